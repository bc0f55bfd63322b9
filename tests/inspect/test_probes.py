"""Linear probes on data whose answer is known."""

import dataclasses

import pytest
import torch
from support import small_model

from selfalign.data.source import DataSource, MemorySplit
from selfalign.errors import UserError
from selfalign.inspect.features import chosen_blocks, mean_tokens, untrained
from selfalign.inspect.logistic import STRENGTHS, fit_and_predict
from selfalign.inspect.probes import (
    linear_probe,
    pixel_probe,
    probe_blocks,
    probe_data,
)
from selfalign.randomness import make_generator


def _source(informative: bool) -> DataSource:
    """Two classes, bright and dark, or two names for the same noise."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> MemorySplit:
        labels = torch.arange(count) % 2
        images = 0.2 * torch.randn(count, 2, 4, 6, generator=generator)
        if informative:
            images += (labels * 2.0 - 1)[:, None, None, None]
        return MemorySplit(images, labels)

    return DataSource(split(200), split(100), 2, (4, 6), ("dark", "bright"), "made here")


class TestRegression:
    def test_one_hot_features_tell_all(self):
        labels = torch.arange(300) % 7 + 3  # any numbers may name classes
        features = torch.nn.functional.one_hot(labels).float()
        found, _ = fit_and_predict(features, labels, features)
        assert torch.equal(found, labels)

    def test_shuffled_labels_tell_nothing(self):
        generator = make_generator(0, "shuffled")
        features = torch.randn(1400, 20, generator=generator)
        labels = torch.randint(5, (1400,), generator=generator)
        found, strength = fit_and_predict(features[:1000], labels[:1000], features[1000:])
        share = float((found == labels[1000:]).float().mean())
        assert abs(share - 1 / 5) <= 2 * (0.2 * 0.8 / 400) ** 0.5
        assert strength == max(STRENGTHS)

    def test_the_same_classes_as_scikit_learn(self):
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        generator = make_generator(0, "regression")
        labels = torch.arange(900) % 6
        centres = torch.randn(6, 30, generator=generator)
        features = centres[labels] + 1.5 * torch.randn(900, 30, generator=generator)
        found, strength = fit_and_predict(features[:600], labels[:600], features[600:])
        theirs = make_pipeline(
            StandardScaler(), LogisticRegression(C=1 / (600 * strength), max_iter=2000)
        ).fit(features[:600].numpy(), labels[:600].numpy())
        same = found.numpy() == theirs.predict(features[600:].numpy())
        assert same.mean() > 0.99

    def test_a_constant_feature_is_no_feature(self):
        labels = torch.arange(100) % 2
        features = torch.stack([torch.full((100,), 7.0), labels.float()], dim=1)
        assert torch.equal(fit_and_predict(features, labels, features)[0], labels)


class TestProbes:
    def test_what_features_tell_and_what_they_cannot(self):
        model = small_model(dtype=torch.float32).eval()
        assert linear_probe(model, _source(informative=True), "linear", block=2) > 0.95
        assert linear_probe(model, _source(informative=False), "linear", block=2) < 0.65

    def test_the_same_every_time(self):
        model = small_model(dtype=torch.float32).eval()
        source = _source(informative=True)
        assert linear_probe(model, source, "linear", 1) == linear_probe(model, source, "linear", 1)

    def test_labels_are_needed(self):
        unlabelled = dataclasses.replace(_source(informative=True), class_names=())
        with pytest.raises(UserError, match="two classes"):
            linear_probe(small_model(dtype=torch.float32), unlabelled, "linear", 1)

    def test_between_the_largest_classes(self, monkeypatch):
        """Of many classes those of most images; none too small for cross-validation."""
        source = _source(informative=True)
        labels = torch.tensor([0] * 4 + [1] * 50 + [2] * 6 + [3] * 40 + [4] * 100)
        train = dataclasses.replace(source.train, labels=labels)
        heldout = dataclasses.replace(source.heldout, labels=torch.arange(100) % 5)
        names = ("a", "b", "c", "d", "e")
        many = dataclasses.replace(source, train=train, heldout=heldout, class_names=names)
        assert probe_data(many).classes == 4
        monkeypatch.setattr("selfalign.inspect.probes.MOST_CLASSES", 3)
        data = probe_data(many)
        assert data.classes == 3 and len(data.train) == 190 and len(data.heldout) == 60
        assert set(data.train_labels.tolist()) == set(data.labels.tolist()) == {1, 3, 4}
        alone = dataclasses.replace(many, train=MemorySplit(train.images, torch.arange(200)))
        with pytest.raises(UserError, match="of 5 images each"):
            probe_data(alone)

    def test_controls(self):
        """Pixels tell bright from dark until there is only noise; shuffled labels teach nothing."""
        data = probe_data(_source(informative=True))
        assert pixel_probe(data, "linear", 0.1).float().mean() == 1
        assert pixel_probe(data, "linear", 1.0).float().mean() < 0.65
        model = small_model(dtype=torch.float32).eval()
        of_shuffled = probe_blocks(model, data.shuffled(), "linear", 0.1, (1,), draws=1)[1]
        assert 0.3 < of_shuffled.float().mean() < 0.7

    def test_any_module_can_be_probed(self):
        model = small_model(dtype=torch.float32).eval()
        data = probe_data(_source(informative=True), images=50)
        found = probe_blocks(model, data, "linear", 0.1, ("blocks.1.attn",), draws=1)
        assert found["blocks.1.attn"].shape == (50,)


class TestFeatures:
    def test_mean_tokens_are_means_of_features(self):
        model = small_model(dtype=torch.float32).eval()
        x0 = _source(informative=True).train.images[:5]
        one, two = (mean_tokens(model, x0, "linear", 0.3, (3,), "a", draws=n)[3] for n in (1, 2))
        other = mean_tokens(model, x0, "linear", 0.3, (3,), "b")[3]
        assert one.shape == (5, 24) and not torch.equal(one, two) and not torch.equal(one, other)

    def test_blocks_are_spread(self):
        assert chosen_blocks(6) == (1, 2, 3, 4, 5, 6)
        assert chosen_blocks(28) == (5, 9, 14, 19, 23, 28)
        assert chosen_blocks(3) == (1, 2, 3)

    def test_an_untrained_network_is_no_identity(self):
        model = small_model(dtype=torch.float32).eval()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        fresh = untrained(model)
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert torch.equal(fresh.pos_embed, model.pos_embed)
        x0 = _source(informative=True).train.images[:5]
        features = mean_tokens(fresh, x0, "linear", 0.3, (1, 3), "a")
        assert (features[3] - features[1]).abs().mean() > 0.05
