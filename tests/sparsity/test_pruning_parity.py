"""Masks and weights of the authors' code (AlphaPruning, FARMS), computed once and stored in tests/data.

Where their counts differ from ours (one more for magnitude, floor in every row for Wanda), the counts are passed
or planned as theirs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from farms_tb.sparsity import PlannedLayer, SparsityPlan
from farms_tb.sparsity.masks import magnitude_mask, pruned_count
from farms_tb.sparsity.owl import outlier_shares
from farms_tb.sparsity.prune import prune
from farms_tb.sparsity.sparsegpt import BLOCK_COLUMNS, block_counts, inverse_factor, sparsegpt

DATA = Path(__file__).parents[1] / "data"
REFERENCE = json.loads((DATA / "reference_pruning.json").read_text())["masks"]
with np.load(DATA / "reference_pruning_masks.npz") as archive:
    ARRAYS = {name: archive[name] for name in archive.files}

NAMES = ("q", "k", "v", "o", "gate", "up", "down")
MODEL = REFERENCE["model"]


def weight_of(seed: int, shape: tuple[int, int], decay: float, df: int | None) -> Tensor:
    """Make the weight of a recipe: Gaussian or Student's t, with columns that decay."""
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(shape) if df is None else generator.standard_t(df, size=shape)
    columns = shape[1]
    scaled = values * np.arange(1, columns + 1) ** -decay / np.sqrt(columns)
    return torch.from_numpy(scaled.astype(np.float32))


def inputs_of(recipe: dict[str, Any]) -> Tensor:
    """Make the inputs of a recipe: Gaussian, each feature with a scale of its own."""
    values = np.random.default_rng(recipe["seed"]).standard_normal(recipe["shape"]).astype(np.float32)
    scales = np.random.default_rng(recipe["scale_seed"]).standard_normal(recipe["shape"][-1])
    inputs = values * np.exp(recipe["scale_sigma"] * scales).astype(np.float32)
    assert hashlib.sha256(inputs.tobytes()).hexdigest() == recipe["sha256"]
    return torch.from_numpy(inputs)


def unpacked(name: str, entries: int) -> np.ndarray:
    return np.unpackbits(ARRAYS[name])[:entries].astype(bool)


def matrix_and_inputs(layer: str) -> tuple[Tensor, Tensor]:
    """Make the weight of a layer of the recipe, and its inputs `(tokens, in)`."""
    recipe = REFERENCE[layer]["weight"]
    weight = weight_of(recipe["seed"], tuple(recipe["shape"]), recipe["decay"], recipe["df"])
    return weight, inputs_of(REFERENCE[layer]["inputs"]).flatten(0, 1)


@pytest.mark.parametrize("layer", ["layer_a", "layer_b"])
@pytest.mark.parametrize("case", range(6))
def test_sparsegpt_of_a_matrix(layer: str, case: int) -> None:
    options = REFERENCE[layer]["cases"][case]
    weight, inputs = matrix_and_inputs(layer)
    structure = (options["prune_n"], options["prune_m"]) if "prune_n" in options else None
    widths = [min(BLOCK_COLUMNS, weight.shape[1] - start) for start in range(0, weight.shape[1], BLOCK_COLUMNS)]
    counts = [int(weight.shape[0] * width * options["sparsity"]) + 1 for width in widths]
    corrected, mask = sparsegpt(weight, inverse_factor(inputs.T @ inputs), counts, structure)
    expected = unpacked(f"{layer}_{case}_mask", weight.numel()).reshape(weight.shape)
    assert np.mean(mask.numpy() != expected) <= 0.002
    assert int(mask.sum()) == options["zeros"]
    both = ~(mask.numpy() | expected)
    np.testing.assert_allclose(corrected.numpy()[both], ARRAYS[f"{layer}_{case}_weight"][both], 1e-3, 1e-6)


