"""TempBalance in a plain PyTorch loop: the same guarantees without Lightning."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiplicativeLR

from farms_tb import Report, StepGroup, TempBalance, analyze, lr_ratios
from farms_tb.balancing import measured_model
from tests.balancing.test_layerwise_step import Lookahead
from tests.helpers import assert_same_state, assert_same_weights, make_data, make_net, spy_on_updates

pytestmark = pytest.mark.filterwarnings("ignore:lazy modules are a new feature", "ignore:Lazy modules are a new")
LAYERS = ["0", "2", "5", "7", "9"]
BALANCED = LAYERS[1:-1]


def train(net: nn.Module, optimizers: list[Optimizer], epochs: int = 2, end_of_epoch: Any = None) -> None:
    for _ in range(epochs):
        for inputs, targets in make_data(3):
            for optimizer in optimizers:
                optimizer.zero_grad()
            nn.functional.mse_loss(net(inputs), targets).backward()
            for optimizer in optimizers:
                optimizer.step()
        if end_of_epoch is not None:
            end_of_epoch()


def make_wide(width: int) -> nn.Sequential:
    """Return four random linear layers, with `width` features between the second and the third."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(32, 32), nn.Linear(32, width), nn.Linear(width, 32), nn.Linear(32, 32))


def expected_ratios(net: nn.Module) -> dict[str, float]:
    alphas = analyze(net).alphas
    return dict.fromkeys(LAYERS, 1.0) | lr_ratios({name: alphas[name] for name in BALANCED})


def of_parameters(ratios: dict[str, float]) -> dict[str, float]:
    by_name = {f"{layer}.{part}": ratio for layer, ratio in ratios.items() for part in ("weight", "bias")}
    return by_name | {"3.weight": ratios["2"], "3.bias": ratios["2"]}


def test_lr_is_the_schedulers_times_the_ratio_of_the_last_measurement() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = MultiplicativeLR(optimizer, lambda _: 0.7)
    groups = optimizer.param_groups
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    said: list[dict[str, float]] = []

    def measure() -> None:
        scheduler.step()
        report = balancer.step()
        assert isinstance(report, Report)
        assert report is balancer.report
        assert balancer.ratios == expected_ratios(net)
        assert balancer.parameter_ratios() == of_parameters(balancer.ratios)
        said.append(balancer.parameter_ratios())

    assert balancer.ratios == expected_ratios(net)
    said.append(balancer.parameter_ratios())
    with spy_on_updates("SGD") as seen:
        train(net, [optimizer], 3, measure)
    lr = 0.1
    for epoch in range(3):
        for step in seen[3 * epoch : 3 * epoch + 3]:
            assert {n: step[id(p)] for n, p in net.named_parameters()} == {
                name: lr * ratio for name, ratio in said[epoch].items()
            }
        lr *= 0.7
    assert optimizer.param_groups is groups
    assert len(groups) == 1
    assert len(set(map(str, said))) == 4, "the ratios never changed: the test shows nothing"


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_ratio_one_is_bit_identical(name: str) -> None:
    states, nets = [], []
    for measured in (True, False):
        net = make_net()
        optimizer = getattr(torch.optim, name)(net.parameters(), lr=0.01)
        balancer = TempBalance(net, optimizer, lr_min_ratio=1.0, lr_max_ratio=1.0) if measured else None
        train(net, [optimizer], 2, balancer.step if balancer else None)
        states.append(optimizer.state_dict())
        nets.append(net)
    assert_same_weights(*nets)
    assert_same_state(*states)


