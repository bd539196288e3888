"""The trainings that are looked at: a small language model with AdamW or SGD, at rates that a study tuned."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Mapping, Sequence

from lightning import Callback
from torch import nn

from benchmarks.models import settings
from recipes.console import quiet_lightning
from recipes.parts import Parts, build_parts
from recipes.study.training import make_trainer

__all__ = ["FACTOR", "SETTINGS", "TYPES", "matrices_of", "train"]

FACTOR = 5
"""Times the learning rate of the rest, for embedding and head."""

_ADAMW = "experiment=study/tiny_lm_small"
_SGD = "experiment=study/tiny_lm_small_sgd"
_HIGH = "experiment=study/tiny_lm_fast"


def _faster(*patterns: str) -> list[str]:
    """Return the settings that give parameters of these names the factor, and nothing else."""
    fixed = ",".join(f"['{pattern}',{FACTOR}]" for pattern in patterns)
    return ["balancing=monitor", f"balancing.fixed=[{fixed}]"]


SETTINGS: Mapping[str, Sequence[str]] = {
    "AdamW": [_ADAMW, "balancing=off", "lr=6e-3"],
    "AdamW, embedding faster": [_ADAMW, *_faster("*embed*"), "lr=3e-3"],
    "AdamW, head faster": [_ADAMW, *_faster("*lm_head*"), "lr=6e-3"],
    "AdamW, both faster": [_ADAMW, *_faster("*embed*", "*lm_head*"), "lr=6e-3"],
    "LLR": [_ADAMW, "balancing=llr", "lr=1.5e-3"],
    "SGD": [_SGD, "balancing=off", "lr=0.4"],
    "SGD, both faster": [_SGD, *_faster("*embed*", "*lm_head*"), "lr=0.4"],
    "high rate": [_HIGH, "balancing=off"],
    "high rate, shrinkage": [_HIGH, "balancing=shrinkage"],
}
"""By name: the settings of `python -m recipes.train`. The rates are those of docs/results/controls; the last two
are the model of 0.86 million parameters at four times its best rate, of docs/results/direction."""

TYPES: Mapping[str, Sequence[str]] = {
    "embedding": ("embed_tokens",),
    "head": ("lm_head",),
    "queries, keys": ("q_proj", "k_proj"),
    "values, outputs": ("v_proj", "o_proj"),
    "feed-forward": (".mlp.",),
}
"""Types of the model's matrices, and what the names of each have in them."""


def matrices_of(net: nn.Module) -> dict[str, list[str]]:
    """Return the names of the matrices of each type.

    Args:
        net: the language model.
    """
    names = [name for name, parameter in net.named_parameters() if parameter.ndim == 2]
    return {kind: [n for n in names if any(part in n for part in parts)] for kind, parts in TYPES.items()}


def train(setting: str, seed: int, *more: str, callback: Callback | None = None) -> Parts:
    """Train as a run of the study does.

    Args:
        setting: one of `SETTINGS`.
        seed: draws the initial weights and the batches.
        more: further settings.
        callback: sees each step.

    Returns:
        The trained model and its data.
    """
    quiet_lightning(logging.ERROR)
    cfg = settings(*SETTINGS[setting], f"seed={seed}", "trainer.accelerator=cpu", *more)
    if "log" in cfg.balancing:
        cfg.balancing.log = False
    parts = build_parts(cfg)
    trainer, _ = make_trainer(cfg, parts, *([] if callback is None else [callback]))
    with contextlib.redirect_stdout(io.StringIO()):  # the trainer's table of times
        trainer.fit(parts.model, datamodule=parts.data)
    return parts
