"""The 1D flow solver against exact solutions, and the random flows made with it."""

from __future__ import annotations

import numpy as np
import pytest

from recipes.generate.cfd1d import CFD1DSpec, random_flow, random_wave
from recipes.generate.flow import PRESSURE_FLOOR, Gas, conserved, hllc_flux, simulate
from tests.reference.riemann import State, exact_riemann, star_state

AIR = 1.4
# left, right, time, place of the jump: Toro's tests, chapter 4; then pressure and velocity between the waves
TUBES = {
    "Sod": (State(1, 0, 1), State(0.125, 0, 0.1), 0.2, 0.5, (0.30313, 0.92745)),
    "near vacuum": (State(1, -2, 0.4), State(1, 2, 0.4), 0.15, 0.5, (0.00189, 0.0)),
    "strong shock": (State(1, 0, 1000), State(1, 0, 0.01), 0.012, 0.5, (460.894, 19.5975)),
    "collision": (
        State(5.99924, 19.5975, 460.894),
        State(5.99242, -6.19633, 46.095),
        0.035,
        0.4,
        (1691.64, 8.68975),
    ),
}


def centres(n: int) -> np.ndarray:
    return (np.arange(n) + 0.5) / n


def tube(name: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Computed and exact state at the end of a shock tube on [0, 1], both (3, n)."""
    left, right, time, jump, _ = TUBES[name]
    x = centres(n)
    initial = np.where(x < jump, np.array(left)[:, None], np.array(right)[:, None])[:, None]
    made = simulate(initial, np.array([0.0, time]), Gas(1 / n, gamma=AIR, periodic=False))[:, 0, -1]
    return made, exact_riemann(left, right, (x - jump) / time, AIR)


def sound_wave(n: int, viscosity: float, density: float = 2.0) -> float:
    """Rate at which a weak sound wave of length 1 and speed 1 decays."""
    gas = Gas(1 / n, viscosity)
    x, height = centres(n), 1e-5
    wave = height * np.sin(2 * np.pi * x)
    initial = np.stack([density * (1 + wave), wave, density / gas.gamma * (1 + gas.gamma * wave)])[:, None]
    velocity = simulate(initial, np.array([0.0, 1.0, 2.0]), gas)[1, 0]
    heights = np.abs(velocity @ np.exp(-2j * np.pi * x))
    return float(np.log(heights[1] / heights[2]))


@pytest.mark.parametrize("name", TUBES)
def test_exact_solver_gives_the_published_states(name: str) -> None:
    left, right, _, _, expected = TUBES[name]
    np.testing.assert_allclose(star_state(left, right, AIR), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", TUBES)
def test_shock_tubes_converge_to_the_exact_solution(name: str) -> None:
    errors = []
    for n in (50, 100, 200):
        made, exact = tube(name, n)
        assert made[0].min() > 0
        assert made[2].min() > 0
        errors.append(np.abs(made - exact).mean(axis=1) / np.abs(exact).mean(axis=1))
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:])).mean(axis=0)
    assert (orders > 0.6).all(), orders  # 1 in theory for shocks, 2/3 for contacts
    assert (errors[-1] < {"Sod": 0.012, "collision": 0.022}.get(name, 0.085)).all(), errors[-1]


def test_states_between_the_waves_of_sods_tube() -> None:
    made, exact = tube("Sod", 400)
    x = centres(400)
    for start, end in ((0.55, 0.63), (0.72, 0.82)):  # before and behind the contact
        inside = (x > start) & (x < end)
        np.testing.assert_allclose(made[:, inside], exact[:, inside], rtol=2e-4)


def test_flux_of_a_supersonic_flow_is_that_of_its_side() -> None:
    state = np.array([1.0, 5.0, 1.0])
    other = np.array([0.5, 4.0, 0.7])
    energy = 1.0 / (AIR - 1) + 12.5
    expected = [5.0, 26.0, 5 * (energy + 1)]
    np.testing.assert_allclose(hllc_flux(state, other, AIR), expected, rtol=1e-14)
    mirror = np.array([1.0, -1.0, 1.0])
    np.testing.assert_allclose(hllc_flux(mirror * other, mirror * state, AIR), -mirror * expected, rtol=1e-14)


def test_standing_contact_stays() -> None:
    density = np.where(np.abs(centres(50) - 0.5) < 0.2, 5.0, 1.0)
    initial = np.stack([density, 0 * density, 0 * density + 1])[:, None]
    made = simulate(initial, np.array([0.0, 1.0]), Gas(0.02, viscosity=0.01))
    np.testing.assert_allclose(made[:, :, 1], initial, atol=1e-13)


def test_smooth_density_wave_is_carried_with_second_order() -> None:
    errors = []
    for n in (64, 128, 256):
        density = 2 + np.sin(2 * np.pi * centres(n)) * np.sinc(1 / n)  # means over the cells
        initial = np.stack([density, np.ones(n), np.ones(n)])[:, None]
        made = simulate(initial, np.array([0.0, 1.0]), Gas(1 / n, gamma=AIR))[:, 0, -1]
        np.testing.assert_allclose(made[1:], 1.0, atol=1e-13)
        errors.append(np.abs(made[0] - density).mean())
    orders = np.log2(np.array(errors[:-1]) / np.array(errors[1:]))
    assert (orders > 1.95).all(), orders


@pytest.mark.parametrize("viscosity", [0.003, 0.01])
def test_sound_decays_at_stokes_rate(viscosity: float) -> None:
    expected = viscosity * (2 * np.pi) ** 2 / 2
    errors = [abs(sound_wave(n, viscosity) - expected) for n in (32, 64, 128)]
    assert errors[-1] < 2e-3 * expected
    assert errors[0] > 3.5 * errors[1] > 12 * errors[2]


def test_viscosity_is_kinematic() -> None:
    """A dense gas decays at the same rate; with a dynamic viscosity it would take longer."""
    assert sound_wave(64, 0.01, density=8.0) == pytest.approx(sound_wave(64, 0.01, density=2.0), rel=1e-6)


def test_many_subcycles_follow_the_heat_equation() -> None:
    """With much viscosity a step has many cycles, and a slow flow decays like heat: at second order, over all."""
    viscosity, time, errors = 5.0, 0.01, []
    for n in (16, 32, 64):
        slow = 1e-3 * np.sin(2 * np.pi * centres(n))
        initial = np.stack([np.ones(n), slow, np.full(n, 1e-3)])[:, None]
        made = simulate(initial, np.array([0.0, time]), Gas(1 / n, viscosity))[1, 0, -1]
        errors.append(np.abs(made / slow - np.exp(-viscosity * (2 * np.pi) ** 2 * time)).max())
    assert errors[-1] < 1e-3
    assert errors[0] > 3.5 * errors[1] > 12 * errors[2]


def random_states(samples: int, n: int) -> np.ndarray:
    x = CFD1DSpec(points=n).coordinates["x-coordinate"]
    return np.stack([random_flow(np.random.default_rng(seed), x) for seed in range(samples)], axis=1)


def test_mass_momentum_and_energy_are_conserved() -> None:
    gas = Gas(2 / 64, viscosity=0.05)
    made = simulate(random_states(5, 64), np.linspace(0, 0.5, 6), gas)
    totals = conserved(made.reshape(3, -1, 64), gas).mean(axis=-1).reshape(3, 5, 6)
    scale = np.abs(made).max(axis=(2, 3)) * np.array([1.0, 20.0, 1.0])[:, None]
    np.testing.assert_allclose((totals - totals[..., :1]) / scale[..., None], 0, atol=1e-13)


def test_viscosity_turns_motion_into_heat() -> None:
    """Kinetic energy decays, the entropy of the whole never does."""
    gas = Gas(2 / 64, viscosity=0.5)
    density, velocity, pressure = simulate(random_states(4, 64), np.linspace(0, 0.5, 11), gas)
    entropy = (density * np.log(pressure / density**gas.gamma)).sum(axis=-1)
    assert (np.diff(entropy) > -1e-9).all()
    kinetic = (
        density * (velocity - (density * velocity).mean(-1, keepdims=True) / density.mean(-1, keepdims=True)) ** 2
    ).sum(-1)
    assert (kinetic[:, -1] < 0.05 * kinetic.max(axis=1)).all()


def test_uniform_flow_stays_uniform() -> None:
    initial = np.ones((3, 2, 32)) * np.array([[3.0], [-1.7], [0.2]])[..., None]
    made = simulate(initial, np.linspace(0, 1, 4), Gas(1 / 32, viscosity=0.1))
    np.testing.assert_allclose(made, np.broadcast_to(initial[:, :, None], made.shape), rtol=1e-13)


def test_mirrored_flow_is_mirrored() -> None:
    initial, gas, times = random_states(3, 48), Gas(2 / 48, viscosity=0.02), np.array([0.0, 0.2])
    mirror = np.array([1.0, -1.0, 1.0])[:, None, None]
    made = simulate(initial, times, gas)
    mirrored = simulate(mirror * initial[..., ::-1], times, gas)
    np.testing.assert_allclose(mirrored, mirror[..., None] * made[..., ::-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("viscosity", [0.0, 0.05])
def test_hard_cases_stay_positive(viscosity: float) -> None:
    """Gas torn apart faster than sound, jumps of pressure by ten million, noise at the floor."""
    rng = np.random.default_rng(0)
    x = centres(64)
    torn = [np.ones(64), 20 * np.sign(x - 0.5), np.full(64, 0.4)]
    blast = [np.ones(64), 0 * x, np.where(np.abs(x - 0.5) < 0.1, 1e4, 1e-3)]
    light = [np.where(x < 0.5, 0.03, 30.0), 0 * x, np.where(x < 0.5, 1e2, 1e-2)]
    noise = [10 ** rng.uniform(-1.5, 1.5, 64), rng.normal(0, 10, 64), 10 ** rng.uniform(-4, 4, 64)]
    initial = np.array([torn, blast, light, noise]).transpose(1, 0, 2)
    made = simulate(initial, np.array([0.0, 0.002, 0.02]), Gas(1 / 64, viscosity))
    assert np.isfinite(made).all()
    assert made[0].min() > 0
    assert made[2].min() > 0.99 * PRESSURE_FLOOR


def test_broken_state_is_an_error() -> None:
    initial = np.ones((3, 1, 16))
    initial[0, 0, 3] = np.nan
    with pytest.raises(FloatingPointError, match="broke down at time 0"):
        simulate(initial, np.array([0.0, 1.0]), Gas(1 / 16))


def test_sample_is_the_same_in_any_batch() -> None:
    spec = CFD1DSpec(points=37)
    together = spec.make(range(5))
    alone = [spec.make(range(index, index + 1)) for index in range(5)]
    for name, values in together.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, np.concatenate([one[name] for one in alone]))
    assert not np.array_equal(together["density"][0], together["density"][1])
    assert not np.array_equal(together["density"], CFD1DSpec(points=37, seed=1).make(range(5))["density"])


def test_one_seed_is_one_flow_at_every_resolution() -> None:
    coarse, fine = (CFD1DSpec(points=n, eta=0.1, zeta=0.1).make(range(2)) for n in (64, 192))
    for name in coarse:
        nearby = fine[name][..., 1::3]
        assert np.sqrt(np.square(coarse[name] - nearby).mean() / np.square(nearby).mean()) < 0.05


def test_random_flows_have_the_described_distribution() -> None:
    x = CFD1DSpec(points=256).coordinates["x-coordinate"]
    waves = np.array([random_wave(np.random.default_rng(seed), x) for seed in range(2000)])
    windowed = (np.abs(waves[:, x < 0]).max(axis=1) < 1e-6).mean()
    one_signed = ((waves >= 0).all(axis=1) | (waves <= 0).all(axis=1)) & (np.abs(waves[:, 0]) > 0)
    assert windowed == pytest.approx(0.5, abs=0.04)
    assert np.abs(waves).max() <= 2
    assert one_signed.mean() == pytest.approx(0.05, abs=0.015)  # folded, and not windowed
    unwindowed = waves[np.abs(waves[:, x < 0]).max(axis=1) >= 1e-6]
    power = np.abs(np.fft.rfft(unwindowed[((unwindowed > 0).any(1)) & ((unwindowed < 0).any(1))])) ** 2
    assert power[:, 4:].sum() < 1e-9 * power.sum()  # whole waves: periodic, numbers 1 to 3 alone
    assert (power[:, 1:4].mean(axis=0) > 0.2 * power.mean(axis=0).max()).all()

    flows = np.array([random_flow(np.random.default_rng(seed), x) for seed in range(500)])
    for field, low, high in ((flows[:, 0], 1, 10), (flows[:, 2], 10, 100)):
        base, height = field.min(axis=1), np.ptp(field, axis=1)
        for draw in (base, height):
            assert low <= draw.min() * (1 + 1e-9)
            assert draw.max() <= high * (1 + 1e-9)
            assert np.log(draw / low).mean() == pytest.approx(np.log(high / low) / 2, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"points": 7}, "points must be at least 8"),
        ({"eta": -0.1}, "eta must be 0 or positive, and finite, got -0.1"),
        ({"zeta": float("nan")}, "zeta must be 0 or positive"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_bad_settings(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CFD1DSpec(**options)  # type: ignore[arg-type]