@pytest.mark.parametrize("layer", ["layer_a", "layer_b"])
def test_sparsegpt_loses_less_than_its_mask_alone(layer: str) -> None:
    weight, inputs = (tensor.double() for tensor in matrix_and_inputs(layer))
    counts = block_counts(*weight.shape, 0.7)
    corrected, mask = sparsegpt(weight, inverse_factor(inputs.T @ inputs), counts)
    assert int(mask.sum()) == pruned_count(weight.numel(), 0.7)
    assert (corrected[mask] == 0).all()

    def lost(pruned: Tensor) -> float:
        return float(((weight - pruned.double()) @ inputs.T).norm())

    assert lost(corrected) < 0.97 * lost(weight.masked_fill(mask, 0))
    assert lost(corrected) < 0.9 * lost(weight.masked_fill(magnitude_mask(weight, sum(counts)), 0))


class ReferenceBlock(nn.Module):
    """The block of the recipe: attention without softmax, and a gated MLP."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        for name, weight in zip(NAMES, weights, strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data.copy_(weight)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.k(x), self.v(x)], dim=-1)
        query = self.q(x)
        h = torch.tanh(query) + both.repeat(1, 1, query.shape[-1] // both.shape[-1])
        x = x + self.o(h)
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class ReferenceModel(nn.Module):
    """The blocks of the recipe one after the other."""

    def __init__(self) -> None:
        super().__init__()
        blocks, place = [], 0
        for (hidden, kv, ff), spec in zip(MODEL["blocks"], MODEL["specs"], strict=True):
            shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
            shapes += [(ff, hidden), (ff, hidden), (hidden, ff)]
            weights = []
            for shape in shapes:
                weights.append(weight_of(MODEL["seed"] + place, shape, spec["decay"], spec["df"]))
                place += 1
            blocks.append(ReferenceBlock(weights))
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def matrices(self) -> list[Tensor]:
        return [getattr(block, name).weight.detach() for block in self.layers for name in NAMES]


def calibration() -> list[dict[str, Tensor]]:
    return [{"x": sequence[None]} for sequence in inputs_of(MODEL["inputs"])]


CASES = {"magnitude": 0, "wanda": 1, "sparsegpt": 2, "wanda 2:4": 3, "wanda 4:8": 4}


@pytest.mark.parametrize("name", CASES)
def test_a_model_block_after_block(name: str) -> None:
    case = MODEL["cases"][CASES[name]]
    model = ReferenceModel()
    shares = iter(case["sparsity_of_matrices"])
    layers = {
        f"layers.{block}.{matrix}": PlannedLayer(weight.numel(), next(shares), f"layers.{block}")
        for block in range(3)
        for matrix, weight in zip(NAMES, model.layers[block].parameters(), strict=True)
    }
    plan = SparsityPlan(layers, 0.6, "alpha", granularity="matrix")
    structure = name.partition(" ")[2] or "unstructured"
    report = prune(model, plan, case["method"], calibration=calibration(), structure=structure)
    matrices = model.matrices()
    mask = np.concatenate([(matrix == 0).flatten().numpy() for matrix in matrices])
    expected = unpacked(f"model_{CASES[name]}_masks", mask.size)
    wrong = np.mean(mask != expected)
    assert wrong <= (0.002 if case["method"] == "sparsegpt" else 0), wrong
    assert [layer.sparsity for layer in report.layers.values()] == pytest.approx(case["sparsity_of_matrices"])
    with torch.no_grad():
        norm = float(model(torch.cat([batch["x"] for batch in calibration()])).norm())
    assert norm == pytest.approx(case["output_norm"], rel=1e-3)


@pytest.mark.parametrize("case", MODEL["owl"], ids=lambda case: f"factor {case['outlier_factor']}")
def test_owl_outliers(case: dict[str, Any]) -> None:
    model = ReferenceModel()
    blocks = {f"layers.{block}.{matrix}": f"layers.{block}" for block in range(3) for matrix in NAMES}
    shares = outlier_shares(model, blocks, calibration(), factor=case["outlier_factor"])
    percent = np.array([100 * shares[f"layers.{block}"] for block in range(3)])
    spread = (percent - percent.min()) / (percent.max() - percent.min()) * 2 * case["lamda"]
    sparsity = case["target"] - (spread - spread.mean())
    np.testing.assert_allclose(sparsity, case["sparsity_of_blocks"], atol=1e-6)
