"""Metrics against torch-fidelity, independent double-precision computations and closed forms."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from selfalign import UserError
from selfalign.evaluation.estimate import from_share
from selfalign.evaluation.frechet import (
    Gaussian,
    Moments,
    extrapolated_distance,
    fit,
    frechet_distance,
    frechet_estimate,
)
from selfalign.evaluation.metrics.consistency import class_consistency
from selfalign.evaluation.metrics.inception_score import inception_score
from selfalign.evaluation.metrics.kid import draw_subsets, kernel_distance
from selfalign.evaluation.metrics.memorisation import memorisation
from selfalign.evaluation.neighbours import (
    nearest,
    precision_recall,
    several_nearest,
    squared_radii,
)


def features(count: int, dimensions: int, seed: int, spread: float = 1.0) -> Tensor:
    """Correlated, non-negative features of unequal variance, as a network's pooled ones are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimensions, dimensions, generator=torch.Generator().manual_seed(99))
    mixing = mixing * torch.linspace(0.05, 1, dimensions) / math.sqrt(dimensions)
    noise = torch.randn(count, dimensions, generator=generator)
    return (0.3 + spread * noise @ mixing).relu()


FIRST, SECOND = features(1500, 96, 0), features(1200, 96, 1, spread=1.15)


class TestFrechet:
    def test_agrees_with_torch_fidelity(self) -> None:
        fid = pytest.importorskip("torch_fidelity.metric_fid")
        # Its means are float32 sums for float32 features; in float64 both say the same.
        statistics = [fid.fid_features_to_statistics(f.double()) for f in (FIRST, SECOND)]
        expected = fid.fid_statistics_to_metric(*statistics, verbose=False)
        ours = frechet_distance(fit(FIRST), fit(SECOND))
        assert ours == pytest.approx(expected[fid.KEY_METRIC_FID], rel=1e-9)

    def test_agrees_with_torch_fidelity_on_float32_features(self) -> None:
        fid = pytest.importorskip("torch_fidelity.metric_fid")
        statistics = [fid.fid_features_to_statistics(f) for f in (FIRST, SECOND)]
        expected = fid.fid_statistics_to_metric(*statistics, verbose=False)
        ours = frechet_distance(fit(FIRST), fit(SECOND))
        assert ours == pytest.approx(expected[fid.KEY_METRIC_FID], rel=1e-6)

    def test_agrees_with_a_matrix_square_root(self) -> None:
        a, b = FIRST.double().numpy(), SECOND.double().numpy()
        root = scipy.linalg.sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
        difference = a.mean(0) - b.mean(0)
        traces = np.trace(np.cov(a, rowvar=False)) + np.trace(np.cov(b, rowvar=False))
        expected = difference @ difference + traces - 2 * np.trace(root)
        assert frechet_distance(fit(FIRST), fit(SECOND)) == pytest.approx(expected, rel=1e-9)

    def test_fits_what_numpy_fits(self) -> None:
        gaussian = fit(FIRST)
        torch.testing.assert_close(
            gaussian.covariance, torch.from_numpy(np.cov(FIRST.double().numpy(), rowvar=False))
        )
        torch.testing.assert_close(gaussian.mean, FIRST.double().mean(dim=0))

    def test_identical_sets_are_at_distance_zero(self) -> None:
        assert frechet_distance(fit(FIRST), fit(FIRST)) == pytest.approx(0, abs=1e-10)

    def test_closed_form_of_commuting_gaussians(self) -> None:
        mean, scales = torch.linspace(-1, 1, 20).double(), torch.linspace(0.1, 2, 20).double()
        first = Gaussian(torch.zeros(20).double(), torch.eye(20).double())
        second = Gaussian(mean, torch.diag(scales**2))
        expected = mean.square().sum() + (scales - 1).square().sum()
        assert frechet_distance(first, second) == pytest.approx(expected.item(), rel=1e-12)

    def test_a_shift_adds_its_square(self) -> None:
        # The features' own rounding, 1e-7 of them, is what remains.
        assert frechet_distance(fit(FIRST.double() + 2), fit(FIRST)) == pytest.approx(4 * 96)

    def test_rank_deficient_covariances(self) -> None:
        """Fewer samples than dimensions: the exact value is a nuclear norm of small matrices."""
        a, b = features(40, 300, 2).double(), features(60, 300, 3).double()
        roots = [(x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
        overlap = torch.linalg.matrix_norm(roots[0] @ roots[1].T, ord="nuc")
        squares = sum(root.square().sum() for root in roots)
        expected = (a.mean(0) - b.mean(0)).square().sum() + squares - 2 * overlap
        assert frechet_distance(fit(a), fit(b)) == pytest.approx(expected.item(), rel=1e-9)

    def test_constant_images(self) -> None:
        constant = torch.full((50, 8), 3.0)
        assert frechet_distance(fit(constant), fit(constant)) == 0
        assert frechet_distance(fit(constant), fit(constant + 1)) == pytest.approx(8)

    def test_moments_do_not_depend_on_the_parts(self) -> None:
        moments = Moments(FIRST[0])
        for part in FIRST.split(217):
            moments.add(part)
        torch.testing.assert_close(moments.gaussian().covariance, fit(FIRST).covariance)

    def test_standard_error_is_that_of_repeated_draws(self) -> None:
        reference = fit(features(4000, 16, 50, spread=1.2))
        repeats = [frechet_estimate(features(800, 16, seed), reference) for seed in range(40)]
        true = torch.tensor([repeat.value for repeat in repeats]).std().item()
        typical = torch.tensor([repeat.standard_error for repeat in repeats]).mean().item()
        assert typical == pytest.approx(true, rel=0.3)

    def test_refusals(self) -> None:
        broken = FIRST.clone()
        broken[3, 5] = torch.nan
        with pytest.raises(UserError, match="features of 1 of 1500 images are NaN"):
            frechet_estimate(broken, fit(SECOND))
        with pytest.raises(UserError, match="at least 20 samples, here are 19"):
            frechet_estimate(FIRST[:19], fit(SECOND))
        with pytest.raises(UserError, match="different networks"):
            frechet_estimate(FIRST[:, :5], fit(SECOND))


class TestInceptionScore:
    logits = 3 * torch.randn(1003, 40, generator=torch.Generator().manual_seed(0))

    def test_agrees_with_torch_fidelity(self) -> None:
        isc = pytest.importorskip("torch_fidelity.metric_isc")
        expected = isc.isc_features_to_metric(self.logits, splits=10, shuffle=False)
        ours = inception_score(self.logits)
        assert ours.value == pytest.approx(expected[isc.KEY_METRIC_ISC_MEAN], rel=1e-12)
        std = expected[isc.KEY_METRIC_ISC_STD]
        assert ours.standard_error == pytest.approx(std / math.sqrt(10 - 1), rel=1e-9)

    def test_limits(self) -> None:
        sure = 1000 * torch.eye(10).repeat(20, 1)
        assert inception_score(sure).value == pytest.approx(10)
        assert inception_score(torch.zeros(200, 10)).value == pytest.approx(1)

    def test_refusals(self) -> None:
        with pytest.raises(UserError, match="at least 20 samples, here are 19"):
            inception_score(self.logits[:19])


class TestPrecisionRecall:
    @pytest.mark.parametrize("k", [1, 3])
    def test_agrees_with_torch_fidelity(self, k: int) -> None:
        prc = pytest.importorskip("torch_fidelity.metric_prc")
        expected = prc.calculate_precision_recall_full(FIRST, SECOND, neighborhood=k)
        ours = precision_recall(FIRST, SECOND, k)
        assert [e.value for e in ours] == pytest.approx(list(expected), rel=1e-6)
        assert 0.05 < ours[0].value < 0.99

    def test_agrees_with_all_pairs_in_double_precision(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("selfalign.evaluation.neighbours.TILE", 128)  # ragged tiles

        def radii(x: Tensor) -> Tensor:
            distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
            return distances.fill_diagonal_(torch.inf).kthvalue(3, dim=1).values

        a, b = FIRST.double(), SECOND.double()
        across = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        precision = (across <= radii(b)).any(dim=1).double().mean().item()
        recall = (across <= radii(a)[:, None]).any(dim=0).double().mean().item()
        ours = precision_recall(FIRST, SECOND)
        assert (ours[0].value, ours[1].value) == (precision, recall)
        torch.testing.assert_close(squared_radii(FIRST, 3).sqrt(), radii(a))

    def test_known_cases(self) -> None:
        precision, recall = precision_recall(FIRST, FIRST.clone())
        assert (precision.value, recall.value) == (1, 1)
        precision, recall = precision_recall(FIRST, FIRST + 100)
        assert (precision.value, recall.value) == (0, 0)
        constant = torch.full((20, 7), 0.1)  # every distance and every radius is zero
        precision, recall = precision_recall(constant, constant.clone())
        assert (precision.value, recall.value) == (1, 1)
        one_mode = FIRST[:1].repeat(50, 1)  # copies of one reference image
        precision, recall = precision_recall(one_mode, FIRST)
        assert (precision.value, recall.value) == (1, 1 / len(FIRST))

    def test_refusals(self) -> None:
        with pytest.raises(UserError, match="more than 3 samples, here are 3"):
            precision_recall(FIRST[:3], SECOND)
        with pytest.raises(UserError, match="NaN"):
            precision_recall(FIRST, SECOND * torch.nan)


class TestKernelDistance:
    def test_agrees_with_torch_fidelity(self) -> None:
        kid = pytest.importorskip("torch_fidelity.metric_kid")
        random = np.random.RandomState(2020)  # its order of draws
        subsets = []
        for _ in range(6):
            first = random.choice(len(FIRST), 1000, replace=False)
            second = random.choice(len(SECOND), 1000, replace=False)
            subsets.append((torch.from_numpy(first), torch.from_numpy(second)))
        # The same numbers, in the two types that it may be given them in: it computes its kernel in
        # the features' own type, and ours is always float64.
        single, double = (
            kid.kid_features_to_metric(
                FIRST.to(dtype), SECOND.to(dtype), kid_subsets=6, verbose=False
            )[kid.KEY_METRIC_KID_MEAN]
            for dtype in (torch.float32, torch.float64)
        )
        ours = kernel_distance(FIRST, SECOND, subsets)
        assert ours.value == pytest.approx(double, rel=1e-9)
        # On float32 features what differs is its own rounding.
        assert abs(ours.value - double) < 1e-3 * abs(single - double)

    def test_same_distribution_is_near_zero(self) -> None:
        first, second = features(2000, 32, 7), features(2000, 32, 8)
        subsets = draw_subsets(2000, 2000)[:10]
        estimate = kernel_distance(first, second, subsets)
        assert abs(estimate.value) < 4 * estimate.standard_error

    def test_refusals(self) -> None:
        with pytest.raises(UserError, match="at least 1000 reference images, here are 999"):
            draw_subsets(1000, 999)


class TestNearest:
    def test_finds_neighbours_across_parts(self) -> None:
        distances, indices = nearest(FIRST[:50], SECOND.split(300))
        expected = torch.cdist(FIRST[:50].double(), SECOND.double()).min(dim=1)
        torch.testing.assert_close(distances, expected.values)
        assert torch.equal(indices, expected.indices)

    def test_several_neighbours_across_parts(self) -> None:
        distances, indices = several_nearest(FIRST[:50], SECOND.split(300), 3)
        expected = torch.cdist(FIRST[:50].double(), SECOND.double()).topk(3, largest=False)
        torch.testing.assert_close(distances, expected.values)
        assert torch.equal(indices, expected.indices)
        alone, _ = several_nearest(FIRST[:2], [SECOND[:1]], 2)
        assert alone[:, 1].isinf().all()

    def test_copies_are_memorised_and_fresh_images_are_not(self) -> None:
        train, heldout, fresh = (features(1000, 24, seed) for seed in (10, 11, 12))
        copies = train[:400] + 0.1 * features(400, 24, 13)
        ratios = []
        for images in (copies, fresh, heldout):
            both, _ = several_nearest(images, [train], 2)
            ratios.append(both[:, 0] / both[:, 1])
        share, chance = memorisation(ratios[0], ratios[2])
        assert share.value > 0.99 and chance.value > 0.99
        share, chance = memorisation(ratios[1], ratios[2])
        assert share.value == pytest.approx(0.05, abs=0.03)
        assert chance.value == pytest.approx(0.5, abs=0.05)

    def test_a_dense_region_is_no_copy(self) -> None:
        """Samples nearer to training images than held-out ones are, and to many of them alike."""
        train, heldout = features(1000, 24, 10), features(1000, 24, 11)
        inner = 0.3 * features(500, 24, 12)
        both, _ = several_nearest(torch.cat([inner, heldout]), [train], 2)
        of_inner, of_heldout = (both[:, 0] / both[:, 1]).split([500, 1000])
        assert both[:500, 0].mean() < 0.9 * both[500:, 0].mean()
        assert memorisation(of_inner, of_heldout)[0].value < 0.08


class TestExtrapolation:
    """Sets of one distribution are at distance 0, however few there are."""

    def test_the_bias_is_gone(self) -> None:
        plain, extrapolated = [], []
        for seed in range(6):
            samples, reference = features(600, 16, 2 * seed), features(400, 16, 2 * seed + 1)
            plain.append(frechet_distance(fit(samples), fit(reference)))
            extrapolated.append(extrapolated_distance(samples, reference).value)
        assert min(plain) > 0.03
        assert abs(sum(extrapolated)) / 6 < 0.15 * sum(plain) / 6

    def test_a_difference_stays(self) -> None:
        shift = torch.zeros(16)
        shift[0] = 2.0
        samples, reference = features(600, 16, 0) + shift, features(400, 16, 1)
        estimate = extrapolated_distance(samples, reference)
        assert estimate.value == pytest.approx(4, abs=4 * estimate.standard_error + 0.4)

    def test_refusals(self) -> None:
        with pytest.raises(UserError, match="at least 80 samples, here are 79"):
            extrapolated_distance(features(79, 4, 0), features(400, 4, 1))
        with pytest.raises(UserError, match="at least 40 reference images, here are 39"):
            extrapolated_distance(features(80, 4, 0), features(39, 4, 1))


def test_class_consistency() -> None:
    estimate = class_consistency(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    assert estimate == from_share(0.75, 4)
    assert estimate.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / 4))
