"""Who takes part, and which parameter follows which layer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from farms_tb import TempBalance
from tests.helpers import make_net


def balanced(net: nn.Module, **options: Any) -> TempBalance:
    params = [p for p in net.parameters() if p.requires_grad]
    return TempBalance(net, torch.optim.SGD(params, lr=0.1), **options)


# Norms of any class


class OwnRMSNorm(nn.Module):
    """As Llama has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Unit(nn.Module):
    """Divides by the length, as some write it; no `eps`, no telling name, and a weight that begins at 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) * (1 + self.g)


class ChannelsFirst(nn.Module):
    """As ConvNeXt has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        assert x.ndim == 4
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-6).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class OwnBatchNorm(nn.Module):
    """Counts its batches, and keeps statistics."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("mean", torch.zeros(width))
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += 1
        if self.training:
            self.mean.lerp_(x.mean(0), 0.1)
        return (x - x.mean(0)) / x.std(0) * self.weight


class LayerScaleNorm(nn.Module):
    """No norm, whatever it is called: it scales."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Random(nn.Module):
    """Draws numbers, and raises."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3)
        raise KeyError("not now")


def net_with(norm: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 12), nn.Linear(12, 16), norm, nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 2)
    )


@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.RMSNorm, OwnRMSNorm, Unit, ChannelsFirst, OwnBatchNorm])
def test_a_norm_of_any_class_follows(cls: Any) -> None:
    net = net_with(cls(16))
    balancer = balanced(net)
    ratios = balancer.parameter_ratios()
    assert balancer.ratios["1"] != 1
    assert {ratios[f"2.{name}"] for name, _ in net[2].named_parameters()} == {balancer.ratios["1"]}


@pytest.mark.parametrize("cls", [LayerScaleNorm, Random, nn.PReLU])
def test_what_does_not_normalise_keeps_the_base_rate(cls: Any) -> None:
    net = net_with(cls(16))
    ratios = balanced(net).parameter_ratios()
    assert {ratios[f"2.{name}"] for name, _ in net[2].named_parameters()} == {1.0}


def test_looking_for_norms_changes_nothing() -> None:
    norm = OwnBatchNorm(16)
    hooked: list[int] = []
    norm.register_forward_hook(lambda *_: hooked.append(1))
    nets = net_with(norm).eval(), net_with(Random(16))
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for net in nets:
            balanced(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(norm.mean, torch.zeros(16))
    assert (norm.batches, hooked, norm.training) == (0, [], False)


def test_norms_of_language_models_follow() -> None:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, intermediate_size=48))
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=60, bos_token_id=0, eos_token_id=0
        )
    )
    for net, norm, layer in (
        (llama, "model.layers.0.post_attention_layernorm", "model.layers.0.mlp.down_proj"),
        (gpt2, "transformer.h.0.ln_2", "transformer.h.0.attn.c_proj"),
    ):
        balancer = balanced(net)
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
    balancer = TempBalance(model, torch.optim.SGD(params, lr=0.1))
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
