"""The inputs that blocks are shown one after the other, against those of whole passes of the model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farms_tb.sparsity.evaluating import evaluating
from farms_tb.sparsity.prunable import planned_weights
from farms_tb.sparsity.sequential import planned_blocks, visit_blocks
from tests.sparsity.models import gpt2, llama, uniform_plan
from tests.sparsity.models import token_batches as tokens

WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        shown = x * scale if mask is None else x * mask[..., None]
        added: Tensor = self.down(torch.relu(self.up(shown)))
        return x + added


class Decoder(nn.Module):
    """An embedding and three blocks; how they are called is what differs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(3))


class Masked(Decoder):
    """Like language models with two kinds of attention: some blocks alone get the mask, if it hides any."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x: Tensor = self.embedding(input_ids)
        mask = None if bool(attention_mask.all()) else attention_mask
        for number, layer in enumerate(self.layers):
            x = layer(x, mask if number == 1 else None)
        return x


class Scaled(nn.Module):
    """A number that comes of the batch is passed to all blocks but the first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scale = float(x.abs().max())
        for number, layer in enumerate(self.layers):
            x = layer(x, scale=scale if number else 1.0)
        return x


@dataclass
class Context:
    """What a model tells all its blocks of a batch; unlike a dict, nobody sees the tensors in it."""

    scale: Tensor
    calls: int = 0


class ContextBlock(Block):
    def forward(self, x: Tensor, context: Context) -> Tensor:  # type: ignore[override]
        context.calls += 1
        return super().forward(x * context.calls, scale=context.scale)


class WithContext(nn.Module):
    """Some blocks get an object that depends on the tokens, and count their calls in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, WIDTH)
        kinds = (ContextBlock, Block, ContextBlock, ContextBlock, Block, Block)
        self.layers = nn.ModuleList(kind() for kind in kinds)

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(input_ids)
        context = Context(input_ids.double().mean().float())
        for layer in self.layers:
            x = layer(x, context) if isinstance(layer, ContextBlock) else layer(x)
        return x


class InPlace(Scaled):
    """Writes into its inputs, before a block and between two calls of one."""

    def forward(self, x: Tensor) -> Tensor:
        first, twice, last = self.layers
        x = first(x.add_(1.0))
        x = x.add_(twice(x))
        x = x.add_(twice(x))
        return last(x)


class Counted(Decoder):
    """A number that comes of the tokens is passed to all blocks but the first."""

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.embedding(input_ids)
        for number, layer in enumerate(self.layers):
            x = layer(x, scale=float(input_ids.sum()) if number else 1.0)
        return x


def token_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(2, top, (1, 12), generator=generator)} for top in (10, 50, 30)]


def masked_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.tensor([0, 5, 2, 0, 7])
    ids = torch.randint(2, 50, (len(hidden), 1, 12), generator=generator)
    masks = (torch.arange(12) >= hidden[:, None]).long()[:, None]
    return [{"input_ids": one, "attention_mask": mask} for one, mask in zip(ids, masks, strict=True)]


def scaled_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(9, WIDTH, generator=generator) * 10.0**power} for power in range(4)]


def squared_norms(model: nn.Module, batches: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Sum the squared inputs of each linear layer over whole passes."""
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + x.double().flatten(0, -2).square().sum(0)

    handles = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("model", "batches"),
    [
        (Masked(), masked_batches()),
        (Scaled(), scaled_batches()),
        (WithContext(), token_batches()),
        (Counted(), token_batches()),
        (InPlace(), scaled_batches()),
    ],
)
def test_batches_of_one_shape_that_are_called_differently(
    model: nn.Module, batches: list[dict[str, Tensor]], first: int
) -> None:
    batches = batches[first:] + batches[:first]
    expected = squared_norms(model, copy.deepcopy(batches))
    before = copy.deepcopy(batches)
    blocks = planned_blocks(model, planned_weights(model, uniform_plan(model, 0.5)))
    seen = {}
    with evaluating(model):
        for _, statistics in visit_blocks(model, blocks, batches):
            seen.update({name: one.squared_norms for name, one in statistics.items()})
    assert seen.keys() == expected.keys()
    for name, norms in expected.items():
        of_blocks = seen[name]
        assert of_blocks is not None
        torch.testing.assert_close(of_blocks[0].double(), norms, rtol=1e-5, atol=1e-8)
    for batch, unchanged in zip(batches, before, strict=True):
        assert all(torch.equal(batch[key], value) for key, value in unchanged.items())


@pytest.mark.parametrize("make", [llama, gpt2])
def test_blocks_of_transformers_are_run_twice_and_the_model_once_more(make: Any) -> None:
    """None of their arguments keeps a block from being called directly."""
    model = make()
    batches = tokens(4)
    blocks = planned_blocks(model, planned_weights(model, uniform_plan(model, 0.5)))
    passes: list[str] = []
    for block in blocks:
        block.module.register_forward_hook(lambda *_, path=block.path: passes.append(path))
    with evaluating(model):
        assert len(list(visit_blocks(model, blocks, batches))) == 3
    # One trace for all batches; then each block for the statistics and, but for the last, for what it returns.
    counts = [passes.count(block.path) for block in blocks]
    assert counts == [1 + 2 * 4, 1 + 2 * 4, 1 + 4]
