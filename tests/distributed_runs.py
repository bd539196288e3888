"""What each process of `test_distributed.py` runs."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from farms_tb import FARMSTempBalance, TempBalance
from farms_tb.options import SpectrumOptions
from farms_tb.spectra.distributed import current_team
from farms_tb.spectra.permutation_null import measure_nulls
from farms_tb.weights.layers import find_layers
from tests.helpers import Module, Recorder, make_data, make_net, make_trainer


def meet() -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=30))


def loop(rank: int, breaks: bool = False) -> dict[str, Any]:
    """Train under DistributedDataParallel; with `breaks`, compiled around it, one process fails to measure."""
    meet()
    model = nn.parallel.DistributedDataParallel(make_net())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    whole = torch.compile(model) if breaks else model
    balancer = TempBalance(whole, optimizer, assign_func="tb_linear_map")
    alone = TempBalance(
        model.module, torch.optim.SGD(model.module.parameters(), lr=0.1), assign_func="tb_linear_map"
    )
    ratios = [(balancer.ratios, alone.ratios)]
    for epoch in range(2):
        for step, (inputs, targets) in enumerate(make_data(4)):
            if step % dist.get_world_size() == rank:
                optimizer.zero_grad()
                nn.functional.mse_loss(model(inputs), targets).backward()
                optimizer.step()
        if breaks and epoch == 1:
            break_measuring(rank)
        alone.step() if not breaks else None
        balancer.step()
        ratios.append((balancer.ratios, alone.ratios))
    weights = {name: p.detach() for name, p in model.module.named_parameters()}
    return {"ratios": ratios, "weights": weights, "alphas": balancer.report.alphas}


def adapted_net() -> nn.Module:
    """Return the net with adapters of DoRA, which alone are trained, in all of its layers."""
    import peft

    net = make_net(bias=False)
    config = peft.LoraConfig(r=2, target_modules=r"[02468]", use_dora=True, init_lora_weights=False)
    torch.manual_seed(1)
    found: nn.Module = peft.get_peft_model(net, config)
    return found


def sharded(rank: int, make: Callable[[], nn.Module] = make_net) -> dict[str, Any]:
    """Train under FSDP2 and, alongside, the same model whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    meet()
    nets = [make(), make()]
    layers = find_layers(nets[0], adapters="merged")
    for part in (*(layer.module for layer in layers), nets[0]):
        fully_shard(part, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    trained = [[parameter for parameter in net.parameters() if parameter.requires_grad] for net in nets]
    optimizers = [torch.optim.SGD(parameters, lr=0.1, momentum=0.9) for parameters in trained]
    balancers = [TempBalance(*pair, assign_func="tb_linear_map") for pair in zip(nets, optimizers, strict=True)]
    ratios = []
    for _ in range(2):
        for inputs, targets in make_data(3):
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad()
                nn.functional.mse_loss(net(inputs), targets).backward()
                optimizer.step()
        for balancer in balancers:
            balancer.step()
        ratios.append([balancer.ratios for balancer in balancers])
    nulls = [
        measure_nulls(find_layers(net, adapters="merged"), balancer.report, SpectrumOptions(), team=share)
        for net, balancer, share in zip(nets, balancers, (current_team(), None), strict=True)
    ]
    weights = [p.full_tensor().detach() for p in nets[0].parameters()]
    return {
        "ratios": ratios,
        "nulls": [{name: asdict(null) for name, null in each.items()} for each in nulls],
        "sharded": weights,
        "whole": [p.detach() for p in nets[1].parameters()],
    }


def break_measuring(rank: int) -> None:
    import farms_tb.spectra.measure

    def fail(*_: Any, **__: Any) -> None:
        raise ArithmeticError("planned failure")

    if rank == 1:
        farms_tb.spectra.measure.measure_stacks = fail  # type: ignore[assignment]


class Breaks(FARMSTempBalance):
    """Fails to measure in the second epoch on the second process."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            break_measuring(trainer.global_rank)
        super().on_train_epoch_start(trainer, pl_module)


def lightning(rank: int, breaks: bool = False, strategy: str = "ddp", **options: Any) -> dict[str, Any]:
    """Train with Lightning's own strategy; this process is launched as a cluster would."""
    options = {"assign_func": "tb_linear_map", **options}
    balance, logger = (Breaks if breaks else FARMSTempBalance)(**options), Recorder()
    trainer = make_trainer([balance], logger=logger, devices=2, strategy=strategy)
    module = Module()
    trainer.fit(module, make_data(8))
    return {
        "ratios": balance.ratios,
        "parameter_ratios": balance.parameter_ratios(module),
        "alphas": balance.report.alphas,
        "mean": float(trainer.callback_metrics["farms/alpha_mean"]),
        "rows": [row for _, row in logger.rows if "farms/alpha_mean" in row],
        "weights": {name: p.detach() for name, p in module.named_parameters()},
    }


def lag(rank: int) -> dict[str, Any]:
    """Train with Lightning, measuring at once and in the background, and note where it was measured."""
    from farms_tb.spectra import background

    found: dict[str, Any] = {}
    measure = background.measure_stacks
    for way, devices in (("at once", ()), ("in the background", ("cpu",))):
        threads: list[threading.Thread] = []

        def watched(*args: Any, threads: list[threading.Thread] = threads, **kwargs: Any) -> Any:
            threads.append(threading.current_thread())
            return measure(*args, **kwargs)

        background.measure_stacks, background.BACKGROUND_DEVICES = watched, devices
        found[way] = lightning(rank, lag_steps=2)
        found[way]["in a thread"] = [thread is not threading.main_thread() for thread in threads]
    return found


JOBS = {
    "loop": loop,
    "loop that breaks": lambda rank: loop(rank, breaks=True),
    "sharded": sharded,
    "sharded adapters": lambda rank: sharded(rank, adapted_net),
    "loop and sharded": lambda rank: {"loop": loop(rank), "sharded": sharded(rank)},
    "lightning": lightning,
    "lightning with a lag": lag,
    "lightning that breaks": lambda rank: lightning(rank, breaks=True),
}


def work(job: str, rank: int, folder: Path) -> None:
    """Run a job as one of several processes, save what it returns as `RANK.pt`, and end the process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.chdir(folder)
    torch.save(JOBS[job](rank), folder / f"{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()
    # Sharded weights keep their process group alive even so (torch 2.14), and gloo's threads, which then run to
    # the very end, now and then abort an interpreter that shuts down. What is tested is done, and saved.
    os._exit(0)
