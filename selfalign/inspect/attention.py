"""Attention maps, and the share of attention that tokens give across noise levels."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from selfalign import ops
from selfalign.errors import UserError
from selfalign.evaluation.config import Progress
from selfalign.evaluation.estimate import Estimate
from selfalign.inspect.features import chosen_blocks
from selfalign.inspect.scenes import Scene, batches, make_scene
from selfalign.inspect.section import About, Section, Table
from selfalign.network import Backbone
from selfalign.pages.figures import Chart, Series, curve_chart, heat_map, picture_grid
from selfalign.pages.numbers import number
from selfalign.tokens import TokenGroups
from selfalign.views import View

if TYPE_CHECKING:
    from selfalign.inspect.subject import Subject

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
IMAGES = 64
SHOWN = (0.25, 0.75)
"""Timesteps of the two groups in the maps that are drawn."""
MOST_TOKENS = 64
"""Tokens on a side of a drawn map."""


@dataclass(frozen=True)
class Attended:
    """What one block's attention did."""

    weights: Float[Tensor, "B heads N N"]
    """softmax(QKᵀ/√d), tokens in group order; 0 between groups that are separated."""
    values: Float[Tensor, "B heads N d"]
    output: Float[Tensor, "B heads N d"]
    """What the network went on with."""


