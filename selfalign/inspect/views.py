"""What student and teacher see of one image, and which tokens attend to which, as a picture."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from selfalign.config import RunConfig
from selfalign.errors import UserError
from selfalign.randomness import make_generator
from selfalign.sampling.generate import to_uint8
from selfalign.sampling.pictures import data_uri
from selfalign.views import View, draw_views, make_views, unpatchify

BATCH = 8
"""Of which the first are whole images under whole-image mixing, and the last is not."""
HIGHEST, LOWEST = 0.7, 0.25
"""Timesteps of the first and the last group: far enough apart to be seen."""
MASK_SIDE = 256
"""Tokens of the attention mask that are shown at most, evenly spread."""
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of the token groups, in turn; told apart by colour-blind readers too."""


@dataclass(frozen=True)
class SeenView:
    """One network's view of one image, all in image order."""

    image: UInt8[Tensor, "C H W"]
    """The noised image, decoded."""
    grid: tuple[int, int]
    """Rows and columns of its tokens."""
    groups: Int[Tensor, "N"]
    """Group of every token."""
    timesteps: tuple[float, ...]
    """Of every group."""
    attends: Bool[Tensor, "N N"]
    """Whether the token of the row attends to that of the column (Eq. 8 and 9)."""


@dataclass(frozen=True)
class SeenImage:
    """One image of a batch, as drawn, and as both networks see it."""

    clean: UInt8[Tensor, "C H W"]
    student: SeenView
    teacher: SeenView | None
    whole: bool
    """Whether whole-image mixing kept it whole."""


