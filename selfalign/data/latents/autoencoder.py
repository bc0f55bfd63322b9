"""The VAE between images and latents: any AutoencoderKL of diffusers, which is imported only here."""

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

NAMED = {"ema": "stabilityai/sd-vae-ft-ema", "mse": "stabilityai/sd-vae-ft-mse"}
"""The autoencoders of Stable Diffusion, which share their encoder."""
NAMED_SCALE, NAMED_CHANNELS, NAMED_FACTOR = 0.18215, 4, 8
"""Of both: scale (METHOD: settings reported), channels, and pixels per latent's side, for when their
configuration is not at hand."""
WEIGHTS = "diffusion_pytorch_model.safetensors"
DECODE_BATCH = 16
"""Images decoded at once: activations of the last layers are large."""


def load_autoencoder(name: str) -> "AutoencoderKL":
    """An autoencoder in evaluation mode: `ema`, `mse`, or a folder that save_pretrained wrote.

    Raises:
        UserError: diffusers is not installed, or there is no such autoencoder.
    """
    try:
        from diffusers import AutoencoderKL
    except ImportError as error:
        raise UserError(
            "latents need the package diffusers: pip install 'selfalign[latents]'"
        ) from error
    if name not in NAMED and not (Path(name) / "config.json").is_file():
        raise UserError(
            f"there is no autoencoder {name!r}: allowed are {', '.join(NAMED)}, none, or a folder "
            "with the config.json and the weights of a diffusers AutoencoderKL"
        )

    def fetch(local: bool) -> "AutoencoderKL":
        return AutoencoderKL.from_pretrained(
            NAMED.get(name, name), use_safetensors=True, local_files_only=local
        )

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the hub's own workings
            autoencoder = from_hub(fetch) if name in NAMED else fetch(True)
    except Exception as error:  # a download fails in many ways, and so does a damaged folder
        reason = str(error).strip().partition("\n")[0]
        hint = f"; without network, pass a local copy of {NAMED[name]}" if name in NAMED else ""
        raise UserError(f"autoencoder {name!r} cannot be loaded: {reason}{hint}") from error
    return autoencoder.eval().requires_grad_(False)


def open_decoder(place: Path) -> "Decoder":
    """From latents as the model sees them to images, by an autoencoder without a stored set.

    Args:
        place: `ema`, `mse`, or a folder.

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


def scale_and_shift(autoencoder: "AutoencoderKL") -> tuple[float, float]:
    """Numbers of its configuration such that the model sees latents · scale + shift."""
    scale = float(autoencoder.config.scaling_factor)
    # diffusers has (latents - shift_factor) · scaling_factor.
    return scale, 0.0 - scale * float(autoencoder.config.shift_factor or 0)


@torch.inference_mode()
def encode_moments(
    autoencoder: "AutoencoderKL", images: UInt8[Tensor, "B 3 S S"]
) -> Float[Tensor, "B 2C H W"]:
    """Mean and standard deviation of the posterior over (unscaled) latents, on the CPU."""
    posterior = autoencoder.encode(images.to(autoencoder.device).float() / 127.5 - 1).latent_dist
    return torch.cat([posterior.mean, posterior.std], dim=1).cpu()


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
        scale, shift: the model sees latents · scale + shift.
        autoencoder: where it is loaded already.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        sha256: str,
        scale: float,
        shift: float,
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
        unscaled = (latents.float() - self.shift) / self.scale
        with torch.inference_mode():
            images = [autoencoder.decode(part).sample for part in unscaled.split(DECODE_BATCH)]
        return torch.cat(images).float().clamp(-1, 1)

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
