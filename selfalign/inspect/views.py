"""What student and teacher see of one image, and which tokens attend to which, as a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped, UInt8
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, HPacker, TextArea
from torch import Tensor

from selfalign.config import ResolvedConfig
from selfalign.data.shapes import to_uint8
from selfalign.errors import UserError
from selfalign.evaluation.config import Progress
from selfalign.inspect.section import About, Section
from selfalign.pages.figures import Chart
from selfalign.pages.svg import drawing, to_svg
from selfalign.randomness import make_generator
from selfalign.sampling.pictures import visible
from selfalign.targets.ema import EMATarget
from selfalign.tokens import TokenGroups
from selfalign.views import View, draw_views, make_views

if TYPE_CHECKING:
    from selfalign.inspect.subject import Subject

BATCH = 8
"""Of which the first are whole images under whole-image mixing, and the last is not."""
HIGHEST, LOWEST = 0.7, 0.25
"""Timesteps of the first and the last group: far enough apart to be seen."""
MASK_SIDE = 256
"""Tokens of the attention mask that are shown at most, evenly spread."""
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Of the token groups, in turn; told apart by colour-blind readers too."""


NOT_SEEN = -1
"""Group of tokens that a network does not see at all."""


@dataclass(frozen=True)
class SeenView:
    """One network's view of one image, all in image order."""

    image: UInt8[Tensor, "C H W"]
    """The noised image, decoded."""
    grid: tuple[int, int]
    """Rows and columns of its tokens."""
    groups: Int[Tensor, "N"]
    """Group of every token; NOT_SEEN of one that is dropped."""
    timesteps: tuple[float, ...]
    """Of every group that is seen."""
    attends: Bool[Tensor, "N N"]
    """Whether the token of the row attends to that of the column (Eq. 8 and 9)."""

    @property
    def sizes(self) -> list[int]:
        """Tokens of every group that is seen."""
        sizes: list[int] = self.groups[self.groups != NOT_SEEN].bincount().tolist()
        return sizes

    @property
    def whole(self) -> bool:
        """Whether all tokens that are seen attend to each other."""
        seen = self.groups != NOT_SEEN
        return bool(self.attends[seen][:, seen].all())


@dataclass(frozen=True)
class SeenImage:
    """One image of a batch, as drawn, and as both networks see it."""

    clean: UInt8[Tensor, "C H W"]
    student: SeenView
    teacher: SeenView | None
    whole: bool
    """Whether whole-image mixing kept it whole."""


def see_views(
    config: ResolvedConfig,
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
    if config.schedule.one_per_sample:
        spread = spread[:1].expand(groups)
    draw = replace(draw, timesteps=spread.expand(BATCH, groups))
    views = make_views(config, x0, draw)
    targets = config.used_targets()
    ema = targets.get("ema")
    teacher = ema.view(views, draw) if isinstance(ema, EMATarget) else None
    whole = views.groups.whole
    shown = [0, BATCH - 1] if 0 < whole < BATCH else [BATCH - 1]
    grid = config.grid

    def see(view: View | None, index: int) -> SeenView | None:
        if view is None:
            return None
        noised = grid.unpatchify(_in_image(view.tokens, view.groups, grid.num_tokens, 0))[index]
        one_group = index < whole or len(view.groups.sizes) == 1
        timesteps = view.timesteps[index].tolist()
        members = _members(view, grid.num_tokens)[index]
        there = members != NOT_SEEN
        separate = view.groups.separate and not one_group
        attends = members[:, None].eq(members) | (not separate)
        return SeenView(
            image=pixels(noised, decode),
            grid=(grid.shape[0], grid.shape[1]),
            groups=members.clamp(max=0) if one_group else members,
            timesteps=tuple(timesteps[:1] if one_group else timesteps),
            attends=attends & there[:, None] & there,
        )

    seen = []
    for index in shown:
        student = see(views.student, index)
        assert student is not None
        clean = pixels(image, decode)
        seen.append(SeenImage(clean, student, see(teacher, index), index < whole))
    return seen


def _members(view: View, num_tokens: int) -> Int[Tensor, "B N"]:
    """Group of every token, in image order."""
    numbers = torch.arange(len(view.groups.sizes)).expand(len(view.tokens), -1)[..., None]
    own = view.groups.broadcast(numbers)
    return _in_image(own, view.groups, num_tokens, NOT_SEEN)[..., 0]


def _in_image(
    tokens: Shaped[Tensor, "B n D"], groups: TokenGroups, num_tokens: int, absent: float
) -> Shaped[Tensor, "B N D"]:
    """Tokens in image order, with a number in the place of those that are dropped."""
    if tokens.shape[1] == num_tokens:
        return groups.restore(tokens)
    assert groups.order is not None, "only of several groups one is dropped"
    whole = tokens.new_full((len(tokens), num_tokens, tokens.shape[2]), absent)
    return whole.scatter(1, groups.order[..., None].expand_as(tokens), tokens)


def pixels(
    image: Float[Tensor, "C H W"], decode: Callable[[Tensor], Tensor]
) -> UInt8[Tensor, "C H W"]:
    """A sample as bytes; its first channels, scaled, where it cannot be decoded."""
    try:
        return to_uint8(decode(image[None]))[0].cpu()
    except UserError:
        return first_channels(image)


def first_channels(image: Float[Tensor, "C H W"]) -> UInt8[Tensor, "C H W"]:
    """What can be shown of latents that cannot be decoded: three channels or one, scaled."""
    channels = image[: 3 if len(image) >= 3 else 1]
    scaled = channels / channels.abs().amax().clamp(min=1e-6)
    return to_uint8(scaled[None])[0].cpu()


def draw_diagram(seen: SeenImage, title: str) -> str:
    """The picture, as SVG that stands alone in a file or within a page, in whose text colour it is.

    A row for the student and one for the teacher: what it sees, its groups tinted and their timesteps
    below, and the mask of its attention: row i is coloured where token i attends, tokens in image order.

    Args:
        seen: what is drawn.
        title: read out in its place to those who cannot see it.
    """
    with drawing():
        figure = Figure(figsize=(5, 4.1))
        (clean, *student), (groups, *teacher) = figure.subplots(
            2, 3, gridspec_kw={"left": 0, "right": 1, "top": 0.93, "bottom": 0.06, "hspace": 0.2}
        )
        for axis in figure.axes:
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set(visible=True, alpha=0.25)
        for axis, heading in zip(
            (clean, *student), ("image", "input at t", "attention"), strict=True
        ):
            axis.set_title(heading, loc="left")
        _show(clean, as_array(seen.clean))
        _caption(clean, "clean")
        sizes = seen.student.sizes
        if len(sizes) > 1 or sum(sizes) < len(seen.student.groups):
            _show(groups, _tint(seen.student, alpha=200))
            _caption(groups, "tokens", sizes)
        else:
            _nothing(groups, "one group")
        _draw_view(student, "student", seen.student)
        if seen.teacher is not None:
            _draw_view(teacher, "teacher", seen.teacher)
        else:
            _nothing(teacher[0], "no teacher")
            teacher[1].set_axis_off()
        return to_svg(figure, title)


def _draw_view(axes: Sequence[Axes], name: str, view: SeenView) -> None:
    image, mask = axes
    _show(image, as_array(view.image))
    _show(image, _tint(view, alpha=70), extent=image.images[0].get_extent())
    _caption(image, name, [f"{t:.2f}" for t in view.timesteps])
    _show(mask, _mask(view))
    _caption(mask, "full" if view.whole else "within groups")


def _show(axis: Axes, picture: np.ndarray[Any, Any], **options: Any) -> None:
    # The viewer enlarges the pixels themselves, sharply.
    axis.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="none", **options)


