"""Plans as files, and against the model that they are for."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from farms_tb import analyze, analyze_checkpoint
from farms_tb.sparsity import PlannedLayer, SparsityPlan, allocate, plan_from_report, prune

SHAPES = {f"layers.{b}.{name}": (1, 8 + b, 4) for b in range(3) for name in ("q", "u\nd")}
ALPHAS = {name: 2.0 + index / 10 for index, name in enumerate(SHAPES)}


@pytest.fixture
def plan() -> SparsityPlan:
    made = allocate(ALPHAS, SHAPES, 0.7, epsilon=0.1, errors=dict.fromkeys(SHAPES, 0.05), seed=3)
    return replace(made, options={**made.options, "window": 100}, notes=("something",))


def test_json_holds_everything(plan: SparsityPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    assert SparsityPlan.load(tmp_path / "plan.json") == plan
    held = json.loads((tmp_path / "plan.json").read_text())
    assert held["total"] == pytest.approx(0.7, abs=1e-12)
    assert held["layers"][0]["shape"] == [1, 8, 4]


def test_csv_holds_the_layers(plan: SparsityPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.csv")
    with (tmp_path / "plan.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["layer"] for row in rows] == list(SHAPES)
    assert [float(row["sparsity"]) for row in rows] == list(plan.sparsity.values())
    with pytest.raises(ValueError, match="no JSON"):
        SparsityPlan.load(tmp_path / "plan.csv")


def test_a_plan_has_layers() -> None:
    with pytest.raises(ValueError, match="no layers"):
        SparsityPlan({}, 0.5, "alpha")
    with pytest.raises(TypeError, match="layers must be"):
        SparsityPlan(None, 0.5, "alpha")  # type: ignore[arg-type]


def changed(**changes: Any) -> Any:
    def change(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, **changes}

    return change


def of_first_layer(**changes: Any) -> Any:
    def change(values: dict[str, Any]) -> dict[str, Any]:
        first, *others = values["layers"]
        return {**values, "layers": [{**first, **changes}, *others]}

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: [values], "lacks 'format'"),
        (changed(format="another"), "lacks 'format'"),
        (changed(version=2), "version 2"),
        (changed(layers=[]), "no layers"),
        (changed(layers=3), "damaged"),
        (lambda values: {k: v for k, v in values.items() if k != "target"}, "target"),
        (lambda values: {**values, "layers": [*values["layers"], values["layers"][0]]}, "two layers"),
        (of_first_layer(sparsity=0.1), "add up"),
        (of_first_layer(sparsity=-0.1), "at least 0"),
        (of_first_layer(sparsity="much"), "damaged"),
        (of_first_layer(size=0), "size"),
        (of_first_layer(size=1.5), "integer"),
        (of_first_layer(shape=None), "damaged: layer 'layers.0.q': shape must be a list"),
        (of_first_layer(shape=[4, "4"]), "layer 'layers.0.q': shape must be an integer"),
        (of_first_layer(size=10**400), "layer 'layers.0.q': size must be finite"),
        (of_first_layer(sparsity="0.5"), "layer 'layers.0.q': sparsity must be a number"),
        (of_first_layer(sparsity=10**400), "sparsity must be finite"),
        (of_first_layer(alpha="2"), "layer 'layers.0.q': alpha must be a number"),
        (of_first_layer(alpha_error=float("inf")), "Infinity is no number"),
        (of_first_layer(block=3), "layer 'layers.0.q': block must be text"),
        (of_first_layer(name=["q"]), "name of a layer must be text"),
        (changed(layers=["q"]), "a layer must be an object, got 'q'"),
        (changed(layers={"q": 1}), "layers must be a list"),
        (changed(target="abc"), "target must be a number, got 'abc'"),
        (changed(target=True), "target must be"),
        (changed(target=1.5), "target must be at most 1"),
        (changed(method=7), "method must be text.*, got 7"),
        (changed(granularity="blocks"), "granularity must be one of .*'blocks'"),
        (changed(granularity=["block"]), "granularity must be one of"),
        (changed(epsilon=float("nan")), "NaN is no number"),
        (changed(epsilon=10**400), "epsilon must be"),
        (changed(bounds=[0, "1"]), "bounds must be"),
        (changed(bounds=[0.9, 0.1]), "bounds must be at least 0.9"),
        (changed(bounds=[0]), "bounds must be two numbers"),
        (changed(bounds=3), "bounds must be two numbers"),
        (changed(seed="x"), "seed must be an integer"),
        (changed(options=[1]), "options must be values by name"),
        (changed(options={"window": float("nan")}), "NaN is no number"),
        (changed(notes="a note"), "notes must be a list"),
        (changed(notes=[7]), "note must be text"),
        (changed(total="much"), "total must be"),
    ],
)
def test_damaged_and_foreign_files(plan: SparsityPlan, tmp_path: Path, change: Any, message: str) -> None:
    values = change(json.loads(plan.to_json()))
    (tmp_path / "plan.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as raised:
        SparsityPlan.load(tmp_path / "plan.json")
    assert "plan.json" in str(raised.value)


def test_files_cut_anywhere(plan: SparsityPlan, tmp_path: Path) -> None:
    text = plan.to_json().rstrip()
    for end in range(0, len(text), 97):
        (tmp_path / "plan.json").write_text(text[:end])
        with pytest.raises(ValueError, match="no plan"):
            SparsityPlan.load(tmp_path / "plan.json")
    with pytest.raises(FileNotFoundError):
        SparsityPlan.load(tmp_path / "other.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00" * 9)
    with pytest.raises(ValueError, match="no plan"):
        SparsityPlan.load(tmp_path / "plan.json")


def test_a_full_disk_leaves_the_plan_before(plan: SparsityPlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        replace(plan, options={"window": float("nan")}).save(tmp_path / "plan.json")
    assert SparsityPlan.load(tmp_path / "plan.json") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_a_plan_fits_its_model_alone(plan: SparsityPlan) -> None:
    plan.check_fits({**SHAPES, "head": (5, 5)})
    plan.check_fits({name: (shape[2], shape[1]) for name, shape in SHAPES.items()})
    with pytest.raises(ValueError, match=r"another model.*layers\.0\.q"):
        plan.check_fits({name: shape for name, shape in SHAPES.items() if name != "layers.0.q"})
    with pytest.raises(ValueError, match=r"another model.*layers\.0\.q.*\(1, 8, 5\)"):
        plan.check_fits({**SHAPES, "layers.0.q": (1, 8, 5)})
    with pytest.raises(ValueError, match="another model"):
        plan.check_fits({**SHAPES, "layers.0.q": (1, 16, 2)})


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(16, 16, 4), (16, 32, 2), (64, 8, 2)])
def test_a_plan_of_a_file_fits_a_grouped_convolution(
    kind: type[nn.Module], inputs: int, outputs: int, groups: int, tmp_path: Path
) -> None:
    """A file does not tell the groups of its convolutions, so that it has other matrices than the model."""
    model = nn.Sequential(kind(inputs, outputs, 3, groups=groups), nn.Flatten(), nn.Linear(64, 48))
    torch.save(model.state_dict(), tmp_path / "model.pt")
    of_model, of_file = analyze(model), analyze_checkpoint(tmp_path / "model.pt")
    shapes = {name: layer.shape for name, layer in of_model.layers.items()}
    for report in (of_model, of_file):
        plan = plan_from_report(report, 0.5, method="uniform", granularity="matrix")
        plan.check_fits(shapes)
        prune(model, plan, "magnitude", in_place=True)
        assert int((model[0].weight == 0).sum()) == model[0].weight.numel() // 2
    matrices, rows, columns = of_file.layers["0"].shape
    with pytest.raises(ValueError, match="another model"):
        plan.check_fits({**shapes, "0": (matrices, 2 * rows, columns // 2)})


def test_sizes_alone_and_convolutions() -> None:
    sizes = {"layers.0.conv": 9 * 4 * 8, "layers.1.conv": (9, 8, 4)}
    plan = allocate({}, sizes, 0.5, method="uniform")
    plan.check_fits({"layers.0.conv": (8, 4, 3, 3), "layers.1.conv": (8, 4, 3, 3)})
    assert plan.layers["layers.0.conv"].shape == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0, "sparsity": 0.5}, "size must be at least 1"),
        ({"size": 2.5, "sparsity": 0.5}, "size must be an integer"),
        ({"size": 4, "sparsity": float("nan")}, "sparsity must be finite"),
        ({"size": 4, "sparsity": True}, "sparsity must be a number"),
    ],
)
def test_impossible_layers(values: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        PlannedLayer(**values)


def test_what_can_be_made_can_be_saved_and_read(tmp_path: Path) -> None:
    layers = {"fc": PlannedLayer(np.int64(48), np.float32(0.5), shape=[1, 6, 8])}  # type: ignore[arg-type]
    plan = SparsityPlan(layers, np.float64(0.5), "alpha")
    plan.save(tmp_path / "plan.json")
    assert SparsityPlan.load(tmp_path / "plan.json") == plan
    with pytest.raises(ValueError, match="granularity"):
        replace(plan, granularity="row")
