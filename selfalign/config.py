"""A run is one tree of frozen dataclasses: sections, and the settings of the parts it chooses.

Each section checks what it can see on its own when it is made, the tree what its parts need of each
other; `resolve` checks what depends on the data's shape and fills in what was left to it. A resolved
tree is what a run folder's `config.json` holds, and `config_from_dict` reads it back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from selfalign.errors import UserError
from selfalign.parts import Part, PartSettings, load_plugin, require_named_plugins
from selfalign.sections import (
    MAX_TOKENS,
    PATCH_SIZES,
    DataConfig,
    FlowConfig,
    ModelConfig,
    ObjectiveConfig,
    ResolvedModel,
    TrainingConfig,
    ViewsConfig,
)
from selfalign.settings import Settings, require
from selfalign.targets import Target
from selfalign.terms import Term
from selfalign.tokens import TokenGrid, group_sizes

if TYPE_CHECKING:
    from selfalign.data.source import DataSource


@dataclass(frozen=True)
class RunConfig(Settings):
    """Everything that determines a run."""

    seed: int = 0
    """Every random number of the run is a function of this seed."""
    plugins: tuple[str, ...] = ()
    """Python files that register parts of their own; they are run, so name only files you trust."""
    flow: FlowConfig = field(default_factory=FlowConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    partitions: PartSettings = field(default_factory=partial(PartSettings, "partition"))
    schedules: PartSettings = field(default_factory=partial(PartSettings, "schedule"))
    curriculums: PartSettings = field(default_factory=partial(PartSettings, "curriculum"))
    conditions: PartSettings = field(default_factory=partial(PartSettings, "condition"))
    backbones: PartSettings = field(default_factory=partial(PartSettings, "backbone"))
    targets: PartSettings = field(default_factory=partial(PartSettings, "target"))
    projectors: PartSettings = field(default_factory=partial(PartSettings, "projector"))
    terms: PartSettings = field(default_factory=partial(PartSettings, "term"))
    encoders: PartSettings = field(default_factory=partial(PartSettings, "encoder"))
    optimizers: PartSettings = field(default_factory=partial(PartSettings, "optimizer"))

    def check(self) -> None:
        """The parts must fit each other."""
        self.require(0 <= self.seed < 2**63, "seed", "allowed is a whole number from 0 to 2^63-1")
        for part in self.parts():
            part.check_in(self)
        self._check_hidden_groups()
        self.model.require(
            not self.padded or self.backbone.pads,
            "backbone",
            "it sees every token, and samples are of unequal lengths; allowed is sit",
        )
        self.model.require(
            not self.condition.attends or self.backbone.attends,
            "condition",
            f"model.backbone {self.model.backbone} attends to no texts; allowed is label",
        )

    def _check_hidden_groups(self) -> None:
        """Only some backbones let tokens pass by blocks."""
        skipped = self.views.skipped_blocks
        if skipped is not None:
            self.views.require(
                self.backbone.passes_by and skipped[1] <= self.depth,
                "skipped_blocks",
                f"allowed are blocks from 1 to {self.depth}"
                if self.backbone.passes_by
                else f"model.backbone {self.model.backbone} has no way around its blocks",
            )

    def parts(self) -> Iterator[Part]:
        """The parts that the tree chooses, with their settings."""
        yield self.backbone
        yield self.condition
        yield self.curriculum
        yield from self.curriculum.uses(self)
        yield self.schedule
        yield self.optimizers[self.training.optimizer]
        yield self.data.source
        for part in (*self.used_terms().values(), *self.used_targets().values()):
            yield part
            yield from part.uses(self)

    @cached_property
    def backbone(self) -> Any:
        """What builds the transformer (a `BackboneConfig`)."""
        return self.backbones[self.model.backbone]

    @cached_property
    def condition(self) -> Any:
        """What a sample is conditioned on (a `Condition`)."""
        return self.conditions[self.model.condition]

    @cached_property
    def partition(self) -> Any:
        """How tokens are split into groups (a `Partition`)."""
        return self.partitions[self.views.partition]

    def partition_of(self, views: ViewsConfig) -> Any:
        """The partition of a step's grouping."""
        usual = views.partition == self.views.partition
        return self.partition if usual else self.partitions[views.partition]

    @cached_property
    def schedule(self) -> Any:
        """Which timestep each group gets (a `Schedule`)."""
        return self.schedules[self.views.timesteps]

    @cached_property
    def curriculum(self) -> Any:
        """How the grouping changes over the run (a `Curriculum`)."""
        return self.curriculums[self.views.curriculum]

    @cached_property
    def padded(self) -> bool:
        """Whether samples are of unequal lengths. Known since the tree was checked: compiled code asks."""
        return bool(self.data.source.padded)

    @cached_property
    def depth(self) -> int:
        """Blocks of the transformer."""
        return self.backbone.depth(self.model)

    @property
    def num_groups(self) -> int:
        """Token groups K."""
        return len(self.views.mask_ratios)

    def used_terms(self) -> dict[str, Term]:
        """The terms of the objective by name, in alphabetical order but for denoising, which comes first."""
        found = {name: term for name, term in self.terms.items() if term.is_used(self)}
        return {"denoising": found.pop("denoising"), **found}

    def used_targets(self) -> dict[str, Target]:
        """The targets that these terms compare with, by name."""
        names = [name for term in self.used_terms().values() for name in term.target_names()]
        return {name: self.targets[name] for name in dict.fromkeys(names)}


