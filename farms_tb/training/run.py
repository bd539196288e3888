"""A run of training as a trainer describes it, and the balancer that is attached to its optimizers."""

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
from farms_tb.training.schedule import Moment
from farms_tb.weights.layers import clean_name, unwrap


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
        """Return the given objects, or the defaults, overridden by the keywords."""
        return cls(
            resolved(SpectrumOptions, spectrum, keywords),
            resolved(RatioOptions, ratios, keywords),
            resolved(ScheduleOptions, schedule, keywords),
            resolved(LoggingOptions, logging, keywords),
        )

    def as_plain(self) -> dict[str, Any]:
        """Return all options as one flat dict of plain values, for a checkpoint."""
        return as_plain(self.spectrum, self.ratios, self.schedule, self.logging)


@dataclass(frozen=True)
class Run:
    """What a trainer tells about a run when it begins.

    Attributes:
        model: the model that is trained.
        optimizers: returns the optimizers that train it now.
        attach: makes a balancer that is attached to them.
        loggers: loggers or reporters of the trainer.
        is_rank_zero: whether this process logs.
        known_length: whether the trainer knows how many batches an epoch has.
    """

    model: nn.Module
    optimizers: Callable[[], Sequence[Optimizer]]
    attach: Callable[[], LayerBalancer]
    loggers: Iterable[object]
    is_rank_zero: bool
    known_length: bool


@dataclass
class Attachment:
    """A balancer, and the optimizers of a run that it is attached to.

    Attributes:
        run: the run.
        balancer: what measures and balances.
    """

    run: Run
    balancer: LayerBalancer = field(init=False)
    _optimizers: list[Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        self._attach()

    def _attach(self) -> None:
        self._optimizers = list(self.run.optimizers())
        self.balancer = self.run.attach()

    def follow_optimizers(self) -> None:
        """Attach to the optimizers that train now, with the same ratios, where they were exchanged."""
        if list(map(id, self.run.optimizers())) == list(map(id, self._optimizers)):
            return
        state = self.balancer.state_dict()
        self.balancer.detach()
        self._attach()
        self.balancer.load_state_dict(state)

    def detach(self) -> None:
        """Leave the optimizers as they were found; report and ratios stay."""
        self.balancer.detach()

    def results(self) -> Results:
        """Return report and ratios without the model."""
        balancer = self.balancer
        return Results(balancer.report, dict(balancer.ratios), balancer.parameter_ratios())

    def trained_layers(self) -> frozenset[str]:
        """Return the names of the layers with a parameter that an optimizer trains."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        named = unwrap(self.run.model).named_parameters()
        trained = {clean_name(name) for name, p in named if p.requires_grad and id(p) in held}
        return frozenset(layer.name for layer in self.balancer.layers if not trained.isdisjoint(layer.parameters))

    def aggregates(self) -> dict[str, float]:
        """Return mean and standard deviation of alpha over the trained layers; empty before a measurement."""
        report = self.balancer.report
        return {} if report is None else alpha_summary(report, self.trained_layers())

    def measurement(self, now: Moment, *, table: bool, lrs: bool) -> Measurement:
        """Describe the latest update, for the logs.

        Args:
            now: when.
            table: whether table and pictures are logged too.
            lrs: whether learning rates are.
        """
        balancer = self.balancer
        assert balancer.report is not None
        return Measurement(
            balancer.report,
            ratios=dict(balancer.ratios),
            lrs=balancer.layer_lrs() if lrs else {},
            summary=summary_row(balancer.summary),
            epoch=now.logged_epoch,
            step=now.logged_step,
            trained=self.trained_layers(),
            table=table,
        )
