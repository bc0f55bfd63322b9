"""Feature networks: Inception as the ADM suite has it, DINOv2, timm's models, a small classifier, or
any module."""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from selfalign.data.source import DataSource
from selfalign.disk import cache_folder
from selfalign.errors import UserError
from selfalign.evaluation.classifier import get_classifier
from selfalign.evaluation.inputs import ImageSet, hash_file
from selfalign.interop.timm_models import load_timm, own_preprocessing
from selfalign.processes import together

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
"""torch-fidelity's port of the 2015 graph; the name ends with the beginning of the file's SHA-256."""
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)
DINOV2 = "vit_large_patch14_dinov2.lvd142m"
"""ViT-L/14, the network of FD-DINOv2 (arXiv:2306.04675)."""
DINOV2_SIDE = 224
SPATIAL_CHANNELS = 7
PART = 4096
"""Images whose features are gathered from all processes at once."""


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that turns images into features.

    Its module maps uint8 images (B, C, H, W) to a dictionary of float tensors (B, …): `features`,
    and where it has them `spatial` (for sFID) and `logits`.
    """

    name: str
    module: nn.Module
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What a report on its features has to say about it."""
    notes: tuple[str, ...] = ()
    """Why numbers from it might not compare with published ones."""

    @property
    def weight_hash(self) -> str:
        """16 hexadecimal digits of the SHA-256 of its weights, names included."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(
                tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            )
        return digest.hexdigest()[:16]

    def sizes(self, shape: tuple[int, int, int], device: torch.device) -> dict[str, int]:
        """How many features of each kind it gives of images of a shape: tried on a black one.

        Raises:
            UserError: it does not take such images.
        """
        module = self.module.to(device).eval()
        try:
            with torch.no_grad():
                found = module(torch.zeros(1, *shape, dtype=torch.uint8, device=device))
        except Exception as error:  # any module may stand here, and raise what it likes
            raise UserError(
                f"{self.name} takes no images of {shape} (channels, height, width): {error}"
            ) from error
        return {kind: features.shape[1] for kind, features in found.items()}


def feature_network(name: str, source: DataSource | None, data_name: str) -> FeatureNetwork:
    """The network of `--features`.

    Args:
        name: inception, dinov2, classifier or timm:NAME.
        source: the data set on which a classifier is trained.
        data_name: what that data set is called.

    Raises:
        UserError: an unknown name, or weights that are neither here nor to be had.
    """
    if name == "inception":
        return _inception()
    if name == "dinov2":
        return _timm(DINOV2, name, DINOV2_SIDE)
    if name == "classifier":
        if source is None:
            raise UserError("--features classifier needs --data.name, the set it is trained on")
        trained = get_classifier(source, data_name)
        facts = {"trained_on": data_name, "heldout_accuracy": trained.heldout_accuracy}
        return FeatureNetwork(name, trained.module, facts)
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"), name)
    raise UserError(
        f"--features is {name!r}: allowed are inception, dinov2, classifier and timm:NAME"
    )


class Inception(nn.Module):
    """torch-fidelity's port of the 2015 graph, and the ADM suite's spatial features.

    Args:
        file: its weights, as torch-fidelity publishes them.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        from torch_fidelity import FeatureExtractorInceptionV3

        # The extractor unpickles its file without precautions. It gets a copy of what could be
        # loaded with them.
        state = torch.load(file, map_location="cpu", weights_only=True)
        safe = io.BytesIO()
        torch.save(state, safe)
        safe.seek(0)
        self.extractor = FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048", "logits_unbiased"],
            feature_extractor_weights_path=safe,
        )
        # mixed_6/conv of the graph: the 1×1 branch, after batch norm and ReLU.
        self.extractor.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self._kept: Tensor | None = None

    def _keep(self, module: nn.Module, inputs: object, output: Tensor) -> None:
        self._kept = output[:, :SPATIAL_CHANNELS]

    def forward(self, images: UInt8[Tensor, "B C H W"]) -> dict[str, Float[Tensor, "B F"]]:
        """`features` (B, 2048), `logits` (B, 1008) without bias, and `spatial` (B, 2023) in the order
        (row, column, channel), as the statistics of ADM's reference files have it."""
        features, logits = self.extractor(images.expand(-1, 3, -1, -1))
        assert self._kept is not None
        spatial, self._kept = self._kept.permute(0, 2, 3, 1).flatten(1), None
        return {"features": features, "logits": logits, "spatial": spatial}


