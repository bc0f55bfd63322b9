"""How images are prepared."""

from dataclasses import dataclass
from typing import Literal

from selfalign.errors import UserError
from selfalign.sections import check_colour

LARGEST_SIDE = 2**14


@dataclass(frozen=True)
class PrepareConfig:
    """How images are prepared."""

    image_size: int = 256
    """Side of the square that images are cropped and resized to."""
    vae: str = "ema"
    """Autoencoder: ema or mse (those of Stable Diffusion), a folder with one, or none for pixels."""
    dtype: Literal["float16", "float32"] = "float16"
    """Numbers that latents are stored as; pixels are stored as bytes."""
    flip: bool = False
    """Store each image's mirrored copy too, for --data.flip."""
    background: str = "white"
    """Colour behind images where they are transparent: a name, or #rrggbb."""
    image_key: str | None = None
    """Which of a sample's images is meant, where there are several: its ending in tar files (jpg), its
    column in tables."""
    label_key: str | None = None
    """Which column of a table has the classes, where there are several."""
    skip_unreadable: bool = False
    """Leave unreadable images out and list them in the manifest, instead of stopping."""
    processes: int = 1
    """Processes that decode and encode; GPUs are shared out among them."""

    def __post_init__(self) -> None:
        for name, highest in (("image_size", LARGEST_SIDE), ("processes", 1024)):
            if not 1 <= getattr(self, name) <= highest:
                raise UserError(
                    f"{name} is {getattr(self, name)}: allowed is a number from 1 to {highest:,}"
                )
        if self.dtype not in ("float16", "float32"):
            raise UserError(f"dtype is {self.dtype!r}: allowed are float16, float32")
        if self.flip and self.vae == "none":
            raise UserError(
                "flip is True with vae none: allowed is False, as pixels are mirrored when read"
            )
        check_colour("background", self.background)
