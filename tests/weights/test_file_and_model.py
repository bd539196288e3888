"""A file has the rows of the model that it was saved from: names, shapes, alphas, statuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from farms_tb import analyze, analyze_checkpoint
from farms_tb.report import Report

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
ENCODER_DECODER = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    **{name: SMALL[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")},
}

ENCODERS = tuple(
    f"{name}ForMaskedLM" for name in ("Bert", "Albert", "DistilBert", "Electra", "ModernBert", "MPNet", "Roberta")
)

TRANSFORMERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", SMALL),
    **{name: (name.replace("ForMaskedLM", "Config"), SMALL) for name in ENCODERS},
    "T5ForConditionalGeneration": (
        "T5Config",
        {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 64},
    ),
    "BartForConditionalGeneration": ("BartConfig", ENCODER_DECODER),
    "WhisperForConditionalGeneration": ("WhisperConfig", {**ENCODER_DECODER, "decoder_start_token_id": 1}),
    "MixtralForCausalLM": ("MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
    ),
    "GptOssForCausalLM": ("GptOssConfig", {**GROUPED, "num_local_experts": 4, "head_dim": 8}),
    "Llama4ForCausalLM": (
        "Llama4TextConfig",
        {**GROUPED, "num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 48},
    ),
    "GraniteMoeForCausalLM": ("GraniteMoeConfig", {**GROUPED, "num_local_experts": 4}),
    "ViTForImageClassification": (
        "ViTConfig",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "image_size": 32,
            "patch_size": 8,
        },
    ),
}
TIMM = {
    "resnet10t": {},
    "deit_tiny_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 4)},
    "eva02_tiny_patch14_224": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "beit_base_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "cait_xxs24_224": {"depth": 2, "embed_dim": 48, "num_heads": 4},
}


def of_transformers(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config, settings = TRANSFORMERS[name]
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**settings))
    for parameter in model.parameters():  # Some are left at zero, or uninitialised, by their class.
        nn.init.normal_(parameter, std=0.1)
    return model


def of_timm(name: str) -> nn.Module:
    model: nn.Module = pytest.importorskip("timm").create_model(name, num_classes=10, **TIMM[name])
    return model


def fourier(**options: Any) -> nn.Module:
    from neuralop.models import FNO

    model: nn.Module = FNO(
        in_channels=1, out_channels=1, hidden_channels=8, n_layers=2, **{"n_modes": (6, 6), **options}
    )
    return model


def recurrent() -> nn.Module:
    return nn.ModuleDict(
        {
            "lstm": nn.LSTM(12, 8, num_layers=2, bidirectional=True),
            "projected": nn.LSTM(12, 8, proj_size=4),
            "gru": nn.GRU(12, 8, bias=False),
            "rnn": nn.RNN(12, 8),
            "cell": nn.LSTMCell(12, 8),
        }
    )


def look_alikes() -> nn.Module:
    return nn.ModuleDict(
        {
            "norm": nn.LayerNorm([6, 8, 8]),
            "0": nn.LayerNorm([8, 8]),
            "bilinear": nn.Bilinear(12, 12, 16),
            "1": nn.Bilinear(40, 40, 16),
            "conv": nn.Conv1d(8, 12, 64),
            "2": nn.Conv1d(8, 12, 3),
            "word_embeddings": nn.Embedding(20, 8),
            "embed_out": nn.Linear(8, 20, bias=False),
            "patch_embed": nn.Linear(12, 8),
            "ensemble": nn.ModuleList([nn.Linear(12, 8, bias=False)]),
            "member": nn.Linear(12, 8, bias=False),
            "assembly": nn.Linear(12, 8, bias=False),
            "separate": nn.MultiheadAttention(16, 2, kdim=12, vdim=8),
        }
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: of_transformers(name) for name in TRANSFORMERS},  # type: ignore[misc]
    **{name: lambda name=name: of_timm(name) for name in TIMM},  # type: ignore[misc]
    "FNO": fourier,
    "FNO of one dimension": lambda: fourier(n_modes=(6,)),
    "separable FNO": lambda: fourier(separable=True),
    "separable FNO of one dimension": lambda: fourier(n_modes=(6,), separable=True),
    "recurrent": recurrent,
    "look-alikes": look_alikes,
}


def rows(report: Report) -> dict[str, tuple[Any, ...]]:
    return {name: (record.shape, record.alpha, record.status) for name, record in report.layers.items()}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_rows_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    if name == "T5ForConditionalGeneration":  # before, its file holds the embedding three times
        pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    model = MODELS[name]()
    expected = rows(analyze(model))
    assert any(alpha is not None for _, alpha, _ in expected.values())
    torch.save(state(model), tmp_path / "weights.pt")
    assert rows(analyze_checkpoint(tmp_path / "weights.pt")) == expected
    # safetensors know no shared memory; tests of tied weights are below.
    save_file({key: value.contiguous().clone() for key, value in state(model).items()}, tmp_path / "a.safetensors")
    assert rows(analyze_checkpoint(tmp_path / "a.safetensors")) == expected
    assert rows(analyze(state(model))) == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "WhisperForConditionalGeneration", *ENCODERS])
def test_tied_heads_of_a_folder(name: str, tmp_path: Path) -> None:
    """The folder holds the embedding alone; its `config.json` says that the head shares it."""
    model = of_transformers(name)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    config = json.loads((tmp_path / "config.json").read_text())
    if "tie_word_embeddings" not in config:
        pytest.skip("this transformers does not write what is its default, and the folder does not say it")
    assert rows(analyze_checkpoint(tmp_path)) == rows(analyze(model))
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    assert len(analyze_checkpoint(tmp_path).layers) == len(analyze(model).layers) - 1


@pytest.mark.parametrize("config", ["[" * 100_000, "[1]", '{"num_experts": "four"}', "\xff", ""])
def test_a_config_that_says_nothing(config: str, tmp_path: Path) -> None:
    save_file({"fc.weight": torch.randn(12, 8)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config, encoding="latin-1")
    assert list(analyze_checkpoint(tmp_path).layers) == ["fc"]


def test_experts_are_told_by_the_config(tmp_path: Path) -> None:
    save_file({"mixer.up.weight": torch.randn(5, 24, 16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_experts": 5}')
    assert analyze_checkpoint(tmp_path).layers["mixer.up"].shape == (5, 24, 16)
    (tmp_path / "config.json").unlink()
    assert analyze_checkpoint(tmp_path).layers["mixer.up"].shape == (16, 24, 5)


def test_a_convolution_below_experts_is_one() -> None:
    expert = nn.ModuleDict({"short": nn.Conv1d(12, 16, 3, bias=False), "down": nn.Linear(12, 16)})
    model = nn.ModuleDict({"experts": nn.ModuleList([expert]), "moe_mixer": nn.Conv1d(12, 16, 3)})
    assert analyze(model.state_dict()).layers == analyze(model).layers


@pytest.mark.parametrize(
    "name",
    [
        *(
            "mlp.experts.gate_up_proj",
            "block_sparse_moe.input_linear.weight",
            "ffn_up_exps.weight",
            "mlp_experts.w1",
        ),
        *("expert_weights.w2", "moe.w3", "sparseMoe.w1", "Experts1.w", "experts.0.w"),
    ],
)
def test_experts_are_told_by_a_word(name: str) -> None:
    (layer,) = analyze({name: torch.randn(4, 24, 16)}).layers.values()
    assert layer.shape == (4, 24, 16)


@pytest.mark.parametrize("name", ["memoed.cls", "inexpert.w", "experts.pos_embed", "mlp.expert_bias"])
def test_what_is_no_weight_of_experts_is_listed(name: str) -> None:
    layers = analyze({"fc.weight": torch.randn(24, 16), name: torch.randn(4, 24, 16)}).layers
    assert "no rule" in layers[name].status
