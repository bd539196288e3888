"""What a study's tables say, in sentences.

They are there because a table of intervals is easily read as more than it shows: they name the arms that differ
beyond the noise, the effects that are ruled out, and what would have been found by a less careful rule. With fewer
than five seeds nothing is called an effect.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from statistics import mean

from recipes.study.effects import POOLED, Row
from recipes.study.mediation import Contrast
from recipes.study.rules import RuleRow
from recipes.study.sensitivity import Curve, compare_ranges, rate_range
from recipes.study.statistics import Effect
from recipes.study.units import interval, show_percent, unit_of

__all__ = [
    "ENOUGH_SEEDS",
    "about_contrasts",
    "about_ranges",
    "about_rules",
    "about_tasks",
    "ruled_out",
    "verdict",
]

SIGNIFICANT = 0.05
ENOUGH_SEEDS = 5
"""With fewer pairs, a t-interval rests on a standard deviation that is itself mostly chance."""


def verdict(rows: Sequence[Row], baseline: str) -> str:
    """Say what the pooled rows show, and the rows of each cell whose arms have no pooled one.

    With fewer than five seeds in a cell a study proves nothing, and the text says that first. Rows come cell by
    cell, the pooled ones last.
    """
    compared = [row for row in rows if row.effect is not None]
    if not compared:
        return f"Nothing to compare with {baseline} yet."
    pooled = {row.arm for row in compared if row.cell == POOLED}
    told = [row for row in compared if row.cell == POOLED or row.arm not in pooled]
    sentences: list[str] = []
    for cell, members in groupby(told, key=attrgetter("cell")):
        found = _significant(list(members), compared)
        if cell == POOLED:
            sentences.insert(0, f"Over all cells, {_finding(found, baseline)}")
        elif found or not pooled:
            sentences.append(f"In {cell}, {_finding(found, baseline)}")
    return f"{_warning_of_few_seeds(compared)}{' '.join(sentences)}"


def _of(row: Row) -> Effect:
    """Return the effect of a row that has one."""
    assert row.effect is not None
    return row.effect


def _fewest_pairs(rows: Sequence[Row]) -> int:
    """Return the pairs of the row with the fewest; pooled rows have those of all cells, and are not looked at."""
    return min(_of(row).pairs for row in rows if row.cell != POOLED)


def _warning_of_few_seeds(rows: Sequence[Row]) -> str:
    """Return the sentence, with a space behind it, for a study whose smallest cell has too few pairs; else ""."""
    fewest = _fewest_pairs(rows)
    if fewest >= ENOUGH_SEEDS:
        return ""
    return (
        f"This proves nothing: with {_seeds(fewest)} chance alone can make any order of the arms; set study.seeds "
        f"to at least {ENOUGH_SEEDS}, better 10 to 20. "
    )


def _seeds(count: int) -> str:
    """Return a number of seeds in words."""
    return "1 seed" if count == 1 else f"{count} seeds"


def _significant(shown: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """Return the rows with an effect beyond the noise, of arms with enough seeds.

    Args:
        shown: The rows with an effect of one cell, or the pooled ones.
        rows: The rows with an effect, of all cells: a pooled effect rests on the smallest cell.
    """
    return [row for row in shown if row.p_holm < SIGNIFICANT and _enough(row, rows)]  # NaN is not below


def _enough(row: Row, rows: Sequence[Row]) -> bool:
    """Return whether an arm has enough pairs in the row's cell, for a pooled row in every cell."""
    own = [row]
    if row.cell == POOLED:
        own = [other for other in rows if other.arm == row.arm and other.cell != POOLED]
    return _fewest_pairs(own) >= ENOUGH_SEEDS


def _finding(found: Sequence[Row], baseline: str) -> str:
    """Name the arms that differ from the baseline beyond the noise."""
    if not found:
        return f"no arm can be said to differ from {baseline} beyond the noise (5%, Holm)."
    named = [f"{row.arm} has {_change(_of(row).mean)}{_in_unit(row)}" for row in found]
    return f"compared with {baseline}, {', '.join(named)} error, beyond the noise (5%, Holm)."


def _change(log_ratio: float) -> str:
    """Return a change in words, `"3.0% less"`."""
    size = _size_in_percent(log_ratio)
    return f"{size} less" if log_ratio <= 0 else f"{size} more"


def _size_in_percent(log_ratio: float) -> str:
    """Return how large a change is, either way, `"3.0%"`."""
    return f"{show_percent(log_ratio)[1:]}%"  # without its sign


def _in_unit(row: Row) -> str:
    """Return the difference of a row in the unit of its error, `" (-0.0384 nats)"`; empty where it has no unit."""
    unit = unit_of(row.error)
    if not unit.name or row.difference is None:
        return ""
    return f" ({unit.show(row.difference.mean, '+')} {unit.name})"


