"""Compressible Navier-Stokes flow in one dimension, a batch of samples at a time.

    rho_t   + (rho v)_x       = 0
    (rho v)_t + (rho v^2 + p)_x = tau_x
    E_t     + ((E + p) v)_x   = (v tau)_x,    E = p/(gamma - 1) + rho v^2/2,    tau = rho (4/3 eta + zeta) v_x

without heat conduction. `eta` and `zeta` are kinematic: PDEBench's paper (Takamoto et al., NeurIPS 2022) prints
tau without the factor rho, but the program that made its files has it, and data made here stand in for them.

Scheme: MUSCL-Hancock (van Leer, SIAM J. Sci. Stat. Comput. 5, 1984) with van Leer's limiter on primitive
variables, the HLLC flux (Toro, Spruce and Speares, Shock Waves 4, 1994) between Einfeldt's wave speeds, and
viscosity after each step, in explicit sub-cycles. Second order where the flow is smooth: the error of such a
splitting does not add up from step to step, and is too small to be seen next to the others.

Arrays have shape (3, B, n): density, velocity, pressure ("primitive") or density, momentum, energy ("conserved")
of B samples at n cell centres, float64. Each sample runs on its own clock, and no operation mixes samples or
depends on their number, so that a sample is bitwise identical in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Gas", "conserved", "hllc_flux", "primitive", "simulate"]

CFL = 0.3
PRESSURE_FLOOR = 1e-4


@dataclass(frozen=True)
class Gas:
    """The gas and its grid.

    Attributes:
        spacing: Width of a cell.
        viscosity: 4/3 eta + zeta, kinematic.
        gamma: Ratio of specific heats.
        periodic: Whether what leaves at one end comes in at the other; else it leaves for good (zero gradient).
    """

    spacing: float
    viscosity: float = 0.0
    gamma: float = 5 / 3
    periodic: bool = True


def conserved(state: np.ndarray, gas: Gas) -> np.ndarray:
    """Return density, momentum and energy of a primitive state, shape (3, B, n)."""
    density, velocity, pressure = state
    momentum = density * velocity
    return np.stack([density, momentum, pressure / (gas.gamma - 1) + 0.5 * momentum * velocity])


def primitive(state: np.ndarray, gas: Gas) -> np.ndarray:
    """Return density, velocity and pressure of a conserved state, shape (3, B, n)."""
    density, momentum, energy = state
    velocity = momentum / density
    return np.stack([density, velocity, (gas.gamma - 1) * (energy - 0.5 * momentum * velocity)])


def _extended(values: np.ndarray, ghosts: int, gas: Gas) -> np.ndarray:
    """Add ghost cells at both ends of the last axis."""
    if gas.periodic:
        return np.concatenate([values[..., -ghosts:], values, values[..., :ghosts]], axis=-1)
    return np.concatenate([values[..., :1]] * ghosts + [values] + [values[..., -1:]] * ghosts, axis=-1)


def _limited_slopes(values: np.ndarray) -> np.ndarray:
    """Van Leer's limited differences: the harmonic mean of both one-sided ones, 0 at an extremum.

    Args:
        values: Cell values, shape (..., n + 2).

    Returns:
        Difference across each inner cell, shape (..., n).
    """
    steps = np.diff(values)
    product = np.maximum(steps[..., :-1] * steps[..., 1:], 0.0)
    total = steps[..., :-1] + steps[..., 1:]
    return np.asarray(2 * product / np.where(product > 0, total, 1.0))


def _face_states(state: np.ndarray, dt: np.ndarray, gas: Gas) -> tuple[np.ndarray, np.ndarray]:
    """Primitive states on both sides of each of the n + 1 faces, half a step ahead; both (3, B, n + 1)."""
    cells = _extended(state, 2, gas)
    slopes = _limited_slopes(cells)
    cells = cells[..., 1:-1]
    density, velocity, pressure = cells
    _, d_velocity, d_pressure = slopes
    change = velocity * slopes
    change[0] += density * d_velocity
    change[1] += d_pressure / density
    change[2] += gas.gamma * pressure * d_velocity
    ahead = cells - (dt / (2 * gas.spacing)) * change
    low, high = ahead - 0.5 * slopes, ahead + 0.5 * slopes
    # Where a half step empties a cell (a strong rarefaction), its mean alone is used.
    sound = (np.minimum(low[::2], high[::2]) > 0).all(axis=0)
    if not sound.all():
        low, high = np.where(sound, low, cells), np.where(sound, high, cells)
    return high[..., :-1], low[..., 1:]


def hllc_flux(left: np.ndarray, right: np.ndarray, gamma: float) -> np.ndarray:
    """Approximate flux between two constant states.

    Args:
        left: Primitive states on the left, shape (3, ...).
        right: Primitive states on the right, same shape.
        gamma: Ratio of specific heats.

    Returns:
        Fluxes of mass, momentum and energy, shape (3, ...).
    """
    density_l, velocity_l, pressure_l = left
    density_r, velocity_r, pressure_r = right
    squared_l, squared_r = gamma * pressure_l / density_l, gamma * pressure_r / density_r
    # Speeds of the outer waves: Einfeldt's, of each side and of the Roe average; they keep the gas positive.
    root_l, root_r = np.sqrt(density_l), np.sqrt(density_r)
    share = root_l / (root_l + root_r)
    jump = velocity_l - velocity_r
    mean = velocity_r + share * jump
    sound = squared_r + share * (squared_l - squared_r + 0.5 * (gamma - 1) * (1 - share) * jump * jump)
    sound = np.sqrt(sound)
    slow = np.minimum(velocity_l - np.sqrt(squared_l), mean - sound)
    fast = np.maximum(velocity_r + np.sqrt(squared_r), mean + sound)
    inflow_l, inflow_r = density_l * (slow - velocity_l), density_r * (fast - velocity_r)
    contact = (pressure_r - pressure_l + inflow_l * velocity_l - inflow_r * velocity_r) / (inflow_l - inflow_r)

    # The face is on one side of the contact; `wave` is the outer wave of that side, 0 once it has passed the face.
    on_left = contact >= 0
    density, velocity, pressure = np.where(on_left, left, right)
    wave = np.where(on_left, np.minimum(slow, 0.0), np.maximum(fast, 0.0))
    momentum = density * velocity
    energy = pressure / (gamma - 1) + 0.5 * momentum * velocity
    star = density * (wave - velocity) / (wave - contact)
    star_energy = energy / density + (contact - velocity) * (contact + pressure / (density * (wave - velocity)))
    return np.stack(
        [
            momentum + wave * (star - density),
            momentum * velocity + pressure + wave * (star * contact - momentum),
            (energy + pressure) * velocity + wave * (star * star_energy - energy),
        ]
    )


def _advected(state: np.ndarray, dt: np.ndarray, gas: Gas) -> np.ndarray:
    """Conserved state after a step without viscosity."""
    flux = hllc_flux(*_face_states(primitive(state, gas), dt, gas), gas.gamma)
    return _floored(state - (dt / gas.spacing) * np.diff(flux), gas)


def _floored(state: np.ndarray, gas: Gas) -> np.ndarray:
    """Lift the energy where the pressure is below the floor; everywhere else the state stays as it is."""
    density, momentum, energy = state
    least = PRESSURE_FLOOR / (gas.gamma - 1) + 0.5 * momentum * momentum / density
    np.maximum(energy, least, out=energy)
    return state


def _diffused(state: np.ndarray, dt: np.ndarray, gas: Gas) -> np.ndarray:
    """Conserved state after a step of viscosity alone, in as many equal Euler steps as keep the gas from cooling.

    Viscous heating is never negative as long as dt <= spacing^2 / (2 viscosity) times the least ratio of a cell's
    density to that of its faces. Under that bound an Euler step's error in time is of second order in the spacing.
    """
    density, momentum, energy = state[0], state[1].copy(), state[2].copy()
    extended = _extended(density, 1, gas)
    at_faces = 0.5 * (extended[:, :-1] + extended[:, 1:])
    contrast = (np.maximum(at_faces[:, :-1], at_faces[:, 1:]) / density).max(axis=1, keepdims=True)
    counts = np.maximum(np.ceil(2 * gas.viscosity / gas.spacing**2 * contrast * dt), 1)
    ratio = dt / counts / gas.spacing
    resistance = gas.viscosity / gas.spacing * at_faces
    for cycle in range(int(counts.max())):
        velocity = _extended(momentum / density, 1, gas)
        stress = np.where(cycle < counts, ratio, 0.0) * resistance * np.diff(velocity)
        momentum += np.diff(stress)
        energy += np.diff(stress * (0.5 * (velocity[:, :-1] + velocity[:, 1:])))
    return np.stack([density, momentum, energy])


def _largest_step(state: np.ndarray, gas: Gas) -> np.ndarray:
    """Longest stable step of each sample by the speed of its sound waves, shape (B, 1)."""
    density, velocity, pressure = primitive(state, gas)
    speed = np.abs(velocity) + np.sqrt(gas.gamma * pressure / density)
    return np.asarray(CFL * gas.spacing / speed.max(axis=1, keepdims=True))


def simulate(initial: np.ndarray, times: np.ndarray, gas: Gas) -> np.ndarray:
    """Follow the flow and keep it at the given times.

    Args:
        initial: Primitive state at `times[0]`, shape (3, B, n), density and pressure positive.
        times: Increasing times, shape (T,).
        gas: The gas and its grid.

    Returns:
        Primitive states, shape (3, B, T, n).

    Raises:
        FloatingPointError: The flow of a sample is no longer finite or positive.
    """
    frames = np.empty((*initial.shape[:2], len(times), initial.shape[2]))
    frames[:, :, 0] = initial
    state = conserved(initial, gas)
    running = np.arange(initial.shape[1])  # samples not yet at the last time
    clock, coming = np.full(len(running), times[0]), np.ones(len(running), dtype=int)
    while len(times) > 1 and len(running):
        left = times[coming] - clock
        step = _largest_step(state, gas)[:, 0]
        arrives = step >= left
        dt = np.where(arrives, left, step)
        if not (dt > 0).all():
            raise FloatingPointError(f"the flow broke down at time {clock[~(dt > 0)][0]:.4g}")
        state = _step(state, dt[:, None], gas)
        clock = np.where(arrives, times[coming], clock + dt)
        if arrives.any():
            frames[:, running[arrives], coming[arrives]] = primitive(state[:, arrives], gas)
            coming += arrives
            unfinished = coming < len(times)
            if not unfinished.all():
                state, running = state[:, unfinished], running[unfinished]
                clock, coming = clock[unfinished], coming[unfinished]
    return frames


def _step(state: np.ndarray, dt: np.ndarray, gas: Gas) -> np.ndarray:
    """Conserved state `dt`, shape (B, 1), later."""
    state = _advected(state, dt, gas)
    return state if gas.viscosity == 0 else _diffused(state, dt, gas)
