"""Which submatrices form a sample. A sample is a list of matrices whose eigenvalues are pooled."""

from __future__ import annotations

import math

EPS = 1e-9
"""So that 30 / 0.3 rows are 100 rows."""


def samples(stack, sampling, esd="farms", aspect_ratio=1.0, window=100, windows_per_dim=9, window_step=None):
    """The samples of a stack by the names of the options."""
    if esd == "full":
        return full(stack)
    if sampling == "blocks":
        return row_blocks(stack, aspect_ratio)
    return grid(stack, aspect_ratio, window, windows_per_dim, window_step)


def full(stack):
    """One sample: the whole of every matrix."""
    return [list(stack)]


def row_blocks(stack, aspect_ratio=1.0):
    """One sample for each block of rows, as many as fit: that block of every matrix."""
    rows, columns = stack[0].shape
    if aspect_ratio >= 1:
        height, width = math.floor(columns / aspect_ratio + EPS), columns
    else:
        height, width = columns, math.floor(columns * aspect_ratio + EPS)
    if height == 0 or width == 0:
        return []
    blocks = rows // height
    return [[matrix[b * height : (b + 1) * height, :width] for matrix in stack] for b in range(blocks)]


def grid(stack, aspect_ratio=1.0, window=100, ops=9, step=None):
    """One sample: windows of one size, laid over each matrix on a grid."""
    rows, columns = stack[0].shape
    height, width = _largest_window(rows, columns, window, aspect_ratio)
    if height == 0 or width == 0:
        return []
    sample = []
    for matrix in stack:
        for top in _starts(rows, height, ops, step):
            for left in _starts(columns, width, ops, step):
                sample.append(matrix[top : top + height, left : left + width])
    return [sample]


def _largest_window(rows, columns, window, aspect_ratio):
    """As tall as wanted, or as the rows allow, or as the columns allow; of the aspect ratio always."""
    height = min(window, rows)
    if math.floor(height * aspect_ratio + EPS) <= columns:
        return height, math.floor(height * aspect_ratio + EPS)
    return math.floor(columns / aspect_ratio + EPS), columns


def _starts(length, size, ops, step):
    if step is not None:
        return [start for start in range(0, length, step) if start + size <= length]
    if ops == 1:
        return [0]
    step = max(1, (length - size) // (ops - 1))
    count = min(ops, max(1, (length - size) // step + 1))
    return [i * step for i in range(count)]
