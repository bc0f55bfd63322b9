"""Transformers of the library diffusers, trained as they are: each token group is a sequence of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from selfalign.backbones import BackboneConfig
from selfalign.backbones.diffusers.folder import DIT, FLUX, read_settings
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.backbones.diffusers.model import Adapter
    from selfalign.config import ResolvedConfig
    from selfalign.sections import ModelConfig

MAX_RANK = 4096


@register("diffusers")
@dataclass(frozen=True)
class DiffusersConfig(BackboneConfig):
    """A DiT or Flux from a folder that diffusers wrote, with its weights where it holds any.

    The patch comes from `model.size`, as in S/2. Each group is a row of a batch with one timestep; so groups
    with timesteps of their own need separated attention.
    """

    mixes_timesteps = False

    folder: str = ""
    """Folder with config.json, and the weights that training starts from."""
    lora_rank: int = 0
    """Rank of low-rank adapters (peft) on the attention's matrices, all else frozen; 0 trains all weights."""
    lora_alpha: float = 0.0
    """Scale of the adapters, over their rank; 0: the rank."""

    def check(self) -> None:
        """Limits of the numbers."""
        self.require_number("lora_rank", 0, MAX_RANK, f"a number from 0 to {MAX_RANK}")
        self.require_number("lora_alpha", 0, 1e6, "a number from 0")

    @property
    def attends(self) -> bool:
        """Flux does."""
        return self.kind_of_model == FLUX

    @property
    def kind_of_model(self) -> str:
        """The class that the folder's config.json names."""
        return str(self.settings["_class_name"])

    @property
    def settings(self) -> Mapping[str, Any]:
        """The folder's config.json."""
        return read_settings(self.folder, self.dotted("folder"))

    def check_in(self, config: Any) -> None:
        """Data, patch and views must be those that the model can take."""
        settings, model, views = self.settings, config.model, config.views
        patch = model.patch_size
        if self.kind_of_model == DIT:
            model.require(
                settings["patch_size"] == patch,
                "size",
                f"the DiT in {self.folder} has patches of {settings['patch_size']}; allowed is "
                f"S/{settings['patch_size']}",
            )
            model.require(
                model.channels in (None, settings["in_channels"]),
                "channels",
                f"the DiT in {self.folder} has {settings['in_channels']}",
            )
            side = settings["sample_size"]
            model.require(
                model.image_size in (None, (side, side)),
                "image_size",
                f"the DiT in {self.folder} has {side}×{side}",
            )
            classes = settings["num_embeds_ada_norm"]
            model.require(
                model.num_classes is None or 1 <= model.num_classes <= classes,
                "num_classes",
                f"the DiT in {self.folder} has {classes}; allowed are 1 to as many",
            )
        elif model.channels is not None:
            values = model.channels * patch ** len(model.image_size or (0, 0))
            model.require(
                settings["in_channels"] == values,
                "size",
                f"a patch holds {values} values, and a token of the Flux in {self.folder} "
                f"{settings['in_channels']}",
            )
        views.require(
            views.attention == "separated" or config.schedule.one_per_sample,
            "attention",
            f"model.backbone {self.name} sees one timestep per sequence; allowed with timesteps "
            f"{views.timesteps} is separated",
        )

    def depth(self, model: ModelConfig) -> int:
        """Blocks; of Flux those of two streams and then those of one."""
        settings = self.settings
        return int(settings["num_layers"]) + int(settings.get("num_single_layers", 0))

    def build(self, config: ResolvedConfig) -> Adapter:
        """The model in its adapter, with the folder's weights."""
        from selfalign.backbones.diffusers.dit import DiTAdapter
        from selfalign.backbones.diffusers.flux import FluxAdapter
        from selfalign.backbones.diffusers.model import load_folder

        model, pretrained = load_folder(self.folder, self.kind_of_model)
        kind = DiTAdapter if self.kind_of_model == DIT else FluxAdapter
        adapter: Adapter = kind(config, model, pretrained)
        if self.lora_rank:
            adapter.add_adapters(self.lora_rank, self.lora_alpha or self.lora_rank)
        return adapter
