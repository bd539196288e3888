"""The three fits: known answers, the slow implementation on all sorts of samples, and samples without a fit."""

import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from farms_tb.spectra import power_law
from farms_tb.spectra.power_law import FLAT_ALPHA, fit_power_law
from tests.reference import search, spectrum

FITS = ["median", "goodness-of-fit", "xmin_peak"]
# Searched fits whose D differ by less may choose either tail.
TIE = 1e-6


def sample(*values):
    return torch.tensor([values], dtype=torch.float64)


def pareto(alpha, number, seed=0):
    """Random draws from the law lam^(-alpha) for lam above 1."""
    draws = torch.rand(number, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (draws ** (-1 / (alpha - 1))).sort().values[None]


def assert_same_fit(values, fit, xmin_pos=2.0, first=0):
    """Compare with the slow implementation; of two tails that fit equally well, either is right."""
    counted = values[first:]
    found = fit_power_law(sample(*values), fit, xmin_pos, torch.tensor([first]))
    alpha, distance = found.alpha.item(), found.ks_distance.item()
    wanted, wanted_distance = spectrum.fit(counted, fit, xmin_pos)
    context = f"{fit} of {counted}: {alpha}, {distance} against {wanted}, {wanted_distance}"
    if wanted is None or wanted > FLAT_ALPHA:
        assert math.isnan(alpha), context
        assert math.isnan(distance), context
        return
    assert distance == pytest.approx(wanted_distance, abs=TIE), context
    start = found.tail_start.item() - first
    assert alpha == pytest.approx(spectrum.hill(counted, start), rel=1e-8), context
    assert distance == pytest.approx(spectrum.ks_distance(counted, start, alpha), abs=1e-8), context
    if fit == "median":
        assert start == int(len(counted) / xmin_pos), context
    if fit == "xmin_peak":
        low, high = spectrum.peak_range(counted)
        assert low <= counted[start] <= high, context


@pytest.mark.parametrize("fit", ["median", "goodness-of-fit"])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 3.0, 5.0])
def test_pareto_samples_give_back_their_exponent(fit, alpha):
    found = fit_power_law(pareto(alpha, 4000), fit)
    assert found.alpha.item() == pytest.approx(alpha, rel=0.08)
    assert found.ks_distance.item() < 0.03


def test_pareto_tail_above_other_values_is_found():
    body = torch.linspace(0.01, 0.99, 1000, dtype=torch.float64)[None]
    found = fit_power_law(torch.cat([body, pareto(2.5, 1000)], -1), "goodness-of-fit")
    assert found.alpha.item() == pytest.approx(2.5, rel=0.08)
    assert 900 <= found.tail_start.item() <= 1300


def test_four_doublings_by_hand():
    # The tail is 4, 8: alpha = 1 + 2 / ln 2, and D is at 8: 1 - 2^(-2 / ln 2) - 1/2.
    found = fit_power_law(sample(1, 2, 4, 8))
    assert found.alpha.item() == pytest.approx(1 + 2 / math.log(2))
    assert found.ks_distance.item() == pytest.approx(0.5 - math.exp(-2))
    assert found.tail_start.item() == 2


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [2, 3, 5, 8, 30])
def test_random_samples_match_the_slow_implementation(fit, size):
    for seed in range(10):
        generator = torch.Generator().manual_seed(100 * size + seed)
        normal = torch.randn(size, dtype=torch.float64, generator=generator)
        for values in (normal.square(), normal.exp(), (4 * normal).exp(), normal.abs() + 1e-3):
            assert_same_fit(values.sort().values.tolist(), fit)


@pytest.mark.parametrize("fit", FITS)
@given(
    values=st.lists(st.floats(1e-12, 1e12), min_size=2, max_size=25),
    zeros=st.integers(0, 5),
    xmin_pos=st.floats(1.01, 8),
)
@settings(max_examples=150)
def test_any_sample_matches_the_slow_implementation(fit, values, zeros, xmin_pos):
    assert_same_fit([0.0] * zeros + sorted(values), fit, xmin_pos)


