"""Training with adapters of PEFT: A, B and DoRA's magnitude take the ratio of the layer that they adapt."""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import Dataset

from farms_tb import FARMSTempBalance, TempBalance, analyze
from tests.helpers import LIGHTNING_NOISE, Module, assert_same_weights, fit, spy_on_updates

peft = pytest.importorskip("peft")

pytestmark = [*LIGHTNING_NOISE, pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")]

LR = 0.1
ALL: dict[str, Any] = {"assign_func": "tb_linear_map", "exclude_first": False, "exclude_last": False}
PARTS = ("lora_A", "lora_B", "lora_magnitude_vector")


def adapted_net(use_dora: bool = True) -> Any:
    """Return a net of four layers, three of which have adapters; all but the adapters is frozen."""
    torch.manual_seed(0)
    sizes = ((6, 24), (24, 32), (32, 48), (48, 2))
    layers = [layer for rows, columns in sizes for layer in (nn.Linear(rows, columns), nn.Tanh())]
    config = peft.LoraConfig(r=4, target_modules=["0", "2", "4"], use_dora=use_dora)
    return peft.get_peft_model(nn.Sequential(*layers), config)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([parameter for parameter in parameters if parameter.requires_grad], lr=LR)


class Steps(Module):
    """Note how far each step moves each parameter for each unit of gradient, and the ratios it steps with."""

    def __init__(self, balance: FARMSTempBalance, **options: Any) -> None:
        super().__init__(sgd, net=adapted_net(**options))
        self.balance = balance
        self.moved: list[dict[str, float]] = []
        self.ratios: list[dict[str, float]] = []

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        trained = {name: parameter for name, parameter in self.named_parameters() if parameter.grad is not None}
        before = {name: parameter.detach().clone() for name, parameter in trained.items()}
        self.ratios.append(self.balance.parameter_ratios(self))
        optimizer.step()
        self.moved.append({name: _rate(before[name], now) for name, now in trained.items()})


def _rate(before: Tensor, parameter: Tensor) -> float:
    """Return the learning rate that a step of SGD used: the movement along the gradient."""
    gradient = parameter.grad
    assert gradient is not None
    length = float((gradient * gradient).sum())
    return float(((before - parameter.detach()) * gradient).sum()) / length if length else 0.0


@pytest.mark.parametrize("use_dora", [False, True])
def test_every_trained_part_of_a_layer_steps_at_one_rate(use_dora: bool) -> None:
    callback = FARMSTempBalance(**ALL)
    module = Steps(callback, use_dora=use_dora)
    fit(module, [callback])
    layers = [f"net.base_model.model.{index}" for index in (0, 2, 4)]
    assert list(callback.ratios) == [*layers, "net.base_model.model.6"]
    ratios = [callback.ratios[layer] for layer in layers]
    assert sorted(ratios) == pytest.approx([0.5, sorted(ratios)[1], 1.5])
    assert callback.ratios["net.base_model.model.6"] == 1, "frozen, so it takes no part"
    parts = PARTS if use_dora else PARTS[:2]
    for moved, active in zip(module.moved, module.ratios, strict=True):
        for layer in layers:
            own = {active[name] for name in active if name.startswith(f"{layer}.")}
            assert len(own) == 1
            for part in parts:
                rate = moved[f"{layer}.{part}.default.weight"]
                # B is zero at first, and A has no gradient then.
                assert rate == pytest.approx(LR * own.copy().pop(), rel=1e-2) or rate == 0
    assert any(rate not in (0, pytest.approx(LR)) for rate in module.moved[-1].values())


class Encoder(nn.Module):
    """Two layers with attention of torch's."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 24, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x[:, None])[:, 0])


def test_attention_of_torch_steps_at_the_rates_of_its_layers() -> None:
    """PEFT makes its weights anew, as other parameters, whenever the model's modules or parameters are listed."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["self_attn", "linear1"], init_lora_weights=False)
    balance = FARMSTempBalance(**ALL)
    module = Module(sgd, net=peft.get_peft_model(Encoder(), config))
    with spy_on_updates("SGD") as updates:
        fit(module, [balance])
    ratios = balance.parameter_ratios(module)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    assert {names[key]: lr for key, lr in updates[-1].items()} == {
        name: LR * ratios[name] for name in map(names.get, updates[-1])
    }
    for index in (0, 1):
        path = f"net.base_model.model.layers.layers.{index}"
        packed = statistics.mean(balance.ratios[f"{path}.self_attn.{part}"] for part in "qkv")
        own = {
            f"{path}.self_attn": packed,
            f"{path}.self_attn.base_layer.out_proj": balance.ratios[f"{path}.self_attn.out_proj"],
            f"{path}.linear1": balance.ratios[f"{path}.linear1"],
        }
        for part, ratio in own.items():
            assert ratios[f"{part}.lora_A.default.weight"] == pytest.approx(ratio)
            assert ratios[f"{part}.lora_B.default.weight"] == pytest.approx(ratio)
    assert len(set(ratios.values())) > 3
    assert len(balance.ratios) == 2 * 6 + 1


def test_final_report_is_that_of_the_merged_model() -> None:
    callback = FARMSTempBalance(**ALL)
    module = Module(sgd, net=adapted_net())
    fit(module, [callback])
    plain = analyze(copy.deepcopy(module.net).merge_and_unload())
    assert callback.report is not None
    found = list(callback.report.alphas.values())
    assert found == pytest.approx(list(plain.alphas.values()), rel=2e-6)
    changes = [record.adapter_change for record in callback.report.layers.values()]
    assert all(change > 0 for change in changes[:3])
    assert changes[3] is None


@pytest.mark.parametrize("adapters", ["merged", "base"])
def test_resume_is_bitwise_identical(adapters: Any, tmp_path: Path) -> None:
    whole, keep = FARMSTempBalance(adapters=adapters, **ALL), ModelCheckpoint(tmp_path, save_top_k=-1)
    expected = Module(sgd, net=adapted_net())
    fit(expected, [whole, keep], enable_checkpointing=True)
    assert any(ratio != 1 for ratio in whole.ratios.values())
    resumed, balance = Module(sgd, net=adapted_net()), FARMSTempBalance(adapters=adapters, **ALL)
    path = tmp_path / "epoch=1-step=8.ckpt"
    fit(resumed, [balance, ModelCheckpoint(tmp_path)], path, enable_checkpointing=True)
    assert_same_weights(resumed, expected)
    assert balance.ratios == whole.ratios
    assert balance.report == whole.report


def test_a_checkpoint_of_a_run_whose_parts_were_layers_of_their_own_says_so(tmp_path: Path) -> None:
    options: dict[str, Any] = {"enable_checkpointing": True}
    callbacks = [FARMSTempBalance(adapters="separate", **ALL), ModelCheckpoint(tmp_path, save_top_k=-1)]
    with pytest.warns(UserWarning, match="all weights are zero"):
        fit(Module(sgd, net=adapted_net()), callbacks, **options)
    callbacks = [FARMSTempBalance(**ALL), ModelCheckpoint(tmp_path)]
    with pytest.warns(UserWarning, match=r"adapters was 'separate' and is 'merged'.*lora_A"):
        fit(Module(sgd, net=adapted_net()), callbacks, tmp_path / "epoch=1-step=8.ckpt", **options)


def test_adapters_merged_during_training_are_not_added_twice() -> None:
    model = adapted_net(use_dora=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    balancer = TempBalance(model, sgd(model.parameters()), **ALL)
    before = dict(balancer.report.alphas)
    model.merge_adapter()
    balancer.step()
    assert balancer.report.alphas == pytest.approx(before, rel=2e-6)


def test_with_blocks_all_parts_of_a_block_have_its_ratio() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=3, n_embd=32, n_head=2, n_positions=8, vocab_size=30)
    lora = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)
    balancer = TempBalance(model, sgd(model.parameters()), unit="block", assign_func="tb_linear_map")
    ratios = {name: ratio for name, ratio in balancer.parameter_ratios().items() if "lora_" in name}
    for index in range(3):
        own = {ratio for name, ratio in ratios.items() if f".h.{index}." in name}
        assert len(own) == 1
    assert len(set(ratios.values())) == 3


