"""Blocks by name: of real architectures, the same in a model and in its file."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from farms_tb import analyze_checkpoint
from farms_tb.weights.blocks import blocks_of, name_in_block, split_number
from farms_tb.weights.layers import find_layers


def shapes_of(make: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = make()
    return {layer.name: layer.shape for layer in find_layers(model) if layer.shape}


def blocks_in(make: Callable[[], nn.Module]) -> list[str]:
    return list(dict.fromkeys(blocks_of(shapes_of(make)).values()))


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    models = pytest.importorskip("torchvision.models")
    return lambda: models.get_model(name)


def transformers_model(name: str, **config: Any) -> Callable[[], nn.Module]:
    transformers = pytest.importorskip("transformers")
    made = getattr(transformers, f"{name}Config")(**config)
    return lambda: getattr(transformers, f"{name}Model")(made)


@pytest.mark.parametrize(
    ("name", "number", "first"),
    [
        ("resnet18", 8, "layer1.0"),
        ("resnet50", 16, "layer1.0"),
        ("vit_b_16", 12, "encoder.layers.encoder_layer_0"),
        ("convnext_tiny", 18, "features.1.0"),
        ("swin_t", 12, "features.1.0"),
        ("densenet121", 58, "features.denseblock1.denselayer1"),
    ],
)
def test_models_of_torchvision(name: str, number: int, first: str) -> None:
    found = blocks_in(torchvision_model(name))
    assert len(found) == number
    assert found[0] == first


TINY = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 50}


@pytest.mark.parametrize(
    ("name", "config", "number", "first"),
    [
        ("Llama", {"num_hidden_layers": 3, **TINY}, 3, "layers.0"),
        ("Bert", {"num_hidden_layers": 3, **TINY}, 3, "encoder.layer.0"),
        ("GPT2", {"n_layer": 3, "n_embd": 64, "n_head": 4}, 3, "h.0"),
        ("T5", {"num_layers": 3, "d_model": 64, "d_ff": 96, "vocab_size": 50}, 6, "encoder.block.0"),
        ("ConvNext", {"hidden_sizes": [8, 16, 32, 64]}, 18, "encoder.stages.0.layers.0"),
        ("ResNet", {"hidden_sizes": [8, 16, 32, 64], "depths": [2, 2, 2, 2]}, 8, "encoder.stages.0.layers.0"),
    ],
)
def test_models_of_transformers(name: str, config: dict[str, Any], number: int, first: str) -> None:
    if name == "ConvNext":  # before, it reads numbers of a tensor while it is made, which has none here
        pytest.importorskip("transformers", minversion="5")
    found = blocks_in(transformers_model(name, **config))
    assert len(found) == number
    assert found[0] == first


class Experts(nn.Module):
    """A block whose experts are a longer list than the blocks; the first block is dense."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.attn = nn.Linear(8, 8)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 16)}) for _ in range(experts))
        self.router = nn.Linear(8, experts)


def mixture() -> nn.Module:
    return nn.ModuleDict({"head": nn.Linear(8, 50), "layers": nn.ModuleList(Experts(n) for n in (1, 9, 9, 9, 9))})


def test_experts_are_no_blocks_and_blocks_may_differ() -> None:
    shapes = shapes_of(mixture)
    assert set(blocks_of(shapes).values()) == {f"layers.{i}" for i in range(5)}
    assert "head" not in blocks_of(shapes)


def test_the_order_of_the_layers_does_not_matter() -> None:
    items = list(shapes_of(mixture).items())
    mixed = random.Random(0).sample(items, len(items))
    assert blocks_of(dict(mixed)) == blocks_of(dict(items))


def test_a_file_has_the_blocks_of_its_model(tmp_path: Path) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 3)
    save_file(encoder.state_dict(), tmp_path / "model.safetensors")
    report = analyze_checkpoint(tmp_path / "model.safetensors", window=8)
    in_file = {name: record.shape for name, record in report.layers.items() if record.shape}
    in_model = {layer.name: layer.shape for layer in find_layers(encoder) if layer.shape}
    assert blocks_of(in_file) == blocks_of(in_model)
    assert set(blocks_of(in_file).values()) == {"layers.0", "layers.1", "layers.2"}


@pytest.mark.parametrize(
    "make",
    [
        torchvision_model("vgg11"),
        torchvision_model("googlenet"),
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        lambda: nn.Linear(4, 4),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_models_without_blocks(make: Callable[[], nn.Module]) -> None:
    assert blocks_of(shapes_of(make)) == {}
    assert blocks_of({}) == {}


def test_patterns_and_functions() -> None:
    shapes = {
        "down.a.conv": (2, 2),
        "down.b.conv": (2, 2),
        "up.a.conv": (2, 2),
        "up.a.b.conv": (2, 2),
        "head": (2,),
    }
    assert blocks_of(shapes, ["down.*"]) == {"down.a.conv": "down.a", "down.b.conv": "down.b"}
    assert blocks_of(shapes, ["up.*", "up.a.*"])["up.a.b.conv"] == "up.a"
    told = blocks_of(shapes, lambda name: name.partition(".")[0] if "." in name else None)
    assert set(told.values()) == {"down", "up"}
    assert "head" not in told
    assert blocks_of(shapes, ["nothing.*"]) == {}
    with pytest.raises(TypeError, match="sequence of patterns"):
        blocks_of(shapes, "down.*")


def test_names_in_blocks() -> None:
    assert name_in_block("layers.1.mlp.up", "layers.1") == "mlp.up"
    assert name_in_block("head", "") == "head"
    assert split_number("layers." + "9" * 30) == ("layers." + "9" * 30, -1)
