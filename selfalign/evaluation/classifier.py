"""A small classifier, trained on a data set's training split in seconds: features where Inception's
make no sense."""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional

from selfalign.data.shapes import to_uint8
from selfalign.data.source import DataSource, Split, SubsetSplit
from selfalign.disk import cache_folder, is_full, locked, write_whole
from selfalign.errors import UserError
from selfalign.randomness import make_generator
from selfalign.weights import write_safetensors

STEPS = 700
BATCH = 128
LEARNING_RATE = 6e-3
FEATURES = 64
WIDTHS = (32, 64, 64)


class Classifier(nn.Module):
    """Convolutions, strided while the side is above 4, then 64 features and one linear layer.

    Args:
        channels: of the images.
        side: the smaller side of the images.
        num_classes: of the labels.
        generator: where the initial weights come from.
    """

    def __init__(
        self, channels: int, side: int, num_classes: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        # Larger images are averaged down first: the classifier is to take seconds.
        self.shrink = max(1, side // 32)
        side, width = side // self.shrink, channels
        self.convolutions = nn.ModuleList()
        for next_width in WIDTHS:
            stride = 2 if side > 4 else 1
            self.convolutions.append(nn.Conv2d(width, next_width, 3, stride, padding=1))
            side, width = -(-side // stride), next_width
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in WIDTHS)
        self.hidden = nn.Linear(WIDTHS[-1] * 4, FEATURES)
        self.output = nn.Linear(FEATURES, num_classes)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.kaiming_normal_(parameter, generator=generator)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(self, images: UInt8[Tensor, "B C H W"]) -> dict[str, Float[Tensor, "B F"]]:
        """`features` (B, 64) and `logits` (B, classes)."""
        x = images.float() / 127.5 - 1
        x = functional.avg_pool2d(x, self.shrink)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = functional.gelu(norm(convolution(x)))
        pooled = functional.adaptive_avg_pool2d(x, 2).flatten(1)
        features = self.hidden(pooled)
        return {"features": features, "logits": self.output(functional.gelu(features))}


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier and the share of held-out images that it recognises."""

    module: Classifier
    heldout_accuracy: float


def require_classes(source: DataSource, name: str) -> None:
    """Refuse a data set that has no classes to tell apart.

    Args:
        source: the data set.
        name: what it is called.

    Raises:
        UserError: it has fewer than two.
    """
    if source.num_classes < 2:
        raise UserError(
            f"features classifier needs a data set with two classes or more, {name} has "
            f"{source.num_classes}; allowed are inception, dinov2 and timm:NAME"
        )


def halves(count: int) -> tuple[Int[Tensor, "A"], Int[Tensor, "B"]]:
    """Numbers of a set's images in two halves, drawn once and for all."""
    order = torch.randperm(count, generator=make_generator(0, "halves"))
    return order[: count // 2].sort().values, order[count // 2 :].sort().values


def get_classifier(
    source: DataSource, name: str, seed: int = 0, half: int | None = None
) -> TrainedClassifier:
    """The data set's classifier, from the cache or trained now. A function of the data and the arguments.

    Args:
        source: the data set.
        name: what it is called.
        seed: of its weights and batches.
        half: which of `halves` of the training images it is trained on; None for all.

    Raises:
        UserError: the data set has no classes to tell apart.
    """
    require_classes(source, name)
    channels, *sides = source.picture_shape
    classifier = Classifier(
        channels,
        min(sides),
        source.num_classes,
        make_generator(seed, "classifier"),
    )
    split, own = source.train, []
    if half is not None:
        split, own = SubsetSplit(split, halves(len(split))[half]), [seed, half]
    recipe = json.dumps([source.image_size, STEPS, BATCH, LEARNING_RATE, torch.__version__, *own])
    key = hashlib.sha256(f"{source.fingerprint} {recipe} {classifier}".encode()).hexdigest()[:16]
    file = cache_folder("classifiers") / f"{name}-{key}.safetensors"
    accuracy = _read_kept(file, classifier)
    if accuracy is None:
        with _one_at_a_time(file):
            accuracy = _read_kept(file, classifier)  # another process may have trained it meanwhile
            if accuracy is None:
                accuracy = _train_and_keep(classifier, source, seed, split, file)
    return TrainedClassifier(classifier.eval().requires_grad_(False), accuracy)


def _read_kept(file: Path, classifier: Classifier) -> float | None:
    """Load the weights, and return the accuracy; None if no such file is whole."""
    try:
        with safe_open(file, framework="pt") as opened:
            accuracy = float(opened.metadata()["heldout_accuracy"])
            state = {k: opened.get_tensor(k) for k in opened.keys()}  # noqa: SIM118
        classifier.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
        return None
    return accuracy


@contextlib.contextmanager
def _one_at_a_time(file: Path) -> Iterator[None]:
    """The runs of a study end at about the same time: one trains, and the others wait for what it keeps.

    Where the cache cannot be written each trains its own.
    """
    with contextlib.ExitStack() as held:
        with contextlib.suppress(UserError):
            held.enter_context(locked(file.parent, busy=None, name=f"{file.stem}.lock"))
        yield


def _train_and_keep(
    classifier: Classifier, source: DataSource, seed: int, split: Split, file: Path
) -> float:
    _train(classifier, split, seed)
    accuracy = _accuracy(classifier, source.heldout)
    facts = {"heldout_accuracy": repr(accuracy)}
    try:
        write_whole(file, lambda path: write_safetensors(path, classifier.state_dict(), facts))
    except UserError as error:
        if is_full(error):
            raise  # now, and not after what is long: samples and the report need space too
        warnings.warn(
            f"the classifier is not kept, and trained again next time: {error}", stacklevel=3
        )
    return accuracy


def _train(classifier: Classifier, split: Split, seed: int) -> None:
    """AdamW with a one-cycle schedule on random batches, always on the CPU: there it is reproducible."""
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    classifier.train()
    for step in range(STEPS):
        generator = make_generator(seed, "classifier batch", step)
        chosen = torch.randint(len(split), (BATCH,), generator=generator)
        images, labels = split.read(chosen.tolist())
        loss = functional.cross_entropy(
            classifier(to_uint8(images))["logits"], labels, label_smoothing=0.05
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    classifier.eval()


@torch.no_grad()
def _accuracy(classifier: Classifier, split: Split) -> float:
    right = 0
    for numbers in torch.arange(len(split)).split(512):
        images, labels = split.read(numbers.tolist())
        right += int((classifier(to_uint8(images))["logits"].argmax(dim=1) == labels).sum())
    return right / len(split)
