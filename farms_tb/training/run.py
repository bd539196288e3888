"""A run of training: `CallbackOptions` is what the user asked for, `Run` what the trainer says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from farms_tb.balancing.balancer import LayerBalancer
from farms_tb.options import LoggingOptions, RatioOptions, ScheduleOptions, SpectrumOptions, as_plain
from farms_tb.training.schedule import RunLength


@dataclass(frozen=True)
class CallbackOptions:
    """The options of a callback.

    Attributes:
        spectrum: how an alpha is measured.
        ratios: how alphas become learning-rate ratios.
        schedule: when layers are measured.
        logging: what is logged.
    """

    spectrum: SpectrumOptions
    ratios: RatioOptions
    schedule: ScheduleOptions
    logging: LoggingOptions

    def as_plain(self) -> dict[str, Any]:
        """Return all options as one flat dict of plain values, for a checkpoint; see `farms_tb.options`."""
        return as_plain(self.spectrum, self.ratios, self.schedule, self.logging)


@dataclass(frozen=True)
class Run:
    """What a trainer tells about a run when it begins.

    The optimizers are asked for again before each measurement, as they may be others by then.

    Attributes:
        model: the model that is trained.
        optimizers: returns the optimizers that train it now.
        attach: makes a balancer that is attached to them.
        loggers: loggers or reporters of the trainer.
        is_rank_zero: whether this process logs.
        known_length: whether the trainer knows how many batches an epoch has.
        length: returns how many steps the run and an epoch of it have.
    """

    model: nn.Module
    optimizers: Callable[[], Sequence[Optimizer]]
    attach: Callable[[], LayerBalancer]
    loggers: Iterable[object]
    is_rank_zero: bool
    known_length: bool
    length: Callable[[], RunLength]
