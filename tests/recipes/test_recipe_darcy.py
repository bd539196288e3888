"""Darcy data: the solver's order, seeding, the cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.data import darcy
from recipes.data.cache import StaleCacheError, load_or_make, read_arrays, write_arrays
from recipes.data.darcy import DarcyData, generate
from recipes.generate.darcy import FAMILIES, DarcySpec, cell_centres, sample, solve_darcy

CENTRE = 0.0736713532814  # of -Laplace(u) = 1 on the unit square, by its Fourier series
SMALL = DarcySpec(resolution=16)


def _centre_error(n: int) -> float:
    middle = slice(n // 2 - 1, n // 2 + 1)
    return float(abs(solve_darcy(np.ones((n, n)))[middle, middle].mean() - CENTRE))


def _manufactured_error(n: int) -> float:
    """Largest error for u = sin(pi x) sin(pi y) and a = 1 + sin(2 pi x) cos(pi y) / 2."""
    x, y = np.meshgrid(cell_centres(n), cell_centres(n), indexing="ij")
    pi, u = np.pi, np.sin(np.pi * x) * np.sin(np.pi * y)
    a = 1 + 0.5 * np.sin(2 * pi * x) * np.cos(pi * y)
    a_x, a_y = pi * np.cos(2 * pi * x) * np.cos(pi * y), -0.5 * pi * np.sin(2 * pi * x) * np.sin(pi * y)
    u_x, u_y = pi * np.cos(pi * x) * np.sin(pi * y), pi * np.sin(pi * x) * np.cos(pi * y)
    source = 2 * pi**2 * a * u - a_x * u_x - a_y * u_y
    return float(np.abs(solve_darcy(a, source) - u).max())


def _layered_error(n: int) -> float:
    """Largest error for a jump of `a` from 1 to 10 at x = 1/2, where u has a kink: a u_x is what is continuous."""
    x, y = np.meshgrid(cell_centres(n), cell_centres(n), indexing="ij")
    pi, a = np.pi, np.where(x < 0.5, 1.0, 10.0)
    u = (np.sin(2 * pi * x) / a + np.sin(pi * x)) * np.sin(pi * y)
    source = (5 * pi**2 * np.sin(2 * pi * x) + 2 * pi**2 * a * np.sin(pi * x)) * np.sin(pi * y)
    return float(np.abs(solve_darcy(a, source) - u).max())


def test_centre_value_for_constant_coefficient() -> None:
    errors = [_centre_error(n) for n in (16, 32, 64)]
    np.testing.assert_allclose(errors, [2.3e-4, 5.7e-5, 1.4e-5], rtol=0.03)


@pytest.mark.parametrize("error", [_centre_error, _manufactured_error, _layered_error])
def test_second_order_convergence(error: Callable[[int], float]) -> None:
    errors = np.array([error(n) for n in (16, 32, 64, 128)])
    orders = np.log2(errors[:-1] / errors[1:])
    np.testing.assert_allclose(orders, 2.0, atol=0.08)


def test_thresholded_fields_converge() -> None:
    """Jumps inside cells cost the second order; the error still falls with the spacing."""
    u = {n: sample(DarcySpec(resolution=n, low=3.0, high=12.0), "train", 1)[1] for n in (27, 81, 243)}
    coarse = np.sqrt(np.square(u[27] - u[243][4::9, 4::9]).mean())
    fine = np.sqrt(np.square(u[81] - u[243][1::3, 1::3]).mean())
    assert coarse > 2.5 * fine
    assert fine < 0.01 * u[243].max()


def test_solution_obeys_the_maximum_principle() -> None:
    """Fed at one point, u is positive and has its one peak there; what is fed evenly lies between even media."""
    rng = np.random.default_rng(0)
    a = 10.0 ** rng.uniform(-2, 2, (20, 20))
    source = np.zeros_like(a)
    source[6, 13] = 1.0
    u = solve_darcy(a, source)
    assert u.min() > 0
    inner = np.pad(u, 1)  # the wall's zeros
    around = np.stack([inner[:-2, 1:-1], inner[2:, 1:-1], inner[1:-1, :-2], inner[1:-1, 2:]]).max(axis=0)
    np.testing.assert_array_equal(np.argwhere(u >= around), [[6, 13]])

    _, even = sample(DarcySpec(resolution=24), "train", 2)
    low, high = (solve_darcy(np.full((24, 24), value)).mean() for value in (0.1, 1.0))
    assert high < even.mean() < low


def test_reciprocity_and_mirrors() -> None:
    """The response at A to a source at B is that at B to A's; mirrored and turned media have such solutions."""
    rng = np.random.default_rng(1)
    a = 10.0 ** rng.uniform(-1, 1, (12, 12))
    first, second = np.zeros((2, 12, 12))
    first[2, 3] = second[9, 5] = 1.0
    assert solve_darcy(a, first)[9, 5] == pytest.approx(solve_darcy(a, second)[2, 3], rel=1e-11)
    u = solve_darcy(a)
    for turn in (np.flipud, np.fliplr, np.rot90, np.transpose):
        np.testing.assert_allclose(solve_darcy(turn(a)), turn(u), rtol=1e-10)


