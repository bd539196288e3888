"""Warnings come once, from rank zero, and point at the user's own line."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from farms_tb import FARMSTempBalance, TempBalance
from farms_tb.warnings import warn_once
from tests.helpers import LIGHTNING_NOISE, Module, make_data, make_net, make_trainer

pytestmark = LIGHTNING_NOISE


def spoilt(seed: int = 0) -> nn.Sequential:
    net = make_net(seed=seed)
    nn.init.zeros_(net[5].weight)
    return net


def messages(function: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Of what is said about such small nets; tests/balancing/test_noise.py looks at it.
        warnings.filterwarnings("ignore", message=".* is sampling noise")
        function()
    return [str(warning.message).split(":")[0] for warning in caught]


def balance(net: nn.Module, *optimizers: type[torch.optim.Optimizer]) -> TempBalance:
    parameters = list(net.parameters())
    # Each optimizer has its own share of the parameters.
    shares = [parameters[index :: len(optimizers)] for index in range(len(optimizers))]
    return TempBalance(net, [cls(share, lr=0.1) for cls, share in zip(optimizers, shares, strict=True)])


def test_two_optimizers_of_one_class_warn_once() -> None:
    class Own(torch.optim.SGD):
        pass

    assert messages(lambda: balance(make_net(), Own, Own)) == ["layer-wise learning rates are untested with Own"]
    assert messages(lambda: balance(make_net(), Own)) == []


def test_a_layer_without_alpha_warns_once_a_model() -> None:
    net = spoilt()

    def run() -> None:
        balancer = balance(net, torch.optim.SGD)
        balancer.step()
        balancer.detach()
        # A finder or a second fit makes a new one.
        balance(net, torch.optim.SGD).detach()

    said = "layers with no alpha keep the base learning rate"
    assert messages(run) == [said]
    assert messages(lambda: balance(spoilt(), torch.optim.SGD)) == [said]


def test_a_warning_holds_no_control_character_of_a_name() -> None:
    """A terminal would take it for a command."""
    torch.manual_seed(0)
    net = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("a", "b\x1b[31m", "c", "d")})
    nn.init.zeros_(net["b\x1b[31m"].weight)
    with pytest.warns(UserWarning, match=r"layers with no alpha .*: b\\x1b\[31m: ") as caught:
        TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1))
    assert all(str(warning.message).isprintable() for warning in caught)


def test_changed_settings_warn_once() -> None:
    net = make_net()
    state = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), lr_max_ratio=2).state_dict()
    balancer = balance(net, torch.optim.SGD)

    def load() -> None:
        balancer.load_state_dict(state)
        balancer.load_state_dict(state)

    assert messages(load) == ["the checkpoint was written with other settings, measuring anew"]


@pytest.mark.parametrize(("rank", "said"), [(0, 1), (1, 0), (7, 0)])
def test_rank_zero_alone(rank: int, said: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    net = spoilt()
    state = {**balance(make_net(), torch.optim.SGD).state_dict(), "ratios": {"gone": 1.0}}

    class Own(torch.optim.SGD):
        pass

    def load() -> None:
        balance(net, Own).load_state_dict(state)

    assert len(messages(load)) == 3 * said


def test_another_message_or_object_is_another_warning() -> None:
    class About:
        pass

    first, second = About(), About()

    def say() -> None:
        for message, about in (("a", first), ("a", first), ("b", first), ("a", second), ("a", About)):
            warn_once(message, about)

    assert messages(say) == ["a", "b", "a", "a"]


def test_another_model_has_warnings_of_its_own_under_pythons_default_filter() -> None:
    first, second = type("About", (), {})(), type("About", (), {})()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for about in (first, second, first):
            warn_once("of each", about)
    assert len(caught) == 2


def own_optimizer() -> type[torch.optim.Optimizer]:
    """A class that is warned about, anew in each test."""
    return type("Own", (torch.optim.SGD,), {})


def line_of(caught: list[warnings.WarningMessage], about: str) -> str:
    """Return the source of the line in this file that the warning points at."""
    (warning,) = [w for w in caught if about in str(w.message)]
    assert warning.filename == __file__
    return Path(__file__).read_text().splitlines()[warning.lineno - 1].strip()


def test_the_line_of_a_plain_loop() -> None:
    net = make_net()
    optimizer = own_optimizer()(net.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        balancer = TempBalance(net, optimizer)
        nn.init.zeros_(net[5].weight)
        balancer.step()
    assert line_of(caught, "untested with Own") == "balancer = TempBalance(net, optimizer)"
    assert line_of(caught, "no alpha") == "balancer.step()"


def test_the_line_of_options() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        FARMSTempBalance(every_n_epochs=2, every_n_steps=3)
        FARMSTempBalance(max_overhead=0.1)  # type: ignore[call-arg]
    assert line_of(caught, "replaces every_n_epochs") == "FARMSTempBalance(every_n_epochs=2, every_n_steps=3)"
    assert line_of(caught, "no longer").startswith("FARMSTempBalance(max_overhead=0.1)")


def test_the_line_of_a_lightning_run() -> None:
    module = Module(own_optimizer(), net=spoilt())
    trainer = make_trainer([FARMSTempBalance(histogram_every_n=1)], max_epochs=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, make_data())
    for about in ("untested with Own", "no alpha", "histogram_every_n"):
        assert line_of(caught, about) == "trainer.fit(module, make_data())"


def test_the_line_of_a_hugging_face_run(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from farms_tb import FARMSTrainerCallback
    from tests.training import test_huggingface as hugging_face

    trainer = hugging_face.make_trainer(tmp_path, FARMSTrainerCallback(table_every_n=1), num_train_epochs=1)
    trainer.optimizer = own_optimizer()(trainer.model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    for about in ("untested with Own", "table_every_n"):
        assert line_of(caught, about) == "trainer.train()"


def test_users_can_turn_a_warning_into_an_error_or_off() -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="every_n_steps", module=__name__)
        with pytest.raises(UserWarning, match="every_n_steps"):
            FARMSTempBalance(every_n_epochs=3, every_n_steps=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="every_n_steps")
        FARMSTempBalance(every_n_epochs=4, every_n_steps=3)


def test_only_libraries_on_the_stack() -> None:
    """In a thread of a library the outermost line is taken: some line is better than none."""
    scope = {"__name__": "torch.x", "warn_once": warn_once, "about": balance}
    thread = threading.Thread(target=exec, args=("warn_once('alone', about)", scope))

    def run() -> None:
        thread.start()
        thread.join()

    assert messages(run) == ["alone"]
