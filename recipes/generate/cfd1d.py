"""PDEBench's random 1D compressible flows (Takamoto et al., NeurIPS 2022): periodic on [-1, 1], t in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from recipes.data.cache import Arrays
from recipes.generate.flow import Gas, simulate

__all__ = ["FRAMES", "CFD1DSpec", "random_flow", "random_wave"]

FRAMES = 101
INTERVAL = 0.01
LENGTH = 2.0
VARIABLES = ("density", "Vx", "pressure")


def random_wave(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Draw two sine waves; now and then folded up or down, and cut off outside a window.

    Wave numbers are from {1, 2, 3}, amplitudes U(0, 1), phases uniform. With probability 0.1 the absolute value is
    taken, with 0.5 the sign is turned, with 0.5 the wave is kept inside one smooth window alone.

    Args:
        rng: Source of all of it; one draw takes the same number of random numbers, whatever comes out.
        x: Cell centres in [-1, 1], shape (n,).

    Returns:
        The wave, shape (n,).
    """
    numbers, amplitudes, phases = rng.integers(1, 4, 2), rng.random(2), 2 * np.pi * rng.random(2)
    folded, turned, windowed = rng.random(3) < (0.1, 0.5, 0.5)
    start, end = rng.uniform((0.1, 0.55), (0.45, 0.9))
    waves = np.sin(2 * np.pi / LENGTH * numbers[:, None] * x + phases[:, None])
    wave = amplitudes @ waves
    wave = np.abs(wave) if folded else wave
    wave = -wave if turned else wave
    window = 0.5 * (np.tanh((x - start) / 0.01) - np.tanh((x - end) / 0.01))
    return np.asarray(wave * window if windowed else wave)


def _rescaled(rng: np.random.Generator, wave: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scale a wave, shape (n,), to [b, b + m] with m and b drawn log-uniformly from [low, high]."""
    height, base = np.exp(rng.uniform(np.log(low), np.log(high), 2))
    return np.asarray(base + height * (wave - wave.min()) / np.ptp(wave))


def random_flow(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Draw an initial state: a random wave each; density rescaled within [1, 20], pressure within [10, 200].

    Args:
        rng: Source of the waves.
        x: Cell centres in [-1, 1], shape (n,).

    Returns:
        Density, velocity and pressure at the cell centres, shape (3, n).
    """
    density = _rescaled(rng, random_wave(rng, x), 1.0, 10.0)
    pressure = _rescaled(rng, random_wave(rng, x), 10.0, 100.0)
    return np.stack([density, random_wave(rng, x), pressure])


@dataclass(frozen=True)
class CFD1DSpec:
    """Which flows are made.

    Attributes:
        points: Cells of the grid.
        eta: Shear viscosity, kinematic.
        zeta: Bulk viscosity, kinematic.
        seed: Root of every sample's own seed.
    """

    points: int = 1024
    eta: float = 0.01
    zeta: float = 0.01
    seed: int = 0

    batch: ClassVar[int] = 4  # what a step works on stays in a core's cache

    def __post_init__(self) -> None:
        if self.points < 8:
            raise ValueError(f"points must be at least 8 (the highest wave needs them), got {self.points}")
        for name in ("eta", "zeta"):
            value = getattr(self, name)
            if not 0 <= value < np.inf:
                raise ValueError(f"{name} must be 0 or positive, and finite, got {value}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @property
    def file_name(self) -> str:
        """PDEBench's name for such a file."""
        return f"1D_CFD_Rand_Eta{float(self.eta)}_Zeta{float(self.zeta)}_periodic_Train.hdf5"

    @property
    def fields(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of one sample of each data set."""
        return dict.fromkeys(VARIABLES, (FRAMES, self.points))

    @property
    def coordinates(self) -> Arrays:
        """Cell centres and, as in PDEBench's files, one time more than there are frames."""
        x = -LENGTH / 2 + (np.arange(self.points) + 0.5) * LENGTH / self.points
        return {"x-coordinate": x, "t-coordinate": INTERVAL * np.arange(FRAMES + 1)}

    def make(self, indices: range) -> Arrays:
        """Make samples; each depends on the settings and its index alone.

        Args:
            indices: Numbers of the samples.

        Returns:
            Density, velocity and pressure by their names in the file, float32 of shape (samples, frames, points).
        """
        x = self.coordinates["x-coordinate"]
        seeds = (np.random.SeedSequence(self.seed, spawn_key=(index,)) for index in indices)
        initial = np.stack([random_flow(np.random.default_rng(seed), x) for seed in seeds], axis=1)
        gas = Gas(spacing=LENGTH / self.points, viscosity=4 / 3 * self.eta + self.zeta)
        frames = simulate(initial, self.coordinates["t-coordinate"][:FRAMES], gas)
        return dict(zip(VARIABLES, frames.astype(np.float32), strict=True))
