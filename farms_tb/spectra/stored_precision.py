"""Whether the tail of a spectrum is made of the rounding errors that the weight has in the type it is stored in.

A matrix of low rank, such as a merged low-rank update, has as many non-zero eigenvalues as the rounding of its
entries makes. Their power law says nothing of the layer: a matrix of rank 2 has an alpha of about 1.25 in float32.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from farms_tb.spectra.eigenvalues import squared_singular_values
from farms_tb.spectra.precision import Array
from farms_tb.spectra.samples import Samples
from farms_tb.spectra.windows import first_windows

NOISE_FACTOR = 2.0
"""An eigenvalue is noise if it grows by more than this factor when every entry is moved by its rounding error.

Rounding errors are spread evenly up to the unit roundoff u, of variance u^2 / 3; errors of just u add 3 times that
variance. So an eigenvalue made of noise alone grows to 4 times its size, one of which a third is noise to 2 times.
"""


def stored_roundoff(dtype: torch.dtype) -> float:
    """Return the relative error of an entry of a weight that was computed and stored in a type.

    Half-precision weights are computed in single precision and rounded once when they are stored, by half an eps.
    Others are the results of some operations in their own type, a few roundoffs each.

    Args:
        dtype: a type of real or complex floats, of eight bits or more.

    Example:
        >>> stored_roundoff(torch.bfloat16)
        0.00390625
    """
    info = torch.finfo(dtype)
    return info.eps / 2 if info.bits <= 16 else 2 * info.eps


def tail_is_rounding(samples: Samples, xmin_pos: float) -> bool:
    """Return whether the tail of a layer is made of rounding errors.

    A cheap test comes first: whether the tail begins below the largest eigenvalue of a random matrix of rounding
    errors. Only then is the first window of each sample solved again, with its entries off by their rounding
    errors.

    Args:
        samples: the fitted samples of the layer.
        xmin_pos: the tail of a window begins at eigenvalue int(w / xmin_pos) of w.
    """
    if not (samples.xmin < _noise_edge(samples)).any():
        return False
    windows = first_windows(samples.layer.windows)
    windows = windows.to(torch.complex128 if windows.is_complex() else torch.float64)
    generator = torch.Generator("cpu").manual_seed(0)
    signs = torch.randint(0, 2, windows.shape, generator=generator, device="cpu").double() * 2 - 1
    errors = stored_roundoff(samples.layer.stored_as) * signs.to(windows.device)
    start = int(samples.layer.windows.size / xmin_pos)
    before = squared_singular_values(windows)[:, start]
    after = squared_singular_values(windows * (1 + errors))[:, start]
    return bool((after > NOISE_FACTOR * before).double().mean() > 0.5)


def _noise_edge(samples: Samples) -> Array:
    """Return the largest eigenvalue `(S,)` of a random matrix of the rounding errors of a window.

    An entry w stored with unit roundoff u has an error of variance u^2 w^2 / 3. A random matrix of such errors has
    the largest eigenvalue u^2 / 3 * mean(w^2) * (sqrt(h) + sqrt(w))^2, the edge of the Marchenko-Pastur law.
    """
    height, width = samples.layer.windows.view.shape[-2:]
    windows = samples.pooled.shape[-1] // samples.layer.windows.size
    # The factor on the eigenvalues is in both, the mean square and the edge.
    mean_square = samples.pooled.sum(axis=-1) / (windows * height * width)
    variance = stored_roundoff(samples.layer.stored_as) ** 2 / 3 * mean_square
    edge: Array = np.asarray(variance * (math.sqrt(height) + math.sqrt(width)) ** 2)
    return edge
