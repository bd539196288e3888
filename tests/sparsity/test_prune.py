"""Pruning models: what is planned is what happens, block after block on pruned ones, or an error comes first."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from farms_tb.sparsity import PlannedLayer, SparsityPlan, allocate, prune
from farms_tb.sparsity.masks import pruned_count, wanda_mask, wanda_scores
from recipes.models.resnet import SmallImageResNet

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(straight line|large for a target|calibration is short|nearly singular|damping)"
)
SMALL = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
METHODS = ["magnitude", "wanda", "sparsegpt"]


def llama(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_hidden_layers=3, tie_word_embeddings=False, **options)
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config).eval()


def bert() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(**SMALL, num_hidden_layers=2)).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=16, patch_size=4)).eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return SmallImageResNet(width=8).eval()


def text(batches: int = 2, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(60, (3, 20), generator=generator)} for _ in range(batches)]


def images(name: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{name: torch.randn(4, 3, 16, 16, generator=generator)} for _ in range(2)]


MODELS = {
    "llama": (llama, text),
    "gpt2": (gpt2, text),
    "bert": (bert, text),
    "vit": (vit, lambda: images("pixel_values")),
    "resnet": (resnet, lambda: images("x")),
}


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """The weights that are planned: of linear layers and convolutions inside numbered blocks."""
    kinds = (nn.Linear, nn.Conv2d, transformers.pytorch_utils.Conv1D)
    return {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(module, kinds) and any(part.isdecimal() for part in name.split("."))
    }


def plan_for(model: nn.Module, target: float = 0.6, **options: Any) -> SparsityPlan:
    weights = matrices(model)
    alphas = {name: 2 + 0.1 * place for place, name in enumerate(weights)}
    sizes = {name: weight.numel() for name, weight in weights.items()}
    return allocate(alphas, sizes, target, epsilon=0.2, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_achieved_is_what_was_planned(name: str, method: str) -> None:
    make, batches = MODELS[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    plan = plan_for(model)
    report = prune(model, plan, method, calibration=batches())
    for layer, weight in matrices(model).items():
        count = pruned_count(weight.numel(), plan.sparsity[layer])
        assert int((weight == 0).sum()) == count
        assert report.layers[layer].sparsity == count / weight.numel()
        assert 0 < report.layers[layer].output_error < 1
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{layer}.weight" for layer in plan.layers}
    assert report.sparsity == pytest.approx(plan.total, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_masks_each_time(method: str) -> None:
    models = [llama(), llama()]
    for model in models:
        prune(model, plan_for(model), method, calibration=text())
    for one, other in zip(*(matrices(model).values() for model in models), strict=True):
        assert torch.equal(one, other)


def test_a_block_sees_the_pruned_blocks_before_it() -> None:
    model, expected = llama(), llama()
    plan = plan_for(model)
    prune(model, plan, "wanda", calibration=text())
    name = "model.layers.2.self_attn.q_proj"
    # By hand: the first two blocks as pruned, then the inputs of the third.
    for layer, weight in matrices(model).items():
        if ".layers.2." not in layer:
            matrices(expected)[layer].data.copy_(weight.data)
    inputs: list[Tensor] = []
    handle = expected.get_submodule(name).register_forward_pre_hook(
        lambda _, args: inputs.append(args[0].detach())
    )
    for batch in text():
        expected(**batch)
    handle.remove()
    norms = sum(part.double().square().sum((0, 1)) for part in inputs)
    dense = matrices(expected)[name].detach()
    mask = wanda_mask(wanda_scores(dense, norms), pruned_count(dense.numel(), plan.sparsity[name]))
    assert torch.equal(matrices(model)[name] == 0, mask)


def test_masks_survive_training_and_can_be_made_permanent() -> None:
    model = llama()
    plan = plan_for(model)
    prune(model, plan, "magnitude", in_place=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**text()[0], labels=text()[0]["input_ids"]).loss.backward()
    optimizer.step()
    name = "model.layers.0.mlp.up_proj"
    module = model.get_submodule(name)
    torch_prune.remove(module, "weight")
    assert int((module.weight == 0).sum()) == pruned_count(module.weight.numel(), plan.sparsity[name])


@pytest.mark.parametrize(("structure", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8)])
@pytest.mark.parametrize("method", METHODS)
def test_structures(method: str, structure: str, n: int, m: int) -> None:
    model = llama()
    prune(model, plan_for(model, 0.5, method="uniform"), method, calibration=text(), structure=structure)
    for weight in matrices(model).values():
        assert ((weight == 0).view(weight.shape[0], -1, m).sum(-1) == n).all()


def test_mixed_structure_follows_the_plan() -> None:
    model = llama()
    plan = plan_for(model)
    report = prune(model, plan, "wanda", calibration=text(), structure="mixed:8")
    assert report.sparsity == pytest.approx(plan.total, abs=0.05)
    assert all(layer.sparsity * 8 == round(layer.sparsity * 8) for layer in report.layers.values())


def test_a_stopped_run_goes_on_at_the_block_where_it_stopped(tmp_path: Path) -> None:
    expected = llama()
    plan = plan_for(expected)
    prune(expected, plan, "sparsegpt", calibration=text())

    class StopError(Exception):
        pass

    stopped = llama()
    stopped.get_submodule("model.layers.2.mlp").register_forward_pre_hook(fail_with(StopError, after=2))
    with pytest.raises(StopError):
        prune(stopped, plan, "sparsegpt", calibration=text(), checkpoint=tmp_path / "run")
    model = llama()
    report = prune(model, plan, "sparsegpt", calibration=text(), checkpoint=tmp_path / "run")
    assert list(report.layers) == list(plan.layers)
    for one, other in zip(matrices(model).values(), matrices(expected).values(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="run"):
        prune(llama(), plan, "wanda", calibration=text(), checkpoint=tmp_path / "run")


def fail_with(error: type[Exception], after: int) -> Any:
    """A hook that raises at its call number `after` + 1."""
    calls = []

    def hook(*_: Any) -> None:
        calls.append(None)
        if len(calls) > after:
            raise error

    return hook


def broken(model: nn.Module) -> nn.Module:
    matrices(model)["model.layers.1.mlp.up_proj"].data[0, 0] = torch.nan
    return model


def tied(model: nn.Module) -> nn.Module:
    model.get_submodule("model.layers.1.mlp").up_proj.weight = model.get_submodule(
        "model.layers.0.mlp"
    ).up_proj.weight
    return model


def empty() -> Iterator[Any]:
    yield from ()


@pytest.mark.parametrize(
    ("change", "calibration", "options", "words"),
    [
        (broken, text(), {}, "up_proj"),
        (tied, text(), {}, "up_proj"),
        (None, None, {}, "calibration"),
        (None, [], {}, "calibration"),
        (None, [{"input_ids": torch.full((1, 8), 60)}], {}, "vocab"),
        (None, text(), {"method": "wander"}, "wanda"),
        (None, text(), {"structure": "2:4"}, "mixed:8"),
    ],
)
def test_bad_input_changes_nothing(change: Any, calibration: Any, options: dict[str, Any], words: str) -> None:
    model = llama()
    plan = plan_for(model)
    if change is not None:
        model = change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        prune(model, plan, calibration=calibration, **options)
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[key].nan_to_num())


def test_a_plan_of_another_model_is_refused() -> None:
    plan = SparsityPlan({"layers.9.up": PlannedLayer(100, 0.5)}, 0.5, "alpha")
    with pytest.raises(ValueError, match=r"layers\.9\.up"):
        prune(llama(), plan, "magnitude")