@pytest.mark.parametrize("fit", FITS)
@given(
    values=st.lists(st.sampled_from([0.0, 1e-9, 0.5, 1.0, 1.7, 3.1, 100.0]), min_size=2, max_size=25),
)
@settings(max_examples=150)
def test_tied_values_match_the_slow_implementation(fit, values):
    if max(values) > 0:
        assert_same_fit(sorted(values), fit)


@pytest.mark.parametrize("fit", FITS)
@given(
    values=st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=20),
    junk=st.lists(st.floats(0, 1e-7), max_size=10),
)
@settings(max_examples=100)
def test_values_before_first_are_ignored(fit, values, junk):
    assert_same_fit(sorted(junk) + sorted(values), fit, first=len(junk))


@pytest.mark.parametrize("xmin_pos", [1.1, 1.2, 2.2, 2.4, 3.0, 3.3])
def test_median_tail_starts_at_the_truncated_quotient(xmin_pos):
    # 18 / 1.2 and 33 / 2.2 are 15: a quotient in single precision would start a place too early.
    for size in range(5, 70):
        values = torch.rand(1, size, dtype=torch.float64).sort().values
        assert fit_power_law(values, "median", xmin_pos).tail_start.item() == int(size / xmin_pos), size


def test_samples_are_fitted_independently():
    rows = torch.rand(7, 40, dtype=torch.float64).sort(-1).values
    first = torch.tensor([0, 3, 0, 10, 1, 30, 35])
    for fit in FITS:
        together = fit_power_law(rows, fit, first=first)
        for index in range(7):
            alone = fit_power_law(rows[index : index + 1], fit, first=first[index : index + 1])
            for all_rows, one_row in zip(together, alone, strict=True):
                torch.testing.assert_close(all_rows[index : index + 1], one_row, equal_nan=True)


@pytest.mark.parametrize("fit", ["goodness-of-fit", "xmin_peak"])
def test_search_in_chunks_finds_the_same(fit, monkeypatch):
    rows = torch.rand(3, 50, dtype=torch.float64).sort(-1).values
    whole = fit_power_law(rows, fit)
    monkeypatch.setattr(power_law, "_SEARCH_BYTES", 8 * 3 * 50 * 7)
    for one, other in zip(whole, fit_power_law(rows, fit), strict=True):
        assert torch.equal(one, other)


