"""`farms-tb sparsity`: the plan, its file, its comparison with depth, and how it ends."""

from __future__ import annotations

import csv
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from farms_tb import analyze
from farms_tb.cli.app import app
from farms_tb.sparsity import SparsityPlan, plan_from_report

pytestmark = pytest.mark.filterwarnings("ignore:.*(torch.jit|forkpty|enable_nested_tensor)")


def encoder() -> nn.Module:
    """Four blocks, each with a heavier tail than the one before."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 4), "head": nn.Linear(32, 100)})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "layers." in name:
                parameter.normal_()
                block = int(name.split(".")[2])
                parameter *= torch.arange(1, parameter.shape[1] + 1) ** -(0.8 - 0.2 * block)
    return model


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file(encoder().state_dict(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["sparsity", *map(str, arguments)])


def test_the_plan_is_that_of_python(weights: Path, tmp_path: Path) -> None:
    plan_file = tmp_path / "plan.json"
    done = run(weights, "--target", 0.7, "--window", 16, "--epsilon", 0.2, "-o", plan_file)
    assert done.exit_code == 0, done.stderr
    plan = SparsityPlan.load(plan_file)
    with pytest.warns(UserWarning, match="straight line"):
        wanted = plan_from_report(analyze(encoder(), window=16), 0.7, epsilon=0.2)
    assert plan.sparsity == pytest.approx(wanted.sparsity, abs=1e-12)
    assert plan.total == pytest.approx(0.7, abs=1e-12)
    assert plan.options["window"] == 16
    assert "head" not in plan.layers
    assert "head" not in done.stdout


@pytest.mark.parametrize("of_folder", [True, False])
def test_a_plan_never_replaces_a_file_of_the_model(of_folder: bool, weights: Path) -> None:
    config = weights.with_name("config.json")
    config.write_text("{}")
    refused = run(weights.parent if of_folder else weights, "--target", 0.5, "--method", "uniform", "-o", config)
    assert refused.exit_code == 2
    assert "replace" in refused.stderr
    assert config.read_text() == "{}"


def test_the_layers_are_those_that_analyze_measures(tmp_path: Path) -> None:
    state = {"layers.0.fc.weight": torch.randn(48, 32), "layers.0.embed.weight": torch.randn(64, 32)}
    save_file(state, tmp_path / "model.safetensors")
    for options, expected in (((), ["layers.0.fc"]), (("--embeddings",), ["layers.0.embed", "layers.0.fc"])):
        done = run(tmp_path, "--target", 0.5, "--granularity", "matrix", *options, "-o", tmp_path / "plan.json")
        assert done.exit_code == 0, done.stderr
        assert sorted(SparsityPlan.load(tmp_path / "plan.json").layers) == expected


def test_the_table_compares_with_depth(weights: Path) -> None:
    done = run(weights, "--target", 0.7, "--window", 16)
    assert re.search(r"total sparsity 0\.700000 of [\d,]+ entries \(24 layers, 4 blocks\)", done.stdout)
    correlation = re.search(r"correlation with depth ([+-][\d.]+)", done.stdout)
    assert correlation is not None
    assert float(correlation[1]) > 0.9
    assert re.search(r"from uniform 0\.\d+, from a straight line in depth 0\.\d+", done.stdout)
    assert "straight line in depth (correlation" in done.stderr
    header = next(line for line in done.stdout.splitlines() if line.startswith("layer"))
    assert header.split() == ["layer", "block", "alpha", "±", "entries", "sparsity"]
    line = run(weights, "--target", 0.7, "--method", "depth")
    assert "correlation with depth +1.00" in line.stdout
    assert "from a straight line in depth 0.0000" in line.stdout
    assert "correlation with depth none" in run(weights, "--target", 0.7, "--method", "uniform").stdout


def test_csv(weights: Path, tmp_path: Path) -> None:
    done = run(weights, "--target", 0.5, "--method", "shrinkage", "--window", 16, "-o", tmp_path / "plan.csv")
    assert done.exit_code == 0, done.stderr
    with (tmp_path / "plan.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sizes = [int(row["size"]) for row in rows]
    zeros = [size * float(row["sparsity"]) for size, row in zip(sizes, rows, strict=True)]
    assert math.fsum(zeros) / sum(sizes) == pytest.approx(0.5, abs=1e-12)


def test_models_by_name_and_patterns(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    plan_file = tmp_path / "plan.json"
    done = run("resnet18", "--target", 0.5, "--method", "uniform", "--blocks", "layer?.*", "-o", plan_file)
    assert done.exit_code == 0, done.stderr
    assert len(SparsityPlan.load(plan_file).blocks) == 8
    assert "random weights" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "1.5"], "target must be at most 1"),
        (["--target", "0.5", "--method", "owl"], "calibration"),
        (["--target", "0.5", "--method", "search"], "calibration"),
        (["--target", "0.5", "--epsilon", "2"], "epsilon"),
        (["--target", "0.5", "--blocks", "nothing.*"], "no blocks"),
        (["--target", "0.5", "-o", "plan.txt"], ".json"),
        (["--target", "0.5", "-o", "no/such/folder/plan.json"], "cannot write"),
        (["--target", "0.5", "--granularity", "layer"], "granularity"),
        ([], "--target"),
    ],
)
def test_mistakes(weights: Path, arguments: list[str], message: str) -> None:
    done = run(weights, "--method", "uniform", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_target_out_of_reach_costs_no_measurement(tmp_path: Path) -> None:
    """It is said even of a model that cannot be opened."""
    done = run(tmp_path / "absent", "--target", 0.995)
    assert done.exit_code == 2
    assert "out of reach" in done.stderr


def test_a_damaged_part_gives_no_plan(tmp_path: Path) -> None:
    """Half a plan would be taken for that of the model."""
    state = encoder().state_dict()
    parts = {"a.safetensors": {}, "b.safetensors": {}}
    for index, (name, value) in enumerate(state.items()):
        parts[("a.safetensors", "b.safetensors")[index % 2]][name] = value
    for file, held in parts.items():
        save_file(held, tmp_path / file)
    weight_map = {name: file for file, held in parts.items() for name in held}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "b.safetensors").read_bytes()[:200])
    for method, code in (("alpha", 1), ("uniform", 2)):
        done = run(tmp_path, "--target", 0.5, "--method", method, "-o", tmp_path / "plan.json")
        assert done.exit_code == code
        assert "b.safetensors" in done.stderr
        assert not (tmp_path / "plan.json").exists()


def folder_of_holes(folder: Path, layers: int, side: int) -> None:
    """Write a sharded model whose files are mostly holes, and take no disk."""
    weight_map = {}
    corner = torch.randn(20, side).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    for layer in range(layers):
        header, start = {}, 0
        for name in ("q_proj", "k_proj", "up_proj", "down_proj"):
            key, end = f"model.layers.{layer}.{name}.weight", start + 2 * side * side
            header[key] = {"dtype": "BF16", "shape": [side, side], "data_offsets": [start, end]}
            weight_map[key], start = f"{layer}.safetensors", end
        text = json.dumps(header).encode()
        with (folder / f"{layer}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for entry in header.values():
                file.seek(8 + len(text) + entry["data_offsets"][0])
                file.write(corner)
            file.truncate(8 + len(text) + start)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Of 1.5 GiB of weights, the peak rises by a few times one tensor of 32 MiB; so do 7 billion parameters."""
    folder_of_holes(tmp_path, layers=12, side=4096)
    code = f"""
import resource
from typer.testing import CliRunner
from farms_tb.cli.app import app
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def plan(*arguments):
    done = CliRunner().invoke(app, ["sparsity", {str(tmp_path)!r}, "--target", "0.7", *arguments])
    assert done.exit_code == 0, done.stderr
    return peak()
before = peak()
print(plan("--method", "uniform") - before)
print(plan("--window", "20", "--windows-per-dim", "1") - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert all(float(rise) < 400 for rise in done.stdout.split())