def test_measuring_changes_nothing() -> None:
    net = make_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random_state = torch.get_rng_state()
    balancer = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map")
    balancer.step()
    assert_same_state(dict(net.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_resume_through_a_file(tmp_path: Path) -> None:
    def start() -> tuple[Any, Any, Any, Any]:
        net = make_net()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
        return (
            net,
            optimizer,
            CosineAnnealingLR(optimizer, 10),
            TempBalance(net, optimizer, exclude=["7"], assign_func="tb_linear_map"),
        )

    def end_of_epoch(*parts: Any) -> Any:
        return lambda: [part.step() for part in parts]

    net, optimizer, scheduler, balancer = start()
    train(net, [optimizer], 2, end_of_epoch(scheduler, balancer))
    # In the middle of an epoch: the ratios are of weights that are gone.
    train(net, [optimizer], 1)
    saved = [part.state_dict() for part in (net, optimizer, scheduler, balancer)]
    torch.save(saved, tmp_path / "state.pt")
    report, ratios = balancer.report, balancer.ratios
    train(net, [optimizer], 2, end_of_epoch(scheduler, balancer))

    again = start()
    balancer.detach()
    for part, state in zip(again, torch.load(tmp_path / "state.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    assert again[3].report == report
    assert again[3].ratios == ratios
    train(again[0], [again[1]], 2, end_of_epoch(again[2], again[3]))
    assert_same_weights(again[0], net)
    assert_same_state(again[3].state_dict(), balancer.state_dict())


def test_state_of_other_options_is_measured_anew() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    first = TempBalance(net, optimizer, assign_func="tb_linear_map")
    state = first.state_dict()
    first.detach()
    second = TempBalance(net, optimizer, lr_max_ratio=1.1, esd="full", assign_func="tb_linear_map")
    message = "measuring anew: esd was 'farms' and is 'full'; lr_max_ratio was 1.5 and is 1.1$"
    with pytest.warns(UserWarning, match=message):
        second.load_state_dict(state)
    alphas = analyze(net, esd="full").alphas
    assert second.ratios == dict.fromkeys(LAYERS, 1.0) | lr_ratios(
        {name: alphas[name] for name in BALANCED}, lr_max_ratio=1.1
    )


def test_state_of_another_model_names_the_layers() -> None:
    net, other = make_net(), nn.Sequential(*[nn.Linear(12, 12) for _ in range(4)])
    state = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map").state_dict()
    balancer = TempBalance(other, torch.optim.SGD(other.parameters(), lr=0.1), assign_func="tb_linear_map")
    message = "layers 5, 7, 9 are not in the model; layers 1, 3 are new"
    with pytest.warns(UserWarning, match=message):
        balancer.load_state_dict(state)
    assert set(balancer.ratios) == {"0", "1", "2", "3"}


def test_state_of_layers_of_another_shape_is_measured_anew() -> None:
    """Compared with permutation nulls of the old shape, random weights would seem to have learnt."""
    net, other = make_wide(40), make_wide(10)
    state = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1)).state_dict()
    balancer = TempBalance(other, torch.optim.SGD(other.parameters(), lr=0.1))
    report = balancer.report
    message = (
        r"measuring anew: layer 1 had shape \(1, 40, 32\) and has \(1, 32, 10\); "
        r"layer 2 had shape \(1, 40, 32\) and has \(1, 32, 10\)$"
    )
    with pytest.warns(UserWarning, match=message):
        balancer.load_state_dict(state)
    assert balancer.report == report
    assert balancer.step() == report


def test_state_is_compared_with_the_layers_as_they_are_when_it_is_loaded() -> None:
    net, other = make_wide(40), make_wide(10)
    balancer = TempBalance(other, torch.optim.SGD(other.parameters(), lr=0.1))
    state = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1)).state_dict()
    other[1], other[2] = net[1], net[2]
    balancer.load_state_dict(state)  # without a warning
    assert balancer.report.layers["1"].shape == (1, 40, 32)


def test_a_lazy_layer_that_got_its_shape_after_the_measurement_is_no_change() -> None:
    def start() -> tuple[nn.Sequential, TempBalance]:
        net = make_net()
        net[2] = nn.LazyLinear(16)
        return net, TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map")

    net, balancer = start()
    net(torch.zeros(1, 6))
    again, resumed = start()
    again.load_state_dict(net.state_dict())
    resumed.load_state_dict(balancer.state_dict())  # without a warning
    assert resumed.report == balancer.report
    assert resumed.step() == balancer.step()


