"""Exact solution of the Riemann problem of an ideal gas (Godunov 1959; Toro, "Riemann Solvers", chapter 4)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq

__all__ = ["State", "exact_riemann", "star_state"]


class State(NamedTuple):
    """A constant state."""

    density: float
    velocity: float
    pressure: float

    def sound(self, gamma: float) -> float:
        return float(np.sqrt(gamma * self.pressure / self.density))


def _velocity_jump(pressure: float, side: State, gamma: float) -> float:
    """Velocity gained through the wave that leads from `side` to `pressure`: a shock up, a rarefaction down."""
    if pressure > side.pressure:
        a, b = 2 / ((gamma + 1) * side.density), (gamma - 1) / (gamma + 1) * side.pressure
        return float((pressure - side.pressure) * np.sqrt(a / (pressure + b)))
    ratio = (pressure / side.pressure) ** ((gamma - 1) / (2 * gamma))
    return float(2 * side.sound(gamma) / (gamma - 1) * (ratio - 1))


def star_state(left: State, right: State, gamma: float) -> tuple[float, float]:
    """Return pressure and velocity between the waves."""

    def mismatch(pressure: float) -> float:
        waves = _velocity_jump(pressure, left, gamma) + _velocity_jump(pressure, right, gamma)
        return waves + right.velocity - left.velocity

    pressure = brentq(mismatch, 1e-14, 1e3 * max(left.pressure, right.pressure), xtol=1e-14, rtol=1e-14)
    return pressure, left.velocity - _velocity_jump(pressure, left, gamma)


def _behind(side: State, speed: np.ndarray, star: tuple[float, float], gamma: float) -> np.ndarray:
    """State at x/t = `speed` between the left state and the contact, shape (3, n)."""
    pressure, velocity = star
    sound = side.sound(gamma)
    if pressure > side.pressure:
        ratio, weight = pressure / side.pressure, (gamma - 1) / (gamma + 1)
        shock = side.velocity - sound * np.sqrt((gamma + 1) / (2 * gamma) * ratio + (gamma - 1) / (2 * gamma))
        inside = (side.density * (ratio + weight) / (weight * ratio + 1), velocity, pressure)
        return np.where(speed < shock, np.array(side)[:, None], np.array(inside)[:, None])
    star_sound = sound * (pressure / side.pressure) ** ((gamma - 1) / (2 * gamma))
    inside = (side.density * (pressure / side.pressure) ** (1 / gamma), velocity, pressure)
    base = 2 / (gamma + 1) + (gamma - 1) / ((gamma + 1) * sound) * (side.velocity - speed)
    base = np.maximum(base, 1e-300)
    fan = np.stack(
        [
            side.density * base ** (2 / (gamma - 1)),
            2 / (gamma + 1) * (sound + (gamma - 1) / 2 * side.velocity + speed),
            side.pressure * base ** (2 * gamma / (gamma - 1)),
        ]
    )
    behind_tail = np.where(speed > velocity - star_sound, np.array(inside)[:, None], fan)
    return np.where(speed < side.velocity - sound, np.array(side)[:, None], behind_tail)


def exact_riemann(left: State, right: State, speed: np.ndarray, gamma: float) -> np.ndarray:
    """Return density, velocity and pressure at x/t = `speed`, shape (3, n); no vacuum forms."""
    star = star_state(left, right, gamma)
    mirrored = right._replace(velocity=-right.velocity)
    on_right = _behind(mirrored, -speed, (star[0], -star[1]), gamma) * np.array([1.0, -1.0, 1.0])[:, None]
    return np.where(speed < star[1], _behind(left, speed, star, gamma), on_right)
