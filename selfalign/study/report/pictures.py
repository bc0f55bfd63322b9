"""The report's pictures: samples from the same noise and labels, and what every variant sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from selfalign.config import resolve
from selfalign.data.datasets import open_data
from selfalign.data.shapes import side_by_side
from selfalign.data.source import DataSource
from selfalign.errors import UserError
from selfalign.evaluation.inputs import open_images
from selfalign.inspect.views import draw_diagram, see_views
from selfalign.sampling.pictures import column_labels, data_uri, fitting_columns, tile
from selfalign.study.plan import Job
from selfalign.study.results import RunResult

SAMPLE_ROWS = 2
LARGEST_SAMPLE = 48
"""Height in pixels above which samples are shrunk, so that the file stays small."""
SHOWN_IMAGE = 0
"""Of the held-out images, the one that the diagrams show."""


@dataclass(frozen=True)
class SampleStrip:
    """A run's samples in one picture."""

    variant: str
    address: str
    width: int
    """In pixels of the picture."""
    height: int


def sample_strips(
    folder: Path, runs: Sequence[RunResult], seed: int, source: DataSource | None
) -> list[SampleStrip]:
    """Samples of every finished run of a seed: a class per column, the same samples of each.

    Of videos a few frames are beside each other.

    Args:
        folder: the study's.
        runs: finished ones.
        seed: which of them are shown.
        source: the data set; None where it cannot be opened, which leaves classes and frames unknown.

    Raises:
        UserError: a file of samples is damaged.
    """
    num_classes, sides = (source.num_classes, source.image_size) if source else (0, ())
    strips = []
    for run in runs:
        files = sorted((folder / run.folder).glob("evaluation/*/samples.npz"))
        if run.seed != seed or not files:
            continue
        samples = open_images(files[-1])
        labels = None if samples.labels is None else samples.labels.numpy()
        one = side_by_side(samples.read([0]), sides)
        chosen = _choose(labels, len(samples), num_classes, fitting_columns(*one.shape[2:]))
        columns = len(chosen) // SAMPLE_ROWS or len(chosen)
        shown = side_by_side(samples.read(chosen), sides).permute(0, 2, 3, 1).numpy()
        picture = tile(_shrink(shown), columns)
        strips.append(
            SampleStrip(run.variant, data_uri(picture), picture.shape[1], picture.shape[0])
        )
    return strips


def _choose(
    labels: np.ndarray[tuple[int], np.dtype[np.int64]] | None,
    count: int,
    num_classes: int,
    columns: int,
) -> list[int]:
    """The first samples of some classes, row by row; simply the first where classes lack samples."""
    first = list(range(min(count, SAMPLE_ROWS * columns)))
    shown = column_labels(num_classes, columns)
    if labels is None or shown is None:
        return first
    found = [np.flatnonzero(labels == label)[:SAMPLE_ROWS].tolist() for label in shown]
    if min(map(len, found)) < SAMPLE_ROWS:
        return first
    return [column[row] for row in range(SAMPLE_ROWS) for column in found]


def _shrink(images: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> UInt8[Tensor, "M C H W"]:
    factor = max(1, -(-images.shape[1] // LARGEST_SAMPLE))
    if factor > 1:
        size = (images.shape[2] // factor, images.shape[1] // factor)
        images = np.stack(
            [
                np.asarray(Image.fromarray(image.squeeze()).resize(size, Image.Resampling.LANCZOS))
                for image in images
            ]
        ).reshape(len(images), size[1], size[0], -1)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class Diagram:
    """What a variant sees of an image."""

    variant: str
    note: str
    """Which part of the batch it is of, where there are two."""
    svg: str


def view_diagrams(jobs: Sequence[Job]) -> list[Diagram]:
    """A diagram of every job's variant, from one held-out image of its data set.

    Raises:
        UserError: the data set is not there, or does not fit the settings.
    """
    diagrams = []
    source = open_data(jobs[0].config.data)
    if len(source.image_size) != 2:
        raise UserError("views are drawn of data with two axes")
    image = source.heldout.read([SHOWN_IMAGE])[0][0]
    for job in jobs:
        config = resolve(job.config, source.channels, source.image_size, source.num_classes)
        seen = see_views(config, image, source.decode)
        share = config.views.whole_image_fraction
        notes = (f"{share:g} of each batch, kept whole", f"the other {1 - share:g} of each batch")
        for index, view in enumerate(seen):
            note = notes[index] if len(seen) > 1 else ""
            title = (
                f"What student and teacher of {job.variant} see of one image, and which tokens attend "
                "to which"
            )
            diagrams.append(Diagram(job.variant, note, draw_diagram(view, title)))
    return diagrams


def find_data(jobs: Sequence[Job]) -> DataSource | None:
    """The data set of a study's runs; None where it cannot be opened."""
    try:
        return open_data(jobs[0].config.data)
    except UserError:
        return None
