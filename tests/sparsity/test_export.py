"""Plans as the tables of other packages: by what these read."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from farms_tb.sparsity import PlannedLayer, SparsityPlan, to_llm_compressor, to_torchao
from tests.sparsity.models import gpt2, llama, plan_of, token_batches
from tests.sparsity.texts import tokenizer


def reordered(plan: SparsityPlan) -> SparsityPlan:
    """The same plan with its layers in another order, and without the prefix of the model."""
    layers = {name.removeprefix("model."): layer for name, layer in reversed(plan.layers.items())}
    return SparsityPlan(layers, plan.target, plan.method)


def zeros(model: nn.Module, name: str) -> int:
    return int((model.get_submodule(name).weight == 0).sum())


def test_tables_name_modules_in_the_order_of_the_model():
    model = llama()
    plan = plan_of(model)
    table = to_llm_compressor(reordered(plan), model)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert table["targets"] == [name for name in linear if name != "lm_head"]
    assert table["sparsity"] == [plan.sparsity[name] for name in table["targets"]]
    rows = to_torchao(reordered(plan), model)
    assert {row["tensor_fqn"]: row["sparsity_level"] for row in rows} == {
        f"{name}.weight": share for name, share in plan.sparsity.items()
    }


def test_torch_reads_the_table_of_torchao():
    """The sparsifiers of torch read the same configuration."""
    from torch.ao.pruning import WeightNormSparsifier

    model = llama()
    plan = plan_of(model)
    sparsifier = WeightNormSparsifier(sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(model, config=to_torchao(plan, model))
    sparsifier.step()
    sparsifier.squash_mask()
    for name, layer in plan.layers.items():
        assert zeros(model, name) == pytest.approx(layer.size * layer.sparsity, abs=1)
    assert zeros(model, "lm_head") == 0


@pytest.mark.filterwarnings("ignore")  # of torchao and torch.ao
def test_torchao_prunes_by_the_table():
    sparsity = pytest.importorskip("torchao.sparsity")
    model = llama()
    plan = plan_of(model)
    sparsifier = sparsity.WandaSparsifier()
    sparsifier.prepare(model, to_torchao(plan, model))
    for batch in token_batches():
        model(**batch)
    sparsifier.step()
    sparsifier.squash_mask()
    for name, layer in plan.layers.items():
        assert zeros(model, name) == pytest.approx(layer.size * layer.sparsity, abs=1)
    assert zeros(model, "lm_head") == 0


@pytest.mark.filterwarnings("ignore")  # of llm-compressor
@pytest.mark.parametrize("modifier", ["WandaPruningModifier", "SparseGPTModifier"])
def test_llm_compressor_prunes_by_the_table(modifier, tmp_path):
    llmcompressor = pytest.importorskip("llmcompressor")
    from llmcompressor.modifiers import pruning

    llama().save_pretrained(tmp_path)
    model = type(llama()).from_pretrained(tmp_path)
    plan = plan_of(model)
    llmcompressor.oneshot(
        model=model,
        recipe=[getattr(pruning, modifier)(**to_llm_compressor(reordered(plan), model))],
        dataset=DataLoader(token_batches(), batch_size=None),
        processor=tokenizer(),
    )
    for name, layer in plan.layers.items():
        columns = model.get_submodule(name).in_features
        if modifier == "WandaPruningModifier":
            assert zeros(model, name) == layer.size // columns * int(columns * layer.sparsity)
        else:
            assert zeros(model, name) == pytest.approx(layer.size * layer.sparsity, abs=1)
    assert zeros(model, "lm_head") == 0


def test_what_cannot_be_exported_is_refused():
    with pytest.raises(ValueError, match="weight of Conv1D"):
        to_llm_compressor(plan_of(gpt2()), gpt2())
    attention = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32))
    with pytest.raises(ValueError, match="weight of MultiheadAttention"):
        to_torchao(plan_of(attention), attention)
    with pytest.raises(ValueError, match="another model"):
        to_torchao(SparsityPlan({"absent": PlannedLayer(4, 0.5)}, 0.5, "alpha"), llama())
    with pytest.raises(TypeError):
        to_torchao(plan_of(llama()), torch.rand(3))
