"""What pruning did to each layer of a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from farms_tb.printable import printable
from farms_tb.weights.names import counted


@dataclass(frozen=True)
class PrunedLayer:
    """What pruning did to one matrix.

    Attributes:
        block: path of its block.
        size: entries of its weight.
        planned: share of them that was to become zero; with a structure N:M, N / M.
        sparsity: share of them that is zero now. More than planned where the dense weight had more zeros.
        columns: of its matrix `(out, in)`.
        inputs: calibration inputs that it was seen with, tokens for a language model; 0 without calibration data.
        output_error: ||(W - W')X||_F / ||WX||_F, W and W' the dense and the pruned weight, X at most 512 of the
            calibration inputs; None where no input was seen.
        method: `"magnitude"`, `"wanda"` or `"sparsegpt"`. Magnitude stands in where no input was seen.
        damping: what SparseGPT added to the diagonal of the Hessian, as a share of its mean; None for the others.
        seconds: that the choice of the entries took, without the forward passes.
    """

    block: str
    size: int
    planned: float
    sparsity: float
    columns: int
    inputs: int
    output_error: float | None
    method: str
    damping: float | None
    seconds: float


@dataclass(frozen=True)
class PruneReport:
    """What pruning did to a model.

    Attributes:
        layers: each pruned layer by name, in the order of the plan.
        method: how entries were chosen.
        structure: the structure of the zeros.
        seconds: of the whole run, forward passes included.
    """

    layers: Mapping[str, PrunedLayer]
    method: str
    structure: str
    seconds: float

    @property
    def sparsity(self) -> float:
        """Share of zeros over all entries of the pruned layers."""
        zeros = math.fsum(layer.size * layer.sparsity for layer in self.layers.values())
        return zeros / sum(layer.size for layer in self.layers.values())

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat dict of plain values a layer, for a table or a file."""
        return [{"layer": name, **asdict(layer)} for name, layer in self.layers.items()]

    def __str__(self) -> str:
        names = [printable(name) for name in self.layers]
        width = max(map(len, names), default=5)
        lines = [f"{'layer':{width}}  sparsity  output error"]
        for name, layer in zip(names, self.layers.values(), strict=True):
            error = "" if layer.output_error is None else f"{layer.output_error:12.4f}"
            lines.append(f"{name:{width}}  {layer.sparsity:8.4f}  {error}".rstrip())
        lines.append(f"{counted(len(self.layers), 'layer')}, {self.sparsity:.2%} zeros, {self.seconds:.1f} s")
        return "\n".join(lines)
