"""What a pruned model still can, and how two models differ on the same data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from farms_tb.sparsity.student import half_width

__all__ = ["Score"]


@dataclass(frozen=True, eq=False)
class Score:
    """A model's score on the evaluation data.

    Attributes:
        metric: `"perplexity"` or `"accuracy"`.
        value: the perplexity, or the share of images that are classified correctly.
        error: its standard error over samples.
        samples: `(samples,)` float64: mean negative log likelihood of each segment in nats, or 1 for each image
            that is classified correctly and 0 for the others.
    """

    metric: str
    value: float
    error: float
    samples: NDArray[np.float64]

    def difference(self, other: Score) -> tuple[float, float]:
        """Compare with another model on the same samples, pair by pair.

        Args:
            other: the score that is subtracted.

        Returns:
            Mean difference of the samples, and half of its interval of 95 % by Student's t; NaN for one sample.
        """
        differences = self.samples - other.samples
        return float(differences.mean()), half_width(differences)
