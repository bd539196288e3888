"""What is kept of the inputs of a layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from farms_tb.sparsity import PlannedLayer, SparsityPlan
from farms_tb.sparsity.prunable import planned_weights
from farms_tb.sparsity.statistics import SAMPLE, observed

TOKENS = 100


@pytest.mark.parametrize("passes", [1, 4, 128, 300, 600])
@pytest.mark.parametrize("repeated", [1, 2])
def test_the_sample_shows_all_places_of_a_sequence_alike(passes: int, repeated: int) -> None:
    """The first token of a sequence is unlike all others in most language models."""
    layer = nn.Linear(2, 2)
    model = nn.Sequential(*[layer] * repeated)
    places = torch.arange(float(TOKENS))[None, :, None].expand(2, TOKENS, 2)
    weights = planned_weights(nn.Sequential(layer), SparsityPlan({"0": PlannedLayer(4, 0.5)}, 0.5, "alpha"))
    layer.weight.data, layer.bias.data = torch.eye(2), torch.zeros(2)
    with observed(weights, hessian=False, calls=passes) as statistics, torch.no_grad():
        for _ in range(passes):
            model(places.clone())
    found = torch.cat(statistics["0"].samples, dim=1)[0, :, 0]
    assert len(found) == min(SAMPLE, 2 * TOKENS * passes)
    counts = torch.bincount(found.long(), minlength=TOKENS).double() / len(found)
    assert float(counts.max()) < 2 / TOKENS
    assert statistics["0"].inputs == 2 * TOKENS * passes * repeated


def test_a_call_without_inputs_is_none() -> None:
    """As of an expert that no token chose."""
    layer = nn.Linear(2, 2)
    weights = planned_weights(nn.Sequential(layer), SparsityPlan({"0": PlannedLayer(4, 0.5)}, 0.5, "alpha"))
    with observed(weights, hessian=True, calls=2) as statistics, torch.no_grad():
        layer(torch.zeros(0, 2))
        layer(torch.ones(3, 2))
    assert [sample.shape[1] for sample in statistics["0"].samples] == [0, 3]
