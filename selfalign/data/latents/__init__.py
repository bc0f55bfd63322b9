"""Data sets prepared once and read fast: latents (or pixels) of every image in a few large files.

`sources` finds the images, `autoencoder` encodes them, `prepare` writes them in parallel, `store`
is the format on disk, and `reader` is the `DataSource` that training opens.
"""

from selfalign.data.latents.prepare import PrepareConfig, prepare
from selfalign.data.latents.reader import open_latents
from selfalign.data.latents.store import verify

__all__ = ["PrepareConfig", "open_latents", "prepare", "verify"]
