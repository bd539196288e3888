"""The optimizers that one would take instead of layer-wise balancing: closed forms, and whole runs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from farms_tb.balancing.layerwise_step import LayerwiseStep
from recipes.config import build
from recipes.errors import RecipeError
from recipes.optimizers import adamw_layer_decay, lamb, lars, make_optimizer, muon
from recipes.parts import build_parts
from recipes.train import train
from tests.helpers import LIGHTNING_NOISE
from tests.recipes.recipe_runs import TINY_DARCY, TINY_UNET

pytestmark = LIGHTNING_NOISE

pytest.importorskip("pytorch_optimizer")
pytest.importorskip("timm")

Settings = Callable[..., DictConfig]

ALL: dict[str, Callable[..., Optimizer]] = {
    "lars": lars,
    "lamb": lamb,
    "muon": muon,
    "adamw_layer_decay": adamw_layer_decay,
}
UNTESTED = pytest.mark.filterwarnings("ignore:layer-wise learning rates are untested")
TINY_TEXT = (f"data.path={__file__}", "data.val_bytes=600", "data.test_bytes=600", "data.length=32")
TINY_LM = ("experiment=tiny_lm", *TINY_TEXT, "model.net.width=32", "model.net.hidden=64", "trainer=cpu")


class Blocks(nn.Module):
    """An input layer, two blocks of a linear layer and a convolution, an output layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"linear": nn.Linear(8, 8), "kernel": nn.Conv2d(4, 8, 3)}) for _ in range(2)
        )
        self.head = nn.Linear(8, 5)


def make_net() -> Blocks:
    torch.manual_seed(0)
    return Blocks()