@pytest.mark.parametrize("state", [{}, None, {"ratios": {}}, [1]])
def test_what_is_no_state_is_refused(state: Any) -> None:
    net = make_net()
    balancer = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map")
    before = balancer.ratios
    with pytest.raises(ValueError, match="not a state of farms_tb: expected a dict with version, options"):
        balancer.load_state_dict(state)
    assert balancer.ratios == before


def test_state_of_a_newer_version_is_refused() -> None:
    net = make_net()
    balancer = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map")
    state = {**balancer.state_dict(), "version": 99}
    with pytest.raises(ValueError, match="the state has version 99, this farms_tb reads up to 2: upgrade it"):
        balancer.load_state_dict(state)


def test_state_of_the_first_version_loads() -> None:
    """A file that stays as it was written: every later version reads it, and warns of nothing."""
    state = json.loads((Path(__file__).parents[1] / "data" / "tempbalance_state_v1.json").read_text())
    net = make_net(seed=3)
    balancer = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map")
    assert balancer.ratios != state["ratios"]
    balancer.load_state_dict(state)
    assert balancer.ratios == state["ratios"]
    assert balancer.report.alphas == {name: record["alpha"] for name, record in state["report"].items()}


def test_detach_gives_the_optimizer_back() -> None:
    net, plain = make_net(), make_net()
    optimizer, other = (torch.optim.SGD(n.parameters(), lr=0.1) for n in (net, plain))
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    balancer.detach()
    balancer.detach()
    train(net, [optimizer])
    train(plain, [other])
    assert_same_weights(net, plain)
    assert balancer.ratios != dict.fromkeys(LAYERS, 1.0)
    for call in (balancer.step, lambda: balancer.load_state_dict(balancer.state_dict())):
        with pytest.raises(RuntimeError, match=r"detach\(\)"):
            call()
    (group,) = balancer.param_groups(optimizer)
    assert (group.ratio, group.lr) == (1.0, 0.1)
    assert TempBalance(net, optimizer, assign_func="tb_linear_map").report is not balancer.report


def test_an_optimizer_that_was_dropped_without_detach_is_in_nobodys_way() -> None:
    """It lives on until Python collects garbage, and the model may be trained on before that."""
    net = make_net()

    def phase() -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        TempBalance(net, optimizer, assign_func="tb_linear_map")
        train(net, [optimizer], 1)

    gc.disable()
    try:
        phase()
        with spy_on_updates("SGD") as seen:
            train(net, [torch.optim.SGD(net.parameters(), lr=0.1)], 1)
    finally:
        gc.enable()
    assert [set(lrs.values()) for lrs in seen] == [{0.1}] * 3


def test_an_optimizer_that_is_kept_without_detach_is_named() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    other = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"to train on without ratios, detach\(\) it"):
        train(net, [other], 1)
    balancer.detach()
    train(net, [other], 1)


def test_several_optimizers() -> None:
    """Layers in different optimizers are compared with each other; a parameter in both is scaled in both."""
    net = make_net()
    one = torch.optim.SGD(net[:4].parameters(), lr=0.1)
    other = torch.optim.Adam(
        [{"params": net[4:7].parameters()}, {"params": net[7:].parameters(), "lr": 0.01}], lr=0.02
    )
    balancer = TempBalance(net, [one, other], assign_func="tb_linear_map")
    assert balancer.ratios == expected_ratios(net)
    ratios, named = balancer.parameter_ratios(), dict(net.named_parameters())
    with spy_on_updates("SGD") as sgd, spy_on_updates("Adam") as adam:
        train(net, [one, other], 1)
    lrs = {**sgd[0]}
    for step in adam[:2]:
        lrs.update(step)
    base = {name: 0.1 if name[0] in "0123" else 0.02 if name[0] in "456" else 0.01 for name in named}
    assert {name: lrs[id(p)] for name, p in named.items()} == {n: base[n] * ratios[n] for n in named}
    assert [group.group for group in balancer.param_groups(other)] == [0, 1, 1]