def bulk(number, seed=0):
    """Eigenvalues of random matrices, as many as it takes."""
    matrices = torch.randn(number // 50 + 1, 50, 50, generator=torch.Generator().manual_seed(seed)).double()
    return torch.linalg.svdvals(matrices).square().flatten()[:number].sort().values[None]


SPECTRA = {
    "random": bulk,
    "power law": lambda number: pareto(2.5, number),
    "exact power law": lambda number: torch.arange(number, 0, -1, dtype=torch.float64)[None] ** -0.5,
    # What training makes of random weights: a heavy tail on top of a bulk.
    "trained": lambda number: (
        torch.cat([bulk(number - number // 5), 60 * pareto(1.8, number // 5)], -1).sort().values
    ),
    "log-normal": lambda number: (3 * torch.randn(1, number, dtype=torch.float64)).exp().sort().values,
    "uniform": lambda number: torch.rand(1, number, dtype=torch.float64).sort().values,
    "tied": lambda number: (100 * pareto(2.5, number)).log().round(decimals=1).exp(),
    "nearly flat": lambda number: 1 + 1e-3 * torch.rand(1, number, dtype=torch.float64).sort().values,
    "low rank": lambda number: torch.cat([torch.zeros(1, number // 2), bulk(number - number // 2)], -1),
}


class TestSearch:
    """A search that skips what cannot win finds what a search of everything finds."""

    @staticmethod
    def assert_finds_all_there_is(values, fit, first=None):
        found = fit_power_law(values, fit, first=first)
        with mock.patch.object(power_law, "_search", search.distances):
            expected = fit_power_law(values, fit, first=first)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=0, equal_nan=True)

    @pytest.mark.parametrize("fit", ["goodness-of-fit", "xmin_peak"])
    @pytest.mark.parametrize("kind", SPECTRA)
    def test_large_samples(self, kind, fit):
        self.assert_finds_all_there_is(SPECTRA[kind](1500), fit)

    def test_several_samples_at_once(self):
        values = torch.cat([make(700) for make in SPECTRA.values()])
        first = torch.arange(len(values)) * 60
        for fit in ("goodness-of-fit", "xmin_peak"):
            self.assert_finds_all_there_is(values, fit, first)

    @pytest.mark.parametrize("fit", ["goodness-of-fit", "xmin_peak"])
    @given(
        values=st.lists(
            st.one_of(st.floats(1e-6, 1e6), st.sampled_from([0.0, 0.5, 1.0, 1.7, 3.1, 100.0])),
            min_size=2,
            max_size=60,
        ),
    )
    @settings(max_examples=150)
    def test_any_sample(self, fit, values):
        with mock.patch.multiple(power_law, _FIRST_POINTS=2, _GROWTH=2):
            self.assert_finds_all_there_is(sample(*sorted(values)), fit)

    @pytest.mark.parametrize("kind", SPECTRA)
    def test_looks_at_few_points(self, kind):
        size, looked_at = 20_000, 0
        distances = power_law._ks_distances

        def count(logs, alphas, tails, points):
            nonlocal looked_at
            looked_at += int(tails.sum()) * min(points, size)
            return distances(logs, alphas, tails, points)

        with mock.patch.object(power_law, "_ks_distances", count):
            fit_power_law(SPECTRA[kind](size), "goodness-of-fit")
        # A twentieth at most: everything would be 10 000 points a tail on average.
        assert 32 * size / 2 < looked_at < 500 * size

    def test_as_much_memory_as_it_is_given(self):
        largest = 0
        exponential = torch.Tensor.exp

        def watch(values):
            nonlocal largest
            largest = max(largest, values.nbytes)
            return exponential(values)

        values = bulk(5000)
        with mock.patch.object(power_law, "_SEARCH_BYTES", 2**17), mock.patch.object(torch.Tensor, "exp", watch):
            fit_power_law(values, "goodness-of-fit")
        assert 2**16 < largest <= 2**17


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(
    "values",
    [
        pytest.param([1.0] * 8, id="equal"),
        pytest.param([1 + 1e-9 * i for i in range(8)], id="equal but for rounding"),
        pytest.param([0.0] * 7 + [3.0], id="rank one"),
        pytest.param([0.0] * 8, id="zeros"),
        pytest.param([2.0], id="one value"),
    ],
)
def test_no_fit(fit, values):
    found = fit_power_law(sample(*values), fit)
    assert found.alpha.isnan().all()
    assert found.ks_distance.isnan().all()


def test_zeros_below_the_tail_do_no_harm():
    assert fit_power_law(sample(0, 0, 0, 1, 2, 3, 5, 9)).alpha.item() == pytest.approx(
        spectrum.hill([2, 3, 5, 9], 0)
    )


def test_xmin_peak_looks_above_the_logarithm_of_the_peak():
    # A law from 2.5 upwards under a bump at p = 100: the range is log10(95) = 1.98 to 150, not 95 to 150.
    law = 2.5 * torch.linspace(1, 0.005, 200, dtype=torch.float64) ** -0.5
    values = torch.cat([law, torch.linspace(100, 100.1, 30, dtype=torch.float64)])[None]
    assert spectrum.histogram_peak(values[0].tolist()) == pytest.approx(100, rel=0.05)
    found = fit_power_law(values, "xmin_peak")
    assert 1.98 < values[0, found.tail_start].item() < 90


@pytest.mark.parametrize("fit", ["median", "goodness-of-fit"])  # xmin_peak compares a logarithm with plain values
@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e3, 1e12])
def test_alpha_does_not_depend_on_scale(fit, scale):
    values = pareto(2.3, 300)
    found = fit_power_law(values * scale, fit).alpha.item()
    assert found == pytest.approx(fit_power_law(values, fit).alpha.item(), rel=1e-9)


def test_default_dtype_does_not_matter():
    values = torch.rand(1, 18, dtype=torch.float64).sort().values
    wanted = fit_power_law(values, "goodness-of-fit")
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        found = fit_power_law(values, "goodness-of-fit")
    finally:
        torch.set_default_dtype(default)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
