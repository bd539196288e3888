"""Who takes part, and which parameter follows which layer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farms_tb import MatrixStack, TempBalance, layer_matrices
from tests.helpers import make_net


def balanced(net: nn.Module, **options: Any) -> TempBalance:
    params = [p for p in net.parameters() if p.requires_grad]
    return TempBalance(net, torch.optim.SGD(params, lr=0.1), assign_func="tb_linear_map", **options)


# Norms of any class


class Loud(nn.Module):
    """Changes itself and fails whenever it is called."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        raise AssertionError("a measurement must not call modules")


class OwnRMSNorm(Loud):
    """A class as Llama has it."""


class Derived(OwnRMSNorm):
    """Not called a norm, but derived from one."""


class NormWithShift(Loud):
    """Two vectors, one of which is laid out for images."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.shift = nn.Parameter(torch.zeros(1, width, 1, 1))


class LayerScale(Loud):
    """A vector that scales: by its parameters alone it could be a norm."""


class DiagonalNormal(Loud):
    """The deviations of a distribution."""


class NormalizedLinear(Loud):
    """Has a matrix and a vector."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.matrix = nn.Parameter(torch.ones(width, width))


class NormOfParts(Loud):
    """Holds another module."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.inner = nn.Identity()


class NormOfTwoWidths(Loud):
    """Has vectors of different lengths."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias = nn.Parameter(torch.zeros(width + 1))


def net_with(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.Linear(12, 16), norm, nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 2)
    )


@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.BatchNorm1d, nn.RMSNorm, OwnRMSNorm, Derived, NormWithShift])
def test_a_norm_of_any_class_follows(cls: Any) -> None:
    net = net_with(cls(16))
    balancer = balanced(net)
    ratios = balancer.parameter_ratios()
    assert balancer.ratios["1"] != 1
    assert {ratios[f"2.{name}"] for name, _ in net[2].named_parameters()} == {balancer.ratios["1"]}


@pytest.mark.parametrize(
    "cls", [LayerScale, DiagonalNormal, nn.PReLU, NormalizedLinear, NormOfParts, NormOfTwoWidths]
)
def test_other_modules_keep_the_base_rate(cls: Any) -> None:
    net = net_with(cls(16))
    ratios = balanced(net).parameter_ratios()
    assert {ratios[f"2.{name}"] for name, _ in net[2].named_parameters()} == {1.0}


@pytest.mark.parametrize("cls", [OwnRMSNorm, NormWithShift, LayerScale, nn.BatchNorm1d, nn.SyncBatchNorm])
def test_looking_for_norms_runs_nothing(cls: Any) -> None:
    module = cls(16)
    hooked: list[int] = []
    module.register_forward_hook(lambda *_: hooked.append(1))
    module.register_forward_pre_hook(lambda *_: hooked.append(1))
    net = net_with(module).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    attributes, state = dict(vars(module)), torch.get_rng_state()
    balanced(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert vars(module) == attributes
    assert not hooked
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


class ParametrizedBias(nn.Module):
    """A layer of a class of one's own, whose bias is computed anew whenever it is asked for."""

    computed = 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 12))

    @property
    def bias(self) -> Tensor:
        type(self).computed += 1
        return self.weight[:, 0]


def test_looking_for_the_width_of_a_layer_computes_nothing() -> None:
    @layer_matrices.register
    def _(module: ParametrizedBias) -> list[MatrixStack]:
        return [MatrixStack(module.weight.detach()[None])]

    balanced(
        nn.Sequential(nn.Linear(6, 12), ParametrizedBias(), nn.LayerNorm(16), nn.Linear(16, 9), nn.Linear(9, 9))
    )
    assert ParametrizedBias.computed == 0


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 48}
GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 16, "bos_token_id": 0, "eos_token_id": 0}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("model", "config", "norm", "layer"),
    [
        ("LlamaForCausalLM", SMALL, "model.layers.0.post_attention_layernorm", "model.layers.0.mlp.down_proj"),
        ("MistralForCausalLM", SMALL, "model.layers.0.post_attention_layernorm", "model.layers.0.mlp.down_proj"),
        ("GPT2LMHeadModel", GPT2, "transformer.h.0.ln_2", "transformer.h.0.attn.c_proj"),
        ("BertForMaskedLM", SMALL, "bert.encoder.layer.0.output.LayerNorm", "bert.encoder.layer.0.output.dense"),
        ("T5Model", T5, "encoder.block.0.layer.1.layer_norm", "encoder.block.0.layer.1.DenseReluDense.wo"),
    ],
    ids=["Llama", "Mistral", "GPT-2", "BERT", "T5"],
)
def test_norms_of_language_models_follow(model: str, config: dict[str, int], norm: str, layer: str) -> None:
    cls = getattr(pytest.importorskip("transformers"), model)
    balancer = balanced(cls(cls.config_class(vocab_size=60, **config)))
    assert balancer.parameter_ratios()[f"{norm}.weight"] == balancer.ratios[layer] != 1


# The first and the last layer


class Student(nn.Module):
    """A frozen teacher comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher, self.net = make_net(seed=1).requires_grad_(False), make_net()


@pytest.mark.parametrize("in_optimizer", [True, False])
def test_first_and_last_are_those_that_are_trained(in_optimizer: bool) -> None:
    model = Student()
    params = model.parameters() if in_optimizer else model.net.parameters()
    balancer = TempBalance(model, torch.optim.SGD(params, lr=0.1), assign_func="tb_linear_map")
    alone = balanced(make_net())
    assert {name: ratio for name, ratio in balancer.ratios.items() if name.startswith("net")} == {
        f"net.{name}": ratio for name, ratio in alone.ratios.items()
    }
    assert balancer.ratios["net.0"] == balancer.ratios["net.9"] == 1
    assert balancer.ratios["net.2"] != 1


def test_a_layer_that_is_frozen_later_hands_its_role_on() -> None:
    net = make_net()
    balancer = balanced(net)
    assert balancer.ratios["2"] != 1
    net[0].requires_grad_(False)
    balancer.step()
    assert balancer.ratios["2"] == 1


# Nothing to balance, and large ratios


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exclude": ["*"]}, "no layer is left to balance"),
        ({"exclude": ["2", "5"]}, "only one layer"),
        ({"balance": ["spectral"]}, "no layer is left to balance"),
    ],
)
def test_nothing_to_balance_is_said_once(options: dict[str, Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        balancer = balanced(make_net(), **options)
    balancer.step()
    assert set(balancer.ratios.values()) == {1.0}


def test_measuring_alone_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balanced(make_net(), exclude=["*"], lr_min_ratio=1, lr_max_ratio=1)


def test_large_ratios_are_said_once() -> None:
    with pytest.warns(UserWarning, match="12 times the base learning rate.*lr_max_ratio"):
        balancer = balanced(make_net(), lr_max_ratio=12)
    balancer.step()
