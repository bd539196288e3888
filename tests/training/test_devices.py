"""The setups of users, each once on the CPU and once on a GPU: where there is none, the second half is skipped."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from farms_tb import FARMSTempBalance, FARMSTrainerCallback, TempBalance, analyze
from farms_tb.cli.app import app
from tests.helpers import LIGHTNING_NOISE, Module, assert_same_weights, fit, make_net, without_wandb
from tests.recipes.recipe_runs import TINY_DARCY

pytestmark = LIGHTNING_NOISE

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])


def trained(device: str, net: nn.Module | None = None, **options: Any) -> tuple[Module, FARMSTempBalance]:
    module, callback = Module(net=net), FARMSTempBalance(assign_func="tb_linear_map")
    fit(module, [callback], accelerator={"cpu": "cpu", "cuda": "gpu"}[device], **options)
    return module, callback


@on_each_device
def test_runs_are_bitwise_the_same(device: str) -> None:
    assert_same_weights(trained(device)[0], trained(device)[0])


@on_each_device
def test_mixed_precision(device: str) -> None:
    """On a GPU in half precision, with the steps that GradScaler skips."""
    _, callback = trained(device, precision={"cpu": "bf16-mixed", "cuda": "16-mixed"}[device])
    assert len(set(callback.ratios.values())) > 1


@on_each_device
def test_compiled_model_and_step(device: str) -> None:
    backend = {"cpu": "aot_eager", "cuda": "inductor"}[device]
    net = make_net().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
    model, step = torch.compile(net, backend=backend), torch.compile(optimizer.step, backend=backend)
    inputs = torch.randn(32, 6, device=device)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :2].sin()).square().mean().backward()
        step()
    balancer.step()
    assert all(not torch.equal(now, then) for now, then in zip(net.parameters(), before, strict=True))


ONE_RANK = """
import json, sys
from tests.training.test_devices import trained
module, callback = trained(sys.argv[1], strategy="ddp", use_distributed_sampler=False)
print(json.dumps(callback.ratios))
"""


@on_each_device
def test_ddp_of_one_rank(device: str) -> None:
    """On a GPU with NCCL; in a process of its own, as process groups are left behind."""
    _, callback = trained(device)
    command = [sys.executable, "-c", ONE_RANK, device]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=without_wandb())
    # DDP averages gradients in buckets of its own, which rounds them otherwise.
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(callback.ratios, rel=1e-3)


@on_each_device
def test_hugging_face_trainer(device: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertForSequenceClassification(config)
    data = [{"input_ids": torch.randint(50, (12,)), "labels": index % 2} for index in range(16)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=4, report_to=[], use_cpu=device == "cpu"
    )
    callback = FARMSTrainerCallback(assign_func="tb_linear_map")
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    assert next(model.parameters()).device.type == device
    assert len(set(callback.ratios.values())) > 1


@on_each_device
def test_recipe(device: str, tmp_path: Path) -> None:
    overrides = [*TINY_DARCY, "model.net.width=8", "trainer.max_epochs=1", f"hydra.run.dir={tmp_path}/run"]
    overrides += [f"paths.data_dir={tmp_path}/data", "logger=csv"]
    if device == "cuda":
        overrides.append("trainer=gpu")
    command = [sys.executable, "-m", "recipes.train", *overrides]
    subprocess.run(command, check=True, capture_output=True, env=without_wandb())
    assert (tmp_path / "run").is_dir()


@on_each_device
def test_command_line(device: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(30, 40, 3), nn.Linear(300, 200))
    torch.save(net.state_dict(), tmp_path / "weights.pt")
    arguments = ["analyze", str(tmp_path / "weights.pt"), "--device", device, "--format", "csv"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0
    exact = analyze(net, precision="float64").layers["1"].alpha
    rows = {row["layer"]: row for row in csv.DictReader(found.stdout.splitlines())}
    assert float(rows["1"]["alpha"]) == pytest.approx(exact, rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_full_gpu_costs_time_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2000, 2000), nn.Conv2d(300, 300, 3)).cuda()
    expected = analyze(model).alphas
    free, _ = torch.cuda.mem_get_info()
    filler = torch.empty(free - 60 * 2**20, dtype=torch.uint8, device="cuda")
    with pytest.warns(UserWarning, match="too little free memory"):
        found = analyze(model).alphas
    del filler
    torch.cuda.empty_cache()
    assert found == pytest.approx(expected, rel=1e-4)
