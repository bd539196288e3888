"""The stable rank of a layer's weight matrix, out of a measurement of whole matrices.

The page and the command line show it; balancing does not use it.
"""

from __future__ import annotations

from farms_tb.report import LayerRecord

__all__ = ["matrix_stable_rank"]


def matrix_stable_rank(full: LayerRecord | None) -> float | None:
    """Return ||W||_F^2 / sigma_max(W)^2, at most min(R, C); with complex weights the mean over the K matrices.

    A record's own `stable_rank` is that of a sample of eigenvalues. Where the sample pools several matrices (FARMS
    windows, the K kernel positions of a convolution), it is larger than that of any of them, and not returned.

    Args:
        full: record of the layer by `esd="full"`; None where there is none.

    Returns:
        The stable rank; None for a layer that was not measured, or is several matrices pooled into one sample.
    """
    if full is None or not full.shape:
        return None
    number_of_matrices = full.shape[0]
    pools_them = full.kind != "spectral"
    if pools_them and number_of_matrices > 1:
        return None
    return full.stable_rank
