"""Darcy flow: -div(a grad u) = beta on the unit square, u = 0 on its boundary.

The elliptic problem is solved directly (cell-centred finite volumes, sparse LU), not marched to a steady state.
Coefficient families: a Gaussian random field thresholded at zero, as in Li et al., "Fourier Neural Operator for
Parametric Partial Differential Equations" (ICLR 2021), and the thresholded sum of Gaussian bumps of PDEBench
(Takamoto et al., NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import splu

from recipes.data.cache import Arrays

__all__ = ["FAMILIES", "SPLITS", "DarcySpec", "bumps", "cell_centres", "gaussian_field", "sample", "solve_darcy"]

SPLITS = ("train", "val", "test")

_MODES, _TAU = 32, 3.0
"""Of a Gaussian field: cosine modes per side, and inverse length scale."""

_BUMPS = 5


def cell_centres(n: int) -> np.ndarray:
    """Centres of n equal cells of [0, 1], shape (n,)."""
    return (np.arange(n) + 0.5) / n


def gaussian_field(rng: np.random.Generator, n: int) -> np.ndarray:
    """Draw from N(0, (-Laplace + tau^2)^-2), tau = 3, with zero normal derivative at the boundary.

    The draw is a cosine series with 32 modes per side, so one seed is one function at every resolution.

    Args:
        rng: Source of the coefficients.
        n: Cells per side.

    Returns:
        Field at the cell centres, shape (n, n).
    """
    k = np.arange(_MODES)
    cosines = np.cos(np.pi * np.outer(cell_centres(n), k)) * np.where(k == 0, 1.0, np.sqrt(2.0))
    amplitude = 1.0 / (np.pi**2 * (k[:, None] ** 2 + k**2) + _TAU**2)
    amplitude[0, 0] = 0.0  # zero mean: both values of the coefficient occur in every sample
    field = cosines @ (amplitude * rng.standard_normal((_MODES, _MODES))) @ cosines.T
    return np.asarray(field)


def bumps(rng: np.random.Generator, n: int) -> np.ndarray:
    """Sum of five Gaussian bumps exp(-r^2/s), centres U(0,1)^2, s ~ U(0, 0.5), minus its mean: PDEBench's family.

    Args:
        rng: Source of centres and widths.
        n: Cells per side.

    Returns:
        Field at the cell centres, shape (n, n).
    """
    centres, scales = rng.random((_BUMPS, 2)), 0.5 * (1.0 - rng.random(_BUMPS))
    x = cell_centres(n)
    along = [np.exp(-((x[:, None] - centres[:, axis]) ** 2) / scales) for axis in (0, 1)]
    field = along[0] @ along[1].T
    return np.asarray(field - field.mean())


FAMILIES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {"grf": gaussian_field, "bumps": bumps}


def _operator(a: np.ndarray) -> sparse.csc_matrix:
    """Finite-volume matrix of -div(a grad .), times the cell area, for `a` of shape (n, n)."""
    n = len(a)
    down = 2 * a[:-1] * a[1:] / (a[:-1] + a[1:])
    right = 2 * a[:, :-1] * a[:, 1:] / (a[:, :-1] + a[:, 1:])
    diagonal = np.zeros_like(a)
    diagonal[:-1] += down
    diagonal[1:] += down
    diagonal[:, :-1] += right
    diagonal[:, 1:] += right
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        diagonal[edge] += 2 * a[edge]  # the wall is half a cell away
    below = -down.ravel()
    next_to = -np.pad(right, ((0, 0), (0, 1))).ravel()[:-1]
    bands = [below, next_to, diagonal.ravel(), next_to, below]
    return sparse.diags(bands, offsets=[-n, -1, 0, 1, n], format="csc")


def solve_darcy(a: np.ndarray, source: float | np.ndarray = 1.0) -> np.ndarray:
    """Solve -div(a grad u) = source on the unit square with u = 0 on the boundary.

    Args:
        a: Positive coefficient at the cell centres, shape (n, n) with n >= 2.
        source: Right-hand side, a number or an array of shape (n, n).

    Returns:
        Solution at the cell centres, shape (n, n), second-order accurate for smooth `a`.

    Raises:
        ValueError: `a` is not a square of positive, finite numbers.
    """
    if a.ndim != 2 or a.shape[0] != a.shape[1] or len(a) < 2:
        raise ValueError(f"the coefficient must have shape (n, n) with n >= 2, got {a.shape}")
    if not (np.isfinite(a).all() and (a > 0).all()):
        raise ValueError("the coefficient must be positive and finite everywhere")
    right_side = np.broadcast_to(np.asarray(source, dtype=float) / a.size, a.shape).ravel()
    factors = splu(_operator(a), permc_spec="MMD_AT_PLUS_A", options={"SymmetricMode": True})
    return np.asarray(factors.solve(right_side)).reshape(a.shape)


@dataclass(frozen=True)
class DarcySpec:
    """Which Darcy problem a sample is drawn from.

    Attributes:
        family: Coefficient family, one of `FAMILIES`.
        resolution: Cells per side.
        low: Coefficient where the field is negative.
        high: Coefficient elsewhere.
        beta: Constant source.
        seed: Root of every sample's own seed.
    """

    family: str = "grf"
    resolution: int = 32
    low: float = 0.1
    high: float = 1.0
    beta: float = 1.0
    seed: int = 0

    batch: ClassVar[int] = 32  # made at once

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {self.family!r}")
        if self.resolution < 2:
            raise ValueError(f"resolution must be at least 2, got {self.resolution}")
        if not 0 < self.low <= self.high < np.inf:
            raise ValueError(f"low and high need 0 < low <= high < infinity, got {self.low} and {self.high}")
        if self.beta == 0 or not np.isfinite(self.beta):
            raise ValueError(f"beta must be finite and not 0, got {self.beta}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @property
    def file_name(self) -> str:
        """PDEBench's name for such a file."""
        return f"2D_DarcyFlow_beta{float(self.beta)}_Train.hdf5"

    @property
    def fields(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of one sample of each data set: PDEBench's `nu` is the coefficient, `tensor` the solution."""
        n = self.resolution
        return {"nu": (n, n), "tensor": (1, n, n)}

    @property
    def coordinates(self) -> Arrays:
        """The cell centres."""
        centres = cell_centres(self.resolution)
        return {"x-coordinate": centres, "y-coordinate": centres}

    def make(self, indices: range) -> Arrays:
        """Make samples of the training split; see `sample`.

        Args:
            indices: Numbers of the samples.

        Returns:
            Coefficients (samples, n, n) and solutions (samples, 1, n, n), float32, by their names in the file.
        """
        pairs = [sample(self, "train", index) for index in indices]
        return {"nu": np.stack([a for a, _ in pairs]), "tensor": np.stack([u[None] for _, u in pairs])}


def sample(spec: DarcySpec, split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Make one sample; it depends on nothing but its arguments.

    The seed is child (split, index) of `spec.seed`, so splits are disjoint streams, and a sample stays the same
    however many others are made, and in whichever order.

    Args:
        spec: The problem.
        split: One of `SPLITS`.
        index: Number of the sample within the split.

    Returns:
        Coefficient and solution, both float32 of shape (n, n).
    """
    seed = np.random.SeedSequence(spec.seed, spawn_key=(SPLITS.index(split), index))
    field = FAMILIES[spec.family](np.random.default_rng(seed), spec.resolution)
    a = np.where(field < 0, spec.low, spec.high)
    return a.astype(np.float32), solve_darcy(a, spec.beta).astype(np.float32)
