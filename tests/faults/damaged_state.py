"""A damaged state must end a resume in a ValueError that names what is damaged, and change nothing.

Right: `TempBalance.load_state_dict` raises a ValueError; ratios and learning rates are what they were. Second
inputs: states that are no dict, and a run of a Trainer that resumes from a checkpoint with a damaged clock.
"""

import copy
import logging
import tempfile
import warnings
from pathlib import Path

import lightning
import torch
from torch import nn

from farms_tb import FARMSTempBalance, TempBalance

warnings.simplefilter("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def must_refuse(load, state: object, case: str) -> None:
    try:
        load(state)
    except ValueError as error:
        print(f"{case}: {error}")
    else:
        raise AssertionError(f"{case} was accepted")


torch.manual_seed(0)
net = nn.Sequential(*[nn.Linear(20, 20) for _ in range(4)])
optimizer = torch.optim.SGD(net.parameters(), 0.1)
balancer = TempBalance(net, optimizer, assign_func="tb_linear_map")
state = balancer.state_dict()
record = state["report"]["1"]
DAMAGES = {
    "version is text": {"version": "2"},
    "ratios are a list": {"ratios": [1]},
    "a ratio is None": {"ratios": {**state["ratios"], "1": None}},
    "options are a list": {"options": [1]},
    "report is a list": {"report": [1]},
    "a record of a later version": {"report": {"1": {**record, "new": 1}}},
    "a record without its shape": {"report": {"1": {}}},
    "an alpha that is a dict": {"report": {"1": {**record, "alpha": {}}}},
    "a status that is a number": {"report": {"1": {**record, "status": 3}}},
}
ratios = balancer.ratios
for case, change in DAMAGES.items():
    must_refuse(balancer.load_state_dict, {**copy.deepcopy(state), **change}, case)
for case in (None, [], "text", {}, {"version": 2}):
    must_refuse(balancer.load_state_dict, case, repr(case))
assert balancer.ratios == ratios


class Net(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*[nn.Linear(20, 20) for _ in range(4)])

    def training_step(self, inputs, _):
        return self.net(inputs).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(callback: FARMSTempBalance, epochs: int, ckpt_path: Path | None = None) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=epochs,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Net(), torch.utils.data.DataLoader(torch.ones(4, 20)), ckpt_path=ckpt_path)
    return trainer


def must_refuse_to_resume(damage, case: str) -> None:
    """Resume from a checkpoint whose state of the callback was damaged."""
    checkpoint = torch.load(sound, weights_only=True)
    damage(checkpoint["callbacks"]["FARMSTempBalance"])
    torch.save(checkpoint, damaged)
    must_refuse(
        lambda path: fit(FARMSTempBalance(assign_func="tb_linear_map"), 2, path), damaged, f"resumed with {case}"
    )


with tempfile.TemporaryDirectory() as folder:
    sound, damaged = Path(folder) / "sound.ckpt", Path(folder) / "damaged.ckpt"
    fit(FARMSTempBalance(assign_func="tb_linear_map"), 1).save_checkpoint(sound)
    for key in ("ratios", "report", "options"):
        must_refuse_to_resume(lambda state, key=key: state["balancer"].update({key: [1]}), key)
    must_refuse_to_resume(lambda state: state.pop("balancer"), "no balancer")
    for key in torch.load(sound, weights_only=True)["callbacks"]["FARMSTempBalance"]:
        if key != "balancer":
            must_refuse_to_resume(lambda state, key=key: state.update({key: "x"}), f"{key} that is text")
    must_refuse_to_resume(lambda state: state.update(begun=3), "a number for the measurement in the background")
