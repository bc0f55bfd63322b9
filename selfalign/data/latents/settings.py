"""How images are prepared."""

from dataclasses import dataclass
from typing import Literal

from selfalign.encoders import parse_word
from selfalign.sections import MAX_PROCESSES, MAX_SIDE, check_colour
from selfalign.settings import Settings


@dataclass(frozen=True)
class PrepareConfig(Settings):
    """How images are prepared."""

    image_size: int = 256
    """Side of the square that images are cropped and resized to."""
    vae: str = "ema"
    """Autoencoder: ema or mse (those of Stable Diffusion), a folder with one of diffusers (KL, DC, RAE …),
    OWNER/NAME on the hub, or none for pixels."""
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
    """Which column of a table has the classes, where there are several; of several tar files without class
    numbers: archive, where each is a class, or none."""
    skip_unreadable: bool = False
    """Leave unreadable images out and list them in the manifest, instead of stopping."""
    encoder: tuple[str, ...] = ()
    """Also store the features that these networks make of the images, each as
    PART[:MODEL][#MODULE][@SIDE][+class]: repa:dinov2-vit-b, timm:NAME, efficientnet-lite0."""
    processes: int = 1
    """Processes that decode and encode; GPUs are shared out among them."""

    normalise: Literal["config", "measured"] = "config"
    """How latents are brought to unit size: by the scale and shift of the autoencoder's config, or by each
    channel's mean and deviation, measured over the training images while preparing."""

    def check(self) -> None:
        """Limits of the numbers, and what goes together."""
        self.require_number("image_size", 1, MAX_SIDE, f"a number from 1 to {MAX_SIDE:,}")
        self.require_number("processes", 1, MAX_PROCESSES, f"a number from 1 to {MAX_PROCESSES:,}")
        self.require(
            not self.flip or self.vae != "none" or bool(self.encoder),
            "flip",
            "allowed with vae none is False, as pixels are mirrored when they are read",
        )
        self.require(
            len(set(self.encoder)) == len(self.encoder), "encoder", "one stands there twice"
        )
        for word in self.encoder:
            parse_word(word)
        check_colour("background", self.background)
