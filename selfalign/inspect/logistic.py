"""Multinomial logistic regression whose strength is chosen by cross-validation, all of it at once.

Probes are fitted for every block, timestep and control. So all folds and strengths of a probe are one
weight matrix, and a step is two matmuls: Böhning's bound on the Hessian, ½·XᵀX/n + λ (Ann. Inst. Stat.
Math. 44, 1992), is the same for every step and is inverted once; Nesterov's momentum does the rest.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from selfalign.randomness import make_generator

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)
"""λ of mean cross-entropy + λ/2·|W|²; in scikit-learn's terms C = 1/(n·λ)."""
FOLDS = 5
STEPS = 80


def fit_and_predict(
    features: Float[Tensor, "M D"], labels: Int[Tensor, "M"], others: Float[Tensor, "R D"]
) -> tuple[Int[Tensor, "R"], float]:
    """Classes of other images, by the regression whose strength was best over five folds.

    Args:
        features: of the training images; standardised here, by their own mean and deviation.
        labels: their classes.
        others: features of the images to classify.

    Returns:
        Their classes, and the strength. Of equally good strengths the strongest.
    """
    classes, targets = labels.unique(return_inverse=True)
    mean, deviation = features.mean(dim=0), features.std(dim=0)
    deviation = torch.where(deviation > 1e-6 * deviation.max(), deviation, torch.inf)
    x, z = (_with_one((part - mean) / deviation) for part in (features, others))
    order = torch.randperm(len(x), generator=make_generator(0, "folds"))
    fold = torch.empty(len(x), dtype=torch.int64)
    fold[order] = torch.arange(len(x)) % FOLDS
    # The last column trains on all images.
    used = torch.cat([fold[:, None] != torch.arange(FOLDS), torch.ones(len(x), 1).bool()], dim=1)
    weights = _solve(x, functional.one_hot(targets).to(x.dtype), used.to(x.dtype))
    scores = (x @ weights.flatten(1)).view(
        len(x), *weights.shape[1:]
    )  # (M, K, folds + 1, strengths)
    right = scores.argmax(dim=1) == targets[:, None, None]
    held = ~used[:, :FOLDS, None]
    accuracy = (right[:, :FOLDS] & held).sum(dim=(0, 1))
    best = int(len(STRENGTHS) - 1 - accuracy.flip(0).argmax())
    return classes[(z @ weights[:, :, FOLDS, best]).argmax(dim=1)], STRENGTHS[best]


def _with_one(x: Float[Tensor, "M D"]) -> Float[Tensor, "M D+1"]:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


def _solve(
    x: Float[Tensor, "M D"], y: Float[Tensor, "M K"], used: Float[Tensor, "M F"]
) -> Float[Tensor, "D K F S"]:
    """Weights of every fold F and strength S; the last row of D is the bias, which is not penalised."""
    (count, width), strengths = x.shape, torch.tensor(STRENGTHS)
    penalty = torch.ones(width, dtype=x.dtype)
    penalty[-1] = 0
    shares = (used / used.sum(dim=0))[:, None, :, None]
    # A fold leaves out a fifth of the images: its Hessian is at most 5/4 of that of all.
    bound = 0.5 * FOLDS / (FOLDS - 1) * (x.T @ x) / count
    ridge = torch.diag(penalty) * strengths[:, None, None] + 1e-6 * torch.eye(width)
    steps = torch.linalg.inv(bound + ridge)  # (S, D, D)
    weights = x.new_zeros(width, y.shape[1], used.shape[1], len(strengths))
    ahead = weights.clone()
    for step in range(STEPS):
        scores = (x @ ahead.flatten(1)).view(count, *weights.shape[1:])
        rest = (scores.softmax(dim=1) - y[:, :, None, None]) * shares
        gradient = (x.T @ rest.flatten(1)).view_as(weights)
        gradient += penalty[:, None, None, None] * strengths * ahead
        new = ahead - torch.einsum("sij,jkfs->ikfs", steps, gradient)
        ahead = new + step / (step + 3) * (new - weights)
        weights = new
    return weights
