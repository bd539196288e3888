"""What is said of a report: the right layers, the right advice, the most urgent first, at most five sentences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from farms_tb import Verdict, analyze
from farms_tb.report import LayerRecord, Report
from farms_tb.viewing.diagnosis import MOST_SENTENCES, diagnose, diagnose_training, summarise
from farms_tb.viewing.history import Curve, History


def record(**changes: Any) -> LayerRecord:
    """A layer that is clearly trained."""
    metrics: dict[str, Any] = {
        "alpha": 1.8,
        "alpha_error": 0.01,
        "alpha_hat": 2.0,
        "ks_distance": 0.15,
        "log_norm": 3.0,
        "entropy": 0.8,
        "null_mean": 2.1,
        "null_std": 0.01,
        "null_draws": 16,
        "null_entropy_mean": 0.9,
        "null_entropy_std": 0.01,
        "num_traps": 0.0,
        "tail_floor": 0.1,
        "rank_99": 50,
        "num_eigenvalues": 100,
        "dead_rows": 0,
        "dead_columns": 0,
        "shape": (1, 100, 100),
        "kind": "real",
    }
    return LayerRecord(**{**metrics, **changes})


OF_VERDICT = {
    Verdict.TRAINED: record(),
    Verdict.RANDOM: record(alpha=2.1, entropy=0.9),
    Verdict.COLLAPSED: record(tail_floor=1e-9, rank_99=2),
    Verdict.OUTLIERS: record(num_traps=3.0),
    Verdict.NO_POWER_LAW: record(ks_distance=0.6),
    Verdict.LOW_RANK: LayerRecord(status="low rank: zero eigenvalues in the tail of 1 sample(s)"),
    Verdict.NOT_MEASURED: LayerRecord(status="weights contain NaN or infinity"),
}


def said(**layers: LayerRecord) -> list[str]:
    return diagnose(Report(layers))


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (Verdict.RANDOM, ["odd", "untrained", "Is it used"]),
        (Verdict.COLLAPSED, ["odd", "2 of 100 directions", "weight decay"]),
        (Verdict.OUTLIERS, ["odd", "outlier", "gradients"]),
        (Verdict.NO_POWER_LAW, ["odd", "power law"]),
        (Verdict.LOW_RANK, ["odd", "low rank"]),
        (Verdict.NOT_MEASURED, ["1 layer was", "NaN"]),
    ],
)
def test_one_odd_layer_is_named_first_with_what_to_do(verdict: Verdict, words: list[str]) -> None:
    odd = OF_VERDICT[verdict]
    assert odd.verdict is verdict
    sentences = said(one=record(), odd=odd, two=record(alpha=1.9))
    for word in words:
        assert word in sentences[0]
    assert "one the most" in sentences[-1]
    assert "two the least" in sentences[-1]


def test_at_most_five_and_the_most_urgent_first() -> None:
    layers = {f"{verdict} {number}": one for verdict, one in OF_VERDICT.items() for number in range(5)}
    sentences = diagnose(Report(layers))
    assert len(sentences) == MOST_SENTENCES
    assert "collapsed" in sentences[0]
    assert "and 2 more" in sentences[0]
    assert "random 0" in sentences[1]


def test_a_model_that_is_all_random_is_one_statement() -> None:
    torch.manual_seed(0)
    (sentence,) = diagnose(analyze(nn.Sequential(nn.Linear(60, 60), nn.Linear(60, 60)), null=True))
    assert "No layer can be told from random" in sentence


@pytest.mark.parametrize("verdict", [Verdict.OUTLIERS, Verdict.LOW_RANK, Verdict.COLLAPSED, Verdict.NO_POWER_LAW])
def test_a_random_layer_among_layers_that_are_none_is_named(verdict: Verdict) -> None:
    """They need not be well trained to be told from random weights."""
    others = {f"other{number}": OF_VERDICT[verdict] for number in range(3)}
    sentences = said(odd=OF_VERDICT[Verdict.RANDOM], **others)
    (about_odd,) = (sentence for sentence in sentences if "odd" in sentence)
    assert "unlike 3 others" in about_odd
    assert not any("No layer can be told" in sentence for sentence in sentences)


def test_without_a_null_it_says_what_is_missing() -> None:
    torch.manual_seed(0)
    (sentence,) = diagnose(analyze(nn.Linear(60, 60)))
    assert "permutation null" in sentence


def test_dead_units() -> None:
    sentences = said(one=record(dead_rows=38), two=record())
    assert "38% of the rows of one are dead" in sentences[0]
    (sentence, *_) = said(one=record(dead_columns=20), two=record(dead_columns=30), three=record())
    assert "of the columns of two are dead" in sentence
    assert "1 more layer has such" in sentence


@pytest.mark.parametrize("layers", [{}, {"only": record()}, {"bad": LayerRecord(status="all weights are zero")}])
def test_small_models(layers: dict[str, LayerRecord]) -> None:
    assert len(diagnose(Report(layers))) == 1
    assert summarise(Report(layers)).layers == len(layers)


def test_names_from_a_hostile_file_are_printable() -> None:
    name = "a\x1b[31m" + "x" * 500
    (sentence,) = diagnose(Report({name: record()}))
    assert "\x1b" not in sentence
    assert len(sentence) < 200


def test_the_summary_counts_and_averages() -> None:
    summary = summarise(Report({"a": record(), "b": record(alpha=2.0), "c": OF_VERDICT[Verdict.NOT_MEASURED]}))
    assert (summary.layers, summary.measured) == (3, 2)
    assert summary.mean_alpha == pytest.approx(1.9)
    assert summary.weighted_alpha == pytest.approx(2.0)
    assert summary.verdicts == {"trained": 2, "not measured": 1}


def history_of(**scores: list[float]) -> History:
    """Curves of z-scores at steps 0, 1, 2, ... of layers that are trained, but for those named `frozen`."""

    def curve(values: list[float]) -> Curve:
        times = range(len(values))
        return Curve(tuple(map(float, times)), tuple(times), tuple(values))

    z = {name: curve(values) for name, values in scores.items()}
    lr = {name: found for name, found in z.items() if not name.startswith("frozen")}
    return History(z=z, lr=lr, layers=tuple(z))


LEARNT = {name: [-1.0, -9.0, -20.0, -30.0] for name in ("a", "b", "c")}


def test_layers_left_behind_in_training() -> None:
    (sentence,) = diagnose_training(history_of(**LEARNT, idle=[0.0, 1.0, -1.0, 0.5]))
    assert sentence.startswith("idle ")
    assert "last 3 measurements" in sentence
    (sentence,) = diagnose_training(history_of(**LEARNT, idle=[0.0] * 4, lazy=[0.0] * 4))
    assert sentence.startswith("idle and lazy ")


@pytest.mark.parametrize(
    "history",
    [
        History(),
        history_of(**LEARNT),
        history_of(**LEARNT, late=[0.0, 0.0, 0.0, -8.0]),
        history_of(**LEARNT, lapsed=[0.0, -8.0, 0.0, 0.0]),
        history_of(**LEARNT, frozen=[0.0, 0.0, 0.0, 0.0]),
        history_of(a=[0.0, 0.0, -9.0, -9.0], b=[0.0, 0.0, -9.0, -9.0], idle=[0.0] * 4),
        history_of(a=[-9.0] * 4, idle=[0.0] * 4, lazy=[0.0] * 4),
    ],
    ids=["no curves", "all learnt", "late", "random again", "frozen", "too short", "most are random"],
)
def test_no_layer_is_left_behind(history: History) -> None:
    assert diagnose_training(history) == []


def test_the_last_measurement_has_the_last_word() -> None:
    history = history_of(**LEARNT, idle=[0.0] * 4)
    assert diagnose_training(history, Report({"idle": record()})) == []
    random = record(alpha=2.1, entropy=0.9)
    assert random.verdict is Verdict.RANDOM
    assert len(diagnose_training(history, Report({"idle": random}))) == 1
