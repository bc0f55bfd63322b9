"""What processes that share a step send each other, and how long that takes: the cost of many devices.

Collectives are rings, as NCCL's and gloo's: every device sends (P-1)/P of the bytes of an all-gather or a
reduce-scatter, and an all-reduce is both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from selfalign.benchmark.cost import FLOAT_BYTES, Cost, Rates

Sharding = Literal["none", "gradients", "full"]


@dataclass(frozen=True)
class Cluster:
    """Devices, how they are linked, and what each holds."""

    devices: int = 1
    """In all."""
    nodes: int = 1
    """Machines, of as many devices each."""
    sharding: Sharding = "none"
    """As `training.sharding`."""
    weight_bytes: int = FLOAT_BYTES
    """Bytes of a weight that is gathered: 4, or 2 under bf16. Gradients are summed in float32."""
    node_bandwidth: float = 450e9
    """Bytes per second from one device to the others of its node."""
    network_bandwidth: float = 400e9
    """Bytes per second from one node to the others, over all of its adapters."""
    overlap: float = 0.9
    """Share of the forward and backward pass behind which devices can send."""

    @property
    def bandwidth(self) -> float:
        """Bytes per second along a ring: that of its slowest link."""
        if self.nodes == 1:
            return self.node_bandwidth
        return min(self.node_bandwidth, self.network_bandwidth)


@dataclass(frozen=True)
class ClusterCost:
    """What a step costs one device of a cluster."""

    state_bytes: float
    """Weights, gradients, moments and averages that it holds between the passes, and what is gathered."""
    gather_bytes: float
    """Bytes that it sends to gather weights, the teacher's too."""
    reduce_bytes: float
    """Bytes that it sends to sum gradients."""
    communication_seconds: float
    """Of sending them."""
    exposed_seconds: float
    """Of these, what no arithmetic hides."""
    seconds: float
    """Of the step."""


def cluster_cost(
    cost: Cost, rates: Rates, cluster: Cluster, depth: int, micro_batches: int = 1
) -> ClusterCost:
    """The cost of a step of a cluster, from that of one device's share of the batch.

    Args:
        cost: of the device's share, counted as if it held everything.
        rates: of a device.
        cluster: devices and links.
        depth: blocks of the model: one is gathered while another is run.
        micro_batches: in which the share is done.
    """
    devices, parameters = cluster.devices, cost.parameters
    averages = cost.state_bytes / FLOAT_BYTES / parameters - 4
    sent = (devices - 1) / devices
    weights, floats = cluster.weight_bytes * parameters, FLOAT_BYTES * parameters
    gather = reduce = 0.0
    if cluster.sharding == "none":
        state, update = cost.state_bytes * 1.0, cost.update_bytes * 1.0
        if devices > 1:
            state += floats  # the buckets in which gradients travel
        reduce = 2 * sent * floats
    else:
        gathers = (1 if cluster.sharding == "gradients" else 2) + cost.teacher_share
        gather = micro_batches * gathers * sent * weights
        reduce = micro_batches * sent * floats
        two_blocks = 2 * (weights + floats) / depth
        whole = weights if cluster.sharding == "gradients" else 0
        state = (4 + averages) * floats / devices + whole + two_blocks
        update = cost.update_bytes / devices
    hidden_by = cost.seconds(rates) - cost.update_bytes / rates.memory
    communication = (gather + reduce) / cluster.bandwidth
    exposed = max(0.0, communication - cluster.overlap * hidden_by)
    return ClusterCost(
        state_bytes=state,
        gather_bytes=gather,
        reduce_bytes=reduce,
        communication_seconds=communication,
        exposed_seconds=exposed,
        seconds=hidden_by + update / rates.memory + exposed,
    )
