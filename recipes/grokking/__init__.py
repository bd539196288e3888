"""Grokking: a network that fits its training images long before it generalises, with alpha alongside."""
