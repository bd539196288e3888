"""Whatever the model, its weights and the options: sound ratios, and every parameter once.

`make test` draws a few hundred models, `make test-nightly` ten thousand others each night.
"""

from __future__ import annotations

import json
import math
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from farms_tb import MatrixStack, TempBalance, layer_matrices
from farms_tb.options import MAPS, AssignFunc, SpectrumOptions
from farms_tb.report import LayerRecord
from farms_tb.spectra.permutation_null import weight_record
from tests.helpers import sharing

MANY = settings(
    max_examples=max(200, settings().max_examples),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
HARMLESS = pytest.mark.filterwarnings(
    "ignore:.*has collapsed",
    "ignore:layers with no",
    "ignore:.* left to balance",
    "ignore:the learning rate of .* times the base",
    "ignore:Complex modules are a new feature",
    "ignore:Casting complex values to real",
)


class Fourier(nn.Module):
    """A layer of another package: complex modes and a real part that no other layer has."""

    def __init__(self, rows: int, columns: int, modes: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(rows, columns, modes, dtype=torch.complex64))
        self.bias = nn.Parameter(torch.zeros(rows))


@layer_matrices.register
def _(module: Fourier) -> list[MatrixStack]:
    return [MatrixStack(module.kernel.permute(2, 0, 1))]


class Bare(nn.Module):
    """Parameters that no rule knows."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, columns))
        self.scale = nn.Parameter(torch.ones(()))


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
RULED = (nn.Linear, *CONVOLUTIONS, nn.MultiheadAttention, nn.LSTM, Fourier)
PARTS = (*"qkv", *(f"weight_{kind}_l0.{gate}" for kind in ("ih", "hh") for gate in "ifgo"))


@st.composite
def mostly(draw: Any, usual: Any, others: st.SearchStrategy[Any]) -> Any:
    return draw(others) if draw(st.integers(0, 4)) == 4 else usual


sizes = st.sampled_from([*range(5, 25), *range(5, 25), *range(1, 5)])


@st.composite
def layers(draw: Any) -> nn.Module:
    rows, columns, bias = draw(sizes), draw(sizes), draw(st.booleans())
    kind = draw(
        st.sampled_from(
            ["linear"] * 4
            + ["convolution"] * 4
            + ["attention", "fourier", "fourier", "norm", "embedding", "lstm", "bare", "nest"]
        )
    )
    if kind == "linear":
        return nn.Linear(columns, rows, bias=bias)
    if kind == "convolution":
        groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
        cls = draw(st.sampled_from(CONVOLUTIONS))
        return cls(groups * columns, groups * rows, draw(st.integers(1, 2)), groups=groups, bias=bias)  # type: ignore[abstract]
    if kind == "attention":
        other = draw(st.sampled_from([None, rows]))
        return nn.MultiheadAttention(2 * rows, draw(st.sampled_from([1, 2])), bias=bias, kdim=other)
    if kind == "fourier":
        return Fourier(rows, columns, draw(st.integers(1, 5)))
    if kind == "norm":
        norm = draw(st.sampled_from([nn.BatchNorm2d, nn.LayerNorm, nn.RMSNorm, nn.InstanceNorm1d]))
        return norm(rows, affine=True) if norm is nn.InstanceNorm1d else norm(rows)
    if kind == "embedding":
        return nn.Embedding(rows, columns)
    if kind == "lstm":
        return nn.LSTM(columns, min(rows, 6), bias=bias)
    if kind == "nest":
        return nn.Sequential(nn.Linear(rows, columns, bias=bias), nn.LayerNorm(columns), nn.ReLU())
    return Bare(rows, columns)


WEIGHTS = (
    *("as it is",) * 6,
    *("nan", "inf", "all nan", "zero", "denormal", "tiny", "huge", "largest", "equal", "signs", "diagonal"),
    *("rank one", "low rank", "orthogonal", "zero rows", "twice", "one entry", "heavy tail", "mixed scales"),
)


def spoil(weight: Tensor, how: str, position: int) -> None:
    """Overwrite a weight of two dimensions or more."""
    real = torch.view_as_real(weight) if weight.is_complex() else weight
    limits = torch.finfo(weight.dtype)
    matrix = weight.flatten(1)
    if how in ("nan", "inf"):
        real.reshape(-1)[position % real.numel()] = float(how) if position % 2 else -float(how)
    elif how == "all nan":
        real.fill_(math.nan)
    elif how == "zero":
        weight.zero_()
    elif how == "denormal":
        weight.mul_(limits.smallest_normal / 8)
    elif how == "tiny":
        weight.mul_(limits.smallest_normal * 8)
    elif how == "huge":
        weight.mul_(limits.max / 64)
    elif how == "largest":
        real.copy_(real.sign() * limits.max)
    elif how == "equal":
        weight.fill_(0.7)
    elif how == "signs":
        real.sign_()
    elif how == "diagonal":
        weight.zero_()
        matrix.diagonal().fill_(2)
    elif how == "rank one":
        matrix.copy_(matrix[:, :1] * matrix[:1])
    elif how == "low rank":
        rank = min(1 + position % 4, *matrix.shape)
        matrix.copy_((matrix[:, :rank].to(torch.complex64) @ matrix[:rank].to(torch.complex64)).to(weight.dtype))
    elif how == "orthogonal":
        weight.copy_(torch.nn.init.orthogonal_(torch.empty(weight.shape)))
    elif how == "zero rows":
        weight[::2].zero_()
    elif how == "twice":
        weight[len(weight) // 2 :] = weight[: len(weight) - len(weight) // 2].clone()
    elif how == "one entry":
        weight.zero_()
        matrix[position % len(matrix), position % matrix.shape[1]] = 1
    elif how == "heavy tail":
        real.copy_(real.double().mul(3).tan().to(real.dtype))
    elif how == "mixed scales":
        weight.mul_(torch.logspace(-8, 8, len(weight)).reshape(-1, *[1] * (weight.ndim - 1)).to(real.dtype))


@st.composite
def models(draw: Any) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    net = nn.ModuleList([draw(layers()) for _ in range(draw(st.sampled_from([6, 8, 10, 4, 5, 3, 2, 1])))])
    dtype = draw(st.sampled_from([torch.float32] * 3 + [torch.float64, torch.bfloat16, torch.float16]))
    for module in net:
        own = draw(st.sampled_from([dtype] * 4 + [torch.float64]))
        if not any(p.is_complex() for p in module.parameters()):
            module.to(own)
    sound = draw(st.booleans())
    for parameter in net.parameters():
        if parameter.ndim > 1 and not (sound and draw(st.integers(0, 3))):
            spoil(parameter.data, draw(st.sampled_from(WEIGHTS)), draw(st.integers(0, 2**10)))
        if draw(st.integers(0, 9)) == 9:
            parameter.requires_grad_(False)
    linear = [module for module in net if isinstance(module, nn.Linear)]
    if len(linear) > 1 and draw(st.integers(0, 4)) == 4:
        linear[-1].weight = linear[0].weight
        event("tied weights")
    if draw(st.integers(0, 5)) == 5:
        net.append(net[0])
        event("a module twice")
    return net


def between(low: float, high: float, **bounds: Any) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False, **bounds)


@st.composite
def spectral_options(draw: Any) -> dict[str, Any]:
    return {
        "esd": draw(st.sampled_from(["farms", "full"])),
        "fit": draw(st.sampled_from(["median", "goodness-of-fit", "xmin_peak"])),
        "aspect_ratio": draw(mostly(1.0, st.sampled_from([0.5, 2.0]) | between(1e-3, 1e3))),
        "window": draw(mostly(100, st.integers(2, 30))),
        "windows_per_dim": draw(st.integers(1, 9)),
        "window_step": draw(mostly(None, st.integers(1, 9) | st.integers(1, 2**40))),
        "xmin_pos": draw(mostly(2.0, between(1, 1e9, exclude_min=True))),
        "filter_zeros": draw(st.booleans()),
        "relative_cutoff": draw(mostly(0.0, between(0, 1, exclude_max=True))),
        "min_eigenvalues": draw(mostly(5, st.sampled_from([2, 3, 12, 40]))),
    }


METRICS = (
    "ks_distance",
    "alpha_hat",
    "spectral_norm",
    "norm",
    "pooled_stable_rank",
    "norm_stable_rank",
    "entropy",
)


@st.composite
def balance_options(draw: Any, names: list[str]) -> dict[str, Any]:
    low = draw(st.sampled_from([0.0, 0.5, 1.0]) | between(0, 10))
    assign = draw(st.sampled_from(get_args(AssignFunc)))
    metrics = ("alpha",) * 5 + METRICS if MAPS[assign].takes in ("metric", "nothing") else ("alpha",)
    return {
        "assign_func": assign,
        "lr_min_ratio": low,
        "lr_max_ratio": max(low + draw(between(0, 100)), 1e-6),
        "sigmoid_min": draw(mostly(0.5, between(0, 100))),
        "sigmoid_max": draw(mostly(0.5, between(0, 100))),
        "sigmoid_tau": draw(mostly(10.0, between(0, 1e6, exclude_min=True))),
        "ratio_levels": draw(mostly(None, st.integers(2, 9))),
        "metric": draw(st.sampled_from(metrics)),
        "exclude_first": draw(st.booleans()),
        "exclude_last": draw(st.booleans()),
        "exclude": draw(mostly([], st.lists(st.sampled_from(names), max_size=2))) if names else [],
        "balance": draw(mostly(["real", "spectral"], st.sampled_from([["real"], ["spectral"], []]))),
        "norms": draw(st.sampled_from(["follow", "base"])),
        "favor": draw(st.sampled_from(["large_alpha", "small_alpha"])),
        "collapsed": draw(st.sampled_from(["leave_out", "keep"])),
    }


OPTIMIZERS: dict[str, Any] = {
    "SGD": torch.optim.SGD,
    "SGD, foreach": lambda groups, lr: torch.optim.SGD(groups, lr=lr, foreach=True),
    "momentum": lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=0.1),
    "Adam": lambda groups, lr: torch.optim.Adam(groups, lr=lr, foreach=True),
    "AdamW": torch.optim.AdamW,
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
}


@st.composite
def groups_of(draw: Any, net: nn.Module) -> list[dict[str, Any]]:
    """Put the parameters in one to three groups, some with an lr of their own."""
    groups: list[dict[str, Any]] = [{"params": []} for _ in range(draw(st.integers(1, 3)))]
    for parameter in net.parameters():
        groups[draw(st.integers(0, len(groups) - 1))]["params"].append(parameter)
    for group in groups[1:]:
        group["lr"] = draw(st.sampled_from([0.0, 0.01, 0.25]))
    return [group for group in groups if group["params"]]


@HARMLESS
@MANY
@given(st.data())
def test_any_model_any_options(data: Any) -> None:
    net = data.draw(models())
    ruled = [name for name, module in net.named_modules() if isinstance(module, RULED)]
    options = data.draw(spectral_options()) | data.draw(balance_options(ruled))
    name = data.draw(st.sampled_from(sorted(OPTIMIZERS)))
    optimizer = OPTIMIZERS[name](data.draw(groups_of(net)), lr=0.1)
    try:
        balancer = TempBalance(net, optimizer, **options)
    except ValueError as error:
        event("refused")
        patterns = [module for module in ruled if module in options["exclude"]]
        documented = ["has no layer that can be analysed"] + ["matches no layer"] * bool(patterns)
        assert any(words in str(error) for words in documented)  # noqa: PT017
        return
    check_ratios(balancer, net, options)
    check_excluded(balancer, net, ruled, options)
    check_groups(balancer, net, optimizer)
    check_state(balancer, net)
    if max(balancer.ratios.values()) < 1000:
        check_step(balancer, net, optimizer, plain=name.startswith("SGD"))
        balancer.step()
        check_ratios(balancer, net, options)


def check_ratios(balancer: TempBalance, net: nn.Module, options: dict[str, Any]) -> None:
    """Finite, inside the bounds of the map, and 1 where there is no metric."""
    low, high = bounds(options, len(balancer.ratios))
    shared = sharing(net)
    slack = 1 + 1e-12
    assert balancer.ratios.keys() == balancer.report.layers.keys()
    for name, ratio in balancer.ratios.items():
        record = balancer.report.layers[name]
        assert type(ratio) is float
        assert ratio == 1 or low / slack <= ratio <= high * slack, (name, ratio)
        mapped = MAPS[options["assign_func"]].takes == "nothing" or record.metric(options["metric"]) is not None
        assert ratio == 1 or (mapped and record.kind in options["balance"]) or name in shared
        check_record(record)
    event(f"{'some' if set(balancer.ratios.values()) - {1.0} else 'no'} layers balanced")


def bounds(options: dict[str, Any], number: int) -> tuple[float, float]:
    if MAPS[options["assign_func"]].bounded:
        low, high = options["lr_min_ratio"], options["lr_max_ratio"]
        # The noise-aware map shrinks ratios towards 1, wherever the bounds are.
        return (min(low, 1), max(high, 1)) if options["assign_func"] == "noise_aware" else (low, high)
    if options["assign_func"] == "tb_sigmoid":
        return 10 ** (-options["sigmoid_min"] / 2), 10 ** (options["sigmoid_max"] / 2)
    return 0, number


def check_record(record: LayerRecord) -> None:
    """An alpha or a reason, and no number that is not finite."""
    has_alpha = record.status == "ok" or record.collapsed
    assert (record.alpha is None) != has_alpha
    assert record.alpha is None or record.alpha > 1
    assert record.kind in ("real", "spectral") or record.status != "ok"
    for name in (*METRICS, "alpha"):
        value = getattr(record, name)
        assert value is None or math.isfinite(value), (name, value)
    assert record.ks_distance is None or 0 <= record.ks_distance <= 1
    assert record.entropy is None or -1e-9 <= record.entropy <= 1 + 1e-9
    for stable_rank in (record.stable_rank, record.pooled_stable_rank):
        assert stable_rank is None or stable_rank >= 1 - 1e-9


def check_excluded(balancer: TempBalance, net: nn.Module, ruled: list[str], options: dict[str, Any]) -> None:
    """Excluded by name, or as the first or the last of the layers that are trained."""
    own = [name for name in ruled if any(p.requires_grad for p in net.get_submodule(name).parameters())]
    excluded = {*options["exclude"]}
    excluded |= {own[0]} if options["exclude_first"] and own else set()
    excluded |= {own[-1]} if options["exclude_last"] and own else set()
    for path in excluded:
        for name in (path, *(f"{path}.{part}" for part in PARTS)):
            assert balancer.ratios.get(name, 1.0) == 1.0


def check_groups(balancer: TempBalance, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Every parameter in one group, of its ratio and lr."""
    ratios = balancer.parameter_ratios()
    names = [name for name, _ in net.named_parameters()]
    assert list(ratios) == names
    groups = balancer.param_groups(optimizer)
    assert sorted(name for group in groups for name in group.parameters) == sorted(names)
    for group in groups:
        assert {ratios[name] for name in group.parameters} == {group.ratio}
        assert group.lr == optimizer.param_groups[group.group]["lr"] * group.ratio
    lowest, highest = min(balancer.ratios.values()), max(balancer.ratios.values())
    assert all(ratio == 1 or lowest <= ratio <= highest for ratio in ratios.values())
    for path, module in net.named_modules():
        alone = isinstance(module, (nn.Linear, *CONVOLUTIONS, Fourier)) and path in balancer.ratios
        if alone and balancer.report.layers[path].status == "ok":
            own = {ratios.get(f"{path}.{name}", balancer.ratios[path]) for name, _ in module.named_parameters()}
            assert own == {balancer.ratios[path]}


def check_state(balancer: TempBalance, net: nn.Module) -> None:
    """Plain, finite values, which give the same ratios again."""
    state = json.loads(json.dumps(balancer.state_dict(), allow_nan=False))
    before, layers = balancer.ratios, balancer.report.layers
    balancer.load_state_dict(state)
    assert balancer.ratios == before
    assert balancer.report.layers == layers


def check_step(balancer: TempBalance, net: nn.Module, optimizer: torch.optim.Optimizer, plain: bool) -> None:
    """Step for real; plain SGD moves every parameter by exactly lr * ratio * gradient."""
    ratios = balancer.parameter_ratios()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    users = [dict(group) for group in optimizer.param_groups]
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name, p in net.named_parameters():
        expected = before[name]
        if p.grad is not None:
            expected = expected.add(p.grad, alpha=-(rates[id(p)] * ratios[name]))
        if plain or p.grad is None:
            assert torch.equal(p.detach().nan_to_num(0.5), expected.nan_to_num(0.5)), name
    for group, user in zip(optimizer.param_groups, users, strict=True):
        assert group.keys() == user.keys()
        assert all(group[key] is user[key] for key in user)


@st.composite
def stacks(draw: Any) -> MatrixStack:
    """Entry by entry: every number that a format can hold."""
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128]))
    shape = draw(st.tuples(st.integers(1, 4), st.integers(2, 9), st.integers(2, 9)))
    broken = draw(st.integers(0, 3)) == 3
    entries = (
        st.floats(allow_nan=broken, allow_infinity=broken) | st.floats(-1, 1) | st.sampled_from([0.0, 1.0, -1.0])
    )
    # Few distinct numbers make equal eigenvalues, many take long to draw.
    pool = torch.tensor(draw(st.lists(entries, min_size=1, max_size=12)), dtype=torch.float64)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    values = pool[torch.randint(len(pool), (2, *shape), generator=generator)]
    if draw(st.booleans()):
        values = values * torch.rand(values.shape, generator=generator, dtype=torch.float64)
    matrices = torch.complex(*values) if dtype.is_complex else values[0].to(dtype)
    return MatrixStack(matrices, draw(st.sampled_from(["blocks", "grid"])), eigenvalue_scale=draw(between(0.1, 2)))


@MANY
@given(stacks(), spectral_options())
def test_any_weights(stack: MatrixStack, options: dict[str, Any]) -> None:
    record = weight_record(stack, SpectrumOptions(**options))
    event(record.status.split(":")[0])
    check_record(record)
    if not stack.matrices.isfinite().all():
        assert record.status == "weights contain NaN or infinity"
