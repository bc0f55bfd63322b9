"""Groups of tokens that the teacher finds alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfalign.backbones import find_tap
from selfalign.partitions import Partition
from selfalign.parts import register

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from selfalign.partitions import Ungrouped


@register("clusters")
@dataclass(frozen=True)
class Clusters(Partition):
    """Each sample's tokens are clustered by the EMA teacher's features; groups take whole clusters at random.

    Where a group's size is no sum of clusters, the last cluster it takes is shared with the next group.
    """

    count: int = 4
    """Clusters of a sample; at most its tokens."""
    iterations: int = 4
    """Rounds of k-means."""
    block: int | float | str = 0.7
    """Teacher block whose features are clustered: its number from 1, a share of the depth, or a module's
    name."""
    timestep: float = 0.1
    """At which the teacher sees the sample."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("count", 2, 1e4, "a number from 2")
        self.require_number("iterations", 1, 1e3, "a number from 1")
        self.require_number("timestep", 0, 1, "a timestep from 0 (clean) to 1 (noise)")

    def check_in(self, config: Any) -> None:
        """The block must be there."""
        find_tap(self.block, config.depth, self.dotted("block"))

    def order(self, batch: Ungrouped) -> Int[Tensor, "B N"]:
        """Tokens by their cluster's random rank, and at random within it; without a teacher at random."""
        features = None
        if batch.teacher is not None:
            tap = find_tap(self.block, len(batch.teacher.blocks), self.dotted("block"))
            features = batch.teacher_features(tap, self.timestep)
        tokens = batch.grid.num_tokens
        count = min(self.count, tokens)
        within = batch.uniform(tokens)
        rank = batch.uniform(count).argsort(dim=1)
        seeds = batch.uniform(tokens)
        if features is None:
            return within.argsort(dim=1)
        cluster = k_means(features.float(), seeds.argsort(dim=1)[:, :count], self.iterations)
        return (rank.gather(1, cluster) + within).argsort(dim=1)


def k_means(
    features: Float[Tensor, "B N D"], seeds: Int[Tensor, "B C"], iterations: int
) -> Int[Tensor, "B N"]:
    """The cluster of every token, by cosine similarity within each sample (spherical k-means).

    A cluster that loses all its tokens keeps its centre.

    Args:
        features: of the tokens; their mean over a sample's tokens is taken out first.
        seeds: the tokens that are the first centres.
        iterations: rounds of assignment and averaging.
    """
    import torch
    from torch.nn import functional

    points = functional.normalize(features - features.mean(dim=1, keepdim=True), dim=2)
    width = points.shape[2]
    centres = points.gather(1, seeds[..., None].expand(-1, -1, width))
    for _ in range(iterations):
        cluster = (points @ centres.transpose(1, 2)).argmax(dim=2)
        member = functional.one_hot(cluster, seeds.shape[1]).to(points.dtype)
        sums = member.transpose(1, 2) @ points
        empty = member.sum(dim=1)[..., None] == 0
        centres = torch.where(empty, centres, functional.normalize(sums, dim=2))
    return (points @ centres.transpose(1, 2)).argmax(dim=2)