def see_views(
    config: RunConfig,
    image: Float[Tensor, "C H W"],
    decode: Callable[[Float[Tensor, "B C H W"]], Float[Tensor, "B C H W"]] = lambda images: images,
    seed: int = 0,
) -> list[SeenImage]:
    """What the networks of a run see of an image, noised as in training.

    Everything is drawn as in training but the timesteps, which are spread evenly so that they can be told
    apart. At one seed, all variants of a method show the same noise and the same groups.

    Args:
        config: a resolved tree.
        image: what the model is trained on: pixels in [-1, 1], or latents.
        decode: from there to pixels in [-1, 1]; where it raises a UserError, the first channels are shown.
        seed: of the draw.

    Returns:
        One image; a second, whole one before it where part of each batch is whole.
    """
    x0 = image.expand(BATCH, *image.shape)
    draw = draw_views(config, x0.shape, make_generator(seed, "diagram"))
    groups = config.num_groups
    spread = torch.linspace(HIGHEST, LOWEST, groups)
    if config.views.timesteps == "single":
        spread = spread[:1].expand(groups)
    draw = replace(draw, timesteps=spread.expand(BATCH, groups))
    views = make_views(config, x0, draw)
    whole = views.student.groups.whole
    shown = [0, BATCH - 1] if 0 < whole < BATCH else [BATCH - 1]
    patch, size = config.model.patch_size, (image.shape[1], image.shape[2])

    def see(view: View | None, index: int) -> SeenView | None:
        if view is None:
            return None
        noised = unpatchify(view.groups.restore(view.tokens), patch, size)[index]
        one_group = index < whole or len(view.groups.sizes) == 1
        timesteps = view.timesteps[index].tolist()
        members = _members(view)[index]
        separate = view.groups.separate and not one_group
        return SeenView(
            image=_pixels(noised, decode),
            grid=(size[0] // patch, size[1] // patch),
            groups=torch.zeros_like(members) if one_group else members,
            timesteps=tuple(timesteps[:1] if one_group else timesteps),
            attends=members[:, None].eq(members) | (not separate),
        )

    seen = []
    for index in shown:
        student = see(views.student, index)
        assert student is not None
        clean = _pixels(image, decode)
        seen.append(SeenImage(clean, student, see(views.teacher, index), index < whole))
    return seen


def _members(view: View) -> Int[Tensor, "B N"]:
    """Group of every token, in image order."""
    numbers = torch.arange(len(view.groups.sizes)).expand(len(view.tokens), -1)[..., None]
    return view.groups.restore(view.groups.broadcast(numbers))[..., 0]


def _pixels(
    image: Float[Tensor, "C H W"], decode: Callable[[Tensor], Tensor]
) -> UInt8[Tensor, "C H W"]:
    try:
        return to_uint8(decode(image[None]))[0].cpu()
    except UserError:
        channels = image[: 3 if len(image) >= 3 else 1]
        return to_uint8(channels / channels.abs().amax().clamp(min=1e-6))


_WIDTH, _SIDE, _GAP = 360, 112, 12
_TOPS = {"student": 18, "teacher": 160}
_HEIGHT = 292


def draw_diagram(seen: SeenImage, title: str) -> str:
    """The picture, as SVG that stands alone in a file or within a page, in whose text colour it is.

    A row for the student and one for the teacher: what it sees, its groups tinted and their timesteps
    below, and the mask of its attention: row i is coloured where token i attends, tokens in image order.

    Args:
        seen: what is drawn.
        title: read out in its place to those who cannot see it.
    """
    sizes = seen.student.groups.bincount().tolist()
    legend = " ".join(f"{_swatch(k)}{size}" for k, size in enumerate(sizes))
    top, below = _TOPS["student"], _TOPS["teacher"]
    parts = [
        *(_text(k, 11, head) for k, head in enumerate(("image", "input at t", "attention"))),
        _picture(0, top, data_uri(_as_array(seen.clean), _SIDE)),
        _text(0, top + _SIDE + 14, "clean"),
    ]
    if len(sizes) > 1:
        parts.append(_picture(0, below, data_uri(_tint(seen.student, alpha=200), _SIDE)))
        parts.append(_text(0, below + _SIDE + 14, f"tokens {legend}"))
    else:
        parts.append(_text(0, below + _SIDE / 2, "one group"))
    for name, view in (("student", seen.student), ("teacher", seen.teacher)):
        top = _TOPS[name]
        if view is None:
            parts.append(_text(1, top + _SIDE / 2, "no teacher"))
            continue
        parts += [
            _picture(1, top, data_uri(_as_array(view.image), _SIDE)),
            _picture(1, top, data_uri(_tint(view, alpha=70), _SIDE)),
            _text(1, top + _SIDE + 14, f"{name} {_timesteps(view)}"),
            _picture(2, top, data_uri(_mask(view), _SIDE)),
            _text(2, top + _SIDE + 14, "full" if view.attends.all() else "within groups"),
        ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="10.5" '
        f'fill="currentColor">{"".join(parts)}</svg>'
    )


def _colour(group: int) -> str:
    return COLOURS[group % len(COLOURS)]


def _rgb(group: int) -> list[int]:
    return list(bytes.fromhex(_colour(group)[1:]))


def _as_array(image: UInt8[Tensor, "C H W"]) -> np.ndarray[Any, Any]:
    picture = image.permute(1, 2, 0).numpy()
    return picture[..., 0] if picture.shape[2] == 1 else picture[..., :3]


def _tint(view: SeenView, alpha: int) -> np.ndarray[Any, Any]:
    """The token groups as transparent colours (rows, columns, 4); clear where there is one group."""
    tint = np.zeros((*view.grid, 4), np.uint8)
    groups = view.groups.reshape(view.grid).numpy()
    if groups.any():
        for group in range(groups.max() + 1):
            tint[groups == group] = [*_rgb(group), alpha]
    return tint


def _mask(view: SeenView) -> np.ndarray[Any, Any]:
    """The attention mask as an RGBA picture, each row in the colour of its token's group."""
    stride = -(-len(view.attends) // MASK_SIDE)
    attends = view.attends[::stride, ::stride].numpy()
    rows = view.groups[::stride].tolist()
    grouped = not attends.all()
    mask = np.zeros((*attends.shape, 4), np.uint8)
    for row, group in enumerate(rows):
        mask[row, attends[row]] = [*(_rgb(group) if grouped else [128] * 3), 255]
    return mask


def _timesteps(view: SeenView) -> str:
    if len(view.timesteps) == 1:
        return f"{view.timesteps[0]:.2f}"
    return " ".join(f"{_swatch(k)}{t:.2f}" for k, t in enumerate(view.timesteps))


def _swatch(group: int) -> str:
    return f'<tspan fill="{_colour(group)}">■</tspan>'


def _picture(column: int, top: float, address: str) -> str:
    place = f'x="{column * (_SIDE + _GAP)}" y="{top}" width="{_SIDE}" height="{_SIDE}"'
    return (
        f'<image {place} href="{address}" style="image-rendering: pixelated"/>'
        f'<rect {place} fill="none" stroke="currentColor" stroke-opacity="0.25"/>'
    )


def _text(column: int, y: float, markup: str) -> str:
    return f'<text x="{column * (_SIDE + _GAP)}" y="{y}" xml:space="preserve">{markup}</text>'
