"""Slow implementations of the mathematics: float64, numpy, plain loops, written from the formulas alone."""
