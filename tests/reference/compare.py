"""The assertion that every comparison of figures goes through."""

from __future__ import annotations

import math
from collections.abc import Mapping

FIGURES = (
    "alpha",
    "ks_distance",
    "alpha_hat",
    "spectral_norm",
    "norm",
    "pooled_stable_rank",
    "norm_stable_rank",
    "entropy",
    "num_eigenvalues",
)


def figures(record) -> dict[str, float | None]:
    """The figures of a record as a dict."""
    return {name: getattr(record, name) for name in FIGURES}


def alphas(report) -> dict[str, dict[str, float | None]]:
    """The alphas of a report, for `assert_same_figures`."""
    return {name: {"alpha": alpha} for name, alpha in report.alphas.items()}


def assert_same_figures(
    actual: Mapping[str, Mapping[str, float | None]],
    expected: Mapping[str, Mapping[str, float | None]],
    rtol: float = 1e-9,
    atol: float = 1e-12,
    ks_atol: float | None = None,
) -> None:
    """Compare the figures of layers, and show those that differ.

    Args:
        actual: layer to figure to value.
        expected: the same; figures that it lacks are not compared.
        rtol: relative tolerance.
        atol: absolute tolerance.
        ks_atol: absolute tolerance of the KS distance, where it is another one.
    """
    assert list(actual) == list(expected), f"layers differ: {list(actual)} against {list(expected)}"
    lines = []
    for layer, wanted in expected.items():
        for name, value in wanted.items():
            got = actual[layer][name]
            absolute = ks_atol if ks_atol is not None and name == "ks_distance" else atol
            if not _close(got, value, rtol, absolute):
                error = abs(got / value - 1) if got is not None and value else math.nan
                lines.append(f"{layer}: {name} is {got!r}, expected {value!r} (relative error {error:.1e})")
    assert not lines, f"{len(lines)} figure(s) differ:\n" + "\n".join(lines)


def _close(got: float | None, wanted: float | None, rtol: float, atol: float) -> bool:
    if got is None or wanted is None:
        return got is wanted
    return math.isclose(got, wanted, rel_tol=rtol, abs_tol=atol)
