"""No images: weights that came without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from selfalign.data.sources import Source
from selfalign.errors import UserError
from selfalign.parts import register

if TYPE_CHECKING:
    from selfalign.data.source import DataSource
    from selfalign.sections import DataConfig


@register("none")
@dataclass(frozen=True)
class NoImages(Source):
    """No images, for weights that were imported without them: they can be sampled from."""

    holds_images: ClassVar[bool] = False
    decodes: ClassVar[bool] = True

    vae: str = ""
    """Autoencoder that turns samples into images: ema, mse, a folder, or OWNER/NAME on the hub; left out:
    samples are images."""

    def open(self, config: DataConfig) -> DataSource:
        """There are none.

        Raises:
            UserError: always.
        """
        raise UserError(
            "data.name is 'none': these weights were imported without images; --data.name and --data.root "
            "say which are meant"
        )

    def decoder(self, config: DataConfig) -> Callable[[Any], Any]:
        """The autoencoder's, or none."""
        if not self.vae:
            return _as_images
        from pathlib import Path

        from selfalign.data.latents.autoencoder import open_decoder

        return open_decoder(Path(self.vae))


def _as_images(samples: Any) -> Any:
    if samples.shape[1] not in (1, 3):
        raise UserError(
            f"samples have {samples.shape[1]} channels and are no images: import the weights with --vae, the "
            "autoencoder that decodes them"
        )
    return samples
