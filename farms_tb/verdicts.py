"""What a measurement says of a layer in one word, its verdict, and the thresholds behind it.

The first rule that applies decides:

1. *not measured*: the layer has no eigenvalues to look at; `status` says why.
2. *low rank*: zeros or rounding errors make up the tail, so there is no alpha.
3. *collapsed*: few directions hold the energy, and make alpha small (see `COLLAPSED`).
4. *random*: of a flat spectrum, which has no tail at all, as orthogonal initialisation makes it.
5. *outliers*: entries so large that one alone makes an outlier of the ESD, also with all entries shuffled.
6. *random*: neither alpha nor the entropy of the ESD is below that of the same entries shuffled, and the whole
   matrices have no more outliers.
7. *no power law*: the tail is too far from the fitted law for alpha to mean anything.
8. *trained*: everything else.

Rules 5 to 8 need the permutation null, `analyze(model, null=True)`; without one such a layer has no verdict.

The test of rule 6 is one-sided. An ESD that is flatter than that of shuffled entries has no direction that stands
out, so nothing shows that anything was learnt: initialisation that makes rows or columns orthogonal gives such
ESDs.

`python -m benchmarks.verdicts` measures the error rates, see `docs/verdicts.md`.
"""

from __future__ import annotations

import math
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from farms_tb.report import LayerRecord

RANDOM_Z = -3.5
"""An alpha, or an entropy, that is this many standard deviations below the permutation null is no accident."""

RANDOM_Z_OF_FEW = -4.0
"""The same where the standard deviation is that of fewer than `FEW_DRAWS` shuffles, and less sure.

Either has a probability of about 0.001 for a random layer, by Student's t.
"""

FEW_DRAWS = 16

MAX_TRAPS = 0.9
"""With more traps than this in a shuffled layer of one matrix, mean over the shuffles, it has outliers."""

FALSE_TRAPS = 0.03
"""Traps that a further matrix without outliers may add to the mean; the test of a trap errs in 1 % of matrices."""

MAX_SPIKES = 0.5
"""With more spikes than this beyond its traps, a layer of one matrix is not random."""

FALSE_SPIKES = 0.15
"""Spikes that a further random matrix may add; the test of a spike errs in 0.1 % of matrices."""

KS_LIMIT = 0.3
"""No power law has a larger Kolmogorov-Smirnov distance. That of random matrices tends to 0.175."""

KOLMOGOROV = 1.63
"""Quantile at 99 % of sqrt(n) times the distance between n samples and their own law."""


FLAT_SPECTRUM = "flat spectrum"
"""How the status of a layer begins that has no alpha because the eigenvalues of its tail are all equal."""


class Verdict(str, Enum):
    """The verdict of a layer, as it stands in the column `verdict` of tables and files."""

    RANDOM = "random"
    TRAINED = "trained"
    COLLAPSED = "collapsed"
    LOW_RANK = "low rank"
    OUTLIERS = "outliers"
    NO_POWER_LAW = "no power law"
    NOT_MEASURED = "not measured"

    def __str__(self) -> str:
        return self.value


def verdict_of(record: LayerRecord) -> Verdict | None:
    """Return the verdict of a layer by the rules above.

    Args:
        record: of a measurement with permutation nulls.

    Returns:
        The verdict; None for a layer that only a permutation null could tell about, and that has none.
    """
    if record.alpha is None:
        return _without_alpha(record.status)
    if record.collapsed:
        return Verdict.COLLAPSED
    if record.z_score is None:
        return None
    if _has_outliers(record):
        return Verdict.OUTLIERS
    if _is_random(record):
        return Verdict.RANDOM
    return Verdict.NO_POWER_LAW if _is_no_power_law(record) else Verdict.TRAINED


def _without_alpha(status: str) -> Verdict:
    if status.startswith(Verdict.LOW_RANK.value):
        return Verdict.LOW_RANK
    return Verdict.RANDOM if status.startswith(FLAT_SPECTRUM) else Verdict.NOT_MEASURED


def _has_outliers(record: LayerRecord) -> bool:
    if record.num_traps is None:
        return False
    return record.num_traps > MAX_TRAPS + FALSE_TRAPS * (_matrices(record) - 1)


def _is_random(record: LayerRecord) -> bool:
    limit = RANDOM_Z if (record.null_draws or 0) >= FEW_DRAWS else RANDOM_Z_OF_FEW
    scores = (record.z_score, record.entropy_z_score)
    if any(score is not None and score < limit for score in scores):
        return False
    if record.num_spikes is None:
        return True
    beyond_traps = record.num_spikes - (record.num_traps or 0)
    return beyond_traps <= MAX_SPIKES + FALSE_SPIKES * (_matrices(record) - 1)


def _matrices(record: LayerRecord) -> int:
    return record.shape[0] if record.shape else 1


def _is_no_power_law(record: LayerRecord) -> bool:
    """Return whether the tail is further from the law than a sample of the law of its size would be."""
    if record.ks_distance is None or not record.shape:
        return False
    matrices, _, columns = record.shape
    # The tail of one sample is half of its eigenvalues, which are those of at most one window of each of the K
    # matrices, while num_eigenvalues counts all samples; the distance of several samples is their mean.
    tail = min(record.num_eigenvalues, matrices * columns) / 2
    return record.ks_distance > max(KS_LIMIT, KOLMOGOROV / math.sqrt(tail))