@pytest.mark.parametrize("wrap", [LightningOptimizer, Lookahead, lambda o: LightningOptimizer(Lookahead(o))])
def test_wrapped_optimizers(wrap: Any) -> None:
    net = make_net()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    wrapped = wrap(inner)
    balancer = TempBalance(net, wrapped, assign_func="tb_linear_map")
    assert balancer.param_groups(wrapped) == balancer.param_groups(inner)


def test_param_groups_are_readable() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=torch.tensor(0.1))
    balancer = TempBalance(net, optimizer, norms="base", assign_func="tb_linear_map")
    first, *rest = balancer.param_groups(optimizer)
    assert first == StepGroup(
        group=0,
        layers=("0", "9"),
        parameters=("0.weight", "0.bias", "3.weight", "3.bias", "9.weight", "9.bias"),
        ratio=1.0,
        lr=float(torch.tensor(0.1)),
        weight_decay=0.0,
    )
    assert {group.layers for group in rest} == {("2",), ("5",), ("7",)}


def test_packed_attention_steps_with_the_ratio_that_its_parts_show() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.inp, self.attn, self.out = nn.Linear(6, 16), nn.MultiheadAttention(16, 2), nn.Linear(16, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.inp(inputs)[None]
            return self.out(self.attn(hidden, hidden, hidden)[0][0])

    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    parts = [balancer.ratios[f"attn.{part}"] for part in "qkv"]
    assert set(parts) == {balancer.parameter_ratios()["attn.in_proj_weight"]} != {1.0}
    with spy_on_updates("SGD") as seen:
        train(net, [optimizer], 1)
    shown = {name: group.lr for group in balancer.param_groups(optimizer) for name in group.parameters}
    assert shown == {name: seen[0][id(p)] for name, p in net.named_parameters()}


def test_replaced_parameters_are_found() -> None:
    """A layer swapped during training is measured and stepped by its new weights."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    net[5] = nn.Linear(16, 12)
    optimizer.add_param_group({"params": list(net[5].parameters())})
    balancer.step()
    assert balancer.ratios == expected_ratios(net)
    groups = {name: group.ratio for group in balancer.param_groups(optimizer) for name in group.parameters}
    assert groups["5.weight"] == balancer.ratios["5"] != 1


def _resize(net: nn.Sequential) -> None:
    net[1], net[2] = nn.Linear(32, 10), nn.Linear(10, 32)


def _take_the_place_of_one_that_is_gone(net: nn.Sequential) -> None:
    net[2] = nn.Sequential(nn.Linear(40, 36), nn.Linear(36, 32))


def _convolve(net: nn.Sequential) -> None:
    net[2] = nn.Conv1d(40, 32, 1)  # the shape (K, R, C) of the linear layer, with windows of its own


@pytest.mark.parametrize("replace", [_resize, _take_the_place_of_one_that_is_gone, _convolve])
def test_replaced_layers_are_compared_with_random_ones_of_their_own_shape(replace: Any) -> None:
    net = make_wide(40)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    balancer = TempBalance(net, optimizer)
    replace(net)
    optimizer.param_groups[0]["params"] = list(net.parameters())
    found = balancer.step().layers
    balancer.detach()
    fresh = TempBalance(net, optimizer).report.layers
    assert {name: record.null_mean for name, record in found.items()} == {
        name: record.null_mean for name, record in fresh.items()
    }
    assert None not in [record.null_mean for record in found.values()]
    # The standard deviation is shared among layers of one shape, also with one that is gone.
    replaced = [name for name in found if name.startswith("2")]
    assert [found[name] for name in replaced] == [fresh[name] for name in replaced]


def test_replaced_parameters_step_with_the_ratios_of_their_names() -> None:
    """From their first step on, though a new parameter may get the address, and so the `id`, of one just freed."""
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    ratios = of_parameters(balancer.ratios)
    assert len({ratios[f"{layer}.weight"] for layer in BALANCED}) == 3
    held = optimizer.param_groups[0]["params"]
    for layer in LAYERS:
        module = net.get_submodule(layer)
        place = next(place for place, parameter in enumerate(held) if parameter is module.weight)
        module.weight = held[place] = nn.Parameter(module.weight.detach().clone())
    net.extend([nn.Linear(16, 16)])
    optimizer.add_param_group({"params": list(net[-1].parameters()), "lr": 0.2})
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    with spy_on_updates("SGD") as seen:
        optimizer.step()
    found = {name: seen[0][id(parameter)] for name, parameter in net.named_parameters()}
    added = {name: 0.2 for name in found if name not in ratios}
    assert len(added) == 2
    assert found == pytest.approx({name: 0.1 * ratio for name, ratio in ratios.items()} | added)
    assert balancer.parameter_ratios() == ratios | dict.fromkeys(added, 1.0)


@pytest.mark.filterwarnings("ignore:.*sampling noise")
def test_a_weight_that_is_parametrized_during_training_stays_balanced() -> None:
    """Its parameter stays the same object and gets another name."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(*sizes, bias=False) for sizes in ((32, 48), (48, 32), (32, 48), (48, 32))))
    balancer = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map")
    nn.utils.parametrizations.spectral_norm(net[1])
    balancer.step()
    alphas = analyze(net).alphas
    assert balancer.ratios == lr_ratios({**alphas, "0": None, "3": None})  # the first and the last are excluded
    assert balancer.parameter_ratios()["1.parametrizations.weight.original"] == balancer.ratios["1"] != 1


def test_a_model_set_up_by_fabric_counts_as_itself() -> None:
    net = make_net()
    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
    balancer = TempBalance(model, optimizer, assign_func="tb_linear_map")
    assert balancer.ratios == expected_ratios(net)
    with spy_on_updates("SGD") as seen:
        for inputs, targets in make_data(2):
            optimizer.zero_grad()
            fabric.backward(nn.functional.mse_loss(model(inputs), targets))
            optimizer.step()
    for lrs in seen:
        found = {name: lrs[id(parameter)] for name, parameter in net.named_parameters()}
        assert found == pytest.approx(
            {name: 0.1 * ratio for name, ratio in of_parameters(balancer.ratios).items()}
        )


def test_an_interrupted_start_leaves_the_optimizer_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(measured_model, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        TempBalance(net, optimizer)
    monkeypatch.undo()
    assert not optimizer._optimizer_step_pre_hooks
    assert TempBalance(net, optimizer).ratios


def test_options_reach_the_measurement() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    spectral = {
        "esd": "full",
        "fit": "goodness-of-fit",
        "xmin_pos": 3.0,
        "min_eigenvalues": 4,
        "windows_per_dim": 2,
    }
    balancer = TempBalance(
        net,
        optimizer,
        **spectral,
        assign_func="tb_step",
        metric="stable_rank",
        exclude_first=False,  # type: ignore[arg-type]
    )
    report = analyze(net, **spectral)  # type: ignore[arg-type]
    assert balancer.report.layers == report.layers
    values = {name: report.layers[name].pooled_stable_rank for name in LAYERS[:-1]}
    assert balancer.ratios == lr_ratios(values, "tb_step") | {"9": 1.0}


@pytest.mark.filterwarnings("ignore:no layer is left to balance")
@pytest.mark.parametrize("kinds", [(), ("spectral",)])
def test_no_layer_of_that_kind(kinds: Any) -> None:
    net = make_net()
    balancer = TempBalance(
        net, torch.optim.SGD(net.parameters(), lr=0.1), balance=kinds, assign_func="tb_linear_map"
    )
    assert balancer.ratios == dict.fromkeys(LAYERS, 1.0)


@pytest.mark.parametrize("assign_func", ["tb_linear_map", "noise_aware"])
def test_default_device_does_not_matter(assign_func: str) -> None:
    """Users set theirs to a GPU; "meta" stands in, on which nothing can be computed."""
    found = []
    for device in ("cpu", "meta"):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        with torch.device(device):
            balancer = TempBalance(net, optimizer, assign_func=assign_func)
            report = balancer.step()
        found.append((report, balancer.ratios))
    assert found[0] == found[1]
    assert any(found[0][0].alphas.values())
