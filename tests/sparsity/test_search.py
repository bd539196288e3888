"""The search for an allocation, on a small language model that is trained here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from farms_tb.sparsity import SparsityPlan, allocate, prune
from farms_tb.sparsity.search import model_loss

WORDS, WIDTH, BLOCKS, LENGTH = 30, 24, 5, 24

pytestmark = pytest.mark.filterwarnings("ignore:.*(straight line|held at|has an alpha)")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.down = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + added


class LanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.layers:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def text(number: int, seed: int) -> Tensor:
    """Sequences of a Markov chain, which is the same for every seed."""
    chain = torch.softmax(3 * torch.randn(WORDS, WORDS, generator=torch.Generator().manual_seed(99)), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (number, 1), generator=generator)
    for _ in range(LENGTH - 1):
        ids = torch.cat([ids, torch.multinomial(chain[ids[:, -1]], 1, generator=generator)], dim=1)
    return ids


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    return functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = LanguageModel()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(150):
        optimizer.zero_grad()
        next_token_loss(model, text(32, seed=step)).backward()
        optimizer.step()
    return model


SIZES = {f"layers.{b}.{name}": 4 * WIDTH * WIDTH for b in range(BLOCKS) for name in ("up", "down")}
ALPHAS = {name: 2 + (index * 7 % 5) / 5 for index, name in enumerate(SIZES)}


def batches(number: int, seed: int = 1000) -> list[dict[str, Tensor]]:
    return [{"input_ids": text(6, seed + index)} for index in range(number)]


def search(model: nn.Module, target: float = 0.9, **options: Any) -> SparsityPlan:
    arguments: dict[str, Any] = {"calibration": batches(16), "prune_method": "magnitude", "evaluations": 12}
    return allocate(ALPHAS, SIZES, target, method="search", model=model, **{**arguments, **options})


def losses_on_fresh_text(model: nn.Module, plan: SparsityPlan) -> np.ndarray:
    copy = LanguageModel()
    copy.load_state_dict(model.state_dict())
    prune(copy, plan, "magnitude")
    with torch.no_grad():
        return np.array([float(next_token_loss(copy, text(8, seed=5000 + index))) for index in range(12)])


@pytest.mark.parametrize("target", [0.5, 0.9])
def test_the_plan_is_no_worse_than_uniform_on_fresh_text(trained: nn.Module, target: float) -> None:
    plan = search(trained, target)
    assert plan.total == pytest.approx(target, abs=1e-12)
    uniform = allocate({}, SIZES, target, method="uniform")
    differences = losses_on_fresh_text(trained, plan) - losses_on_fresh_text(trained, uniform)
    error = differences.std(ddof=1) / len(differences) ** 0.5
    assert differences.mean() <= error
    if target == 0.9:
        assert differences.mean() < -2 * error
        assert plan.options["search"]["difference"] < 0


def test_cost_and_result_are_said(trained: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = search(trained)
    (note,) = [note for note in plan.notes if "search" in note]
    assert "12 times by magnitude" in note
    assert "below uniform" in note
    assert capsys.readouterr() == ("", ""), "a function of the library prints nothing"
    found = plan.options["search"]
    assert set(found["coefficients"]) <= {"line", "alpha", "shrinkage"}
    assert any(found["coefficients"].values())
    assert found["evaluations"] == 12
    plan.save(tmp_path / "plan.json")
    assert SparsityPlan.load(tmp_path / "plan.json") == plan


def test_a_search_is_deterministic_and_leaves_the_model_as_it_was(trained: nn.Module) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    trained.train()
    plans = [search(trained, prune_method=method) for method in ("wanda", "wanda")]
    assert plans[0] == plans[1]
    assert trained.training
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_where_nothing_is_better_the_plan_is_uniform() -> None:
    """A model whose output does not depend on its blocks: every allocation has the same loss."""
    torch.manual_seed(0)
    model = LanguageModel()
    with torch.no_grad():
        for block in model.layers:
            block.down.weight.zero_()
    plan = search(model, 0.5)
    assert set(plan.sparsity.values()) == {0.5}
    assert not any(plan.options["search"]["coefficients"].values())
    assert any("uniform" in note for note in plan.notes)


def test_one_evaluation_is_the_uniform_one(trained: nn.Module) -> None:
    assert set(search(trained, evaluations=1).sparsity.values()) == {0.9}


def test_without_alphas_the_line_remains(trained: nn.Module) -> None:
    plan = allocate(
        {},
        SIZES,
        0.9,
        method="search",
        model=trained,
        calibration=batches(16),
        prune_method="magnitude",
        evaluations=8,
    )
    assert set(plan.options["search"]["coefficients"]) == {"line"}


class WithLoss(LanguageModel):
    """Returns an object with a loss, as models of transformers do for labels."""

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
        logits = super().forward(input_ids)
        return SimpleNamespace(
            loss=functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )


def test_the_loss_of_a_model_is_taken_where_it_returns_one(trained: nn.Module) -> None:
    model = WithLoss()
    model.load_state_dict(trained.state_dict())
    with_labels = [{**batch, "labels": batch["input_ids"]} for batch in batches(16)]
    assert search(model, calibration=with_labels).sparsity == search(trained).sparsity


class WithSign(LanguageModel):
    """Returns a loss that is smaller the worse it predicts, where its batch has a sign of -1."""

    def forward(self, input_ids: Tensor, sign: Tensor) -> Any:  # type: ignore[override]
        logits = super().forward(input_ids)
        return SimpleNamespace(
            loss=sign * functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        )


@pytest.mark.parametrize("sign", [1, -1])
def test_a_winner_that_loses_on_the_other_batches_is_not_taken(trained: nn.Module, sign: int) -> None:
    model = WithSign()
    model.load_state_dict(trained.state_dict())
    confirming = range(3, 16, 4)
    signed = [
        {**batch, "sign": torch.tensor(sign if index in confirming else 1)}
        for index, batch in enumerate(batches(16))
    ]
    plan = search(model, calibration=signed)
    assert any(plan.options["search"]["coefficients"].values()) == (sign == 1)
    assert (set(plan.sparsity.values()) == {0.9}) == (sign == -1)


class Failing(LanguageModel):
    """Fails at the first batch after it has been pruned."""

    def forward(self, input_ids: Tensor) -> Tensor:
        if (self.layers[0].up.weight == 0).any():
            raise RuntimeError("out of memory")
        return super().forward(input_ids)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": None}, ValueError, "model and calibration"),
        ({"calibration": None}, ValueError, "model and calibration"),
        ({"model": "gpt2"}, TypeError, "torch.nn.Module"),
        ({"calibration": batches(11)}, ValueError, "at least 12 batches"),
        ({"prune_method": "random"}, ValueError, "prune_method"),
        ({"evaluations": 0}, ValueError, "evaluations"),
        ({"model": Failing()}, RuntimeError, "out of memory"),
        (
            {"model": nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(2))})},
            ValueError,
            "another model",
        ),
    ],
)
def test_mistakes_leave_the_model_as_it_was(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"model": LanguageModel(), "calibration": batches(12), **changes}
    model = arguments["model"]
    state: Iterator[Tensor] = iter(model.parameters()) if isinstance(model, nn.Module) else iter(())
    before = [parameter.clone() for parameter in state]
    with pytest.raises(error, match=message):
        search(**arguments)
    if isinstance(model, nn.Module):
        assert all(map(torch.equal, before, model.parameters()))


class Images(nn.Module):
    """A classifier: its logits belong to no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


