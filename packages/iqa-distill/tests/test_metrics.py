import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iqa_distill.metrics import bootstrap_gain, correlations, fit_logistic, krcc, plcc, rmse, srcc
from scipy import stats

GOLDEN = json.loads((Path(__file__).parent / "golden" / "metrics.json").read_text())
PREDICTIONS, MOS = np.array(GOLDEN["pred"]), np.array(GOLDEN["mos"])


class TestCorrelations:
    def test_golden(self):
        found = correlations(PREDICTIONS, MOS)
        assert found["srcc"] == pytest.approx(GOLDEN["srcc"], abs=1e-6)
        assert found["krcc"] == pytest.approx(GOLDEN["krcc_tau_b"], abs=1e-6)
        assert found["plcc"] == pytest.approx(GOLDEN["plcc_raw"], abs=1e-6)
        assert rmse(PREDICTIONS, MOS) == pytest.approx(GOLDEN["rmse_raw"], abs=1e-6)
        assert found["plcc_fitted"] == pytest.approx(GOLDEN["plcc_logistic4"], abs=1e-4)
        assert found["rmse_fitted"] == pytest.approx(GOLDEN["rmse_logistic4"], abs=1e-4)

    @given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30))
    @settings(max_examples=50, deadline=None)
    def test_ties_as_scipy(self, pairs):
        x, y = np.array(pairs, float).T
        if np.ptp(x) and np.ptp(y):
            assert srcc(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)
            assert krcc(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-9)
            assert plcc(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)

    @pytest.mark.parametrize("measure", [srcc, krcc, plcc])
    def test_equal_predictions_give_nan_and_a_warning_never_zero(self, measure):
        with pytest.warns(UserWarning, match="all predictions are equal"):
            assert np.isnan(measure([0.3, 0.3, 0.3], [1.0, 2.0, 3.0]))
        with pytest.warns(UserWarning, match="all scores are equal"):
            assert np.isnan(measure([1.0, 2.0, 3.0], [5, 5, 5]))

    def test_all_at_once_of_equal_predictions_is_nan_with_one_warning(self):
        with pytest.warns(UserWarning, match="correlations: all predictions are equal") as said:
            found = correlations(np.ones(9), np.arange(9))
        assert len(said) == 1
        assert np.isnan(list(found.values())).all()

    def test_an_inverted_metric_is_told(self):
        with pytest.warns(UserWarning, match=r"SRCC is -0\.940.*does not show"):
            found = correlations(-PREDICTIONS, MOS)
        assert found["srcc"] == pytest.approx(-GOLDEN["srcc"])
        assert found["plcc_fitted"] == pytest.approx(GOLDEN["plcc_logistic4"], abs=1e-3)  # positive: the trap

    @pytest.mark.parametrize("measure", [srcc, krcc, plcc, rmse, fit_logistic, correlations])
    def test_what_cannot_be_compared(self, measure):
        with pytest.raises(ValueError, match="2 images: a correlation needs at least 3"):
            measure([1, 2], [1, 2])
        with pytest.raises(ValueError, match=r"\(3,\) and scores \(4,\)"):
            measure([1, 2, 3], [1, 2, 3, 4])
        with pytest.raises(ValueError, match="1 predictions are NaN or infinite, the first at row 1"):
            measure([1, np.nan, 3], [1, 2, 3])
        with pytest.raises(ValueError, match="scores are NaN or infinite, the first at row 2"):
            measure([1, 2, 3], [1, 2, np.inf])


class TestFit:
    def test_five_parameters_converge_where_pyiqas_start_fails(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit = fit_logistic(PREDICTIONS, MOS, 5)
        assert fit.kind == "logistic5"
        assert fit.plcc >= GOLDEN["plcc_logistic4"] - 1e-3

    @pytest.mark.parametrize("parameters", [4, 5])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_a_logistic_is_found_whatever_the_units(self, parameters, sign):
        x = np.linspace(-4, 6, 40)
        y = sign * 1e4 / (1 + np.exp(-1.5 * (x - 1))) + 7e5
        fit = fit_logistic(1e-3 * x + 50, y, parameters)
        assert fit.plcc == pytest.approx(1, abs=1e-6)
        assert fit.rmse < 1
        assert np.allclose(fit.predict(1e-3 * x + 50), y, rtol=1e-5)

    @pytest.mark.parametrize("parameters", [4, 5])
    def test_noise_gives_numbers(self, parameters):
        random = np.random.default_rng(0)
        for _ in range(5):
            fit = fit_logistic(random.normal(size=12), random.normal(size=12), parameters)
            assert 0 <= fit.plcc <= 1
            assert np.isfinite(fit.rmse)

    def test_few_images_get_a_line_and_a_warning(self):
        with pytest.warns(UserWarning, match="these 3 images no better than a line"):
            fit = fit_logistic([1, 2, 4], [3, 5, 9])
        assert fit.kind == "linear"
        assert fit.plcc == pytest.approx(1)
        assert fit.predict([8.0]) == pytest.approx(17)

    @pytest.mark.filterwarnings("ignore:a logistic")
    def test_a_flat_line_explains_nothing(self):
        assert fit_logistic([1, 2, 3], [1, 2, 1]).plcc == pytest.approx(0, abs=1e-6)

    def test_nothing_to_fit(self):
        with pytest.raises(ValueError, match="all predictions are 1: there is nothing to fit"):
            fit_logistic([1, 1, 1], [1, 2, 3])
        with pytest.raises(ValueError, match="parameters must be 4 or 5, got 3"):
            fit_logistic([1, 2, 3], [1, 2, 3], 3)


class TestBootstrap:
    SCORES = np.random.default_rng(0).normal(size=80)
    GOOD = SCORES + 0.3 * np.random.default_rng(1).normal(size=80)
    POOR = SCORES + 2.0 * np.random.default_rng(2).normal(size=80)

    def test_the_interval_is_about_the_gain_and_repeats(self):
        gain, low, high = bootstrap_gain(self.GOOD, self.POOR, self.SCORES, n=300)
        assert gain == pytest.approx(srcc(self.GOOD, self.SCORES) - srcc(self.POOR, self.SCORES))
        assert 0 < low < gain < high
        assert (gain, low, high) == bootstrap_gain(self.GOOD, self.POOR, self.SCORES, n=300)
        assert bootstrap_gain(self.POOR, self.GOOD, self.SCORES, n=300) == pytest.approx((-gain, -high, -low))

    def test_it_is_paired(self):
        assert bootstrap_gain(self.POOR, self.POOR, self.SCORES, n=20) == (0, 0, 0)

    def test_whole_groups_are_drawn(self):
        groups = ["a"] * 40 + ["b"] * 40  # two groups: three different resamples
        _, low, high = bootstrap_gain(self.GOOD, self.POOR, self.SCORES, groups, n=100)
        gains = [
            srcc(self.GOOD[s], self.SCORES[s]) - srcc(self.POOR[s], self.SCORES[s]) for s in (slice(40), slice(40, 80))
        ]
        assert (low, high) == pytest.approx((min(gains), max(gains)), abs=2e-3)
        with pytest.raises(ValueError, match="2 groups for 80 images"):
            bootstrap_gain(self.GOOD, self.POOR, self.SCORES, ["a", "b"])

    def test_no_interval(self):
        with pytest.raises(ValueError, match="there is no interval"):
            bootstrap_gain([1, 1, 1], [1, 2, 3], [1, 2, 3], n=5)
