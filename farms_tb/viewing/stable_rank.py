"""The stable rank of a layer's weight matrix, out of a measurement of whole matrices.

The page and the command line show it; balancing does not use it.
"""

from __future__ import annotations

from farms_tb.report import LayerRecord

__all__ = ["matrix_stable_rank"]


def matrix_stable_rank(full: LayerRecord | None) -> float | None:
    """Return ||W||_F^2 / sigma_max(W)^2, at most min(R, C), the mean over the K matrices.

    Args:
        full: record of the layer by `esd="full"`; None where there is none.

    Returns:
        The stable rank; None for a layer that was not measured.
    """
    return None if full is None else full.stable_rank
