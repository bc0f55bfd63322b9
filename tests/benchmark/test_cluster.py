"""What processes send and hold, against closed forms; and the tables of docs/cost.md."""

from dataclasses import replace

import cost_table
import pytest

from selfalign.benchmark.cluster import Cluster, cluster_cost
from selfalign.benchmark.cost import Cost, Rates

COST = Cost(
    parameters=1000,
    student_forward=2e6,
    teacher_forward=1e6,
    backward=4e6,
    attention=1e6,
    elementwise_bytes=0,
    update_bytes=48_000,
    state_bytes=20_000,
    activation_bytes=0,
    teacher_share=0.7,
)
RATES = Rates(matmuls=1e6, attention=1e6, elementwise=1e6, memory=1e6)
"""7 seconds of arithmetic, 0.048 of the update."""
SLOW = Cluster(devices=4, node_bandwidth=1e3, overlap=0.0)


def test_one_device_sends_nothing() -> None:
    found = cluster_cost(COST, RATES, Cluster(), depth=10)
    assert (found.gather_bytes, found.reduce_bytes, found.exposed_seconds) == (0, 0, 0)
    assert found.state_bytes == COST.state_bytes
    assert found.seconds == pytest.approx(COST.seconds(RATES)) == pytest.approx(7.048)


def test_bytes_of_every_sharding() -> None:
    none, gradients, full = (
        cluster_cost(COST, RATES, replace(SLOW, sharding=kind, weight_bytes=2), depth=10)
        for kind in ("none", "gradients", "full")
    )
    assert (none.gather_bytes, none.reduce_bytes) == (0, 2 * 0.75 * 4000)
    assert gradients.gather_bytes == pytest.approx(1.7 * 0.75 * 2000)  # student's and teacher's
    assert full.gather_bytes == pytest.approx(2.7 * 0.75 * 2000)
    assert gradients.reduce_bytes == full.reduce_bytes == 0.75 * 4000
    blocks = 2 * (2000 + 4000) / 10
    assert none.state_bytes == 24_000  # with the buckets
    assert gradients.state_bytes == 5000 + 2000 + blocks
    assert full.state_bytes == 5000 + blocks
    assert none.seconds == pytest.approx(7.048 + none.communication_seconds)
    assert full.seconds == pytest.approx(7.012 + full.communication_seconds)


def test_what_is_sent_hides_behind_arithmetic() -> None:
    all_hidden = cluster_cost(COST, RATES, replace(SLOW, overlap=1.0), depth=10)
    assert all_hidden.communication_seconds == 6 and all_hidden.exposed_seconds == 0
    half = cluster_cost(COST, RATES, replace(SLOW, overlap=0.5), depth=10)
    assert half.exposed_seconds == pytest.approx(6 - 3.5)


def test_rings_are_as_fast_as_their_slowest_link() -> None:
    nodes = replace(SLOW, nodes=2, network_bandwidth=500.0)
    assert cluster_cost(COST, RATES, nodes, 10).communication_seconds == 12
    assert replace(nodes, network_bandwidth=1e9).bandwidth == SLOW.bandwidth


def test_micro_batches_gather_and_reduce_each_time() -> None:
    full = replace(SLOW, sharding="full")
    once, thrice = (cluster_cost(COST, RATES, full, 10, count) for count in (1, 3))
    assert thrice.gather_bytes == pytest.approx(3 * once.gather_bytes)
    assert thrice.reduce_bytes == pytest.approx(3 * once.reduce_bytes)


def test_the_pages_table_is_what_the_command_writes() -> None:
    page = cost_table.PAGE.read_text()
    _, operations, _ = cost_table.between_marks(page, "operations")
    assert operations.count("\n") == 1 + len(cost_table.SIZES) * len(cost_table.TOKENS)
    assert cost_table.operations_row("S/2", 256) in operations.splitlines()