def ruled_out(rows: Sequence[Row], baseline: str) -> list[str]:
    """Say for each cell with an interval, and for all cells, how large an effect the intervals leave possible."""
    compared = [row for row in rows if row.effect is not None]
    known = [row for row in compared if not math.isnan(_of(row).low)]
    sentences = []
    for cell, members in groupby(known, key=attrgetter("cell")):
        # A pooled effect rests on cells without an interval too.
        enough = [row for row in members if _enough(row, compared)]
        if enough:
            sentences.append(f"{cell}: against {baseline}, {_limits(enough)} (95% interval of each arm).")
        else:
            sentences.append(f"{cell}: fewer than {ENOUGH_SEEDS} seeds rule nothing out.")
    return sentences


def _limits(rows: Sequence[Row]) -> str:
    """Name the largest gain and the largest loss that intervals leave possible, and their arms."""
    gain = min(rows, key=lambda row: _of(row).low)
    loss = max(rows, key=lambda row: _of(row).high)
    gains, losses = "any gain is ruled out", "any loss is ruled out"
    if _of(gain).low < 0:
        gains = f"gains of more than {_size(gain, 'low')} are ruled out"
    if _of(loss).high > 0:
        losses = f"losses of more than {_size(loss, 'high')}"
    return f"{gains}, and {losses}"


def _size(row: Row, end: str) -> str:
    """Return how far an end of an interval, "low" or "high", is from no effect, with the arm."""
    size = _size_in_percent(getattr(row.effect, end))
    unit = unit_of(row.error)
    if unit.name and row.difference is not None:
        size += f" or {unit.show(abs(getattr(row.difference, end)))} {unit.name}"
    return f"{size} ({row.arm})"


def about_tasks(rows: Sequence[Row]) -> str:
    """Say whether effects would hold for other tasks; empty with a single cell."""
    compared = [row for row in rows if row.effect is not None]
    pooled = [row for row in compared if row.over_tasks is not None]
    if not pooled:
        return ""
    sentences = [_over_tasks(row) for row in _significant(pooled, compared)]
    if sentences:
        return " ".join(sentences)
    enough = [row for row in pooled if _enough(row, compared)]
    if not enough:
        return f"As a sample of tasks, cells with fewer than {ENOUGH_SEEDS} seeds rule nothing out."
    ends = [(row.over_tasks.low, row.over_tasks.high, row.over_tasks.tau) for row in enough if row.over_tasks]
    lows, highs, taus = zip(*ends, strict=True)
    return (
        f"As a sample of tasks, the cells leave mean changes of {interval(min(lows), max(highs))}% possible "
        "(95% interval of each arm); "
        f"between tasks an arm's change varies by up to {100 * max(taus):.1f}% (standard deviation)."
    )


def _over_tasks(row: Row) -> str:
    """Say whether the effect of an arm is beyond what varies between tasks."""
    tasks = row.over_tasks
    assert tasks is not None
    spread = f"{100 * tasks.tau:.1f}%"
    judgement = "may not hold for other tasks"
    if tasks.low > 0 or tasks.high < 0:
        judgement = "holds for tasks like these on average"
    span = interval(tasks.low, tasks.high)
    return f"The effect of {row.arm} {judgement}: {span}%, standard deviation between tasks {spread}."


def about_rules(rows: Sequence[RuleRow], baseline: str) -> str:
    """Say how much of a gain the papers' rule makes, by the pooled rows or, without these, in each cell.

    Rows come cell by cell, the pooled ones last. The text is empty without an effect by the papers' rule.
    """
    found = [row for row in rows if row.effects["papers"] is not None]
    pooled = [row for row in found if row.cell == POOLED]
    if not any(row.arm != baseline for row in pooled):
        pooled, found = [], [row for row in found if row.cell != POOLED]
    by_cell = groupby(pooled or found, key=attrgetter("cell"))
    gains = {cell: _papers_gain(list(members), baseline) for cell, members in by_cell}
    told = {cell: text for cell, text in gains.items() if text}
    return " ".join(f"{cell}: {text}" if len(told) > 1 else text for cell, text in told.items())


def _papers_gain(rows: Sequence[RuleRow], baseline: str) -> str:
    """Say how much of a gain the papers' rule makes in one cell, or over all; empty without another arm."""
    gains = {row.arm: row.effects["papers"].mean for row in rows if row.effects["papers"] is not None}
    of_baseline = gains.pop(baseline, None)
    if not gains:
        return ""
    arm = min(gains, key=lambda name: gains[name])
    by_arm = {row.arm: row for row in rows}
    text = f"By the papers' rule {arm} has {_change(gains[arm])} error than {baseline} untuned"
    ours = by_arm[arm].effects["last"]
    if ours is not None:
        text += f", by this study's {_change(ours.mean)}"
    if of_baseline is not None and by_arm[baseline].cells == by_arm[arm].cells:  # else it is of other tasks
        text += f". The rule alone gives {baseline} {_change(of_baseline)} than itself untuned"
    return f"{text}."


