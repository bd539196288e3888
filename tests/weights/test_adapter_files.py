"""A folder with an adapter of PEFT, merged onto the file of its base."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import torch as safetensors_torch
from torch import nn

from farms_tb import analyze, analyze_checkpoint
from farms_tb.report import LayerRecord
from farms_tb.weights.adapter_files import tensors_with_adapter

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
    pytest.mark.filterwarnings("ignore:Could not find a config file"),
]

OPTIONS: dict[str, Any] = {"embeddings": True, "min_eigenvalues": 4}


Change = Callable[[Path, Path], Any]
"""Damages the folder of an adapter, or the file of its base."""


class Net(nn.Module):
    """Names as in a model with a head: `body.0`, `head`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleList(
            [nn.Linear(24, 48), nn.Linear(48, 48), nn.Conv2d(12, 24, 3), nn.Embedding(40, 16)]
        )
        self.head = nn.Linear(48, 24)


def adapted(**options: Any) -> Any:
    net = Net()
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": r"body\.\d", **options}
    return peft.get_peft_model(net, peft.LoraConfig(**config))


def saved(model: Any, folder: Path, base: nn.Module | None = None) -> tuple[Path, Path]:
    """Save adapter and base, and return both paths."""
    model.save_pretrained(folder / "adapter")
    path = folder / "base.safetensors"
    safetensors_torch.save_file((Net() if base is None else base).state_dict(), path)
    return folder / "adapter", path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"body.1": 2}, "alpha_pattern": {"1": 16, "^body.0": 3}},
        {"target_modules": r"body\.1", "modules_to_save": ["head"]},
    ],
    ids=str,
)
def test_the_numbers_of_the_merged_model(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**options)
    if "modules_to_save" in options:
        nn.init.normal_(model.base_model.model.head.modules_to_save["default"].weight)
    adapter, base = saved(model, tmp_path)
    merged = model.merge_and_unload()
    expected = analyze(merged, **OPTIONS).alphas
    found = analyze_checkpoint(adapter, base=base, **OPTIONS).alphas
    assert found.keys() == expected.keys()
    for name, alpha in found.items():
        assert alpha == pytest.approx(expected[name], rel=2e-6), name
    assert found["body.1"] != analyze_checkpoint(base, **OPTIONS).alphas["body.1"]
    assert analyze_checkpoint(adapter / "adapter_model.safetensors", base=base, **OPTIONS).alphas == found


def test_transposed_weights_and_a_base_without_head(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_embd=24, n_head=2, n_positions=8, vocab_size=30)
    gpt2 = transformers.GPT2LMHeadModel(config)
    gpt2.transformer.save_pretrained(tmp_path / "base")
    target = ["c_attn", "c_proj"]  # The projection of attention is square.
    lora = peft.LoraConfig(target_modules=target, fan_in_fan_out=True, init_lora_weights=False, use_dora=True)
    model = peft.get_peft_model(gpt2, lora)
    model.save_pretrained(tmp_path / "adapter")
    expected = analyze(copy.deepcopy(model).merge_and_unload()).alphas
    found = analyze_checkpoint(tmp_path / "adapter", base=tmp_path / "base").alphas
    for name in ("h.0.attn.c_attn", "h.1.attn.c_proj", "h.1.mlp.c_proj", "h.1.mlp.c_fc"):
        assert found[name] == pytest.approx(expected[f"transformer.{name}"], rel=2e-6), name


def assert_same(found: LayerRecord, expected: LayerRecord) -> None:
    """Check shape, status and alpha, which a layer that is tied to another one has not."""
    assert (found.shape, found.status) == (expected.shape, expected.status)
    assert (found.alpha or 0) == pytest.approx(expected.alpha or 0, rel=2e-6)


