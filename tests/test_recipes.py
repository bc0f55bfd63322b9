"""The full-size recipes are the paper's settings."""

import pytest

from selfalign import UserError, recipe, resolve


@pytest.mark.parametrize(
    ("name", "latents", "tokens", "depth", "blocks", "steps"),
    [
        ("imagenet256-xl2", 32, 256, 28, (8, 20), 4_000_000),
        ("imagenet256-b2", 32, 256, 12, (4, 8), 800_000),
        ("imagenet512-xl2", 64, 1024, 28, (8, 20), 1_000_000),
    ],
)
def test_full_size(
    name: str, latents: int, tokens: int, depth: int, blocks: tuple[int, int], steps: int
) -> None:
    config = resolve(recipe(name), channels=4, image_size=(latents, latents), num_classes=1000)
    model, training, alignment = config.model, config.training, config.alignment
    assert (model.num_tokens, model.dimensions.depth, model.num_classes) == (tokens, depth, 1000)
    assert (alignment.student_block, alignment.teacher_block) == blocks
    assert (alignment.weight, alignment.teacher_interval) == (0.5, 0.2)
    assert (training.steps, training.batch_size, training.learning_rate) == (steps, 256, 1e-4)
    assert (training.weight_decay, training.clip_norm, training.ema_decay) == (0, 1.0, 0.9999)
    assert not training.ema_warmup and training.schedule == "constant"
    assert config.views.class_dropout == 0.1 and config.views.mask_ratios == (0.25, 0.75)
    assert (config.views.timesteps, config.views.attention) == ("dual", "separated")
    assert config.flow.timestep_distribution == "uniform" and config.data.name == "latents"
    with pytest.raises(UserError, match="the data has"):
        resolve(recipe(name), channels=4, image_size=(16, 16), num_classes=1000)
