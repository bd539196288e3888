"""Folders with adapters of PEFT on the command line: merged onto the weights that they are for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from farms_tb import analyze
from farms_tb.cli.app import app

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(torch.jit|forkpty)"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]

RANK = 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.Linear(48, 64))


def adapted() -> Any:
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=RANK, target_modules=["1"], init_lora_weights=False)
    return peft.get_peft_model(net(), lora)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def rows_of(*arguments: Any) -> dict[str, dict[str, Any]]:
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    return {row["layer"]: row for row in json.loads(result.stdout)["layers"]}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_file(net().state_dict(), tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    adapted().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_analyze(base: Path, adapter: Path) -> None:
    expected = analyze(adapted().merge_and_unload()).alphas
    rows = rows_of("analyze", adapter, "--base", base)
    assert {name: row["alpha"] for name, row in rows.items()} == pytest.approx(expected, rel=2e-6)


def test_compare_merges_the_adapter_onto_the_other_model(base: Path, adapter: Path) -> None:
    expected = analyze(adapted().merge_and_unload()).alphas["1"]
    for models, side in (((base, adapter), "b"), ((adapter, base), "a")):
        rows = rows_of("compare", *models)
        assert rows["1"][f"alpha_{side}"] == pytest.approx(expected, rel=2e-6)
        assert rows["1"]["difference_rank"] == RANK
        assert rows["0"]["difference_norm"] == 0
    change = analyze(adapted()).layers["base_model.model.1"].adapter_change
    assert rows_of("compare", base, adapter)["1"]["difference_norm"] == pytest.approx(change, rel=1e-5)


def test_compare_two_adapters(base: Path, adapter: Path) -> None:
    rows = rows_of("compare", adapter, adapter, "--base", base)
    assert rows["1"]["alpha_a"] == rows["1"]["alpha_b"]
    assert list(rows) == ["0", "1"] or list(rows) == ["1", "0"]


def test_without_a_base_it_says_how_to_merge(adapter: Path) -> None:
    result = run("analyze", adapter, "--no-full")
    assert result.exit_code == 0
    assert "--base" in result.output
    assert "lora_A" in result.stdout


def test_a_model_that_peft_wraps_is_measured_merged() -> None:
    expected = analyze(adapted()).alphas
    rows = rows_of("analyze", "tests.cli.test_adapters:adapted")
    assert {name: row["alpha"] for name, row in rows.items()} == expected
    assert rows["base_model.model.1"]["adapter_change"] > 0
    assert len(rows_of("analyze", "tests.cli.test_adapters:adapted", "--adapters", "separate")) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("analyze", "BASE", "--base", "BASE"), "is none"),
        (("compare", "BASE", "BASE", "--base", "BASE"), "are none"),
        (("analyze", "tests.cli.test_adapters:net", "--base", "BASE"), "is none"),
        (("analyze", "ADAPTER", "--base", "nowhere.safetensors"), "no such file"),
        (("analyze", "ADAPTER", "--base", "ADAPTER"), "no layer '1'"),
    ],
    ids=str,
)
def test_a_base_that_does_not_fit(arguments: tuple[str, ...], message: str, base: Path, adapter: Path) -> None:
    paths = {"BASE": base, "ADAPTER": adapter}
    result = run(*(paths.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


@pytest.mark.parametrize("command", ["analyze", "compare"])
def test_output_never_replaces_a_file_of_the_base(command: str, base: Path, adapter: Path) -> None:
    config = base.with_name("config.json")
    config.write_text("{}")
    models = [adapter] if command == "analyze" else [adapter, adapter]
    refused = run(command, *models, "--base", base, "-o", config)
    assert refused.exit_code == 2
    assert "replace" in refused.stderr
    assert config.read_text() == "{}"


def test_an_adapter_gets_no_plan_to_prune(adapter: Path) -> None:
    refused = run("sparsity", adapter, "--target", 0.5)
    assert refused.exit_code == 2
    assert "merge" in refused.stderr
