"""Shrinkage: against a slow reference implementation, and on effects that are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from farms_tb.sparsity import allocate
from farms_tb.spectra.random_effects import shrunk_effects
from tests.reference import sparsity as reference

pytestmark = pytest.mark.filterwarnings("ignore:.*(epsilon|straight line|took no part|held at)")
ROLES = ("q", "k", "v", "o", "gate", "up", "down")


def alphas_of(effects: np.ndarray, noise: float, seed: int = 0) -> dict[str, float]:
    """Alphas of blocks: an effect of the block, an effect of the role, and noise."""
    rng = np.random.default_rng(seed)
    roles = np.linspace(1.8, 4.5, len(ROLES))
    found = {}
    for block, effect in enumerate(effects):
        for role, base in zip(ROLES, roles, strict=True):
            found[f"layers.{block}.{role}"] = float(base + effect + noise * rng.standard_normal())
    return found


def by_block(alphas: dict[str, float], **options: object) -> np.ndarray:
    plan = allocate(alphas, dict.fromkeys(alphas, 100), 0.7, method="shrinkage", epsilon=0.3, **options)
    return np.array([plan.sparsity[names[0]] for names in plan.blocks.values()])


@given(
    effects=st.lists(st.floats(-5, 5), min_size=2, max_size=12, unique=True),
    errors=st.lists(st.floats(0.05, 3), min_size=12, max_size=12),
)
@example(effects=[0.0, 2.25e-290], errors=[1.0] * 12)
def test_paule_mandel_matches_the_slow_reference(effects: list[float], errors: list[float]) -> None:
    errors = errors[: len(effects)]
    found = shrunk_effects(effects, errors)
    tau2, mean = reference.paule_mandel(effects, errors)
    assert found.tau**2 == pytest.approx(tau2, abs=1e-9)
    assert found.mean == pytest.approx(mean, abs=1e-8)
    for effect, error, shrunk in zip(effects, errors, found.effects, strict=True):
        weight = tau2 / (tau2 + error**2)
        assert shrunk == pytest.approx(mean + weight * (effect - mean), abs=1e-7)


def test_noise_alone_is_nearly_uniform() -> None:
    """Of twelve models without any effect, most get the uniform allocation, none a wide one."""
    spreads = []
    for seed in range(12):
        alphas = alphas_of(np.zeros(24), noise=0.2, seed=seed)
        spreads.append(np.ptp(by_block(alphas, errors=dict.fromkeys(alphas, 0.2))))
    assert np.median(spreads) < 0.02
    assert max(spreads) < 0.2
    wide = allocate(alphas, dict.fromkeys(alphas, 100), 0.7, epsilon=0.3).sparsity.values()
    assert max(wide) - min(wide) > 0.3


def test_clear_effects_reach_the_full_range() -> None:
    effects = np.random.default_rng(3).permutation(np.linspace(-1, 1, 16))
    alphas = alphas_of(effects, noise=0.01)
    found = by_block(alphas, errors=dict.fromkeys(alphas, 0.01))
    assert np.corrcoef(found, effects)[0, 1] > 0.999
    assert found.max() / found.min() == pytest.approx(1.3 / 0.7, rel=0.01)


@pytest.mark.parametrize("errors", [None, 0.05])
def test_one_wild_alpha_does_not_move_its_block(errors: float | None) -> None:
    """The issue that the plain mean has: an alpha of 41 in one of seven matrices."""
    effects = np.linspace(-0.5, 0.5, 30)
    alphas = alphas_of(effects, noise=0.05)
    known = None if errors is None else dict.fromkeys(alphas, errors)
    clean = by_block(alphas, errors=known)
    alphas["layers.3.v"] = 41.0
    assert np.abs(by_block(alphas, errors=known) - clean).max() < 0.02


def test_a_wide_error_draws_a_block_to_the_mean() -> None:
    effects = np.linspace(-1, 1, 11)
    alphas = alphas_of(effects, noise=0.02)
    errors = dict.fromkeys(alphas, 0.05)
    sure = by_block(alphas, errors=errors)
    errors |= {name: 5.0 for name in alphas if name.startswith("layers.10.")}
    unsure = by_block(alphas, errors=errors)
    assert sure[10] == max(sure)
    assert abs(unsure[10] - 0.7) < 0.25 * abs(sure[10] - 0.7)


def test_blocks_of_other_roles_are_compared_by_role() -> None:
    """A hybrid: every other block lacks q and k, whose alphas are small, and is no worse for it."""
    alphas = alphas_of(np.zeros(12), noise=0.03)
    hybrid = {n: a for n, a in alphas.items() if not (n[-1] in "qk" and int(n.split(".")[1]) % 2)}
    assert np.ptp(by_block(hybrid, errors=dict.fromkeys(hybrid, 0.03))) < 0.05


def test_a_few_units_and_matrices() -> None:
    one = {"layers.0.q": 2.0, "layers.0.k": 4.0}
    assert set(by_block(one, blocks=["layers.*"])) == {0.7}
    matrices = {f"m{i}": 2.0 + i for i in range(5)}
    sizes = dict.fromkeys(matrices, 10)
    plan = allocate(matrices, sizes, 0.5, method="shrinkage", epsilon=0.1, granularity="matrix")
    shares = list(plan.sparsity.values())
    assert shares == sorted(shares)
    assert shares[-1] / shares[0] == pytest.approx(1.1 / 0.9)
