"""Images that some other tool has encoded: arrays of a posterior's means and standard deviations."""

import numpy as np

from selfalign.data.images import UnreadableImageError
from selfalign.data.latents.sources import Source
from selfalign.errors import UserError


def read_moments(source: Source, index: int, shape: tuple[int, ...]) -> np.ndarray:
    """The moments (2C, H, W) of an image, as float32.

    Raises:
        UnreadableImageError: the file is no array, or holds numbers that are not finite.
        UserError: it is an array of something else.
    """
    name = source.names[index]
    try:
        moments: np.ndarray = source.load(index)
    except UserError as error:
        raise UnreadableImageError(str(error)) from error
    if moments.ndim == 4 and len(moments) == 1:
        moments = moments[0]
    if moments.dtype.kind != "f" or moments.shape != shape:
        hint = ""
        if moments.shape == (shape[0] // 2, *shape[1:]):
            hint = "; these look like sampled latents, of which the deviations are lost: encode the images"
        raise UserError(
            f"{name} is an array of {moments.dtype} and shape {moments.shape}: allowed is {shape} of "
            f"floats, means and standard deviations of what the VAE makes of an image{hint}"
        )
    moments = moments.astype(np.float32)
    if not np.isfinite(moments).all():
        raise UnreadableImageError(f"{name} holds numbers that are not finite")
    if (lowest := moments[shape[0] // 2 :].min()) < 0:
        raise UserError(
            f"{name} has a standard deviation of {lowest:.3g}: its second half looks like logarithms of "
            "variances; store exp(0.5 * logvar) in their place"
        )
    return moments
