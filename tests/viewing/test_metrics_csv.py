"""Files of metrics that are not what the callback writes: what is odd is left out and said, the rest is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from farms_tb.viewing.metrics_csv import has_measurements, read_metrics
from farms_tb.viewing.page import write_page

HEADER = "epoch,step,farms/alpha/a,farms/ratio/a\n"
GOOD = "1,4,2.5,1\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "metrics.csv"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    return path


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("0,inf,2,1\n", "step 'inf'"),
        ("0,1e300,2,1\n", "step '1e300'"),
        ("0,x,2,1\n", "step 'x'"),
        ("0," + "9" * 5000 + ",2,1\n", "step '…999"),
        ("0,0,nan,1\n", "'nan' as alpha of 'a'"),
        ("0,0,-inf,1\n", "'-inf' as alpha of 'a'"),
        ("0,0,two,1\n", "'two' as alpha of 'a'"),
        ("0,0,\x1b[2J,1\n", r"\x1b"),
        ("0,0,\0,1\n", "line 2"),
        ("0,0,\udcff\udcfe,1\n", "'\ufffd\ufffd' as alpha"),
        ("0,0,2," + "1" * 200_000 + "\n", "line 2"),
        ("0,0," + "9" * 5000 + ",1\n", "'…999"),
    ],
)
def test_odd_cells_are_left_out_and_named(tmp_path: Path, row: str, words: str) -> None:
    found = read_metrics(written(tmp_path, HEADER + row + GOOD))
    assert found.history.alpha["a"].values == (2.5,)
    (problem,) = found.problems
    assert "metrics.csv" in problem
    assert words in problem.replace("\\\\", "\\")
    assert len(problem) < 300
    assert write_page(tmp_path).exists()


def test_other_columns_may_hold_anything(tmp_path: Path) -> None:
    path = written(tmp_path, "epoch,step,loss,farms/alpha/a\nx,y,nan,\n1,4,inf,2.5\n")
    assert read_metrics(path).problems == ()
    assert read_metrics(path).history.alpha["a"].values == (2.5,)


def test_several_odd_cells_are_counted(tmp_path: Path) -> None:
    (problem,) = read_metrics(written(tmp_path, HEADER + "0,0,nan,nan\n" * 3)).problems
    assert "and 5 more" in problem


@pytest.mark.parametrize(
    ("damaged", "line"),
    [
        ('2,8,2.5,"1\n', 4),
        ('2,8,"2.5,1\n', 4),
        ('2,8,2.5,"1"x\n', 4),
        ("garbage\n", 4),
        ("2,83,12,2.5,1\n", 4),
        ("2,8,2.5\n", 4),
        ("garbage,8,2.5,1\n", 4),
        ('2,8,2.5,"1\n\n"\n' + "5,5\n" * 30, 4),
    ],
)
def test_a_damaged_line_costs_itself_alone(tmp_path: Path, damaged: str, line: int) -> None:
    rows = [f"{epoch},{4 * epoch},2.{epoch},1\n" for epoch in range(9)]
    path = written(tmp_path, HEADER + "".join([*rows[:2], damaged, *rows[3:]]))
    found = read_metrics(path)
    kept = found.history.alpha["a"].epochs
    assert [epoch for epoch in kept if epoch != 2] == [0, 1, 3, 4, 5, 6, 7, 8]
    assert set(found.history.alpha["a"].values) <= {2.5, *(float(f"2.{epoch}") for epoch in range(9))}
    (problem,) = found.problems
    assert f"line {line} (" in problem
    assert found.logged == {}


def test_two_stray_quotes_hide_no_row_between_them(tmp_path: Path) -> None:
    rows = ['0,0,2,"1\n', "1,4,2,1\n", '2,8,2,1"\n', GOOD.replace("1,4", "3,12")]
    found = read_metrics(written(tmp_path, HEADER + "".join(rows)))
    assert found.history.alpha["a"].epochs == (1, 2, 3)
    (problem,) = found.problems
    assert "line 2 (" in problem


def test_a_text_of_several_lines_is_left_out(tmp_path: Path) -> None:
    path = written(tmp_path, 'epoch,step,note,farms/alpha/a\n0,0,"two\nlines, ""quoted""",2\n1,4,"one",3\n')
    found = read_metrics(path)
    assert found.history.alpha["a"].values == (3,)
    (problem,) = found.problems
    assert "line 2 (" in problem
    assert "and 1 more" in problem


@pytest.mark.parametrize(
    "name", ["²", "a\x1b[2J", "9" * 5000, "$\\x$", "_orig_mod.0", "{{css}}", "<script>", "层"]
)
def test_any_name_is_read(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, f"epoch,step,farms/alpha/{name},farms/alpha/b.10,farms/alpha/b.9\n0,0,2,2,2\n")
    found = read_metrics(path)
    assert set(found.history.alpha) == {name, "b.9", "b.10"}
    assert found.history.layers.index("b.9") < found.history.layers.index("b.10")


def test_of_two_columns_of_one_name_the_last_counts(tmp_path: Path) -> None:
    path = written(tmp_path, "epoch,step,farms/alpha/a,farms/alpha/a\n0,0,2,3\n")
    assert read_metrics(path).history.alpha["a"].values == (3,)


def test_names_of_two_lines(tmp_path: Path) -> None:
    path = written(tmp_path, 'epoch,step,"farms/alpha/a\nb"\n0,0,2\n')
    assert list(read_metrics(path).history.alpha) == ["a\nb"]
    assert has_measurements(path)


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff\n", b"epoch,step\n0,0\n", b"farms/alpha/a", b'"' + b"a" * 200_000 + b"\n"]
)
def test_files_without_measurements(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.csv").write_bytes(content)
    assert not has_measurements(tmp_path / "metrics.csv")
    assert not has_measurements(tmp_path / "gone.csv")


def test_a_mark_of_byte_order_is_no_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(HEADER + GOOD, encoding="utf-8-sig")
    assert read_metrics(tmp_path / "metrics.csv").history.alpha["a"].epochs == (1.0,)


def test_effects_and_rank_shares_are_curves_of_the_layers_measured(tmp_path: Path) -> None:
    measured = "farms/alpha/a,farms/effect/a,farms/z/a,farms/rank_share/a"
    rows = ["0,0,2,-0.1,-3,0.7,0.9,1", "1,4,1.9,-0.2,-6,0.6,0.9,1"]
    text = "\n".join([f"epoch,step,{measured},farms/rank_share/flat,farms/z/b", *rows, ""])
    history = read_metrics(written(tmp_path, text)).history
    assert history.effect["a"].values == (-0.1, -0.2)
    assert history.z["a"].values == (-3, -6)
    assert history.rank_share["a"].values == (0.7, 0.6)
    assert history.layers == ("a",)
