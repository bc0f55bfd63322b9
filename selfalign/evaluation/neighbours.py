"""Distances between sets of features: precision, recall and nearest neighbours, in bounded memory.

Distances of all pairs come from matrix products in float32, tile by tile. They only choose the pairs
that decide; the deciding distances themselves are then computed from differences in float64. So
duplicates are at distance 0 exactly, and ties are decided the same way whatever the tiles.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selfalign.errors import UserError
from selfalign.evaluation.estimate import Estimate, from_share
from selfalign.evaluation.frechet import require_finite
from selfalign.evaluation.metrics.precision_recall import NEIGHBOURS
from selfalign.ops import linear

TILE = 2048
"""Rows and columns of a tile of distances: 16 MB, which the allocator still reuses."""


def precision_recall(
    samples: Float[Tensor, "M D"], reference: Float[Tensor, "R D"], k: int = NEIGHBOURS
) -> tuple[Estimate, Estimate]:
    """Improved precision and recall.

    Precision is the share of samples within the ball of any reference image, recall the share of
    reference images within the ball of any sample; a ball reaches to the k-th nearest other image of
    its own set, its border included.

    Raises:
        UserError: one of the sets has too few images, or NaN among its features.
    """
    for name, features in (("samples", samples), ("reference images", reference)):
        if len(features) <= k:
            raise UserError(
                f"precision and recall need more than {k} {name}, here are {len(features)}"
            )
        require_finite(features)
    # Distances do not depend on the origin, but their rounding does.
    origin = reference.mean(dim=0)
    samples, reference = (samples - origin).float(), (reference - origin).float()
    sample_radii, reference_radii = squared_radii(samples, k), squared_radii(reference, k)

    inside_reference = _Smallest(len(samples), 1, samples.device)
    inside_samples = _Smallest(len(reference), 1, samples.device)
    for rows, columns in _tiles(len(samples), len(reference)):
        squared = _squared_distances(samples[rows], reference[columns])
        inside_reference.update(rows, columns, squared - reference_radii[columns].float())
        inside_samples.update(columns, rows, squared.T.contiguous() - sample_radii[rows].float())

    def share(features: Tensor, centres: Tensor, radii: Tensor, nearest: Tensor) -> Estimate:
        inside = _exact(features, centres[nearest]) <= radii[nearest]
        return from_share(inside.double().mean().item(), len(features))

    return (
        share(samples, reference, reference_radii, inside_reference.indices[:, 0]),
        share(reference, samples, sample_radii, inside_samples.indices[:, 0]),
    )


def squared_radii(features: Float[Tensor, "M D"], k: int) -> Float[Tensor, "M"]:
    """Squared distance, in float64, from every vector to the k-th nearest other one."""
    nearest = _Smallest(len(features), k, features.device)
    for rows, columns in _tiles(len(features), len(features)):
        if columns.start < rows.start:
            continue  # distances are symmetric: half of the tiles serve both sides
        squared = _squared_distances(features[rows], features[columns])
        if rows == columns:
            squared.fill_diagonal_(torch.inf)
            nearest.update(rows, columns, squared)
        else:
            nearest.update(rows, columns, squared)
            nearest.update(columns, rows, squared.T.contiguous())
    exact = [_exact(features, features[nearest.indices[:, rank]]) for rank in range(k)]
    return torch.stack(exact).amax(dim=0)


def nearest(
    queries: Float[Tensor, "M D"], parts: Iterable[Float[Tensor, "R D"]]
) -> tuple[Float[Tensor, "M"], Int[Tensor, "M"]]:
    """Distance from every query to the nearest vector of a set, and that vector's number.

    Args:
        queries: held in memory.
        parts: the set, in order, a part at a time.
    """
    distances, indices = several_nearest(queries, parts, 1)
    return distances[:, 0], indices[:, 0]


def several_nearest(
    queries: Float[Tensor, "M D"], parts: Iterable[Float[Tensor, "R D"]], k: int
) -> tuple[Float[Tensor, "M k"], Int[Tensor, "M k"]]:
    """As `nearest`, for the k nearest ones; infinite where the set has fewer."""
    device = queries.device
    distances = torch.full((len(queries), k), torch.inf, dtype=torch.float64, device=device)
    indices = torch.zeros(len(queries), k, dtype=torch.int64, device=device)
    first = 0
    for part in parts:
        found = _Smallest(len(queries), min(k, len(part)), device)
        for rows, columns in _tiles(len(queries), len(part)):
            found.update(rows, columns, _squared_distances(queries[rows], part[columns]))
        exact = [_exact(queries, part[chosen]).sqrt() for chosen in found.indices.T]
        distances = torch.cat([distances, torch.stack(exact, dim=1)], dim=1)
        indices = torch.cat([indices, found.indices + first], dim=1)
        distances, order = distances.sort(dim=1, stable=True)
        distances, indices = distances[:, :k], indices.gather(1, order)[:, :k]
        first += len(part)
    return distances, indices


class _Smallest:
    """The k smallest values seen in each row so far, and their columns."""

    def __init__(self, rows: int, k: int, device: torch.device) -> None:
        self.values = torch.full((rows, k), torch.inf, device=device)
        self.indices = torch.zeros(rows, k, dtype=torch.int64, device=device)

    def update(self, rows: slice, columns: slice, tile: Float[Tensor, "r c"]) -> None:
        """Take in a tile of the matrix."""
        k = min(self.values.shape[1], tile.shape[1])
        values, indices = tile.min(dim=1, keepdim=True) if k == 1 else _topk(tile, k)
        values = torch.cat([self.values[rows], values], dim=1)
        indices = torch.cat([self.indices[rows], indices + columns.start], dim=1)
        self.values[rows], order = values.topk(self.values.shape[1], largest=False)
        self.indices[rows] = indices.gather(1, order)


def _topk(tile: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = tile.topk(k, dim=1, largest=False)
    return found.values, found.indices


def _tiles(rows: int, columns: int) -> Iterable[tuple[slice, slice]]:
    for top in range(0, rows, TILE):
        for left in range(0, columns, TILE):
            yield slice(top, min(top + TILE, rows)), slice(left, min(left + TILE, columns))


def _squared_distances(
    first: Float[Tensor, "r D"], second: Float[Tensor, "c D"]
) -> Float[Tensor, "r c"]:
    """|u|² + |v|² - 2·u·v, up to float32 rounding."""
    products = linear(-2 * first, second, second.square().sum(dim=1))
    return products.add_(first.square().sum(dim=1, keepdim=True))


def _exact(first: Float[Tensor, "M D"], second: Float[Tensor, "M D"]) -> Float[Tensor, "M"]:
    """Squared distances, pair by pair, from differences in float64."""
    pairs = zip(first.split(TILE), second.split(TILE), strict=True)
    return torch.cat([(a.double() - b.double()).square().sum(dim=1) for a, b in pairs])
