"""Names out of files that somebody else made, as they are shown."""

from __future__ import annotations

import pytest

from farms_tb.printable import printable
from farms_tb.viewing.names import file_name, shortened, told_apart
from farms_tb.weights.names import natural_order


@pytest.mark.parametrize(
    "evil", ["\x1b[2J", "\x9b2J", "a\nb", "\r", "\x00", "\ud800", "\u202e", "\u2028", "\x7f", "\x07"]
)
def test_nothing_that_a_terminal_executes_is_left(evil: str) -> None:
    shown = printable(evil)
    assert shown.isprintable()
    assert shown.encode("utf-8")
    assert "\\" in shown


@pytest.mark.parametrize("name", ["net.0.conv", "größe", "层.1", "λ²", ""])
def test_other_names_stay_as_they_are(name: str) -> None:
    assert printable(name) == name


def test_messages_keep_their_lines() -> None:
    assert printable("a\n  b\x1b", keep="\n") == "a\n  b\\x1b"


def test_short_names() -> None:
    assert shortened("abc", 3) == "abc"
    assert shortened("abcd", 3) == "…cd"
    assert shortened("a\x1bb", 4) == "…1bb"
    assert shortened("a\nb\x1b", keep="\n") == "a\nb\\x1b"


def test_names_are_sorted_by_their_numbers() -> None:
    names = ["a.10.w", "a.9.w", "a", "b", "a.²", "a." + "1" * 5000, "a." + "2" * 4999, "007", "7", "10"]
    expected = ["7", "007", "10", "a", "a.9.w", "a.10.w", "a." + "2" * 4999, "a." + "1" * 5000, "a.²", "b"]
    ordered = sorted(names, key=natural_order)
    assert [name for name in ordered if name not in ("7", "007", "a.²")] == [
        name for name in expected if name not in ("7", "007", "a.²")
    ]
    assert set(ordered[:2]) == {"7", "007"}


def test_names_are_sorted_part_by_part() -> None:
    names = ["h_10.10", "conv10.w", "conv2.w", "h_10.2", "h_2.10", "conv.w", "conv"]
    expected = ["conv", "conv.w", "conv2.w", "conv10.w", "h_2.10", "h_10.2", "h_10.10"]
    assert sorted(names, key=natural_order) == expected


def test_file_names_are_names_of_files() -> None:
    assert file_name("a/b\\c.weight") == "a_b_c.weight"
    long = [file_name(letter * 5000 + end) for letter in "ab" for end in "cd"]
    assert len(set(long)) == 4
    assert all(len(name.encode()) < 200 for name in long)
    evil = file_name("a\x1b[2J\ud800")
    assert evil.isprintable()
    assert evil != file_name("a_[2J_")


def test_long_names_are_told_apart() -> None:
    sides = ("in", "out")
    layers = [f"decoder.layers.{i}.cross_attention.{side}_projection" for i in (0, 1, 10) for side in sides]
    shown = told_apart(layers, 32)
    assert len(set(shown)) == len(layers)
    assert max(map(len, shown)) <= 32
    assert shown[1] == "…coder.layers.0…n.out_projection"
    assert told_apart([f"layers.{index}.self_attention.proj" for index in (10, 20)], 20) == [
        f"layers.{index}…ntion.proj" for index in (10, 20)
    ]


def test_names_of_three_differences_are_told_apart() -> None:
    runs = [
        f"optimizer.lr={lr},optimizer.weight_decay=0.0001,model.width={width},trainer.max_epochs=50,seed={seed}"
        for lr in (0.1, 0.01)
        for width in (32, 64)
        for seed in (1, 2)
    ]
    assert len(set(told_apart(runs))) == len(runs)


def test_names_that_need_no_telling_apart_stay_as_they_are() -> None:
    names = ["stem", "stem", "a" * 100, "\x1b", "\\x1b", "9" * 5000, "9" * 4999, ""]
    shown = told_apart(names, 32)
    assert shown[:5] == ["stem", "stem", "…" + "a" * 31, "\\x1b", "\\x1b"]
    assert shown[5] != shown[6]
    assert told_apart([]) == []