class Backbone(nn.Module):
    """Any image network: resizes, normalises, and averages what is not yet one vector per image.

    Args:
        model: maps normalised float images (B, C, h, w) to features (B, D) or (B, D, h', w').
        size: side to which images are resized (bicubic, antialiased, not cropped); None keeps theirs.
        mean, std: per channel, of images in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, model: nn.Module, size: int | None, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.model, self.size = model, size
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: UInt8[Tensor, "B C H W"]) -> dict[str, Float[Tensor, "B F"]]:
        """`features` (B, D)."""
        x = images.expand(-1, max(images.shape[1], len(self.mean)), -1, -1).float() / 255
        if self.size is not None:
            side = (self.size, self.size)
            x = functional.interpolate(x, side, mode="bicubic", antialias=True).clamp(0, 1)
        features = self.model((x - self.mean) / self.std)
        return {"features": features.flatten(2).mean(2) if features.dim() == 4 else features}


def _inception() -> FeatureNetwork:
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--features inception needs torch-fidelity: pip install 'selfalign[eval]'"
        ) from error
    file = cache_folder("weights") / INCEPTION_FILE
    # Where torch-fidelity itself puts it.
    shared = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not file.is_file() and shared.is_file():
        file = shared
    if not file.is_file():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, str(file), "6726825d", progress=False)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"the Inception weights are not here and cannot be downloaded ({error}): get "
                f"{INCEPTION_URL} and put it at {file}"
            ) from error
    try:
        network = Inception(file)
    except Exception as error:
        raise UserError(f"{file} does not hold the Inception weights: {error}") from error
    digits = hash_file(file)
    published = INCEPTION_FILE.removesuffix(".pth").endswith(digits[:8])
    notes = () if published else ("the Inception weights are not the published ones",)
    return FeatureNetwork("inception", network, {"weights_file_sha256": digits}, notes)


def _timm(model_name: str, name: str, side: int | None = None) -> FeatureNetwork:
    chosen = f"--features is {name!r}"
    own = own_preprocessing(model_name, chosen)
    model = load_timm(model_name, chosen, side)
    module = Backbone(model, side or own.side, own.mean, own.std)
    return FeatureNetwork(name, module, {"timm_model": model_name, "timm": version("timm")})


def extract(
    network: FeatureNetwork,
    images: ImageSet,
    accelerator: Accelerator,
    batch_size: int,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Iterator[dict[str, Float[Tensor, "M F"]]]:
    """The features of a set, in order, a part at a time; every process gets all of them.

    The batches are the same whatever the number of processes, which take turns: so the numbers are
    the same too, to the last bit.

    Args:
        network: applied in eval mode, on the accelerator's device.
        images: the set.
        accelerator: knows the processes.
        batch_size: images at once in each process.
        progress: told the set's name, and how many images of how many are done.
    """
    module = network.module.to(accelerator.device).eval()
    for first in range(0, len(images), PART):
        part = range(first, min(first + PART, len(images)))
        batches = [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        own = []
        with together(accelerator):
            for number in range(accelerator.process_index, len(batches), accelerator.num_processes):
                with torch.no_grad():
                    found = module(images.read(batches[number]).to(accelerator.device))
                own.append((number, {kind: values.float().cpu() for kind, values in found.items()}))
        done = sorted(gather_object(own), key=lambda numbered: numbered[0])
        progress(images.name, part.stop, len(images))
        yield {kind: torch.cat([values[kind] for _, values in done]) for kind in done[0][1]}
