"""The share of outliers in each block, by which OWL allocates sparsity (Yin et al., arXiv 2310.05175)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from farms_tb.options import check_number
from farms_tb.printable import printable
from farms_tb.sparsity.calibration import Batch, checked_batches
from farms_tb.sparsity.evaluating import evaluating
from farms_tb.sparsity.masks import wanda_scores
from farms_tb.sparsity.prunable import PrunableWeight, named_weights, to_matrix
from farms_tb.sparsity.sequential import Block, planned_blocks, visit_blocks
from farms_tb.sparsity.statistics import InputStatistics


def outlier_shares(
    model: nn.Module, blocks: Mapping[str, str], calibration: Iterable[Batch], factor: float = 5.0
) -> dict[str, float]:
    """Return the share of outliers in each block of a dense model.

    An outlier is an entry whose Wanda score |W_ij| ||x_j|| is larger than `factor` times the mean score of its
    block.

    Args:
        model: any module; it is not changed.
        blocks: path of the block of each layer, by the layer's name: `{"model.layers.0.mlp.up_proj":
            "model.layers.0"}`.
        calibration: batches, see `farms_tb.sparsity.prune`.
        factor: M of the paper.

    Returns:
        The share of each block, 0 to 1, blocks in the order of the forward pass.

    Raises:
        TypeError: `calibration` holds something else than dicts.
        ValueError: a layer or block is not in the model, the calibration data are missing or of the wrong
            vocabulary, or they do not reach a layer.
    """
    check_number("factor", factor, above=0)
    weights = named_weights(model, blocks)
    batches = checked_batches(model, calibration, required=True)
    shares = {}
    with evaluating(model):
        for block, statistics in visit_blocks(model, planned_blocks(model, weights), batches):
            shares[block.path] = _share(block, statistics, factor)
    return shares


def _share(block: Block, statistics: Mapping[str, InputStatistics], factor: float) -> float:
    """Return the share of a block's scores that are larger than `factor` times their mean."""
    scores = torch.cat([_scores(weight, statistics[weight.name]) for weight in block.weights])
    threshold = factor * scores.mean(dtype=torch.float64)
    return int((scores > threshold).sum()) / len(scores)


def _scores(weight: PrunableWeight, statistics: InputStatistics) -> Tensor:
    """Return the Wanda scores of a weight as a vector."""
    if statistics.squared_norms is None or not statistics.inputs:
        raise ValueError(
            f"the calibration data show no inputs of {printable(weight.name)}: leave it out of `blocks`, or pass "
            "data that reach it"
        )
    norms = statistics.squared_norms / statistics.inputs
    return wanda_scores(to_matrix(weight.tensor, weight.layout), norms).flatten()
