"""CKA and CKNNA where their values are known."""

import pytest
import torch

from selfalign.inspect.similarity import between, cknna, gram, hsic, likeness, linear_cka
from selfalign.randomness import make_generator


def _features(count: int, width: int, name: str = "features") -> torch.Tensor:
    return torch.randn(count, width, generator=make_generator(0, name), dtype=torch.float64)


def _rotated(x: torch.Tensor, scale: float = 3.0) -> torch.Tensor:
    return scale * x @ torch.linalg.qr(_features(x.shape[1], x.shape[1], "rotation")).Q + 7


class TestKnownAnswers:
    def test_rotation_scale_and_shift_change_nothing(self):
        x = _features(200, 8)
        assert linear_cka(x, _rotated(x)) == pytest.approx(1, abs=1e-9)
        assert cknna(x, _rotated(x)) == pytest.approx(1, abs=1e-9)

    def test_independent_features_are_not_alike(self):
        found = likeness(_features(500, 20, "one"), _features(500, 20, "two"))
        assert abs(found.cka.value) <= 3 * found.cka.standard_error
        assert found.cka.standard_error < 0.02
        assert abs(found.cknna.value) <= 3 * found.cknna.standard_error
        assert abs(found.permuted_cka) < 0.05

    def test_all_pairs_make_cknna_cka(self):
        x, y = _features(60, 5, "one"), _features(60, 7, "two")
        y[:, :5] += x
        assert cknna(x, y, k=59) == pytest.approx(linear_cka(x, y), abs=1e-12)

    def test_the_estimate_is_unbiased(self):
        """Over many draws of independent features it averages to zero; the plain estimate does not."""
        values = [
            hsic(gram(_features(12, 4, f"a{k}")), gram(_features(12, 4, f"b{k}")))
            for k in range(400)
        ]
        found = torch.tensor(values)
        assert abs(found.mean()) < 3 * found.std() / 20

    def test_hsic_by_its_definition(self):
        """The U-statistic over all quadruples of different images."""
        import itertools

        k, l_ = gram(_features(6, 3, "one")), gram(_features(6, 2, "two"))
        total = [
            k[i, j] * (l_[i, j] + l_[q, r] - 2 * l_[i, q])
            for i, j, q, r in itertools.permutations(range(6), 4)
        ]
        assert hsic(k, l_) == pytest.approx(float(torch.stack(total).mean()), rel=1e-9)


def test_local_likeness_sees_what_global_does_not():
    """Clusters whose members are shuffled: alike between clusters, not within them."""
    centres = 10 * _features(20, 6, "centres").repeat_interleave(25, 0)
    x, y = centres + _features(500, 6, "x"), centres + _features(500, 6, "y")
    assert linear_cka(x, y) > 0.95 and cknna(x, y) < 0.8


def test_permuted_images_are_the_control():
    x = _features(100, 6)
    found = likeness(x, _rotated(x))
    assert found.cka.value > 0.999 and found.permuted_cka < 0.2 and found.permuted_cknna < 0.2


def test_between_all_blocks():
    x = {1: _features(50, 4, "one"), 2: _features(50, 6, "two")}
    table = between(x, x)
    assert table[0][0] == pytest.approx(1) and table[0][1] == pytest.approx(table[1][0])
    assert table[0][1] == pytest.approx(linear_cka(x[1], x[2]))
    local = between(x, x, lambda one, two: float((one * two).sum()))
    assert local[0][1] == pytest.approx(local[1][0]) and local[0][0] != pytest.approx(1)
