"""Checkpoints that version 0.1.0 wrote resume with this one.

The files in tests/data/version_0_1 were written after 6 steps, in the middle of the second epoch of 4 steps:

- `lightning.ckpt`, and `lightning_max_overhead.ckpt` with an option that no longer exists: `Module` of
  tests/helpers.py;
- `hugging_face`: the Trainer of test_huggingface.py;
- `loop.pt`: a plain loop over the network of tests/helpers.py.

Each `*_after.pt` holds the weights that version 0.1.0 reached from there at the end of the epoch, where the layers
are measured next. Until then every step depends on the saved ratios alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from farms_tb import FARMSTempBalance, TempBalance
from tests.helpers import LIGHTNING_NOISE, Module, fit, make_data, make_net, weights

pytestmark = [
    *LIGHTNING_NOISE,
    # The writer was farms_tb 0.1 under a newer Lightning than the oldest that is supported.
    pytest.mark.filterwarnings("ignore:The loaded checkpoint was produced with Lightning"),
]

WRITTEN = Path(__file__).parents[1] / "data" / "version_0_1"


def load(name: str) -> Any:
    return torch.load(WRITTEN / name, weights_only=True)


def is_the_arithmetic_of_the_writer() -> bool:
    """Return whether gradients come out here, bit for bit, as on the machine that wrote the checkpoints.

    Matrix products are rounded differently by other processors and other versions of torch.
    """
    module = Module()
    module.load_state_dict(load("lightning.ckpt")["state_dict"])
    module.loss(next(iter(make_data()))).backward()
    expected = load("lightning_after.pt")["gradients"]
    return all(torch.equal(p.grad, expected[name]) for name, p in module.named_parameters() if p.grad is not None)


def assert_reached(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Compare weights: bitwise where this machine computes like the one that wrote the checkpoints."""
    tolerance = 0.0 if is_the_arithmetic_of_the_writer() else 1e-5
    torch.testing.assert_close(dict(actual), dict(expected), rtol=tolerance, atol=tolerance)


class FirstBatch(Callback):
    """Note the step and the ratios when the first batch of a resumed run begins."""

    def __init__(self, balance: FARMSTempBalance) -> None:
        self.balance = balance
        self.seen: tuple[int, dict[str, float]] | None = None

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.seen = self.seen or (trainer.global_step, dict(self.balance.ratios))


@pytest.mark.parametrize("name", ["lightning", "lightning_max_overhead"])
def test_lightning(name: str) -> None:
    saved = load(f"{name}.ckpt")["callbacks"]["FARMSTempBalance"]
    assert ("overhead" in saved) is (name == "lightning_max_overhead")
    balance, module = FARMSTempBalance(assign_func="tb_linear_map"), Module()
    first = FirstBatch(balance)
    fit(module, [balance, first], WRITTEN / f"{name}.ckpt", max_epochs=2)
    ratios = saved["balancer"]["ratios"]
    assert min(ratios.values()) == 0.5
    assert first.seen == (6, ratios)
    assert_reached(weights(module), load("lightning_after.pt")["weights"])


def test_another_map_than_that_of_the_checkpoint_is_named() -> None:
    """The default map of version 0.1 was that of the papers."""
    balance, module = FARMSTempBalance(), Module()
    first = FirstBatch(balance)
    with pytest.warns(UserWarning, match="'tb_linear_map' and is 'shrinkage' .*pass assign_func='tb_linear_map'"):
        fit(module, [balance, first], WRITTEN / "lightning.ckpt", max_epochs=2)
    assert balance.report is not None
    assert all(record.null is not None for record in balance.report.layers.values())
    assert first.seen is not None
    step, ratios = first.seen
    assert step == 6
    assert ratios.keys() == balance.ratios.keys()
    assert min(ratios.values()) > 0.5, "measured anew"


def test_lightning_without_the_callback_gets_elsewhere() -> None:
    """The checkpoint's ratios show in the weights, far above the tolerance of other machines."""
    module = Module()
    with pytest.warns(UserWarning, match="FARMSTempBalance"):
        fit(module, [], WRITTEN / "lightning.ckpt", max_epochs=2)
    expected = load("lightning_after.pt")["weights"]
    assert max(float((p - expected[name]).abs().max()) for name, p in weights(module).items()) > 1e-2


@pytest.mark.parametrize("restores_options", [False, True])
def test_hugging_face(restores_options: bool, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from transformers import TrainerCallback, TrainerState

    if not hasattr(TrainerState(), "best_global_step"):
        pytest.skip("transformers is older than the writer of the checkpoint")
    from farms_tb import FARMSTrainerCallback
    from tests.training import test_huggingface as hugging_face

    class AtTheNextMeasurement(TrainerCallback):
        reached: Mapping[str, Tensor]

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 8:
                self.reached = weights(kwargs["model"])

    after, probe = AtTheNextMeasurement(), hugging_face.Probe()
    # Since version 0.2 the norms of GPT-2 follow a layer too; with "base" they have ratio 1 in both versions.
    trainer = hugging_face.make_trainer(
        tmp_path,
        FARMSTrainerCallback(norms="base", assign_func="tb_linear_map"),
        after,
        optim="sgd",
        restore_callback_states_from_checkpoint=restores_options,
    )
    trainer.add_callback(probe)
    trainer.train(resume_from_checkpoint=str(WRITTEN / "hugging_face"))
    measured = [step for step, _ in probe.measured]
    assert measured == [8, 12], "no measurement before the one that was due"
    assert_reached(after.reached, load("hugging_face_after.pt"))


def test_plain_loop() -> None:
    saved, net = load("loop.pt"), make_net()
    net.load_state_dict(saved["model"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(saved["optimizer"])
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    balancer.load_state_dict(saved["balancer"])
    assert balancer.ratios == saved["balancer"]["ratios"]
    for inputs, targets in list(make_data())[2:]:
        optimizer.zero_grad()
        nn.functional.mse_loss(net(inputs), targets).backward()
        optimizer.step()
    assert_reached(weights(net), load("loop_after.pt"))