@dataclass(frozen=True)
class ResolvedConfig(RunConfig):
    """A tree in which the data has filled in what was left to it."""

    model: ResolvedModel = field(default_factory=ResolvedModel)

    @property
    def grid(self) -> TokenGrid:
        """How a sample is cut into tokens."""
        return self.model.grid

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Tokens of each group."""
        return group_sizes(self.views.mask_ratios, self.model.num_tokens)


def whole_images(fraction: float, batch_size: int) -> int:
    """How many of a batch's images stay whole: the nearest number, and the even one between two."""
    return round(fraction * batch_size)


def resolve(
    config: RunConfig,
    channels: int | None = None,
    image_size: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    processes: int = 1,
) -> ResolvedConfig:
    """Fill in what was left open, and check what depends on the data's shape.

    Args:
        config: a tree whose model section may leave shapes open.
        channels, image_size, num_classes: the data's; where they are left out, the model section has
            to give them.
        processes: how many share each batch.

    Raises:
        UserError: the model does not fit the data, or a token group or the part of whole images would
            be empty.
    """
    model = config.model
    for name, value in {"channels": channels, "image_size": image_size}.items():
        given = getattr(model, name)
        require(given is not None or value is not None, f"model.{name}", given, "must be given")
        require(
            given is None or value is None or given == value,
            f"model.{name}",
            given,
            f"the data has {value}",
        )
    require(
        num_classes is None or model.num_classes in (None, 0) or model.num_classes >= num_classes,
        "model.num_classes",
        model.num_classes,
        f"the data has {num_classes} classes; allowed is at least that, or 0 (unconditional)",
    )
    classes = num_classes if model.num_classes is None else model.num_classes
    require(classes is not None, "model.num_classes", None, "must be given")
    shapes = {
        "channels": model.channels or channels,
        "image_size": model.image_size or image_size,
        "num_classes": classes,
    }
    resolved = ResolvedConfig(
        **_fields(config) | {"model": ResolvedModel(**_fields(model) | shapes)}
    )
    sides, patch = resolved.model.image_size, resolved.model.patch_size
    fitting = [f"/{p}" for p in PATCH_SIZES if all(side % p == 0 for side in sides)]
    require(
        all(side % patch == 0 for side in sides),
        "model.size",
        model.size,
        f"its patch must divide the input of {'×'.join(map(str, sides))}; allowed are patches "
        + ", ".join(fitting),
    )
    require(
        resolved.model.num_tokens <= MAX_TOKENS,
        "model.size",
        model.size,
        f"makes {resolved.model.num_tokens} tokens of the input of {'×'.join(map(str, sides))}; allowed "
        f"are {MAX_TOKENS}",
    )
    images = config.training.batch_size // (processes * config.training.gradient_accumulation)
    _check_grouping(resolved, config.views, images)
    for views in resolved.curriculum.all_views(resolved):
        try:
            _check_grouping(resolved, views, 0)
        except UserError as error:
            raise UserError(
                f"{resolved.curriculum.section} comes to what is not allowed: {error}"
            ) from None
    return resolved


def _check_grouping(resolved: ResolvedConfig, views: ViewsConfig, images: int) -> None:
    """No group may be empty, and no share of whole images round to none.

    Args:
        resolved: the tree.
        views: a grouping of it.
        images: that a process sees at once; 0 where the share may round to none, as along a ramp.
    """
    tokens, fraction = resolved.model.num_tokens, views.whole_image_fraction
    sizes = group_sizes(views.mask_ratios, tokens)
    require(
        min(sizes) >= 1,
        "views.mask_ratios",
        views.mask_ratios,
        f"of the {tokens} tokens the groups get {sizes}; every group needs at least one",
    )
    require(
        fraction == 0 or images == 0 or whole_images(fraction, images) > 0,
        "views.whole_image_fraction",
        fraction,
        f"of the {images} images that a process sees at once this rounds to none; allowed are 0, a "
        "larger share, or a larger training.batch_size",
    )


