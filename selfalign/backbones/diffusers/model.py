"""What adapters of diffusers' transformers share: groups become rows, and weights come from a folder."""

import logging
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selfalign.backbones.diffusers.folder import LAYERS
from selfalign.config import ResolvedConfig
from selfalign.errors import UserError
from selfalign.memory import require_memory
from selfalign.network import Backbone
from selfalign.ops.reference import join_parts
from selfalign.records import convert
from selfalign.tokens import TokenGroups
from selfalign.weights import listed, not_finite, read_safetensors

LORA = "default"
"""The adapters' name in peft."""
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0")
"""The attention's matrices."""
PLACES = 3
"""Axes of a token's place in Flux: what it is, row and column."""

Rows = dict[Any, Tensor]
"""Features of a sequence by name."""


class Adapter(Backbone):
    """A transformer of diffusers as a backbone; `model` is that transformer.

    Args:
        config: the resolved tree.
        model: from `load_folder`.
        pretrained: whether it has weights that training starts from.
    """

    model: Any

    def __init__(self, config: ResolvedConfig, model: Any, pretrained: bool) -> None:
        settings = config.model
        super().__init__(config.grid, settings.channels, config.condition, settings.num_classes)
        self.model, self.pretrained = model, pretrained
        self.model.gradient_checkpointing = settings.gradient_checkpointing

    def add_adapters(self, rank: int, alpha: float) -> None:
        """Freeze the model but for low-rank adapters of its attention (LoRA, arXiv:2106.09685).

        Args:
            rank: of the adapters.
            alpha: their scale, over their rank.

        Raises:
            UserError: peft is not installed.
        """
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise UserError(
                "backbones.diffusers.lora_rank needs peft: pip install 'selfalign[lora]'"
            ) from error
        scale: Any = alpha  # said to be whole, and only divided by the rank
        settings = LoraConfig(r=rank, lora_alpha=scale, target_modules=list(ADAPTED))
        self.model.requires_grad_(False)
        inject_adapter_in_model(settings, self.model, LORA)

    def initialize_weights(self, generator: torch.Generator | None = None) -> None:
        """What the folder has no weights for; every block of a new model starts as the identity."""
        for name, module in self.named_modules():
            of_lora = f".{LORA}" in name
            if self.pretrained and name.startswith("model.") and not of_lora:
                continue
            if isinstance(module, nn.Linear | nn.Conv2d):
                if ".lora_B." in name or self._starts_at_zero(name):
                    nn.init.zeros_(module.weight)
                else:
                    nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)

    def _starts_at_zero(self, name: str) -> bool:
        """Whether a matrix of the new model is zero at first: gates, shifts, and the output."""
        raise NotImplementedError

    def rows(
        self,
        groups: TokenGroups,
        batch: int,
        run: Callable[[slice, slice, int], Rows],
    ) -> Rows:
        """What a model says of every sequence, put together in group order.

        Args:
            groups: each dense attention over some samples and tokens is a batch of sequences.
            batch: samples B.
            run: told samples, tokens, and the group whose timestep they have; gives features (b, n, D).
        """
        parts = groups.attention_parts(batch)
        found = [
            # Whole images have one timestep in all groups.
            run(slice(first, end), slice(begin, stop), groups.ends.index(stop))
            for first, end, begin, stop in parts
        ]
        return {name: join_parts(parts, [each[name] for each in found]) for name in found[0]}


def load_folder(folder: str, kind: str) -> tuple[nn.Module, bool]:
    """A model from a folder of diffusers, and whether the folder holds its weights.

    Raises:
        UserError: diffusers is not installed, or the folder is damaged.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "model.backbone diffusers needs diffusers: pip install 'selfalign[latents]'"
        ) from error
    cls, where = getattr(diffusers, kind), f"backbones.diffusers.folder is {folder!r}"
    diffusers.logging.set_verbosity(logging.CRITICAL)  # of settings that it leaves out
    try:
        settings = cls.load_config(folder)
        _check_types(cls, settings)
        with torch.device("meta"):
            size = sum(value.nbytes for value in cls.from_config(settings).parameters())
        require_memory(size, "its weights")
        files = _weight_files(Path(folder))
        if not files:
            return cls.from_config(settings), False
        for file in files:
            _require_sound(file)
        model, found = cls.from_pretrained(
            folder, use_safetensors=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # diffusers raises nearly anything for settings that do not fit
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{where}: {reason}") from error
    for keys, fault in (
        ("missing_keys", "lack"),
        ("unexpected_keys", "are of another model, with"),
    ):
        if found[keys]:
            raise UserError(f"{where}: its weights {fault} {listed(sorted(found[keys]))}")
    return model, True


def _check_types(cls: type[nn.Module], settings: Mapping[str, Any]) -> None:
    """Refuse settings of other types than the model's code says, which would fail somewhere in it."""
    for name, wanted in typing.get_type_hints(cls.__init__).items():
        if name in settings:
            convert(settings[name], wanted, f"{name} in config.json")
            sizes = settings[name] if isinstance(settings[name], list) else [settings[name]]
            least = 0 if wanted is float or name in LAYERS else 1
            if any(type(size) is int and size < least for size in sizes):
                raise UserError(f"{name} in config.json is below {least}")
    channels, out = settings.get("in_channels"), settings.get("out_channels")
    if out not in (None, channels):
        raise UserError(
            f"the model makes {out} channels of {channels}; allowed are models that make velocities alone"
        )
    axes, width = settings.get("axes_dims_rope"), settings.get("attention_head_dim")
    if axes is not None and (sum(axes) != width or len(axes) < PLACES or any(a % 2 for a in axes)):
        raise UserError(
            f"axes_dims_rope is {list(axes)}; allowed are {PLACES} or more even numbers that make "
            f"attention_head_dim {width}"
        )


def _weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights; none of one that starts anew.

    Raises:
        UserError: it has weights in another form.
    """
    files = sorted(folder.glob("*.safetensors"))
    others = sorted(path.name for path in folder.glob("diffusion_pytorch_model*"))
    if others and not files:
        raise UserError(
            f"it holds {others[0]}, and no .safetensors: save its weights as these, or take the file "
            "away for a model that begins anew"
        )
    return files


def _require_sound(file: Path) -> None:
    tensors = read_safetensors(file)
    if wrong := [name for name, value in tensors.items() if not value.is_floating_point()]:
        raise UserError(f"{file.name} holds {listed(wrong)} as whole numbers")
    if wrong := not_finite(tensors):
        raise UserError(f"{file.name}: {listed(wrong)} is not finite")


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """A transformer's weights by their own names, with adapters added into the matrices that they adapt."""
    held = {
        name: value.clone() for name, value in model.state_dict().items() if ".lora_" not in name
    }
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight") and LORA in getattr(module, "lora_A", ()):
            held[f"{name}.base_layer.weight"] += module.get_delta_weight(LORA)
    return {name.replace(".base_layer.", "."): value for name, value in held.items()}


def save_folder(adapter: Adapter, folder: Path) -> None:
    """Write a trained transformer as diffusers reads it: the folder that it came from, with new weights.

    Raises:
        UserError: this is no transformer of diffusers.
    """
    if not isinstance(adapter, Adapter):
        raise UserError("the model is no transformer of diffusers: model.backbone was another")
    model = adapter.model
    fresh = type(model).from_config(model.config)
    weights: Mapping[str, Tensor] = merged_weights(model)
    fresh.load_state_dict(weights)
    fresh.save_pretrained(folder, safe_serialization=True)
