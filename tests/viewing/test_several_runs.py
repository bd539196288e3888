"""Reading several runs: names that tell them apart, and errors that name the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from farms_tb.viewing.several_runs import in_every_run, in_some_runs, listed, read_runs, unique_names

METRICS = (
    "epoch,farms/alpha/0,step,train/loss,val/acc\n0,2.1,0,,\n0,,3,0.5,\n0,,4,nan,0.25\n1,1.9,8,,\n1,,9,0.25,0.5\n"
)


def a_run(folder: Path, text: str = METRICS) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/sgd", "/a/adam"], ["sgd", "adam"]),
        (["/a/sgd/version_0", "/a/adam/version_0"], ["sgd", "adam"]),
        (["/a/sgd/1", "/a/adam/1", "/a/adam/2"], ["sgd/1", "adam/1", "adam/2"]),
        (["/a", "/a/a"], ["/", "a"]),
        (["/a/model.safetensors"], ["model.safetensors"]),
    ],
)
def test_names_are_the_shortest_that_tell_runs_apart(paths: list[str], names: list[str]) -> None:
    assert unique_names([Path(path) for path in paths]) == names


def test_a_link_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "best").symlink_to(a_run(tmp_path / "run_17"))
    assert list(read_runs([tmp_path / "best", a_run(tmp_path / "other")])) == ["best", "other"]


def test_other_columns_are_read_too(tmp_path: Path) -> None:
    """Without the layers' and the times, and without what is not finite."""
    runs = read_runs([a_run(tmp_path / "a"), a_run(tmp_path / "b", "step,farms/ratio/0\n0,1.0\n")])
    logged = runs["a"].logged
    assert {name: (curve.steps, curve.values) for name, curve in logged.items()} == {
        "train/loss": ((3, 9), (0.5, 0.25)),
        "val/acc": ((4, 9), (0.25, 0.5)),
    }
    assert logged["val/acc"].epochs == (0, 1)
    assert runs["a"].history.alpha["0"].values == (2.1, 1.9)
    assert runs["b"].logged == {}


def test_a_run_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    good = a_run(tmp_path / "good")
    (tmp_path / "torn.pt").write_bytes(b"PK\x03\x04 half a file")
    several = tmp_path / "sweep"
    a_run(several / "1")
    a_run(several / "2")
    (tmp_path / "empty").mkdir()
    for wrong, words in (
        (tmp_path / "nowhere", "nowhere.*no such folder"),
        (tmp_path / "torn.pt", "torn.pt.*cannot be compared"),
        (tmp_path / "empty", "empty.*no run folder"),
        (several, "sweep.*several runs"),
        (good, "good.*given twice"),
    ):
        with pytest.raises(ValueError, match=f"(?s){words}"):
            read_runs([good, wrong])


def test_what_is_not_there_is_found_before_weights_are_measured(tmp_path: Path) -> None:
    """The first file has no weights that could be measured, and is not looked into."""
    torch.save({"weight": torch.zeros(3)}, tmp_path / "first.pt")
    with pytest.raises(ValueError, match="second"):
        read_runs([tmp_path / "first.pt", tmp_path / "second.pt"])


def test_files_of_weights(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.save(nn.Linear(30, 40).state_dict() | {"x": torch.zeros(2)}, tmp_path / f"{name}.pt")
    runs = read_runs([tmp_path / "a.pt", tmp_path / "b.pt"], null=True)
    assert list(runs) == ["a.pt", "b.pt"]
    for run in runs.values():
        assert run.farms is not None
        (record,) = [record for record in run.farms.layers.values() if record.alpha is not None]
        assert record.effect is not None


def test_common_names() -> None:
    values = {"a": {"x": 1, "y": 1, "z": 1}, "b": {"z": 2, "x": 2, "v": 2}}
    assert in_every_run(values) == ["x", "z"]
    assert in_some_runs(values) == ["y", "v"]
    assert in_every_run({}) == in_some_runs({}) == []


def test_names_of_hostile_files_are_safe_to_print() -> None:
    assert "\x1b" not in listed(["a\x1b[2J"])
    assert len(listed(["9" * 5000] * 20)) < 400
