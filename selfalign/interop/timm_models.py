"""Pretrained models of timm, with weights that are put into the cache by hand or fetched from the hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from selfalign.disk import cache_folder
from selfalign.errors import UserError
from selfalign.hub import from_hub


@dataclass(frozen=True)
class Preprocessing:
    """What a model of timm wants of an image."""

    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def load_timm(name: str, chosen: str, side: int | None = None) -> nn.Module:
    """A pretrained model without its classifier.

    Args:
        name: timm's, as in `vit_small_patch14_dinov2.lvd142m`.
        chosen: what chose it, for messages.
        side: of the images that it will be given, where the network has to be built for it.

    Raises:
        UserError: timm is not installed, has no such model or no weights for it, or they are not here.
    """
    import_timm(chosen)
    import timm

    require_model(name, chosen)
    weights = timm.models.get_pretrained_cfg(name)
    if weights is None or not weights.hf_hub_id:
        raise UserError(f"{chosen}: timm has no weights for {name}")
    file = _weights_file(weights.hf_hub_id, chosen)
    # By file, so that no other format than safetensors is ever loaded.
    options: dict[str, Any] = {"pretrained_cfg_overlay": {"file": str(file)}, "num_classes": 0}
    try:
        if side is not None and _is_built_for_a_side(name):
            options["img_size"] = side
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        raise UserError(f"{file} does not hold the weights of {name}: {error}") from error


def own_preprocessing(name: str, chosen: str) -> Preprocessing:
    """The side, mean and deviation with which timm evaluates a model."""
    import_timm(chosen)
    import timm

    require_model(name, chosen)
    config = timm.models.get_pretrained_cfg(name)
    if config is None:
        raise UserError(f"{chosen}: timm has no weights for {name}")
    return Preprocessing(config.input_size[1], config.mean, config.std)


def import_timm(chosen: str) -> None:
    """Refuse where timm is not installed."""
    try:
        import timm  # noqa: F401
    except ImportError as error:
        raise UserError(f"{chosen} needs timm: pip install 'selfalign[encoders]'") from error


def require_model(name: str, chosen: str) -> None:
    """Refuse a name that timm does not know."""
    import timm

    if not timm.is_model(name):
        raise UserError(f"{chosen}: timm has no model {name}")


def _is_built_for_a_side(name: str) -> bool:
    """Whether a model is one of those (transformers) that take `img_size`."""
    import torch
    from timm import create_model

    try:
        with torch.device("meta"):
            create_model(name, pretrained=False, num_classes=0, img_size=224)
    except TypeError:
        return False
    except (AssertionError, ValueError, RuntimeError):  # 224 is no side for it, or no meta device
        return True
    return True


def _weights_file(repository: str, chosen: str) -> Path:
    """The weights of one of timm's repositories: put there by hand, or fetched by huggingface_hub."""
    from huggingface_hub import hf_hub_download

    file = cache_folder("weights") / f"{repository.rpartition('/')[2]}.safetensors"
    if file.is_file():
        return file
    try:
        return from_hub(
            lambda local: Path(
                hf_hub_download(repository, "model.safetensors", local_files_only=local)
            )
        )
    except Exception as error:
        raise UserError(
            f"{chosen}: the weights of {repository} are not here and cannot be downloaded "
            f"({type(error).__name__}): get https://huggingface.co/{repository}/resolve/main/"
            f"model.safetensors and put it at {file}"
        ) from error