def language_model(folder: Path, tied: bool) -> Any:
    """Return a tiny Llama, which is saved in a folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=40, tie_word_embeddings=tied)
    )
    model.save_pretrained(folder)
    return model


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers", "ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("resized", [False, True], ids=["", "resized"])
@pytest.mark.parametrize("target", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=",".join)
def test_adapters_on_head_and_embedding(target: list[str], resized: bool, tied: bool, tmp_path: Path) -> None:
    model = language_model(tmp_path / "base", tied)
    if resized:
        model.resize_token_embeddings(56, mean_resizing=False)
    lora = peft.LoraConfig(target_modules=["q_proj", *target], r=4, init_lora_weights=False)
    lora_model = peft.get_peft_model(model, lora)
    lora_model.save_pretrained(tmp_path / "adapter")
    expected = analyze(lora_model.merge_and_unload(), **OPTIONS).layers
    found = analyze_checkpoint(tmp_path / "adapter", base=tmp_path / "base", **OPTIONS).layers
    assert found.keys() == expected.keys()
    for name, layer in found.items():
        # Of a resized model, PEFT saves no table but those with an adapter.
        if tied or not resized or name.endswith((*target, "_proj")):
            assert_same(layer, expected[name])


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("ensured", [False, True])
def test_a_tied_table_that_was_trained_as_a_whole(ensured: bool, tmp_path: Path) -> None:
    model = language_model(tmp_path / "base", tied=True)
    lora = peft.LoraConfig(
        target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=ensured, r=4
    )
    lora_model = peft.get_peft_model(model, lora)
    nn.init.normal_(lora_model.get_input_embeddings().weight)
    lora_model.save_pretrained(tmp_path / "adapter")
    expected = analyze(lora_model.merge_and_unload(), **OPTIONS).layers
    found = analyze_checkpoint(tmp_path / "adapter", base=tmp_path / "base", **OPTIONS).layers
    assert ("tied" in found["lm_head"].status) == ensured
    for name, layer in found.items():
        assert_same(layer, expected[name])


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers")
def test_one_adapter_for_both_names_of_a_tied_weight_is_refused(tmp_path: Path) -> None:
    model = language_model(tmp_path / "base", tied=True)
    lora = peft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True, init_lora_weights=False)
    peft.get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="ensure_weight_tying"):
        analyze_checkpoint(tmp_path / "adapter", base=tmp_path / "base")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "corda", "loftq", "lora_ga"])
def test_initialisations_that_change_the_base_are_refused(init: str, tmp_path: Path) -> None:
    adapter, base = saved(adapted(target_modules=r"body\.[01]"), tmp_path)
    changed(init_lora_weights=init)(adapter, base)
    with pytest.raises(ValueError, match=rf"init_lora_weights='{init}'.*merge_and_unload"):
        analyze_checkpoint(adapter, base=base)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_are_merged(init: bool | str, tmp_path: Path) -> None:
    model = adapted(target_modules=r"body\.[01]", init_lora_weights=init)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    adapter, base = saved(model, tmp_path)
    expected = analyze(model.merge_and_unload(), **OPTIONS).alphas
    assert analyze_checkpoint(adapter, base=base, **OPTIONS).alphas == pytest.approx(expected, rel=2e-6)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base")
def test_a_pissa_that_was_converted_is_merged(tmp_path: Path) -> None:
    model = adapted(target_modules=r"body\.[01]", init_lora_weights="pissa")
    base = tmp_path / "base.safetensors"
    safetensors_torch.save_file(Net().state_dict(), base)
    initial = tmp_path / "initial"
    model.save_pretrained(initial)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(initial))
    expected = analyze(model.merge_and_unload(), **OPTIONS).alphas
    found = analyze_checkpoint(tmp_path / "adapter", base=base, **OPTIONS).alphas
    assert found == pytest.approx(expected, rel=1e-4)


def test_one_weight_is_read_at_a_time(tmp_path: Path) -> None:
    adapter, base = saved(adapted(), tmp_path)
    tensors = tensors_with_adapter(adapter, base)
    base.write_bytes(b"")
    with pytest.raises(ValueError, match="cannot read"):
        tensors[0].read()


def test_quantised_weights_of_the_base_are_left_out_with_the_reason(tmp_path: Path) -> None:
    adapter, base = saved(adapted(target_modules=r"body\.[01]"), tmp_path)
    tensors = Net().state_dict()
    tensors["body.0.weight"] = tensors["body.0.weight"].to(torch.int8)
    safetensors_torch.save_file(tensors, base)
    layers = analyze_checkpoint(adapter, base=base).layers
    assert "quantised" in layers["body.0"].status
    assert layers["body.1"].alpha


def changed(**entries: Any) -> Change:
    def change(adapter: Path, base: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    return change


def rewritten(
    edit: Callable[[dict[str, torch.Tensor]], None], of_base: bool = False
) -> Callable[[Path, Path], None]:
    def change(adapter: Path, base: Path) -> None:
        path = base if of_base else adapter / "adapter_model.safetensors"
        tensors = safetensors_torch.load_file(path)
        edit(tensors)
        safetensors_torch.save_file(tensors, path)

    return change


A = "base_model.model.body.0.lora_A.weight"
DAMAGES: dict[str, tuple[Change, str]] = {
    "kind": (changed(peft_type="IA3"), "IA3"),
    "variant": (changed(use_bdlora={"a": 1}), "use_bdlora"),
    "trained tokens": (changed(trainable_token_indices={"body.3": [1]}), "trainable_token_indices"),
    "alpha": (changed(lora_alpha="8"), "lora_alpha"),
    "alphas": (changed(alpha_pattern=[3]), "alpha_pattern"),
    "regular expression": (changed(alpha_pattern={"(a+)+$": 3}), "alpha_pattern"),
    "no JSON": (lambda adapter, base: (adapter / "adapter_config.json").write_text("[1"), "damaged"),
    "no weights": (lambda adapter, base: (adapter / "adapter_model.safetensors").unlink(), "no adapter_model"),
    "no A": (rewritten(lambda tensors: tensors.pop(A)), "expected lora_A and lora_B"),
    "rank 0": (rewritten(lambda tensors: tensors.update({A: torch.zeros(0, 24)})), "does not fit"),
    "shape": (rewritten(lambda tensors: tensors.update({A: torch.zeros(4, 23)})), "does not fit"),
    "no matrix": (rewritten(lambda tensors: tensors.update({A: torch.zeros(())})), "does not fit"),
    "unknown part": (rewritten(lambda tensors: tensors.update({"a.lora_E": torch.zeros(3)})), "lora_E"),
    "empty": (rewritten(lambda tensors: tensors.clear()), "holds no adapter"),
    "other base": (rewritten(lambda tensors: tensors.pop("body.0.weight"), of_base=True), "no layer 'body.0'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_fit_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    adapter, base = saved(adapted(target_modules=r"body\.[01]"), tmp_path)
    change, message = DAMAGES[damage]
    change(adapter, base)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        analyze_checkpoint(adapter, base=base)


def test_base_without_an_adapter(tmp_path: Path) -> None:
    adapter, base = saved(adapted(), tmp_path)
    with pytest.raises(ValueError, match="no folder of an adapter"):
        analyze_checkpoint(base, base=base)
    with pytest.raises(ValueError, match="adapters='separate'"):
        analyze_checkpoint(adapter, base=base, adapters="separate")
    assert any("lora_A" in name for name in analyze_checkpoint(adapter).layers)
