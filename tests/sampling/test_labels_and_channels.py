"""Balanced labels, and guidance on a latent's first three channels."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from support import small_model

from selfalign import UserError, make_generator
from selfalign.sampling.generate import (
    SamplingConfig,
    balanced_labels,
    check_sampling,
    generate,
)
from selfalign.sampling.guidance import Guidance, GuidedModel


@pytest.mark.parametrize("num", [7, 700])
def test_balanced_over_every_multiple(num: int) -> None:
    labels = balanced_labels(7, range(num)).tolist()
    assert set(Counter(labels).values()) == {num // 7}
    # A function of the number alone: parts of a set have the set's own labels.
    assert balanced_labels(7, range(3, 10)).tolist() == [3, 4, 5, 6, 0, 1, 2]


def test_samples_have_the_labels_that_are_asked_for() -> None:
    model = small_model()
    config = SamplingConfig(steps=1)
    chosen = {
        labels: torch.cat(
            [
                part.labels
                for part in generate(model, "linear", config, 9, batch_size=4, labels=labels)
            ]
        ).tolist()
        for labels in ("balanced", "random", None, (4, 1))
    }
    assert chosen["balanced"] == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert chosen["random"] == chosen[None]
    assert chosen[4, 1] == [4, 1, 4, 1, 4, 1, 4, 1, 4]


def test_a_model_without_classes_has_none_to_balance() -> None:
    with pytest.raises(UserError, match="labels are balanced: the model's classes are none"):
        check_sampling(small_model(num_classes=0), SamplingConfig(), 0.1, "balanced")


def test_first_three_is_the_released_samplers_guidance() -> None:
    """`forward_with_cfg` of DiT and SiT: three channels extrapolated, the rest the label's own."""
    model = small_model(channels=4)
    labels = torch.tensor([0, 3, 4])
    x = torch.randn(3, 4, 4, 6, generator=make_generator(0, "noise")).double()
    t = torch.full((3,), 0.5, dtype=torch.float64)
    with torch.no_grad():
        nulls = torch.full_like(labels, model.null_label)
        null = model.velocity(x, t, nulls)
        label = model.velocity(x, t, labels)
        guided = {
            channels: GuidedModel(model, labels, nulls, Guidance(2.5, channels=channels)).at(
                0, 0.5
            )(x, 0.5)
            for channels in ("all", "first-three")
        }
    torch.testing.assert_close(guided["all"], null + 2.5 * (label - null))
    expected = torch.cat([guided["all"][:, :3], label[:, 3:]], dim=1)
    torch.testing.assert_close(guided["first-three"], expected)
    assert not torch.allclose(guided["first-three"][:, 3], guided["all"][:, 3])


def test_generate_passes_the_channels_on() -> None:
    model = small_model(channels=4)
    config = SamplingConfig(steps=2, guidance_scale=3.0)
    all_channels, three = (
        torch.cat([s.images for s in generate(model, "linear", c, 3, batch_size=3)])
        for c in (config, replace(config, guidance_channels="first-three"))
    )
    assert not torch.allclose(all_channels, three)
