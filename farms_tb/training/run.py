"""A run of training as a trainer describes it, and the balancer that is attached to its optimizers.

`CallbackOptions` is what the user asked for, `Run` what the trainer says, `Attachment` what comes of both. Nothing
here knows which trainer it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from farms_tb.balancing.balancer import LayerBalancer
from farms_tb.keywords import resolved
from farms_tb.options import LoggingOptions, RatioOptions, ScheduleOptions, SpectrumOptions, as_plain
from farms_tb.training.handover import Results
from farms_tb.training.metrics import Measurement, alpha_summary, summary_row
from farms_tb.training.schedule import Moment, RunLength


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

    @classmethod
    def resolved(
        cls,
        spectrum: SpectrumOptions | None,
        ratios: RatioOptions | None,
        schedule: ScheduleOptions | None,
        logging: LoggingOptions | None,
        keywords: Mapping[str, Any],
    ) -> CallbackOptions:
        """Return the options of all four kinds, from objects and keywords as a user gives them.

        Args:
            spectrum: options as one object; None for the defaults.
            ratios: likewise.
            schedule: likewise.
            logging: likewise.
            keywords: options by name; each overrides the field of that name.

        Raises:
            TypeError: an object of another class, or a value of the wrong type.
            ValueError: a value out of range.
        """
        return cls(
            resolved(SpectrumOptions, spectrum, keywords),
            resolved(RatioOptions, ratios, keywords),
            resolved(ScheduleOptions, schedule, keywords),
            resolved(LoggingOptions, logging, keywords),
        )

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
    length: Callable[[], RunLength] = RunLength


@dataclass
class Attachment:
    """A balancer, and the optimizers of a run that it is attached to.

    Attached from the moment it is made, until `detach`.

    Attributes:
        run: the run.
        verdicts: whether layers are compared with their permutation nulls, for the logs.
        balancer: what measures and balances.
    """

    run: Run
    verdicts: bool = False
    balancer: LayerBalancer = field(init=False)
    _optimizers: list[Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        self._attach()

    def _attach(self) -> None:
        """Make the balancer, and note which optimizers it steps."""
        self._optimizers = list(self.run.optimizers())
        self.balancer = self.run.attach()
        if self.verdicts:
            self.balancer.compare_with_random()

    def follow_optimizers(self) -> None:
        """Attach to the optimizers that train now, with the same ratios, where they were exchanged.

        Callbacks of the user may exchange a trainer's optimizers in the middle of a run.
        """
        current = [id(optimizer) for optimizer in self.run.optimizers()]
        attached = [id(optimizer) for optimizer in self._optimizers]
        if current == attached:
            return
        state = self.balancer.state_dict()
        self.balancer.detach()
        self._attach()
        self.balancer.load_state_dict(state)

    def detach(self) -> None:
        """Leave the optimizers as they were found; report and ratios stay."""
        self.balancer.detach()

    def results(self) -> Results:
        """Return report and ratios without the model, to be pickled or handed to another process."""
        balancer = self.balancer
        return Results(balancer.report, dict(balancer.ratios), balancer.parameter_ratios())

    def aggregates(self) -> dict[str, float]:
        """Return mean and standard deviation of alpha over the trained layers; empty before a measurement."""
        report = self.balancer.report
        if report is None:
            return {}
        return alpha_summary(report, frozenset(self.balancer.trained_layers()))

    def measurement(self, now: Moment, *, table: bool, lrs: bool) -> Measurement:
        """Describe the latest update, for the logs.

        Args:
            now: when.
            table: whether table and pictures are logged too.
            lrs: whether learning rates are.
        """
        balancer = self.balancer
        assert balancer.report is not None
        layer_lrs = balancer.layer_lrs() if lrs else {}
        return Measurement(
            balancer.report,
            ratios=dict(balancer.ratios),
            lrs=layer_lrs,
            summary=summary_row(balancer.summary),
            epoch=now.logged_epoch,
            step=now.logged_step,
            trained=frozenset(balancer.trained_layers()),
            table=table,
        )
