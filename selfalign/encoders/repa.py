"""The encoders of REPA, each with the preprocessing and the features of its family there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from selfalign.encoders import Encoder, refuse_model
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.vision import Vision

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class Family:
    """How REPA's code treats the encoders of a family (`preprocess_raw_image`, `load_encoders`)."""

    patch: int
    """Pixels of a patch's side."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    module: str = ""
    """Whose output the features are: MAE's and CLIP's are taken before the last norm."""

    def side(self, image_side: int) -> int:
        """To which images are resized: 224 for every 256 of theirs, so that 14 pixels become a token where
        16 are one of the student's; encoders with patches of 16 get images as they are."""
        if self.patch == 16:
            return max(self.patch, image_side // self.patch * self.patch)
        return 224 * max(1, image_side // 256)


DINOV2, VIT16 = Family(14), Family(16)
MODELS: dict[str, tuple[Family, str, int]] = {
    "dinov2-vit-s": (DINOV2, "vit_small_patch14_dinov2.lvd142m", 384),
    "dinov2-vit-b": (DINOV2, "vit_base_patch14_dinov2.lvd142m", 768),
    "dinov2-vit-l": (DINOV2, "vit_large_patch14_dinov2.lvd142m", 1024),
    "dinov2-vit-g": (DINOV2, "vit_giant_patch14_dinov2.lvd142m", 1536),
    "dinov2reg-vit-s": (DINOV2, "vit_small_patch14_reg4_dinov2.lvd142m", 384),
    "dinov2reg-vit-b": (DINOV2, "vit_base_patch14_reg4_dinov2.lvd142m", 768),
    "dinov2reg-vit-l": (DINOV2, "vit_large_patch14_reg4_dinov2.lvd142m", 1024),
    "dinov2reg-vit-g": (DINOV2, "vit_giant_patch14_reg4_dinov2.lvd142m", 1536),
    "dinov1-vit-b": (VIT16, "vit_base_patch16_224.dino", 768),
    "mae-vit-b": (Family(16, module="blocks"), "vit_base_patch16_224.mae", 768),
    "mae-vit-l": (Family(16, module="blocks"), "vit_large_patch16_224.mae", 1024),
    "clip-vit-l": (
        Family(14, CLIP_MEAN, CLIP_STD, "blocks"),
        "vit_large_patch14_clip_224.openai",
        1024,
    ),
}
"""REPA's names: family, model of timm, and features of a token. MoCo v3 and I-JEPA have no weights there."""


@register("repa")
@dataclass(frozen=True)
class RepaEncoder(Encoder):
    """REPA's encoders under its own names, as in repa:dinov2-vit-b (arXiv:2410.06940)."""

    def width(self, model: str) -> int | None:
        """That of the named transformer."""
        return MODELS[model][2] if model in MODELS else None

    def load(self, model: str, image_side: int, side: int | None) -> Vision:
        """Weights by timm; resizing and normalisation by the family."""
        from selfalign.interop.timm_models import load_timm
        from selfalign.vision import Vision

        if model not in MODELS:
            raise refuse_model(self, model, ", ".join(f"repa:{name}" for name in MODELS))
        family, name, _ = MODELS[model]
        side = side or family.side(image_side)
        network = load_timm(name, f"encoder repa:{model}", side)
        return Vision(network, family.mean, family.std, side, family.module)
