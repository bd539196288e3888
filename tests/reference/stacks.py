"""Layers to lists of matrices, one kernel position, group or Fourier mode at a time.

A stack is a list of numpy arrays (R, C), each with R >= C.
"""

from __future__ import annotations

import itertools

import numpy as np


def upright(matrix):
    """Transpose a matrix that is wider than tall."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def linear(weight):
    """One matrix (out, in)."""
    return [upright(weight)]


def attention(in_proj):
    """q, k and v: three stacks of one matrix each, from the packed (3E, E)."""
    width = in_proj.shape[0] // 3
    return [linear(in_proj[part * width : (part + 1) * width]) for part in range(3)]


def convolution(weight, groups=1):
    """One out/g x in/g matrix for each group and kernel position of a weight (out, in/g, *kernel)."""
    rows = weight.shape[0] // groups
    stack = []
    for group in range(groups):
        for position in itertools.product(*map(range, weight.shape[2:])):
            matrix = np.zeros((rows, weight.shape[1]))
            for row in range(rows):
                for column in range(weight.shape[1]):
                    matrix[row, column] = weight[(group * rows + row, column, *position)]
            stack.append(upright(matrix))
    return stack


def transposed_convolution(weight, groups=1):
    """One in/g x out/g matrix for each group and kernel position of a weight (in, out/g, *kernel)."""
    return convolution(weight, groups)  # The same loop: here the groups split the first dimension too.


def gates(weight, number):
    """One stack of one matrix for each gate of a recurrent layer: the gates lie one below the other."""
    rows = weight.shape[0] // number
    return [linear(weight[gate * rows : (gate + 1) * rows]) for gate in range(number)]


def experts(weight):
    """One matrix for each expert of a weight (experts, out, in) or (experts, in, out)."""
    return [upright(matrix) for matrix in weight]


def spectral(weight):
    """One complex in x out matrix for each mode of a weight (in, out, *modes)."""
    return [
        upright(weight[(slice(None), slice(None), *mode)])
        for mode in itertools.product(*map(range, weight.shape[2:]))
    ]