def test_solution_is_linear_in_the_source_and_symmetric() -> None:
    a, _ = sample(SMALL, "train", 0)
    u = solve_darcy(a.astype(float), 3.0)
    np.testing.assert_allclose(u, 3 * solve_darcy(a.astype(float)), rtol=1e-10)
    np.testing.assert_allclose(u.T, solve_darcy(a.T.astype(float), 3.0), rtol=1e-10)
    assert (u > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_one_seed_is_one_function_at_every_resolution(family: str) -> None:
    coarse, fine = (sample(DarcySpec(family=family, resolution=n), "train", 3) for n in (32, 96))
    assert set(np.unique(coarse[0])) == {np.float32(0.1), np.float32(1.0)}
    assert (coarse[0] == fine[0][1::3, 1::3]).mean() == 1.0 or family == "bumps"
    difference = coarse[1] - fine[1][1::3, 1::3]
    assert np.sqrt(np.square(difference).mean() / np.square(coarse[1]).mean()) < 0.06


def test_samples_depend_on_nothing_but_seed_split_and_index() -> None:
    few, many = generate(SMALL, "train", 3, workers=1), generate(SMALL, "train", 6, workers=3)
    np.testing.assert_array_equal(few["u"], many["u"][:3])
    np.testing.assert_array_equal(few["a"], many["a"][:3])
    others = [
        generate(SMALL, "val", 3),
        generate(SMALL, "test", 3),
        generate(DarcySpec(resolution=16, seed=1), "train", 3),
    ]
    for other in others:
        assert not (other["a"][:, None] == few["a"]).all(axis=(2, 3)).any()


def _data(folder: Path, **options: object) -> DarcyData:
    return DarcyData(folder, resolution=16, train_size=6, val_size=3, test_size=3, workers=1, **options)  # type: ignore[arg-type]


def test_scaled_by_the_training_set(tmp_path: Path) -> None:
    data = _data(tmp_path, batch_size=6)
    data.prepare_data()
    data.setup("fit")
    a, u = next(iter(data.train_dataloader()))
    assert a.shape == u.shape == (6, *data.sample_shape)
    assert abs(float(a.mean())) < 1e-5
    assert float(a.std()) == pytest.approx(1.0, abs=1e-4)
    assert float(u.square().mean()) == pytest.approx(1.0, abs=1e-4)


def test_batches_depend_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    first, second = _data(tmp_path, batch_size=2, shuffle_seed=5), _data(tmp_path, batch_size=2, shuffle_seed=5)
    orders = []
    for data, epoch in ((first, 0), (first, 1), (second, 1)):
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        orders.append(torch.cat([u for _, u in loader]))
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[1], orders[2])


def test_cache_is_used_and_a_cut_one_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _data(tmp_path).prepare_data()
    files = sorted((tmp_path / "darcy").iterdir())
    assert len(files) == 3
    before = {file: read_bytes for file in files if (read_bytes := file.read_bytes())}

    made: list[str] = []
    original = darcy.generate
    monkeypatch.setattr(darcy, "generate", lambda *args: made.append(args[1]) or original(*args))
    _data(tmp_path).prepare_data()
    assert made == []

    train = next(file for file in files if "train" in file.name)
    train.write_bytes(before[train][: len(before[train]) // 2])
    _data(tmp_path).prepare_data()
    assert made == ["train"]
    assert "cut short or damaged" in caplog.text
    np.testing.assert_array_equal(np.load(train)["u"], generate(SMALL, "train", 6)["u"])
    assert sorted((tmp_path / "darcy").iterdir()) == files


def test_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path, description = tmp_path / "x.npz", {"what": "ones"}
    write_arrays(path, description, {"x": np.ones(1000)})
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(StaleCacheError, match="cut short or damaged"):
        read_arrays(path, description)


def test_cache_of_other_data_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    write_arrays(path, {"seed": 1}, {"x": np.zeros(3)})
    with pytest.raises(StaleCacheError, match="describes other data"):
        read_arrays(path, {"seed": 2})
    arrays = load_or_make(path, {"seed": 2}, lambda: {"x": np.ones(3)})
    np.testing.assert_array_equal(arrays["x"], np.ones(3))


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", stop)
    with pytest.raises(KeyboardInterrupt):
        write_arrays(tmp_path / "x.npz", {}, {"x": np.ones(3)})
    assert list(tmp_path.iterdir()) == []


def test_other_settings_have_another_cache(tmp_path: Path) -> None:
    for options in ({}, {"seed": 1}, {"beta": 2.0}, {"family": "bumps"}, {"high": 0.5}):
        _data(tmp_path, **options).prepare_data()
    assert len(list((tmp_path / "darcy").iterdir())) == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "fog"}, "data.family must be one of grf, bumps, got 'fog'"),
        ({"resolution": 1}, "data.resolution must be a whole number of at least 2"),
        ({"low": 0.0}, "data.low and high need 0 < low <= high"),
        ({"high": float("inf")}, "0 < low <= high < infinity"),
        ({"beta": 0.0}, "data.beta must be finite and not 0"),
        ({"seed": -1}, "data.seed must not be negative"),
        ({"val_size": 0}, "data.val_size must be a whole number of at least 1"),
    ],
)
def test_bad_settings(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DarcyData(tmp_path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("coefficient", "message"),
    [(np.ones((3, 4)), r"shape \(n, n\)"), (np.zeros((4, 4)), "positive"), (np.full((4, 4), np.nan), "finite")],
)
def test_bad_coefficient(coefficient: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_darcy(coefficient)
