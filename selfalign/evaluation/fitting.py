"""Whether what was opened fits together, and what can be measured with it."""

from collections.abc import Mapping

from selfalign.errors import UserError
from selfalign.evaluation.generation import PlannedSamples
from selfalign.evaluation.inputs import ImageSet
from selfalign.evaluation.metrics import Available
from selfalign.evaluation.reference import NEIGHBOUR_IMAGES
from selfalign.evaluation.setup import Setup


def check_fit(setup: Setup) -> dict[str, int]:
    """How many features of each kind the network gives of samples and reference.

    Raises:
        UserError: sets or statistics that do not fit together or the network.
    """
    reference, samples, data = setup.reference, setup.samples, setup.source
    images = reference.images
    if setup.network.name == "classifier" and data is not None:
        shape = data.picture_shape
        for name, found in ((reference.name, images), (str(setup.subject), samples)):
            if found is not None and found.shape != shape:
                raise UserError(
                    f"{name} holds images of the shape {found.shape}, and the classifier was trained "
                    f"on {shape} (channels, height, width): --data.name must fit the images"
                )
    if images is not None and isinstance(samples, ImageSet):
        samples.require_like(images)
    elif images is not None and samples.shape != images.shape:
        raise UserError(
            f"{setup.subject} makes images of the shape {samples.shape}, and {reference.name} holds "
            f"{images.shape} (channels, height, width): both must be the same"
        )
    sizes = setup.network.sizes(samples.shape, setup.accelerator.device)
    reference.require_network(setup.network, sizes)
    return sizes


def available(setup: Setup, sizes: Mapping[str, int]) -> Available:
    """What metrics may be computed from.

    Args:
        setup: all that is opened.
        sizes: how many features of each kind the network gives.
    """
    reference, samples = setup.reference, setup.samples
    if isinstance(samples, PlannedSamples):
        count, labels = samples.num, samples.label_range
    else:
        count, given = len(samples), samples.labels
        labels = None if given is None else (int(given.min()), int(given.max()))
    return Available(
        network=setup.network.name,
        features=frozenset(sizes),
        samples=count,
        labels=labels,
        classes=setup.source.num_classes if setup.source else 0,
        statistics=reference.kinds(sizes),
        reference_images=min(len(reference.images), NEIGHBOUR_IMAGES) if reference.images else 0,
        heldout_images=len(reference.heldout) if reference.heldout else 0,
        run=setup.run is not None,
        run_data=_other_data(setup),
        inception_splits=setup.config.inception_splits,
    )


def _other_data(setup: Setup) -> str | None:
    """Why a run cannot be tried on the held-out images of the data set in play."""
    run, source = setup.run, setup.source
    if run is None:
        return None
    if run.model.predicts != "velocity":
        return f"a model that predicts velocities: this one predicts {run.model.predicts}"
    if source is None:
        return "held-out images: --data.name names a data set"
    model, shape = run.model, (source.channels, *source.image_size)
    if shape != (model.channels, *model.image_size):
        return f"data of the model's shape, {(model.channels, *model.image_size)}: here is {shape}"
    if model.num_classes and not 0 < source.num_classes <= model.num_classes:
        return f"data of the model's {model.num_classes} classes: here are {source.num_classes}"
    return None