def test_a_model_without_a_loss_says_what_to_do() -> None:
    images = [{"x": torch.randn(2, 3, WIDTH)} for _ in range(12)]
    with pytest.raises(ValueError, match=r"no loss.*labels"):
        search(Images(), calibration=images)


def test_magnitude_runs_no_batch_for_its_masks(trained: nn.Module) -> None:
    """Of 16 batches, 4 choose and 4 confirm; the other 8 would tell magnitude nothing."""
    calls = []
    handle = trained.layers[0].register_forward_hook(lambda *_: calls.append(None))
    try:
        search(trained, evaluations=3)
    finally:
        handle.remove()
    assert len(calls) == 3 * (4 + 4)


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_not_predicted(left: bool) -> None:
    """A model that knows nothing but the token before."""
    torch.manual_seed(0)
    table = nn.Embedding(9, 9)

    class Model(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
            return SimpleNamespace(logits=table(input_ids))

    ids, padding = torch.tensor([[1, 2, 3, 4]]), torch.zeros(1, 5, dtype=torch.int64)
    padded = torch.cat([padding, ids] if left else [ids, padding], dim=1)
    batch = {"input_ids": padded, "attention_mask": (padded > 0).long()}
    assert model_loss(Model(), batch) == pytest.approx(model_loss(Model(), {"input_ids": ids}))
    with pytest.raises(ValueError, match="no token to predict"):
        model_loss(Model(), {"input_ids": padded, "attention_mask": torch.zeros_like(padded)})