def complete(config: ResolvedConfig, source: DataSource) -> ResolvedConfig:
    """A resolved tree with what its targets find out about the data and about networks of their own.

    Args:
        config: the tree.
        source: the opened data.

    Raises:
        UserError: something that a target needs is not there, or does not fit.
    """
    settings = config.targets
    for name, target in config.used_targets().items():
        settings = settings.override(name, _fields(target.completed(config, source)))
    return dataclasses.replace(config, targets=settings)


def _fields(section: Any) -> dict[str, Any]:
    return {entry.name: getattr(section, entry.name) for entry in dataclasses.fields(section)}


OLDER_NAMES = {
    "alignment.student_block": "terms.alignment.block",
    **{f"alignment.{name}": f"terms.alignment.{name}" for name in ("target", "weight", "distance")},
    "alignment.teacher_block": "targets.ema.block",
    **{
        f"alignment.teacher_{name}": f"targets.ema.{name}"
        for name in ("timestep", "interval", "groups", "labels")
    },
}
"""Settings of version 0.1.0 that have another place now; both names are understood everywhere."""


def override(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """A copy of the tree with fields replaced by dotted name, as in `{"model.size": "S/2"}`.

    A part's settings are named `terms.dispersive.weight`: kind, name and field. Plugins are loaded first.

    Raises:
        UserError: a name is not a field of the tree, or the result is not allowed.
    """
    plugins = tuple(str(load_plugin(file)) for file in values.get("plugins", ()))
    changes: dict[str, Any] = {}
    for given, value in values.items():
        dotted = OLDER_NAMES.get(given, given)
        if dotted != given and value is None:
            continue  # version 0.1.0 left blocks open so
        *path, name = dotted.split(".")
        place = changes
        for section in path:
            place = place.setdefault(section, {})
            require(isinstance(place, dict), "config field", given, "no such field")
        place[name] = plugins if dotted == "plugins" else value
    return _changed(config, changes, "")


def _changed(held: Any, changes: Mapping[str, Any], place: str) -> Any:
    """A section, or the settings of a kind's parts, with fields replaced by name, all at once."""
    of_parts = isinstance(held, PartSettings)
    for name, value in changes.items():
        inside = of_parts or isinstance(getattr(held, name, None), Settings | PartSettings)
        known = of_parts or name in _fields(held)
        fits = known and (inside if isinstance(value, dict) else not of_parts)
        require(fits, "config field", f"{place}{_dotted(name, value)}", "no such field")
    if of_parts:
        for name, fields in changes.items():
            held = held.override(name, fields)
        return held
    values = {
        name: _changed(getattr(held, name), value, f"{place}{name}.")
        if isinstance(value, dict)
        else value
        for name, value in changes.items()
    }
    return dataclasses.replace(held, **values)


def _dotted(name: str, value: Any) -> str:
    """The name of the first field in what is left of a tree."""
    inside = next(iter(value.items()), None) if isinstance(value, dict) else None
    return name if inside is None else f"{name}.{_dotted(*inside)}"


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """The tree as nested dictionaries that JSON can hold, with the settings of the chosen parts."""
    chosen_parts = {(part.kind, part.name) for part in config.parts()}

    def plain(held: Any) -> Any:
        if isinstance(held, PartSettings):
            names = [name for name in held if (held.kind, name) in chosen_parts]
            return {name: plain(held[name]) for name in names if _fields(held[name])}
        if isinstance(held, Settings):
            values = {name: plain(value) for name, value in _fields(held).items()}
            return {name: value for name, value in values.items() if value != {}}
        return held

    return plain(config)


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """The tree that `config_to_dict` wrote, also by way of JSON, or that version 0.1.0 wrote.

    Raises:
        UserError: a field is unknown (written by another version), or a value is not allowed.
    """
    flat: dict[str, Any] = {}
    known = {*_fields(RunConfig()), "alignment"}
    for section in values:
        require(section in known, "config field", section, "no such field")

    def flatten(prefix: str, held: Any) -> None:
        if isinstance(held, Mapping) and held:
            for name, value in held.items():
                flatten(f"{prefix}.{name}", value)
        else:
            flat[prefix] = held

    for section, held in values.items():
        flatten(section, held)
    if flat.keys() & {"targets.ema.groups", "alignment.teacher_groups"}:
        # Before there was this setting every group had a lag of its own: runs begun then go on so.
        flat.setdefault("targets.ema.lag", "group")
    require_named_plugins(flat.get("plugins", ()))
    return override(RunConfig(), flat)
