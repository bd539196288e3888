"""What a report says, in sentences that a person can act on, and in a few numbers for the whole model.

`farms-tb analyze` ends in these sentences, and the page of a run shows them, with what its curves say. Everything
here reads the records of a report and curves that were logged; nothing is measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from farms_tb.balancing.verdict_warnings import MOST, PATIENCE
from farms_tb.printable import printable
from farms_tb.report import LayerRecord, Report
from farms_tb.verdicts import RANDOM_Z_OF_FEW, Verdict
from farms_tb.viewing.history import History
from farms_tb.viewing.names import shortened
from farms_tb.weights.names import first_few

MOST_SENTENCES = 5
"""A reader acts on a few sentences and skips a list."""

DEAD_SHARE = 0.1
"""From this share of dead rows on, a layer is worth a sentence."""

Records = Mapping[str, LayerRecord]


@dataclass(frozen=True)
class ModelSummary:
    """A model in a few numbers, to compare it with another one of the same architecture.

    Attributes:
        layers: number of its layers.
        measured: number of those with an alpha.
        mean_alpha: mean of their alphas; None where there is none, as below.
        weighted_alpha: mean of alpha * log10(largest eigenvalue): with `esd="full"` that of WeightWatcher.
        mean_log_norm: mean of log10 of the layers' squared Frobenius norms.
        verdicts: number of layers with each verdict, the most frequent first; those without one are left out.
    """

    layers: int
    measured: int
    mean_alpha: float | None
    weighted_alpha: float | None
    mean_log_norm: float | None
    verdicts: Mapping[str, int]


def summarise(report: Report) -> ModelSummary:
    """Return the numbers that describe a model as a whole.

    Args:
        report: a measurement; with permutation nulls for all verdicts.
    """
    records = list(report.layers.values())
    with_alpha = [record for record in records if record.alpha is not None]
    verdicts = Counter(str(record.verdict) for record in records if record.verdict is not None)
    return ModelSummary(
        layers=len(records),
        measured=len(with_alpha),
        mean_alpha=_mean([record.alpha for record in with_alpha]),
        weighted_alpha=_mean([record.alpha_hat for record in with_alpha]),
        mean_log_norm=_mean([record.log_norm for record in with_alpha]),
        verdicts=dict(verdicts.most_common()),
    )


def diagnose(report: Report) -> list[str]:
    """Return up to five sentences on what to look at, the most urgent first.

    Args:
        report: a measurement; with permutation nulls it also tells trained layers from random ones.

    Returns:
        At least one sentence. Names of layers in them are printable.
    """
    by_verdict: dict[Verdict, dict[str, LayerRecord]] = {verdict: {} for verdict in Verdict}
    for name, record in report.layers.items():
        if record.verdict is not None:
            by_verdict[record.verdict][name] = record
    found = [say(by_verdict[verdict], report.layers) for verdict, say in _SENTENCES.items() if by_verdict[verdict]]
    dead = {name: record for name, record in report.layers.items() if _dead_side(record)[0] >= DEAD_SHARE}
    if dead:
        found.append(_about_dead_rows(dead))
    rest = _about_the_rest(report.layers, by_verdict[Verdict.TRAINED])
    return [*found, *rest][:MOST_SENTENCES] or ["No layer could be measured."]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _named(records: Collection[str], most: int = 3) -> str:
    """Return the names of layers as a list in words: the first few, and how many more there are."""
    names = [shortened(name) for name in records]
    if len(names) <= most:
        return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return first_few(names, most)


def _verb(records: Collection[str], one: str, several: str) -> str:
    return one if len(records) == 1 else several


def _about_collapsed(records: Records, layers: Records) -> str:
    furthest = min(records, key=lambda name: records[name].rank_share or 0.0)
    record = records[furthest]
    energy = f"{record.rank_99} of {record.num_eigenvalues} directions carry 99 % of the energy"
    if len(records) > 1:
        energy += f" of {shortened(furthest)}"
    have = _verb(records, "has collapsed", "have collapsed")
    advice = _verb(records, "A narrower layer", "Narrower layers")
    return (
        f"{_named(records)} {have}: {energy}, and alpha is small for that reason. {advice}, or less weight decay?"
    )


def _about_random(records: Records, layers: Records) -> str:
    alike = (None, Verdict.RANDOM, Verdict.NOT_MEASURED)
    others = sum(record.verdict not in alike for record in layers.values())
    if not others:
        return (
            f"No layer can be told from random weights ({len(records)} measured): the model is untrained, or was "
            "trained for a short time."
        )
    looks = _verb(records, "looks", "look")
    used = _verb(records, "Is it used, and does it get gradients?", "Are they used, and do they get gradients?")
    trained = "the other layer" if others == 1 else f"{others} others"
    shuffled = "no different from its own entries shuffled"
    return f"{_named(records)} {looks} untrained: {shuffled}, unlike {trained}. {used}"


def _about_low_rank(records: Records, layers: Records) -> str:
    have = _verb(records, "is of low rank and has", "are of low rank and have")
    return f"{_named(records)} {have} no alpha: right for a low-rank update, else look for units that died."


def _about_outliers(records: Records, layers: Records) -> str:
    has = _verb(records, "has", "have")
    return (
        f"{_named(records)} {has} entries so large that one alone makes an outlier of the spectrum: usual in some "
        "layers of language models; else look at these entries, and clip gradients or lower the learning rate."
    )


def _about_no_power_law(records: Records, layers: Records) -> str:
    follows = _verb(records, "does not follow", "do not follow")
    return f"The spectrum of {_named(records)} {follows} a power law: do not compare its alpha; plot the spectrum."


def _about_not_measured(records: Records, layers: Records) -> str:
    reasons = Counter(record.status for record in records.values())
    reason, number = reasons.most_common(1)[0]
    more = f" ({number} of them; see the status of the others)" if len(reasons) > 1 else ""
    were = _verb(records, "layer was", "layers were")
    return f"{len(records)} {were} not measured: {printable(reason)}{more}."


_SENTENCES: dict[Verdict, Callable[[Records, Records], str]] = {
    Verdict.COLLAPSED: _about_collapsed,
    Verdict.RANDOM: _about_random,
    Verdict.OUTLIERS: _about_outliers,
    Verdict.NO_POWER_LAW: _about_no_power_law,
    Verdict.LOW_RANK: _about_low_rank,
    Verdict.NOT_MEASURED: _about_not_measured,
}
"""What is said of the layers with a verdict, given these and all layers; the most urgent first."""


def _dead_side(record: LayerRecord) -> tuple[float, str]:
    """Return the share of rows or columns, whichever is larger, that are dead, and which of the two."""
    if not record.shape or record.dead_rows is None or record.dead_columns is None:
        return 0.0, "rows"
    _, rows, columns = record.shape
    return max((record.dead_rows / rows, "rows"), (record.dead_columns / columns, "columns"))


def _about_dead_rows(records: Records) -> str:
    worst = max(records, key=lambda name: _dead_side(records[name]))
    share, side = _dead_side(records[worst])
    others = len(records) - 1
    also = f", and {others} more {'layer has' if others == 1 else 'layers have'} such" if others else ""
    return (
        f"{share:.0%} of the {side} of {shortened(worst)} are dead, units that no longer count: their norm is "
        f"below a thousandth of the largest{also}."
    )


def _about_the_rest(layers: Records, trained: Records) -> list[str]:
    """Say how the trained layers compare, or why that is not known; nothing where none is trained."""
    effects = {name: record.effect for name, record in trained.items() if record.effect is not None}
    with_alpha = [record for record in layers.values() if record.alpha is not None]
    if with_alpha and all(record.null is None for record in with_alpha):
        return ["Trained layers cannot be told from random ones without the permutation null (null=True, --null)."]
    if not effects:
        return []
    least = max(effects, key=lambda name: effects[name])
    most = min(effects, key=lambda name: effects[name])
    if least == most:
        return [
            f"{shortened(least)} is trained: alpha is {-effects[least]:.2f} below that of its entries shuffled."
        ]
    return [
        f"{len(effects)} layers are trained, {shortened(most)} the most (alpha {effects[most]:+.2f} against its "
        f"entries shuffled), {shortened(least)} the least ({effects[least]:+.2f})."
    ]


def diagnose_training(history: History, report: Report | None = None) -> list[str]:
    """Name the layers that stayed random while others learnt, of which training warns, too.

    A log holds z-scores and no verdicts: a layer counts as random while its z-score is above `RANDOM_Z_OF_FEW`.

    Args:
        history: the curves of a run with `verdicts=True`, or with another option that compares with random layers.
        report: a measurement of the weights at the end; a layer that is not random there is not named.

    Returns:
        One sentence, or none.
    """
    behind = _left_behind(history)
    records = {} if report is None else report.layers
    told_apart = {name for name, record in records.items() if record.verdict not in (None, Verdict.RANDOM)}
    named = [name for name in behind if name not in told_apart]
    if not named:
        return []
    length = min(behind[name] for name in named)
    stayed = f"{_named(named)} stayed random over the last {length} measurements of training"
    used = _verb(named, "Is it used, and is its", "Are they used, and is their")
    return [f"{stayed}, while most others learnt. {used} learning rate large enough?"]


def _left_behind(history: History) -> dict[str, int]:
    """Return the layers that have been random for long, and over how many of the last measurements.

    Layers without a learning rate are not trained, and stay as they are.
    """
    scores = {
        name: dict(zip(curve.steps, curve.values, strict=True))
        for name, curve in history.z.items()
        if name in history.lr
    }
    steps = sorted(set().union(*scores.values()), reverse=True)
    waiting = set(scores)
    counts: Counter[str] = Counter()
    for step in steps:
        compared = [name for name in scores if step in scores[name]]
        random = {name for name in compared if scores[name][step] > RANDOM_Z_OF_FEW}
        if len(compared) - len(random) <= MOST * len(compared):
            break
        waiting &= random
        counts.update(waiting)
    return {name: counts[name] for name in scores if counts[name] >= PATIENCE}