def about_ranges(found: Sequence[Curve], baseline: str) -> str:
    """Say whether balancing forgives a badly chosen learning rate; empty without curves to compare."""
    of_baseline = {curve.cell: curve for curve in found if curve.arm == baseline}
    others = [curve for curve in found if curve.arm != baseline and curve.cell in of_baseline]
    if not others:
        return ""
    by_arm: dict[str, list[Curve]] = {}
    for curve in others:
        by_arm.setdefault(curve.arm, []).append(curve)
    wider = _told_apart(by_arm, of_baseline, 1)
    narrower = _told_apart(by_arm, of_baseline, -1)
    return (
        "Does balancing forgive a badly chosen rate? Rates within 5% of the best error span a factor of "
        f"{_widths(by_arm, of_baseline, baseline)}. Wider than that of {baseline} by more than the step "
        f"between the rates tried: {wider}; narrower: {narrower}.{_warning_of_few_tries(found)}"
    )


def _widths(by_arm: dict[str, list[Curve]], baselines: dict[str, Curve], baseline: str) -> str:
    """Return the width of each arm's range, next to the baseline's over the same cells."""
    arms_of: dict[tuple[str, ...], list[str]] = {}
    for arm, own in by_arm.items():
        arms_of.setdefault(tuple(curve.cell for curve in own), []).append(arm)
    texts = []
    for cells, arms in arms_of.items():
        widths = [f"{_width([baselines[cell] for cell in cells])} for {baseline}"]
        widths += [f"{_width(by_arm[arm])} for {arm}" for arm in arms]
        texts.append(", ".join(widths) + _over(cells, everywhere=len(cells) == len(baselines)))
    return "; ".join(texts)


def _over(cells: Sequence[str], everywhere: bool) -> str:
    """Return over which cells widths are means; empty where there is no other cell than theirs."""
    names = f"{len(cells)} cells" if everywhere else ", ".join(cells)
    if len(cells) > 1:
        return f" (geometric means over {names})"
    return "" if everywhere else f" (in {names})"


def _warning_of_few_tries(found: Sequence[Curve]) -> str:
    """Return the sentence for curves of fewer than five seeds, which begins with a space."""
    fewest = min(point.seeds for curve in found for point in curve.points)
    if fewest >= ENOUGH_SEEDS:
        return ""
    return f" With {_seeds(fewest)} for each rate, the curves are rough: these differences may be chance."


def _width(found: Sequence[Curve]) -> str:
    """Return the geometric mean of the widths of ranges, with a sign where some may be wider."""
    spans = [rate_range(curve) for curve in found]
    width = math.exp(mean(math.log(span.factor) for span in spans))
    return f"{'≥ ' if any(span.at_least for span in spans) else ''}{width:.1f}"


def _told_apart(by_arm: dict[str, list[Curve]], baselines: dict[str, Curve], direction: int) -> str:
    """Name the arms whose range is wider (`direction` 1) or narrower (-1) than the baseline's."""
    named = []
    for arm, own in by_arm.items():
        count = sum(compare_ranges(curve, baselines[curve.cell]) == direction for curve in own)
        if count:
            named.append(f"{arm} (in {count} of {len(own)} cells)" if len(baselines) > 1 else arm)
    return ", ".join(named) or "none"


def about_contrasts(found: Sequence[Contrast]) -> str:
    """Say whether it matters which layer has which ratio; contrasts of fewer than five seeds are not looked at."""
    known = [contrast for contrast in found if contrast.effect.pairs >= ENOUGH_SEEDS]
    alike = "the same base rate, mean ratio and spread"
    if not known:
        return (
            f"No two arms with {ENOUGH_SEEDS} seeds have {alike}: what an effect owes to the alphas "
            "can't be told from what it owes to these."
        )
    different = sum(contrast.p_holm < SIGNIFICANT for contrast in known)
    if not different:
        return (
            f"Arms with {alike} don't differ beyond the noise. Of those that gave their ratios to different "
            "layers, as an arm and its permutation do, no more of an effect than the intervals above hold comes "
            "from which layer has which ratio, and so from the alphas."
        )
    return (
        f"Of {len(known)} pairs of arms with {alike}, {different} differ beyond the noise (5%, Holm): there it "
        "matters which layer has which ratio."
    )
