"""From a measurement to a plan, of real models and files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import farms_tb
from farms_tb.sparsity import plan_from_report

pytestmark = pytest.mark.filterwarnings("ignore:.*(epsilon|straight line|held at|enable_nested_tensor)")


class Block(nn.Module):
    """A block of a vision model: two matrices, a depthwise convolution and a norm."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.norm = nn.LayerNorm(32)
        with torch.no_grad():
            self.up.weight *= torch.arange(1, 33) ** -scale


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList(Block(scale) for scale in (0.9, 0.1, 0.4, 0.7))
        self.head = nn.Linear(32, 50)


def test_matrices_in_blocks_are_planned_and_nothing_else() -> None:
    report = farms_tb.analyze(Net(), window=16)
    plan = plan_from_report(report, 0.6, epsilon=0.2)
    assert list(plan.layers) == [f"layers.{b}.{name}" for b in range(4) for name in ("up", "down")]
    assert plan.total == pytest.approx(0.6, abs=1e-12)
    assert plan.options["window"] == 16
    assert plan.layers["layers.1.up"].alpha == report.alphas["layers.1.up"]
    assert plan.layers["layers.1.up"].alpha_error == report.layers["layers.1.up"].alpha_error
    assert plan.sparsity["layers.1.up"] > plan.sparsity["layers.0.up"]
    assert any("stay dense" in note and "layers.0.depthwise" in note for note in plan.notes)


def test_a_file_gives_the_plan_of_its_model(tmp_path: Path) -> None:
    model = Net()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    of_model = plan_from_report(farms_tb.analyze(model, window=16), 0.6)
    of_file = plan_from_report(farms_tb.analyze_checkpoint(tmp_path / "model.safetensors", window=16), 0.6)
    assert of_file.sparsity == pytest.approx(of_model.sparsity, abs=1e-12)
    of_file.check_fits(
        {name: module.weight.shape for name, module in model.named_modules() if hasattr(module, "weight")}
    )


def test_a_plan_without_alphas_needs_no_values() -> None:
    with torch.device("meta"):
        model = Net()
    plan = plan_from_report(farms_tb.analyze(model), 0.5, method="uniform")
    assert set(plan.sparsity.values()) == {0.5}


def test_without_blocks_every_matrix_is_planned() -> None:
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    report = farms_tb.analyze(net, window=16)
    assert list(plan_from_report(report, 0.5, granularity="matrix").layers) == ["0", "2"]
    with pytest.raises(TypeError, match="report must be"):
        plan_from_report(nn.Linear(3, 3), 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="granularity='matrix'"):
        plan_from_report(report, 0.5)
    by_pattern = plan_from_report(farms_tb.analyze(Net(), window=16), 0.5, blocks=["layers.*"])
    assert len(by_pattern.blocks) == 4


def test_quantised_weights_are_named_with_the_way_out() -> None:
    state = Net().state_dict()
    state["layers.2.up.weight"] = torch.ones(64, 32, dtype=torch.int8)
    report = farms_tb.analyze(state, window=16)
    plan = plan_from_report(report, 0.5)
    assert any("layers.2.up: quantised" in note and "dequantise" in note for note in plan.notes)
    assert "layers.2.up" not in plan.layers
    for name in list(report.layers):
        report.layers[name] = replace(report.layers["layers.2.up"])
    with pytest.raises(ValueError, match=r"no layer can be pruned[\s\S]*dequantise"):
        plan_from_report(report, 0.5)


@pytest.mark.filterwarnings("ignore:.*without an alpha")
def test_a_collapsed_layer_is_not_taken_for_a_well_trained_one() -> None:
    model = Net()
    with torch.no_grad():
        for weight in (model.layers[0].up.weight, model.layers[0].down.weight):
            left, right = torch.randn(len(weight), 3), torch.randn(3, weight.shape[1])
            weight.copy_(left @ right + 1e-5 * torch.randn_like(weight))
    report = farms_tb.analyze(model, window=16)
    assert report.layers["layers.0.up"].collapsed
    plan = plan_from_report(report, 0.6)
    assert min(plan.sparsity.values()) < plan.sparsity["layers.0.up"] < max(plan.sparsity.values())
    research = plan_from_report(report, 0.6, compat="farms")
    assert research.sparsity["layers.0.up"] == min(research.sparsity.values())