def _caption(axis: Axes, text: str, of_groups: Sequence[object] = ()) -> None:
    """A line below a picture; where there are several groups, each value after its group's colour."""
    several = len(of_groups) > 1
    parts: list[Artist] = [TextArea(text)]
    for group, value in enumerate(of_groups):
        parts += [TextArea("■", textprops={"color": _colour(group)})] * several
        parts.append(TextArea(f"{value}"))
    line = HPacker(children=parts, pad=0, sep=3, align="baseline")
    place = AnnotationBbox(
        line,
        (0, 0),
        (0, -4),
        "axes fraction",
        "offset points",
        box_alignment=(0, 1),
        pad=0,
        frameon=False,
    )
    axis.add_artist(place)


def _nothing(axis: Axes, text: str) -> None:
    axis.text(0, 0.5, text, transform=axis.transAxes)
    axis.set_axis_off()


def _colour(group: int) -> str:
    return COLOURS[group % len(COLOURS)]


def _rgb(group: int) -> list[int]:
    return list(bytes.fromhex(_colour(group)[1:]))


def as_array(image: UInt8[Tensor, "C H W"]) -> np.ndarray[Any, Any]:
    """Bytes as matplotlib shows them: (H, W) for one channel, else (H, W, 3)."""
    return visible(image.permute(1, 2, 0).numpy())


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
    grouped = not view.whole
    mask = np.zeros((*attends.shape, 4), np.uint8)
    for row, group in enumerate(rows):
        mask[row, attends[row]] = [*(_rgb(group) if grouped else [128] * 3), 255]
    return mask


ABOUT = About(
    title="Views of an image",
    question="What do student and teacher see of an image?",
    definition="A held-out image noised as in training by the recipe’s own settings, with its true groups "
    "and masks (the paper’s Figures 1 to 3); only the timesteps are set, far apart so that they can be seen.",
)


def look(subject: "Subject", progress: Progress) -> Section:
    """One held-out image as student and teacher see it."""
    config = subject.config
    if len(config.grid.shape) != 2:
        return ABOUT.left_out("pictures are drawn of data with two axes")
    image = subject.source.heldout.read([0])[0][0]
    seen = see_views(config, image, subject.decode)
    share = config.views.whole_image_fraction
    names = [f"{share:g} of each batch, kept whole", f"the other {1 - share:g} of each batch"]
    titles = names if len(seen) > 1 else ["One image of a batch"]
    told = "What student and teacher see of one image, and which tokens attend to which"
    charts = [
        Chart(
            title,
            draw_diagram(one, told),
            "Tokens of a group in one tint, their timesteps below; a row of the attention is coloured where "
            "its token attends.",
        )
        for title, one in zip(titles, seen, strict=True)
    ]
    progress("views of an image", 1, 1)
    full = [bool(one.student.attends.all()) for one in seen]
    return Section(
        ABOUT,
        charts=charts,
        numbers={
            "tokens_per_group": [one.student.sizes for one in seen],
            "attention": ["full" if whole else "within groups" for whole in full],
        },
    )