class _Watch(TorchFunctionMode):
    """Tells of every call of torch's attention, by whichever library's layer."""

    def __init__(self, tell: Callable[[Tensor, Tensor, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.tell = tell

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is scaled_dot_product_attention:
            q, k, v = args[:3]
            self.tell(q, k, v, result)
        return result


@torch.no_grad()
def attended(
    model: Backbone, view: View, labels: Any, blocks: Sequence[int]
) -> dict[int, Attended]:
    """The attention of blocks on a view, from the queries and keys of the network's own pass.

    Any backbone that calls torch's `scaled_dot_product_attention` once per block, or once per group where
    it separates them, without a mask; SiT does where its operations are torch's, as they are here. Of a
    block with a module `attn` only that is watched: what else attends there attends to a caption.

    Args:
        model: in eval mode.
        view: what it sees; without whole images.
        labels: one per sample.
        blocks: which, counted from 1.

    Raises:
        UserError: the backbone attends in another way.
    """
    calls: dict[int, list[tuple[Tensor, ...]]] = {block: [] for block in blocks}
    current = 0

    def enter(block: int) -> None:
        nonlocal current
        current = block

    def tell(*call: Tensor) -> None:
        if current in calls:
            calls[current].append(call)

    with _hooks(model, enter), ops.use("torch"), _Watch(tell):
        model(view.tokens, view.timesteps, labels, view.groups)
    return {block: _joined(parts, view.groups, block) for block, parts in calls.items()}


@contextmanager
def _hooks(model: Backbone, enter: Callable[[int], None]) -> Iterator[None]:
    """Tells which block attends from now on, and 0 after it."""
    handles = []
    for place, block in enumerate(model.blocks, 1):
        watched = getattr(block, "attn", block)
        handles += [
            watched.register_forward_pre_hook(lambda *_, place=place: enter(place)),
            watched.register_forward_hook(lambda *_: enter(0)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _joined(parts: Sequence[tuple[Tensor, ...]], groups: TokenGroups, block: int) -> Attended:
    """The calls of one block as one: side by side along the diagonal where groups are separated."""
    tokens = sum(groups.sizes)
    sizes = [q.shape[2] for q, _, _, _ in parts]
    if sum(sizes) != tokens or any(k.shape[2] != q.shape[2] for q, k, _, _ in parts):
        raise UserError(
            f"block {block} does not attend by torch's scaled_dot_product_attention over its {tokens} "
            "tokens: its attention cannot be shown"
        )
    q = parts[0][0]
    weights = q.new_zeros(*q.shape[:2], tokens, tokens)
    start = 0
    for size, (q, k, _, _) in zip(sizes, parts, strict=True):
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        weights[:, :, start : start + size, start : start + size] = scores.softmax(dim=-1)
        start += size
    return Attended(
        weights,
        torch.cat([v for _, _, v, _ in parts], dim=2),
        torch.cat([output for *_, output in parts], dim=2),
    )


def value_norms(model: Backbone, block: int, found: Attended) -> Float[Tensor, "B heads N"] | None:
    """‖v_j W_O‖ of every head, by which attention counts in the output (arXiv:2004.10102).

    None where the block has no `attn.proj`, which SiT's, DiT's and timm's have.
    """
    projection = getattr(getattr(model.blocks[block - 1], "attn", None), "proj", None)
    if not isinstance(projection, nn.Linear):
        return None
    heads, width = found.values.shape[1], found.values.shape[3]
    weight = projection.weight.unflatten(1, (heads, width))  # (D, heads, d)
    return torch.einsum("bhnd,ohd->bhno", found.values, weight).norm(dim=3)


@dataclass(frozen=True)
class CrossShare:
    """The share of attention that tokens of each group give to the other group."""

    plain: Float[Tensor, "M 2 heads"]
    """Mean over the group's tokens i of Σ_j A_ij, j in the other group, by image and head."""
    weighted: Float[Tensor, "M 2 heads"] | None
    """The same with A_ij·‖v_j W_O‖ in the place of A_ij, divided by its sum over all j."""
    expected: tuple[float, float]
    """(N - n_k)/N: what uniform attention gives."""


def cross_share(
    weights: Float[Tensor, "B heads N N"], sizes: tuple[int, int], by: Tensor | None = None
) -> Float[Tensor, "B 2 heads"]:
    """Of attention weights, the share that goes to the other group, by the group that gives it.

    Args:
        weights: tokens in group order, rows add up to 1.
        sizes: tokens of the two groups.
        by: weights (B, heads, N) of the tokens attended to; None counts them alike.
    """
    if by is not None:
        weights = weights * by[:, :, None]
        weights = weights / weights.sum(dim=3, keepdim=True)
    first = sizes[0]
    return torch.stack(
        [
            weights[:, :, :first, first:].sum(dim=3).mean(dim=2),
            weights[:, :, first:, :first].sum(dim=3).mean(dim=2),
        ],
        dim=1,
    )


def cross_noise(
    model: Backbone, scene: Scene, timesteps: tuple[float, float], blocks: Sequence[int]
) -> dict[int, CrossShare]:
    """Cross-noise attention of blocks where the two groups have these timesteps.

    Args:
        model: in eval mode; any backbone that `attended` can watch.
        scene: images, groups and noise; whether the groups see each other.
        timesteps: of the first and the other group.
        blocks: counted from 1.
    """
    sizes = (scene.groups.sizes[0], scene.groups.sizes[1])
    plain: dict[int, list[Tensor]] = {block: [] for block in blocks}
    weighted: dict[int, list[Tensor]] = {block: [] for block in blocks}
    for part in batches(len(scene), model.num_tokens):
        view, _ = scene.view(part, timesteps, model)
        labels = scene.labels[part].to(model.device)
        for block, found in attended(model, view, labels, blocks).items():
            plain[block].append(cross_share(found.weights, sizes).double().cpu())
            norms = value_norms(model, block, found)
            if norms is not None:
                weighted[block].append(cross_share(found.weights, sizes, norms).double().cpu())
    tokens = sum(sizes)
    return {
        block: CrossShare(
            torch.cat(plain[block]),
            torch.cat(weighted[block]) if weighted[block] else None,
            (1 - sizes[0] / tokens, 1 - sizes[1] / tokens),
        )
        for block in blocks
    }


@dataclass(frozen=True)
class ShareGrid:
    """Cross-noise attention divided by what counts let expect, over own and other timestep."""

    levels: tuple[float, ...]
    blocks: tuple[int, ...]
    ratios: Float[Tensor, "T T M blocks heads"]
    """By own and other timestep, image, block and head; each token as one of its own group."""
    weighted: Float[Tensor, "T T M blocks heads"] | None

    def over_gap(
        self, block: int, ratios: Float[Tensor, "T T M blocks heads"] | None = None
    ) -> list[tuple[float, Estimate]]:
        """Mean over own t of log S(t, s)/S(t, t) for every gap s - t, heads taken together.

        Args:
            block: its place among the blocks.
            ratios: those of the weighted shares, for one; left out: the plain ones.
        """
        shares = (self.ratios if ratios is None else ratios)[..., block, :].mean(dim=3)
        means, count = shares.mean(dim=2), len(self.levels)
        found = []
        for gap in range(1 - count, count):
            cells = [(i, i + gap) for i in range(count) if 0 <= i + gap < count]
            i, j = cells[0]
            distance = self.levels[j] - self.levels[i]
            value = sum(float((means[i, j] / means[i, i]).log()) for i, j in cells) / len(cells)
            pull = torch.stack(
                [shares[i, j] / means[i, j] - shares[i, i] / means[i, i] for i, j in cells]
            )
            error = float(pull.mean(dim=0).std() / pull.shape[1] ** 0.5)
            found.append((distance, Estimate(value, error)))
        return found


def share_grid(
    model: Backbone,
    scene: Scene,
    blocks: Sequence[int],
    levels: Sequence[float] = LEVELS,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> ShareGrid:
    """Cross-noise attention for all pairs of timesteps, on the same images, groups and noise.

    Args:
        model: in eval mode; any backbone that `attended` can watch.
        scene: what it is shown.
        blocks: counted from 1.
        levels: timesteps, T of them.
        tick: told how many of all pairs are done.
    """
    count, (first, second) = len(levels), scene.groups.sizes
    tables: list[dict[tuple[int, int], Tensor]] = [{}, {}]
    for i, t in enumerate(levels):
        for j, s in enumerate(levels):
            found = cross_noise(model, scene, (t, s), blocks)
            for table, name in zip(tables, ("plain", "weighted"), strict=True):
                shares = [getattr(found[block], name) for block in blocks]
                if shares[0] is None:
                    continue
                ratio = (
                    torch.stack(shares, dim=2)
                    / torch.tensor(found[blocks[0]].expected)[:, None, None]
                )
                own = (ratio[:, 0] * first, ratio[:, 1] * second)
                for cell, part in zip(((i, j), (j, i)), own, strict=True):
                    table[cell] = table[cell] + part if cell in table else part
            tick(i * count + j + 1, count * count)

    def assembled(table: dict[tuple[int, int], Tensor]) -> Tensor | None:
        if not table:
            return None
        rows = [torch.stack([table[i, j] for j in range(count)]) for i in range(count)]
        return torch.stack(rows) / (first + second)

    plain = assembled(tables[0])
    assert plain is not None
    return ShareGrid(tuple(levels), tuple(blocks), plain, assembled(tables[1]))


ABOUT = About(
    title="Attention across noise levels",
    question="Do tokens look at the group with another noise level?",
    definition="S: mean over the tokens i of a group of Σ A_ij over the tokens j of the other group, by "
    "block and head, divided by (N − n_k)/N; each group’s tokens count in turn. Weighted: A_ij·‖v_j W_O‖ in "
    "the place of A_ij. Over the gap: log S(t, s)/S(t, t), the same images, groups and noise.",
    control="1, which is what uniform attention gives; and the same model with one timestep for both "
    "groups, S(t, t).",
    mixes_timesteps=True,
)


def look(subject: "Subject", progress: Progress) -> Section:
    """Cross-noise attention by block, head and gap, and maps of one image."""
    scene = make_scene(subject.config, subject.source.heldout, IMAGES, "attention")
    trained, scene = "separated" if scene.groups.separate else "full", scene.separated(False)
    model = subject.model
    blocks = chosen_blocks(len(model.blocks))
    try:
        grid = share_grid(
            model,
            scene,
            blocks,
            LEVELS,
            tick=lambda done, total: progress("attention across noise levels", done, total),
        )
        maps = [_maps(model, scene, blocks, pair) for pair in ((SHOWN[0],) * 2, SHOWN)]
    except UserError as error:
        return ABOUT.left_out(error)
    over_gap = {block: grid.over_gap(k) for k, block in enumerate(blocks)}
    strongest = max(blocks, key=lambda block: abs(over_gap[block][0][1].value))
    cleaner, noisier = (number(math.exp(over_gap[strongest][end][1].value), 2) for end in (0, -1))
    widest = f"{LEVELS[-1] - LEVELS[0]:g}"
    findings = [
        f"Tokens give the other group {number(float(grid.ratios.mean()), 2)} times what uniform attention "
        "would, over all blocks, heads and timesteps.",
        f"The gap matters most at block {strongest}: a group cleaner by {widest} gets {cleaner} times what "
        f"it gets at one timestep, one noisier by as much {noisier} times.",
    ]
    if trained == "separated":
        findings.append("Trained with separated attention; here its groups see each other.")
    names = [str(block) for block in blocks]
    lines = [
        Series(f"block {block}", 1 + k, points)
        for k, (block, points) in enumerate(over_gap.items())
    ]
    by_head = grid.ratios.mean(dim=(0, 1, 2))
    heads = [str(head + 1) for head in range(by_head.shape[1])]
    charts = [
        Chart(
            "Share over the gap",
            curve_chart(
                lines, "the other group’s t minus the own", "Log of the share over the gap"
            ),
            "log S(t, s)/S(t, t), mean over own t, with 95 % intervals over images; above zero the other "
            "group is looked at more than at one timestep.",
            lines,
        ),
        Chart(
            "Share by block and head",
            heat_map(by_head.tolist(), names, heads, "block", "head", "Share by block and head"),
            "Divided by what uniform attention gives, mean over all pairs of timesteps.",
        ),
        Chart(
            "Maps of one image",
            picture_grid(maps, ["one t", "two t"], names, "timesteps", "block", "Attention maps"),
            "Who (row) attends to whom (column), heads averaged, tokens in group order. Above, both groups "
            f"at t = {SHOWN[0]:g}; below, at {SHOWN[0]:g} and {SHOWN[1]:g}. White is the largest.",
        ),
    ]
    weighted = [
        None if grid.weighted is None else grid.over_gap(k, grid.weighted)
        for k in range(len(blocks))
    ]
    rows = []
    for block, of_block in zip(blocks, weighted, strict=True):
        values: list[Estimate | None] = [over_gap[block][end][1] for end in (0, -1)]
        values += [None if of_block is None else of_block[end][1] for end in (0, -1)]
        rows.append((f"block {block}", values))
    columns = ("block", "cleaner", "noisier", "weighted, cleaner", "weighted, noisier")
    return Section(
        ABOUT,
        findings,
        charts,
        [Table(f"log S(t, s)/S(t, t) at a gap of {widest}", columns, rows)],
        numbers={
            "images": len(scene),
            "levels": list(LEVELS),
            "blocks": list(blocks),
            "tokens_per_group": list(scene.groups.sizes),
            "trained_with": trained,
            "ratio": grid.ratios.mean(dim=2).tolist(),
            "ratio_weighted": None if grid.weighted is None else grid.weighted.mean(dim=2).tolist(),
            "log_ratio_over_gap": over_gap,
            "log_ratio_over_gap_weighted": dict(zip(blocks, weighted, strict=True)),
        },
    )


def _maps(
    model: Backbone, scene: Scene, blocks: Sequence[int], timesteps: tuple[float, float]
) -> list[Any]:
    """The first image's attention after each block as pictures."""
    view, _ = scene.view(slice(0, 1), timesteps, model)
    found = attended(model, view, scene.labels[:1].to(model.device), blocks)
    pictures = []
    for block in blocks:
        weights = found[block].weights[0].mean(dim=0).float().cpu()
        stride = -(-len(weights) // MOST_TOKENS)
        weights = weights[::stride, ::stride]
        pictures.append((255 * weights / weights.max()).round().to(torch.uint8).numpy())
    return pictures
