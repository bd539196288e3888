"""Tiny models, trainers and probes shared by the integration tests."""

from __future__ import annotations

import importlib
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from farms_tb.balancing import foreach_update as merged_update
from farms_tb.weights.layers import find_layers, own_matrices

EPOCHS, BATCHES, BATCH_SIZE = 3, 4, 4

# What Lightning and torch say about runs as small as these.
LIGHTNING_NOISE = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        r".*does not have many workers",
        r"You defined a `validation_step` but have no",
        r".*isinstance\(treespec, LeafSpec\)",
        r".*`training_step` to be included",
        r".*The number of training batches .* is smaller than the logging interval",
        r".*Checkpoint directory .* exists and is not empty",
        r".*You're resuming from a checkpoint that ended before the epoch ended",
    )
]


def without_wandb() -> dict[str, str]:
    """The environment for another process, whose W&B client must not find, and end, the one of the tests."""
    return {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}


def make_net(bias: bool = True, seed: int = 0) -> nn.Sequential:
    """Return five linear layers, three of which are balanced by default, and a norm that follows the second."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 12, bias=bias),
        nn.Tanh(),
        nn.Linear(12, 16, bias=bias),
        *([nn.LayerNorm(16)] if bias else []),
        nn.Tanh(),
        nn.Linear(16, 12, bias=bias),
        nn.Tanh(),
        nn.Linear(12, 12, bias=bias),
        nn.Tanh(),
        nn.Linear(12, 2, bias=bias),
    )


def make_data(batches: int = BATCHES) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(batches * BATCH_SIZE, 6, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs[:, :2].sin()), batch_size=BATCH_SIZE)


class Module(LightningModule):
    """A regression that takes its optimizer and scheduler from outside."""

    def __init__(
        self,
        optimizer: Callable[..., Optimizer] = lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        scheduler: Callable[[Optimizer], Any] | None = None,
        interval: str = "epoch",
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.net = make_net() if net is None else net
        self._optimizer, self._scheduler, self._interval = optimizer, scheduler, interval

    def loss(self, batch: Any) -> Tensor:
        inputs, targets = batch
        return nn.functional.mse_loss(self.net(inputs), targets)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        # The same in every run, so that a scheduler which watches it does the same with and without balancing.
        self.log("plateau", float(self.current_epoch // 2), on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = self._optimizer(self.parameters())
        if self._scheduler is None:
            return optimizer
        config = {"scheduler": self._scheduler(optimizer), "interval": self._interval, "monitor": "plateau"}
        return {"optimizer": optimizer, "lr_scheduler": config}


def make_trainer(callbacks: Any = (), **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_epochs": EPOCHS,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def fit(
    module: LightningModule, callbacks: Any = (), ckpt_path: str | Path | None = None, **options: Any
) -> Trainer:
    """Train `module` and return the trainer."""
    trainer = make_trainer(callbacks, **options)
    trainer.fit(module, make_data(), ckpt_path=ckpt_path)
    return trainer


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name.replace("_orig_mod.", ""): p.detach().clone() for name, p in module.named_parameters()}


def assert_same_weights(actual: nn.Module, expected: nn.Module) -> None:
    """Compare bitwise, and name the parameters that differ."""
    one, other = weights(actual), weights(expected)
    assert one.keys() == other.keys()
    differ = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differ, f"not bit-identical: {differ}"


def assert_same_state(actual: Any, expected: Any, path: str = "") -> None:
    """Compare two nested states bitwise, types and tensors included."""
    assert type(actual) is type(expected), path
    if isinstance(actual, Tensor):
        assert actual.dtype == expected.dtype, path
        assert torch.equal(actual, expected), path
    elif isinstance(actual, dict):
        assert actual.keys() == expected.keys(), path
        for key in actual:
            assert_same_state(actual[key], expected[key], f"{path}[{key!r}]")
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected), path
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same_state(*pair, f"{path}[{index}]")
    else:
        assert actual == expected, path


@contextmanager
def spy_on_updates(name: str) -> Iterator[list[dict[int, float]]]:
    """Record the lr that each parameter is really updated with, by its id, at each step.

    Args:
        name: name of the optimizer class in `torch.optim`, whose update function is watched.
    """
    # Where the class that `step` comes from is written: AdamW's is Adam's, from torch 2.7 on.
    home = getattr(torch.optim, name).step.__module__.removeprefix("torch.optim.")
    function = home.lstrip("_")
    module = importlib.import_module(f"torch.optim.{'_functional' if name == 'SparseAdam' else home}")
    original = getattr(module, function)
    seen: list[dict[int, float]] = []

    def note(params: list[Tensor], lrs: list[Any]) -> None:
        # A parameter that comes up again begins the next step.
        if not seen or any(id(p) in seen[-1] for p in params):
            seen.append({})
        seen[-1].update(zip(map(id, params), map(float, lrs), strict=True))

    def watched(params: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        note(params, [kwargs["lr"]] * len(params))
        return original(params, *args, **kwargs)

    def watched_rule(rule: merged_update.Rule) -> merged_update.Rule:
        def update(group: Any, lrs: list[Any], params: list[Tensor], *args: Any) -> None:
            note(params, lrs)
            rule.update(group, lrs, params, *args)

        return replace(rule, update=update)

    rules = dict(merged_update.RULES)
    setattr(module, function, watched)
    merged_update.RULES.update(
        {cls: watched_rule(rule) for cls, rule in rules.items() if cls.step.__module__.endswith(f".{home}")}
    )
    try:
        yield seen
    finally:
        setattr(module, function, original)
        merged_update.RULES.update(rules)


class Probe(Callback):
    """Note what a user sees before each step: the groups' lr, of which types, and the ratio of each parameter."""

    def __init__(self, balance: Any = None) -> None:
        self.balance = balance
        self.lrs: list[dict[int, float]] = []
        self.kinds: list[set[type]] = []
        self.ratios: list[dict[int, float]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        groups = optimizer.param_groups
        self.kinds.append({type(group["lr"]) for group in groups})
        self.lrs.append({id(p): float(group["lr"]) for group in groups for p in group["params"]})
        if self.balance is not None:
            by_name = self.balance.parameter_ratios(pl_module)
            self.ratios.append({id(p): by_name[name] for name, p in pl_module.named_parameters()})


class Recorder(Logger):
    """A logger that keeps what it is given as (step, row)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def read_wandb_file(path: Path) -> list[Any]:
    """Return the records of a finished `run-*.wandb` file.

    The file is a LevelDB log behind a header of seven bytes: blocks of 32 KiB that hold pieces, each a checksum
    (4 bytes), a length (2), whether it is whole (1), first (2), middle (3) or last (4), and its bytes.
    """
    from wandb.proto import wandb_internal_pb2

    block, head = 32768, 7
    data, position, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    records = []
    while position + head <= len(data):
        if block - position % block < head:
            position += block - position % block
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + head])
        assert kind in (1, 2, 3, 4), "not a record: the file is cut short or of another version"
        whole += data[position + head : position + head + length]
        position += head + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return records


def sharing(net: nn.Module) -> set[str]:
    """Return the layers with a matrix that other layers have, too: tied ones, and parts of one module."""
    own = {layer.name: set(map(id, own_matrices(layer))) for layer in find_layers(net, embeddings=True)}
    number = Counter(matrix for matrices in own.values() for matrix in matrices)
    return {name for name, matrices in own.items() if any(number[matrix] > 1 for matrix in matrices)}
