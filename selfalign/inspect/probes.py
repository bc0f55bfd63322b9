"""Linear probes: what a block's features tell about an image's class."""

import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from selfalign.data.source import DataSource, Split
from selfalign.errors import UserError
from selfalign.flow import PATHS
from selfalign.network import Backbone, Tap
from selfalign.randomness import make_generator
from selfalign.tokens import one_group

TIMESTEP = 0.1
"""Noise level of the probed images: little noise, as the network never sees none."""
IMAGES = 2_000
"""Images of each split that are used at most."""
ITERATIONS = 1_000


def linear_probe(
    model: Backbone, source: DataSource, path: str, block: Tap, batch_size: int = 256
) -> float:
    """Held-out accuracy of a logistic regression on the mean token of a block.

    The model sees no labels: all images carry the null class. Images, noise and regression are the
    same for every model.

    Args:
        model: in eval mode.
        source: the data set; trained on its training split, tested on the held-out one.
        path: name of the path of Eq. 1 that the model was trained on.
        block: whose output is probed, counted from 1.
        batch_size: images at once.

    Raises:
        UserError: the data set has no two classes.
    """
    if source.num_classes < 2:
        raise UserError("a linear probe needs a data set with two classes or more")
    train, train_labels = _features(model, source.train, path, block, batch_size, "train")
    heldout, labels = _features(model, source.heldout, path, block, batch_size, "held-out")
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=ITERATIONS))
    probe.fit(train.numpy(), train_labels.numpy())
    return float(probe.score(heldout.numpy(), labels.numpy()))


@torch.no_grad()
def _features(
    model: Backbone, split: Split, path: str, block: Tap, batch_size: int, part: str
) -> tuple[Float[Tensor, "M D"], Int[Tensor, "M"]]:
    device, dtype = model.device, model.dtype
    groups = one_group(model.num_tokens)
    chosen = torch.randperm(len(split), generator=make_generator(0, f"probe {part}"))[:IMAGES]
    features, labels = [], []
    for number, indices in enumerate(chosen.split(batch_size)):
        x0, of_batch = split.read(indices.tolist())
        noise = torch.randn(x0.shape, generator=make_generator(0, f"probe noise {part}", number))
        t = torch.full((len(x0), 1), TIMESTEP)
        xt = PATHS[path].interpolate(x0, noise, t[..., None, None])
        null = torch.full((len(x0),), model.null_label, device=device)
        tokens = model.grid.patchify(xt.to(device, dtype))
        found = model.features(tokens, t.to(device, dtype), null, groups, (block,))[block]
        features.append(found.mean(dim=1).float().cpu())
        labels.append(of_batch)
    return torch.cat(features), torch.cat(labels)