class Tokens(Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(30, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def language_model() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=8, vocab_size=30, **special)
    lora = peft.LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, use_dora=True)
    return peft.get_peft_model(transformers.GPT2LMHeadModel(config), lora)


def train_language_model(folder: Path, callback: Any, resume: str | None = None, **options: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    arguments: dict[str, Any] = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "report_to": "none"}
    arguments |= {"use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-2, **options}
    trainer = Trainer(
        language_model(), TrainingArguments(str(folder), **arguments), train_dataset=Tokens(), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume and str(folder / resume))
    return trainer


def test_hugging_face_trains_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from farms_tb import FARMSTrainerCallback

    whole = FARMSTrainerCallback(**ALL)
    trained = train_language_model(tmp_path, whole, save_strategy="epoch").model
    layers = [name for name, ratio in whole.ratios.items() if ratio != 1]
    assert len(layers) > 1
    ratios = whole.parameter_ratios(trained)
    for layer in layers:
        own = {name: ratio for name, ratio in ratios.items() if name.startswith(f"{layer}.")}
        assert {part for part in PARTS if any(part in name for name in own)} == set(PARTS)
        assert set(own.values()) == {whole.ratios[layer]}
    again = FARMSTrainerCallback(**ALL)
    resumed = train_language_model(tmp_path, again, "checkpoint-4").model
    assert_same_weights(resumed, trained)
    assert again.ratios == whole.ratios
    assert again.report == whole.report