def set_grads(net: nn.Module, step: int = 0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in net.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def moves(net: nn.Module, optimizer: Optimizer, step: int = 0) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Make a step; return each parameter before it, its gradient, and after it, by name."""
    set_grads(net, step)
    started = {}
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None
        started[name] = (parameter.detach().clone(), parameter.grad.clone())
    optimizer.step()
    return {name: (*started[name], parameter.detach().clone()) for name, parameter in net.named_parameters()}


def names_of(net: nn.Module, group: dict[str, Any]) -> set[str]:
    own = set(map(id, group["params"]))
    return {name for name, parameter in net.named_parameters() if id(parameter) in own}


def lrs_of(net: nn.Module, optimizer: Optimizer) -> dict[str, float]:
    rates = {}
    for group in optimizer.param_groups:
        rates.update(dict.fromkeys(names_of(net, group), group["lr"]))
    return rates


def test_lars_scales_each_weight_by_its_norm_and_its_gradients() -> None:
    net = make_net()
    optimizer = lars(net, lr=0.5, momentum=0.8, weight_decay=0.1, trust_coefficient=0.02)
    buffers: dict[str, Tensor] = {}
    for step in range(3):
        for name, (before, grad, after) in moves(net, optimizer, step).items():
            if before.ndim > 1:
                trust = 0.02 * before.norm() / (grad.norm() + 0.1 * before.norm())
                grad = trust * (grad + 0.1 * before)
            buffers[name] = 0.8 * buffers.get(name, torch.zeros_like(grad)) + grad
            torch.testing.assert_close(after, before - 0.5 * buffers[name], msg=lambda m, n=name: f"{n}: {m}")


def test_lamb_moves_each_weight_by_lr_of_its_norm() -> None:
    net = make_net()
    optimizer = lamb(net, lr=0.1, betas=(0.8, 0.9), weight_decay=0.3)
    first: dict[str, Tensor] = {}
    second: dict[str, Tensor] = {}
    for step in range(3):
        for name, (before, grad, after) in moves(net, optimizer, step).items():
            first[name] = 0.8 * first.get(name, torch.zeros_like(grad)) + 0.2 * grad
            second[name] = 0.9 * second.get(name, torch.zeros_like(grad)) + 0.1 * grad**2
            update = first[name] / (second[name].sqrt() + 1e-6)
            if before.ndim > 1:
                update = update + 0.3 * before
                assert float((after - before).norm()) == pytest.approx(0.1 * float(before.norm()), rel=1e-4)
                update = before.norm() / update.norm() * update
            torch.testing.assert_close(after, before - 0.1 * update, msg=lambda m, n=name: f"{n}: {m}")


def test_a_bias_on_a_grid_is_a_vector_to_lars() -> None:
    """It gets plain SGD without decay, as biases of other shapes do."""
    net = nn.ParameterDict({"bias": torch.full((4, 1, 1), 2.0), "kernel": torch.ones(4, 1, 3)})
    optimizer = lars(net, lr=0.5, weight_decay=0.1, trust_coefficient=0.02)
    changes = moves(net, optimizer)
    before, buffer, after = changes["bias"]
    torch.testing.assert_close(after, before - 0.5 * buffer)
    before, grad, after = changes["kernel"]
    trust = 0.02 * before.norm() / (grad.norm() + 0.1 * before.norm())
    torch.testing.assert_close(after, before - 0.5 * trust * (grad + 0.1 * before))
    before, grad, after = moves(net, optimizer, 1)["bias"]
    torch.testing.assert_close(after, before - 0.5 * (0.9 * buffer + grad))


def test_a_bias_on_a_grid_is_a_vector_to_lamb() -> None:
    net = nn.ParameterDict({"bias": torch.ones(4, 1, 1), "kernel": torch.ones(4, 1, 3)})
    weights, vectors = lamb(net, lr=0.1).param_groups
    assert (names_of(net, weights), names_of(net, vectors)) == ({"kernel"}, {"bias"})
    assert (weights["weight_decay"], vectors["weight_decay"]) == (0.01, 0.0)


@pytest.mark.parametrize("make", [lars, lamb])
def test_complex_weights_count_as_pairs_of_real_ones(make: Callable[..., Optimizer]) -> None:
    values = torch.randn(2, 4, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    net, pairs = (
        nn.ParameterDict({"w": values.clone()}),
        nn.ParameterDict({"w": torch.view_as_real(values).clone()}),
    )
    optimizers = [make(net, lr=0.1, weight_decay=0.1), make(pairs, lr=0.1, weight_decay=0.1)]
    for step in range(3):
        set_grads(net, step)
        pairs["w"].grad = torch.view_as_real(net["w"].grad).clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(torch.view_as_real(net["w"].detach()), pairs["w"].detach())
    assert not torch.equal(net["w"].detach(), values)


def test_muon_moves_hidden_matrices_along_orthogonal_ones() -> None:
    net = make_net()
    optimizer = muon(net, lr=0.02, weight_decay=0.5)
    hidden, _ = optimizer.param_groups
    weights = {f"layers.{i}.{name}.weight" for i in range(2) for name in ("linear", "kernel")}
    assert names_of(net, hidden) == weights
    done = moves(net, optimizer)
    for name in weights:
        before, grad, after = done[name]
        step = ((1 - 0.02 * 0.5) * before - after).flatten(1)
        singular_values = torch.linalg.svdvals(step / (0.02 * 0.2 * math.sqrt(max(step.shape))))
        assert 0.6 < singular_values.min() <= singular_values.max() < 1.3, name
        u, _, vt = torch.linalg.svd(grad.flatten(1), full_matrices=False)
        assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ vt).flatten(), dim=0) > 0.95, name


def test_muon_leaves_the_rest_to_adamw() -> None:
    net, other = make_net(), make_net()
    optimizer = muon(net, lr=0.02, betas=(0.8, 0.9), weight_decay=0.5)
    adamw = AdamW(other.parameters(), lr=0.02, betas=(0.8, 0.9), weight_decay=0.5, eps=1e-8)
    rest = names_of(net, optimizer.param_groups[1])
    assert {"stem.weight", "head.weight", "layers.0.linear.bias"} <= rest
    for step in range(3):
        ours, theirs = moves(net, optimizer, step), moves(other, adamw, step)
        for name in rest:
            torch.testing.assert_close(ours[name][2], theirs[name][2], msg=lambda m, n=name: f"{n}: {m}")


# What has several dimensions and is AdamW's.
FOR_ADAMW = {
    # Embedding and output, no more: the first block is hidden where there is an embedding.
    TINY_LM: {"llama.model.embed_tokens.weight", "llama.lm_head.weight"},
    ("experiment=digits_resnet18", "model.net.width=4"): {"conv1.weight", "fc.weight"},
    ("experiment=darcy_unet", "model.net.width=4"): {"encoders.0.conv1.weight", "head.weight"},
    ("experiment=cifar100_vit", "model.net.width=24"): {
        "class_token",
        "conv_proj.weight",
        "encoder.pos_embedding",
        "heads.head.weight",
    },
}


@pytest.mark.parametrize("overrides", FOR_ADAMW, ids=lambda overrides: overrides[0])
def test_muon_trains_what_is_between_input_and_output(settings: Settings, overrides: tuple[str, ...]) -> None:
    cfg = settings(*overrides, "optimizer=muon")
    net = build(cfg, "model.net")
    hidden, others = make_optimizer(build(cfg, "optimizer"), net).param_groups
    matrices = {name for name, parameter in net.named_parameters() if parameter.ndim > 1}
    assert matrices - names_of(net, hidden) == FOR_ADAMW[overrides]
    assert names_of(net, others) == {name for name, _ in net.named_parameters()} - names_of(net, hidden)


# Names of one parameter for each level of depth, from input to output.
DEPTHS = {
    TINY_LM: [
        "llama.model.embed_tokens.weight",
        *(f"llama.model.layers.{i}.mlp.up_proj.weight" for i in range(4)),
        "llama.lm_head.weight",
    ],
    ("experiment=digits_resnet18", "model.net.width=4"): [
        "bn1.weight",
        *(f"layer{stage}.{block}.conv2.weight" for stage in range(1, 5) for block in range(2)),
        "fc.bias",
    ],
    ("experiment=darcy_unet", "model.net.width=4"): [
        *(f"encoders.{i}.conv2.weight" for i in range(4)),
        "bottleneck.conv1.weight",
        *(f"decoders.{i}.up.weight" for i in range(4)),
        "head.weight",
    ],
    ("experiment=cifar100_vit", "model.net.width=24"): [
        "encoder.pos_embedding",
        *(f"encoder.layers.encoder_layer_{i}.self_attention.in_proj_weight" for i in range(6)),
        "heads.head.weight",
    ],
}


@pytest.mark.parametrize("overrides", DEPTHS, ids=lambda overrides: overrides[0])
def test_layer_decay_takes_a_power_for_each_block(settings: Settings, overrides: tuple[str, ...]) -> None:
    cfg = settings(*overrides, "optimizer=adamw_layer_decay", "lr=0.25", "optimizer.layer_decay=0.5")
    net = build(cfg, "model.net")
    optimizer = make_optimizer(build(cfg, "optimizer"), net)
    rates, names = lrs_of(net, optimizer), DEPTHS[overrides]
    assert [rates[name] for name in names] == [0.25 * 0.5**depth for depth in reversed(range(len(names)))]
    assert set(rates.values()) == {rates[name] for name in names}
    assert rates.keys() == dict(net.named_parameters()).keys()
    for group in optimizer.param_groups:
        assert all((parameter.ndim > 1) == (group["weight_decay"] > 0) for parameter in group["params"])


def test_layer_decay_follows_the_schedule_and_steps_as_adamw() -> None:
    net, other = make_net(), make_net()
    optimizer = adamw_layer_decay(net, lr=0.1, layer_decay=0.5, weight_decay=0.2)
    schedule = CosineAnnealingLR(optimizer, T_max=4)
    rates = lrs_of(net, optimizer)
    groups = []
    for name, parameter in other.named_parameters():
        decay = 0.2 if parameter.ndim > 1 else 0.0
        groups.append({"params": [parameter], "lr": rates[name], "weight_decay": decay})
    adamw = AdamW(groups)
    theirs = CosineAnnealingLR(adamw, T_max=4)
    for step in range(3):
        ours, expected = moves(net, optimizer, step), moves(other, adamw, step)
        for name in ours:
            torch.testing.assert_close(ours[name][2], expected[name][2], rtol=1e-6, atol=1e-8)
        schedule.step()
        theirs.step()
    assert lrs_of(net, optimizer)["stem.weight"] == pytest.approx(
        0.1 * 0.5**3 * (1 + math.cos(0.75 * math.pi)) / 2
    )


def test_timms_networks_tell_their_depth_themselves() -> None:
    import timm
    from timm.optim import param_groups_layer_decay

    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3)
    optimizer = adamw_layer_decay(net, lr=0.5)
    expected = {}
    for group in param_groups_layer_decay(net, no_weight_decay_list=net.no_weight_decay()):
        for name in names_of(net, group):
            expected[name] = (0.5 * group["lr_scale"], group["weight_decay"])
    found = {}
    for group in optimizer.param_groups:
        found.update(dict.fromkeys(names_of(net, group), (group["lr"], group["weight_decay"])))
    assert found == expected
    assert found["pos_embed"] == (0.5 * 0.75**4, 0.0)


@UNTESTED
@pytest.mark.parametrize("choice", ALL)
def test_a_balanced_step_is_that_of_groups_with_these_rates(choice: str) -> None:
    net, other = make_net(), make_net()
    ratios = {name: (0.5, 1.0, 1.7)[index % 3] for index, (name, _) in enumerate(net.named_parameters())}
    optimizer, by_hand = ALL[choice](net, lr=0.1), ALL[choice](other, lr=0.1)
    split = []
    for group in by_hand.param_groups:
        for name in sorted(names_of(other, group)):
            own = {**group, "params": [dict(other.named_parameters())[name]], "lr": group["lr"] * ratios[name]}
            split.append(own)
    by_hand.param_groups[:] = split
    stepper = LayerwiseStep(optimizer)
    stepper.ratios = {id(parameter): ratios[name] for name, parameter in net.named_parameters()}
    for step in range(3):
        ours, theirs = moves(net, optimizer, step), moves(other, by_hand, step)
    for name in ours:
        # bfloat16 inside of Muon rounds matrices of one shape, which it multiplies together, in another order.
        tolerance = 1e-2 if choice == "muon" else 1e-6
        change = (theirs[name][2] - dict(make_net().named_parameters())[name]).norm()
        assert (ours[name][2] - theirs[name][2]).norm() <= tolerance * change, name
    steps = {group["step"] for group in optimizer.param_groups if "step" in group}
    assert steps <= {3}


@UNTESTED
@pytest.mark.parametrize("choice", ALL)
def test_resumed_training_ends_bitwise_as_one_never_stopped(
    settings: Settings, choice: str, tmp_path: Path
) -> None:
    cfg = settings(*TINY_UNET, f"optimizer={choice}", "lr=0.01", "balancing=farms")

    def fit(epochs: int, ckpt_path: Path | None = None) -> Trainer:
        parts = build_parts(cfg)
        options: dict[str, Any] = {"callbacks": [parts.balancer], "accelerator": "cpu", "limit_val_batches": 0}
        for part in ("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"):
            options[part] = False
        trainer = Trainer(max_epochs=epochs, **options)
        trainer.fit(parts.model, parts.data, ckpt_path=ckpt_path)
        return trainer

    straight = fit(3)
    fit(1).save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = fit(3, tmp_path / "stopped.ckpt")
    rates = [[group["lr"] for group in trainer.optimizers[0].param_groups] for trainer in (straight, resumed)]
    assert rates[0] == rates[1]
    expected, found = (trainer.lightning_module.state_dict() for trainer in (straight, resumed))
    assert expected.keys() == found.keys()
    for name, weights in expected.items():
        assert torch.equal(weights, found[name]), name


def _last(cfg: DictConfig) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(Path(cfg.paths.run_dir) / "checkpoints/last.ckpt", weights_only=True)
    return checkpoint


def test_a_run_shows_each_layer_with_the_rate_of_its_group(settings: Settings) -> None:
    options = ("optimizer=adamw_layer_decay", "lr=0.01", "scheduler=constant", "balancing=off", "logger=csv")
    cfg = settings(*TINY_UNET, *options)
    train(cfg)
    summary = json.loads((Path(cfg.paths.run_dir) / "summary.json").read_text(encoding="utf-8"))
    rates = {row["layer"]: row["lr"] for row in summary["layers"]}
    assert rates["net.head"] == 0.01
    assert rates["net.decoders.3.up"] == pytest.approx(0.01 * 0.75)
    assert rates["net.encoders.0.conv1"] == pytest.approx(0.01 * 0.75**9)


@pytest.mark.parametrize(("choice", "lr"), [("muon", 0.02), ("lamb", 0.1), ("adamw_layer_decay", 0.02)])
def test_a_language_model_learns(settings: Settings, choice: str, lr: float) -> None:
    pytest.importorskip("transformers")
    steps = ("trainer.max_steps=20", "trainer.max_epochs=1", "trainer.limit_train_batches=20")
    options = (*TINY_LM, *steps, "model.net.depth=2", "data.batch_size=8", "scheduler.num_warmup_steps=5")
    facts = train(settings(*options, f"optimizer={choice}", f"lr={lr}", "balancing=off", "logger=csv"))
    assert facts["test"]["test/loss"] < 4.5, "bytes of equal probability have ln 256 = 5.5"


@pytest.mark.parametrize("choice", ["lars", "lamb"])
def test_fourier_weights_are_trained(settings: Settings, choice: str) -> None:
    tiny = ("experiment=darcy_fno", *TINY_DARCY, "model.net.hidden_channels=8", "model.net.n_modes=[4,4]")
    cfg = settings(*tiny, f"optimizer={choice}", "lr=0.01", "trainer.max_epochs=1", "balancing=off", "logger=csv")
    train(cfg)
    before = build(cfg, "model.net").state_dict()
    after = _last(cfg)["state_dict"]
    name = "fno_blocks.convs.0.weight.tensor"
    assert after[f"net.{name}"].is_complex()
    assert not torch.equal(after[f"net.{name}"], before[name])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("experiment=darcy_fno", "optimizer=muon"), r"muon.*complex.*choose optimizer=lars\|lamb"),
        (("experiment=darcy_fno", "optimizer=adamw_layer_decay"), "no repeated blocks in FNO.*group_matcher"),
        (("experiment=grokking_mlp", "optimizer=adamw_layer_decay"), "no repeated blocks in ScaledMLP"),
        (("experiment=grokking_mlp", "model.net.depth=2", "optimizer=muon"), "muon.*no matrix between"),
        (
            ("optimizer=lars", "optimizer.weight_decay=-1"),
            "optimizer.weight_decay must be a finite number of at least 0",
        ),
        (("optimizer=muon", "optimizer.momentum=2"), "optimizer=muon: momentum must be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_an_optimizer_cannot_train_is_refused_before_data_are_made(
    settings: Settings, tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        train(settings(*overrides))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("choice", ALL)
def test_a_missing_package_names_the_command(
    settings: Settings, choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("pytorch_optimizer", "timm", "timm.optim"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RecipeError, match=rf"optimizer={choice} needs .*pip install 'farms-tb\[baselines\]'"):
        train(settings(f"optimizer={choice}"))


@pytest.mark.parametrize("choice", ALL)
def test_parameters_do_not_tell_the_layers(choice: str) -> None:
    """A task of the user's own that calls optimizer(parameters), as it does with torch's optimizers."""
    with pytest.raises(RecipeError, match=f"optimizer={choice} needs the network.*make_optimizer"):
        ALL[choice](make_net().parameters(), lr=0.1)


def test_make_optimizer_hands_torchs_optimizers_the_parameters() -> None:
    net = make_net()
    optimizer = make_optimizer(partial(SGD, lr=0.1), net)
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, net.parameters()))


def test_another_optimizer_cannot_go_on_from_a_checkpoint(settings: Settings) -> None:
    cfg = settings(*TINY_UNET, "balancing=off", "logger=csv")
    train(cfg)
    resume = f"ckpt_path={cfg.paths.run_dir}/checkpoints/last.ckpt"
    with pytest.raises(RecipeError, match="another optimizer; repeat that run's overrides"):
        train(settings(*TINY_UNET, "optimizer=lamb", "balancing=off", "logger=csv", resume))
