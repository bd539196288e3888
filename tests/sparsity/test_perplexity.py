"""Perplexity: the protocol, its errors, and comparisons."""

import math
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from farms_tb.sparsity import Perplexity, perplexity
from tests.sparsity.models import VOCABULARY, bert, gpt2, llama


def text(number: int = 230, seed: int = 3) -> torch.Tensor:
    return torch.randint(VOCABULARY, (number,), generator=torch.Generator().manual_seed(seed))


class Bigram(nn.Module):
    """The logits of the next token are a row of a table."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table = nn.Embedding(VOCABULARY, VOCABULARY, dtype=dtype)
        self.seen: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert not self.training
        self.seen.append(tuple(input_ids.shape))
        return self.table(input_ids)


def reference(table: torch.Tensor, tokens: list[int], length: int) -> list[float]:
    """Mean negative log likelihood of each segment, one prediction at a time in float64."""
    log_probabilities = table.double().log_softmax(1)
    means = []
    for start in range(0, len(tokens) - length + 1, length):
        segment = tokens[start : start + length]
        losses = [-float(log_probabilities[before, after]) for before, after in pairwise(segment)]
        means.append(sum(losses) / (length - 1))
    return means


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_protocol_is_that_of_a_slow_reference_implementation(batch_size):
    model, tokens = Bigram(), text(230)
    result = perplexity(model, tokens, length=32, batch_size=batch_size)
    expected = reference(model.table.weight.detach(), tokens.tolist(), 32)
    assert len(expected) == 7
    assert result.segments.dtype == np.float64
    np.testing.assert_allclose(result.segments, expected, rtol=1e-6)
    assert result.value == pytest.approx(math.exp(sum(expected) / 7), rel=1e-6)
    assert result.error == pytest.approx(result.value * stats.sem(expected), rel=1e-5)
    assert result.tokens == 224
    assert sum(rows for rows, _ in model.seen) == 7


def test_transformers_own_loss_agrees():
    model, tokens = llama(), text(200)
    result = perplexity(model, tokens[None], length=48, batch_size=3)
    segments = tokens[:192].reshape(4, 1, 48)
    losses = [float(model(input_ids=ids, labels=ids).loss.detach()) for ids in segments]
    np.testing.assert_allclose(result.segments, losses, rtol=1e-6)


def test_half_precision_is_converted_before_the_softmax():
    model, tokens = Bigram(torch.bfloat16), text(64)
    expected = reference(model.table.weight.detach(), tokens.tolist(), 32)
    np.testing.assert_allclose(perplexity(model, tokens, length=32).segments, expected, rtol=1e-6)


def test_modes_and_weights_stay_as_they_are():
    model = llama().train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = perplexity(model, text(), length=32)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()
    np.testing.assert_array_equal(perplexity(model, text().tolist(), length=32).segments, first.segments)


def test_progress_counts_segments():
    calls = []
    perplexity(Bigram(), text(), length=32, batch_size=3, progress=lambda *done: calls.append(done))
    assert calls == [(3, 7), (6, 7), (7, 7)]


def test_a_comparison_is_a_paired_t_test():
    tokens = text(640)
    model = Bigram()
    first = perplexity(model, tokens, length=32)
    with torch.no_grad():
        model.table.weight.mul_(0.5)
    second = perplexity(model, tokens, length=32)
    found = second.compare(first)
    expected = stats.ttest_rel(second.segments, first.segments).confidence_interval(0.95)
    assert found.interval == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert found.difference == pytest.approx(second.nll - first.nll)
    assert found.error == pytest.approx(stats.sem(second.segments - first.segments))
    assert found.ratio == pytest.approx(second.value / first.value)
    assert found.ratio_interval == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    assert found.difference == pytest.approx(-first.compare(second).difference)
    assert f"times {found.ratio:.4g}" in str(found)
    assert "20 segments of 32 tokens" in str(first)


@pytest.mark.parametrize("segments", [2, 3, 4, 9, 30, 141])
def test_intervals_of_any_number_of_segments(segments):
    values = np.random.default_rng(0).normal(size=segments)
    found = Perplexity(values, 8, "").compare(Perplexity(np.zeros(segments), 8, ""))
    half = stats.t.ppf(0.975, segments - 1) * stats.sem(values)
    assert found.interval == pytest.approx((values.mean() - half, values.mean() + half), rel=1e-9)


def test_results_of_other_segments_are_not_compared():
    model, tokens = Bigram(), text()
    result = perplexity(model, tokens, length=32)
    with pytest.raises(ValueError, match="length=16"):
        result.compare(perplexity(model, tokens, length=16))
    with pytest.raises(ValueError, match="same text"):
        result.compare(perplexity(model, text(seed=4), length=32))
    with pytest.raises(ValueError, match="same text"):
        result.compare(perplexity(model, tokens[:64], length=32))
    single = perplexity(model, tokens[:40], length=32)
    assert math.isnan(single.error)
    with pytest.raises(ValueError, match="two segments"):
        single.compare(single)
    # The tail is not read, so it may differ.
    assert result.compare(perplexity(model, tokens[:226], length=32)).difference == 0


def test_what_cannot_be_evaluated_is_refused_before_the_model_runs():
    model = Bigram()
    with pytest.raises(ValueError, match="too few: 20"):
        perplexity(model, text(20), length=32)
    with pytest.raises(ValueError, match="vocabulary is 0 to 96"):
        perplexity(Wrapped(model), torch.arange(200), length=32)
    with pytest.raises(TypeError, match="integers"):
        perplexity(model, torch.rand(100), length=32)
    with pytest.raises(ValueError, match=r"\(2, 50\)"):
        perplexity(model, text(100).reshape(2, 50), length=32)
    with pytest.raises(ValueError, match="length must be at least 2"):
        perplexity(model, text(), length=1)
    with pytest.raises(ValueError, match="batch_size"):
        perplexity(model, text(), length=32, batch_size=0)
    assert model.seen == []
    with pytest.raises(ValueError, match="64 positions of GPT2LMHeadModel"):
        perplexity(gpt2(), text(), length=65)
    several = Bigram()
    several.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=16))
    with pytest.raises(ValueError, match="16 positions of Bigram"):
        perplexity(several, text(), length=17)


class Wrapped(nn.Module):
    """Says what its embedding is, as models of transformers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.table

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.inner(input_ids)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="BertModel returned no logits"):
        perplexity(bert(), text(), length=32)


def test_huge_and_missing_values():
    model = Bigram()
    with torch.no_grad():
        model.table.weight.mul_(1e5)
    assert perplexity(model, text(), length=32).value == math.inf
    with torch.no_grad():
        model.table.weight[int(text()[3])] = math.nan
    with pytest.warns(UserWarning, match="NaN"):
        result = perplexity(model, text(), length=32)
    assert math.isnan(result.value)
