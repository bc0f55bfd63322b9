"""The autoencoder between images and latents: any of diffusers for images, which is imported only here.

An AutoencoderKL gives a posterior; others (AutoencoderDC, AutoencoderRAE) one latent, whose deviation is 0.
"""

import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor

from selfalign.disk import write_whole
from selfalign.errors import UserError
from selfalign.hub import from_hub
from selfalign.weights import read_safetensors, weights_sha256

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Numbers = float | tuple[float, ...]
"""One for all channels, or one per channel."""
NAMED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
"""The autoencoders of Stable Diffusion, which share their encoder."""
NAMED_SCALE, NAMED_CHANNELS, NAMED_FACTOR = 0.18215, 4, 8
"""Of both: scale (METHOD: settings reported), channels, and pixels per latent's side, for when their
configuration is not at hand."""
_ON_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
WEIGHTS = "diffusion_pytorch_model.safetensors"
DECODE_BATCH = 16
"""Images decoded at once: activations of the last layers are large."""


def load_autoencoder(name: str) -> "AutoencoderKL":
    """An autoencoder in evaluation mode.

    Args:
        name: `ema`, `mse`, a folder that save_pretrained wrote, or OWNER/NAME on the hub. Its config.json
            says which class of diffusers it is.

    Raises:
        UserError: diffusers is not installed, or there is no such autoencoder.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UserError(
            "latents need the package diffusers: pip install 'selfalign[latents]'"
        ) from error
    is_folder = (Path(name) / "config.json").is_file()
    if name not in NAMED and not is_folder and not _ON_HUB.fullmatch(name):
        raise UserError(
            f"there is no autoencoder {name!r}: allowed are {', '.join(NAMED)}, none, a folder with the "
            "config.json and the weights of an autoencoder of diffusers, or OWNER/NAME on the hub"
        )

    place = NAMED.get(name, name)

    def fetch(local: bool) -> "AutoencoderKL":
        where = {"local_files_only": local}
        kind = str(diffusers.AutoencoderKL.load_config(place, **where).get("_class_name"))
        if not kind.startswith("Autoencoder") or not hasattr(diffusers, kind):
            raise UserError(f"it is a {kind}: allowed are autoencoders of diffusers")
        return getattr(diffusers, kind).from_pretrained(place, use_safetensors=True, **where)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the hub's own workings
            autoencoder = fetch(True) if is_folder else from_hub(fetch)
    except Exception as error:  # a download fails in many ways, and so does a damaged folder
        reason = str(error).strip().partition("\n")[0]
        hint = f"; without network, pass a local copy of {NAMED[name]}" if name in NAMED else ""
        raise UserError(f"autoencoder {name!r} cannot be loaded: {reason}{hint}") from error
    return autoencoder.eval().requires_grad_(False)


def open_decoder(place: Path) -> "Decoder":
    """From latents as the model sees them to images, by an autoencoder without a stored set.

    Args:
        place: `ema`, `mse`, a folder, or OWNER/NAME on the hub.

    Raises:
        UserError: there is no such autoencoder.
    """
    autoencoder = load_autoencoder(str(place))
    return Decoder(place, str(place), "", *scale_and_shift(autoencoder), autoencoder)


def store_autoencoder(autoencoder: "AutoencoderKL", folder: Path) -> None:
    """Write a copy, whole or not at all.

    Raises:
        UserError: the disk does not take it.
    """

    def write(partial: Path) -> None:
        try:
            autoencoder.save_pretrained(partial)
        except SafetensorError as error:  # a full disk, for one
            raise OSError(str(error)) from error

    write_whole(folder, write)


def scale_and_shift(autoencoder: "AutoencoderKL") -> tuple[Numbers, Numbers]:
    """Numbers of its configuration such that the model sees latents · scale + shift.

    diffusers has (latents - shift_factor) · scaling_factor, or per channel
    (latents - latents_mean) · scaling_factor / latents_std; a representation autoencoder does it itself.
    """
    config = autoencoder.config
    if _sees_from_zero(autoencoder):
        return 1.0, 0.0
    factor = float(config.get("scaling_factor") or 1)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:
        scale = tuple(factor / float(each) for each in std)
        return scale, tuple(0.0 - s * float(m) for s, m in zip(scale, mean, strict=True))
    return factor, 0.0 - factor * float(config.get("shift_factor") or 0)


def _sees_from_zero(autoencoder: "AutoencoderKL") -> bool:
    """Whether its images go from 0 to 1 and it normalises latents itself, as AutoencoderRAE does."""
    return "encoder_norm_mean" in autoencoder.config


def per_channel(numbers: Numbers, like: Float[Tensor, "... C H W"]) -> Tensor:
    """Numbers that broadcast over samples' channels."""
    return torch.tensor(numbers, dtype=like.dtype, device=like.device).reshape(-1, 1, 1)


