"""What every backbone is: a module that maps noised tokens to velocities and offers features."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selfalign.conditions import Condition
from selfalign.errors import UserError
from selfalign.tokens import TokenGrid, TokenGroups, one_group
from selfalign.weights import local

Tap = int | str
"""Where features are taken: after a block, counted from 1, or after a module, by its name."""
EARLY_VELOCITY = "final_layer_xr"
"""The released name of a second velocity head (internal guidance)."""


class Hidden(NamedTuple):
    """What a backbone's own pass returns."""

    velocity: Float[Tensor, "B N Q"] | None
    """None where the pass stopped early."""
    features: dict[Tap, Float[Tensor, "B N D"]]
    """Of the blocks that were asked for by number."""
    condition: Float[Tensor, "B K D"]
    """The embedded timesteps and conditions."""


class Output(NamedTuple):
    """What a backbone says about a batch, tokens in group order."""

    velocity: Float[Tensor, "B N Q"]
    features: dict[Tap, Float[Tensor, "B N D"]]
    """By tap."""
    projected: dict[str, Any]
    """What each head made of its features, by the head's name."""


class Backbone(nn.Module):
    """Base of all backbones. Subclasses define `blocks`, `hidden_size` and `transform`.

    A head is a child module that a term of the objective hangs onto a tap; it is called as a block is:
    with features, embedded condition and groups. Heads are children, so that student and heads are one
    module to DDP, EMA, checkpoints and the compiler, under the released names (`ap_head`).

    Args:
        grid: how samples are cut into tokens.
        channels: channels C of a sample.
        condition: what samples are conditioned on.
        num_classes: number of classes; 0 for an unconditional model.
    """

    predicts: ClassVar[str] = "velocity"
    """What solvers ask it for: velocity, or noise at diffusion steps, by the method of that name."""
    blocks: nn.ModuleList
    hidden_size: int
    """Features D of a token."""

    def __init__(
        self, grid: TokenGrid, channels: int, condition: Condition, num_classes: int
    ) -> None:
        super().__init__()
        self.grid, self.channels = grid, channels
        self.condition, self.num_classes = condition, num_classes
        self.head_taps: dict[str, Tap] = {}

    def transform(
        self,
        tokens: Float[Tensor, "B N P"],
        timesteps: Float[Tensor, "B K"],
        condition: Any,
        groups: TokenGroups,
        taps: Sequence[int] = (),
        last: int | None = None,
    ) -> Hidden:
        """The network's pass.

        Args:
            tokens: noised patches in group order, each flattened as (row, column, channel).
            timesteps: one per group.
            condition: of every sample; class labels, for one.
            groups: how the tokens are grouped.
            taps: blocks whose output is returned, counted from 1.
            last: the last block that is run; None runs all, and returns velocities.
        """
        raise NotImplementedError

    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        """Set all weights: Xavier's for matrices, zero for biases, unless a subclass says otherwise.

        Args:
            generator: where the numbers come from; torch's global one if left out.
        """
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                nn.init.zeros_(parameter)

    def require_taps(self, taps: Sequence[Tap], setting: str) -> None:
        """Refuse taps at modules that are not there, or are lists of modules, which are never run.

        Args:
            taps: where features are to be taken.
            setting: names the part that takes them in errors.

        Raises:
            UserError: there is no such module.
        """
        modules = dict(self.named_modules())
        for tap in taps:
            if isinstance(tap, str) and (
                not tap or isinstance(modules.get(tap), nn.ModuleList | nn.ModuleDict | None)
            ):
                raise UserError(
                    f"{setting} takes features of the module {tap!r}, which the backbone does not run: "
                    "allowed are a block's number, a share of the depth, and names such as "
                    + ", ".join([name for name in modules if name.startswith("blocks.")][:2])
                )

    def describe(self, captions: Sequence[str], prompts: Sequence[str] = ()) -> None:
        """Tell a model that is conditioned on texts which they are; nothing for other models.

        Args:
            captions: those of the data, by number.
            prompts: further ones, from number `num_classes + 1` on.

        Raises:
            UserError: what reads them is not there.
        """
        embedder = getattr(self, "y_embedder", None)
        if self.condition.attends and embedder is not None:
            embedder.describe(captions, prompts)

    def add_head(self, name: str, head: nn.Module, tap: Tap) -> None:
        """Hang a head onto a tap; `forward` runs it where it is asked to."""
        parent, _, _ = name.rpartition(".")
        if parent:  # of several that are numbered, as in `projectors.0`
            if parent not in self._modules:
                self.add_module(parent, nn.ModuleList())
            siblings = self.get_submodule(parent)
            assert isinstance(siblings, nn.ModuleList)
            siblings.append(head)
        else:
            self.add_module(name, head)
        self.head_taps[name] = tap

    def velocity_head(self) -> nn.Module:
        """Another layer from features to velocities, called as a head is.

        Raises:
            UserError: this backbone has none to offer.
        """
        raise UserError(f"{type(self).__name__} offers no second velocity head")

    def forward(
        self,
        tokens: Float[Tensor, "B N P"],
        timesteps: Float[Tensor, "B K"],
        condition: Any,
        groups: TokenGroups,
        taps: Sequence[Tap] = (),
        heads: Sequence[str] = (),
        idle_heads: Sequence[str] = (),
    ) -> Output:
        """Velocity of every token, and features on the way (Eq. 2 and 3).

        Args:
            tokens, timesteps, condition, groups: as for `transform`.
            taps: whose features are returned.
            heads: which heads are run.
            idle_heads: heads that are not run, and whose weights get a gradient of zero, so that all
                processes of a job agree on which weights have one.
        """
        needed = dict.fromkeys([*taps, *(self.head_taps[name] for name in heads)])
        with self._hooked(needed, tokens.shape[:2]) as hooked:
            velocity, features, embedded = self.transform(
                tokens,
                timesteps,
                condition,
                groups,
                [tap for tap in needed if isinstance(tap, int)],
            )
        assert velocity is not None
        features |= hooked
        for name in heads:
            width = features[self.head_taps[name]].shape[-1]
            if width != self.hidden_size:
                raise UserError(
                    f"{name} takes features of the module {self.head_taps[name]!r}, which gives {width} "
                    f"per token: needed are {self.hidden_size}"
                )
        projected = {
            name: self.get_submodule(name)(features[self.head_taps[name]], embedded, groups)
            for name in heads
        }
        idle = [p for name in idle_heads for p in self.get_submodule(name).parameters()]
        if idle:
            velocity = (
                velocity + 0 * torch.stack([local(parameter).sum() for parameter in idle]).sum()
            )
        return Output(velocity, {tap: features[tap] for tap in taps}, projected)

    def features(
        self,
        tokens: Float[Tensor, "B N P"],
        timesteps: Float[Tensor, "B K"],
        condition: Any,
        groups: TokenGroups,
        taps: Sequence[Tap],
    ) -> dict[Tap, Float[Tensor, "B N D"]]:
        """Features by tap. Blocks after the last of them are not run. Arguments as for `forward`."""
        with self._hooked(taps, tokens.shape[:2]) as hooked:
            numbers = [tap for tap in taps if isinstance(tap, int)]
            last = max(map(self.block_of, taps))
            features = self.transform(tokens, timesteps, condition, groups, numbers, last).features
        return features | hooked

    def velocity(
        self,
        xt: Float[Tensor, "B C *sides"],
        timesteps: Float[Tensor, "B"],
        condition: Any,
        groups: TokenGroups | None = None,
        internal_guidance: float = 1.0,
    ) -> Float[Tensor, "B C *sides"]:
        """dx/dt of whole samples, one timestep each.

        Args:
            xt: noised samples.
            timesteps: one per sample.
            condition: of every sample.
            groups: may separate attention; None for whole samples.
            internal_guidance: scale w of v_early + w·(v - v_early), where v_early is what the second
                velocity head predicts from an early block (arXiv:2512.24176); 1 is off.
        """
        groups = groups or one_group(self.num_tokens)
        tokens = groups.sort(self.grid.patchify(xt))
        per_group = timesteps[:, None].expand(-1, len(groups.sizes))
        heads = () if internal_guidance == 1 else (EARLY_VELOCITY,)
        output = self(tokens, per_group, condition, groups, heads=heads)
        velocity = output.velocity
        for name in heads:
            velocity = torch.lerp(output.projected[name], velocity, internal_guidance)
        return self.grid.unpatchify(groups.restore(velocity))[:, : self.channels]

    @property
    def num_tokens(self) -> int:
        """Tokens N of a sample."""
        return self.grid.num_tokens

    @property
    def image_size(self) -> tuple[int, ...]:
        """Sides of a sample: height and width of an image."""
        return self.grid.sides

    @property
    def patch_size(self) -> int:
        """Side of a patch."""
        return self.grid.patch_size

    @property
    def null_label(self) -> int:
        """The label that stands for "no label"."""
        return self.num_classes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        return next(self.parameters()).dtype

    def block_of(self, tap: Tap) -> int:
        """The number of the block in which a tap lies; the last one for modules outside of blocks."""
        if isinstance(tap, int):
            return tap
        first, _, rest = tap.partition(".")
        number = rest.partition(".")[0]
        return int(number) + 1 if first == "blocks" and number.isdigit() else len(self.blocks)

    @contextmanager
    def _hooked(
        self, taps: Sequence[Tap] | Mapping[Tap, Any], shape: torch.Size
    ) -> Iterator[dict[Tap, Tensor]]:
        """Collect what modules return that are asked for by name: features (*shape, D).

        Raises:
            UserError: they return something else.
        """
        found: dict[Tap, Tensor] = {}
        handles = []
        for name in taps:
            if isinstance(name, str):

                def keep(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                    if not isinstance(output, Tensor) or output.shape[:2] != shape:
                        raise UserError(
                            f"the module {name!r} gives no features per token: they are taken of others, "
                            "such as blocks and what is in them"
                        )
                    found[name] = output

                handles.append(self.get_submodule(name).register_forward_hook(keep))
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


AnyBackbone = TypeVar("AnyBackbone", bound=Backbone)