def latent_shape(autoencoder: "AutoencoderKL", image_size: int) -> tuple[int, int, int]:
    """Channels, height and width of the latents of square images.

    Raises:
        UserError: it takes no images of that size, or other samples than RGB images.
    """
    config = autoencoder.config
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    factor = 2 ** (len(widths) - 1) if widths else 1
    colours = config.get("in_channels", 3)
    if image_size % factor or colours != 3:
        raise UserError(
            f"image_size is {image_size} and the autoencoder takes {colours} channels: allowed are "
            f"multiples of {factor}, and autoencoders of RGB images"
        )
    if type(autoencoder).__name__ == "AutoencoderKL":
        return config.latent_channels, image_size // factor, image_size // factor
    try:
        image = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
        moments = encode_moments(autoencoder, image)
        _, channels, height, width = moments.shape
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        said = str(error).strip().partition("\n")[0]
        raise UserError(
            f"image_size is {image_size}, which the {type(autoencoder).__name__} does not take: {said}"
        ) from error
    return channels // 2, height, width


@torch.inference_mode()
def encode_moments(
    autoencoder: "AutoencoderKL", images: UInt8[Tensor, "B 3 S S"]
) -> Float[Tensor, "B 2C H W"]:
    """Mean and standard deviation of the posterior over (unscaled) latents, on the CPU.

    The deviation is 0 where the autoencoder gives one latent.
    """
    pixels = images.to(autoencoder.device).float()
    scaled = pixels / 255 if _sees_from_zero(autoencoder) else pixels / 127.5 - 1
    encoded: Any = autoencoder.encode(scaled)
    if hasattr(encoded, "latent_dist"):
        mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
    else:
        mean, std = encoded.latent, torch.zeros_like(encoded.latent)
    return torch.cat([mean, std], dim=1).cpu()


def stored_weights_sha256(folder: Path) -> str:
    """`weights_sha256` of a stored autoencoder, without diffusers.

    Raises:
        UserError: its weights are missing or unreadable.
    """
    return weights_sha256(read_safetensors(folder / WEIGHTS).items())


class Decoder:
    """From model space to images in [-1, 1]; the autoencoder is loaded by the first call.

    Args:
        folder: the copy of the autoencoder in a stored set.
        name: the autoencoder by name, which is tried where there is no copy.
        sha256: hash its weights must have; empty where it is not known.
        scale, shift: the model sees latents · scale + shift, numbers or one per channel.
        autoencoder: where it is loaded already.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        sha256: str,
        scale: Numbers,
        shift: Numbers,
        autoencoder: "AutoencoderKL | None" = None,
    ) -> None:
        self.folder, self.name, self.sha256 = folder, name, sha256
        self.scale, self.shift = scale, shift
        self._autoencoder: Any = autoencoder

    def __call__(self, latents: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 3 S S"]:
        """Decode on the device that the latents are on.

        Raises:
            UserError: the autoencoder is missing, or is not the one that encoded the set.
        """
        autoencoder: Any = self.autoencoder.to(latents.device)
        latents = latents.float()
        unscaled = (latents - per_channel(self.shift, latents)) / per_channel(self.scale, latents)
        with torch.inference_mode():
            decoded = [autoencoder.decode(part).sample for part in unscaled.split(DECODE_BATCH)]
        images = torch.cat(decoded).float()
        return (2 * images - 1 if _sees_from_zero(autoencoder) else images).clamp(-1, 1)

    @property
    def autoencoder(self) -> "AutoencoderKL":
        """Loaded when it is first asked for. Raises what calling raises."""
        if self._autoencoder is None:
            self._autoencoder = self._load()
        return self._autoencoder

    def _load(self) -> "AutoencoderKL":
        stored = (self.folder / "config.json").is_file()
        try:
            autoencoder = load_autoencoder(str(self.folder) if stored else self.name)
        except UserError as error:
            raise UserError(
                f"latents cannot be turned into images: {error}; put the autoencoder that encoded "
                f"them into {self.folder}"
            ) from error
        actual = weights_sha256(autoencoder.state_dict().items())
        if self.sha256 and actual != self.sha256:
            raise UserError(
                f"the autoencoder in {self.folder if stored else self.name} has the weight hash "
                f"{actual[:16]}…, but the latents were encoded by {self.sha256[:16]}…"
            )
        return autoencoder
