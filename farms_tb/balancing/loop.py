"""Layer-wise learning rates for a plain PyTorch loop.

Source of the method: TempBalance, Zhou et al., NeurIPS 2023, arXiv 2312.00359.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from farms_tb.balancing.balancer import LayerBalancer
from farms_tb.balancing.step_groups import StepGroup
from farms_tb.keywords import BalancingKeywords, resolved, takes_options
from farms_tb.options import RatioOptions, SpectrumOptions
from farms_tb.presets import Preset, described, with_preset
from farms_tb.report import Report
from farms_tb.weights.layers import wrappers

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options(SpectrumOptions, RatioOptions)
class TempBalance:
    """Layer-wise learning rates for a plain PyTorch loop.

    Measures the model when it is made and whenever `step()` is called, once an epoch say, and gives each layer the
    learning rate lr * ratio, where lr is what the param group, and so any scheduler, says at that moment.
    `optimizer.param_groups` itself is never changed.

    The optimizer keeps its ratios until `detach()`, even where this object is dropped. Call it before training
    goes on without ratios, with the same optimizer or another one, and before a new `TempBalance` for that
    optimizer. At the end of a script nothing has to be called.

    Under `DistributedDataParallel` or FSDP2, make it and call `step()` on every process: they share the work.

    Args:
        model: the model that is trained.
        optimizer: the optimizer that trains it, or several.
        preset: a published method by name, see `farms_tb.presets`; options given by name override it. When to call
            `step()` stays yours, whatever the method says of it.
        spectrum: the options of `SpectrumOptions` below as one object; an option given by name overrides its
            field.
        ratios: the options of `RatioOptions` below as one object, likewise.

    Attributes:
        preset: the published method that was asked for by name; None without one.
        report: the latest measurement.
        ratios: active ratio of each layer by name.

    Raises:
        TypeError: an option unknown, or an argument of the wrong type.
        ValueError: an option out of range, no layer to analyse, none of its parameters in the optimizer, a pattern
            that matches nothing, or an optimizer that cannot have layer-wise learning rates.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 48), nn.Linear(48, 64), nn.Linear(64, 8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> balancer = TempBalance(model, optimizer)
        >>> for epoch in range(2):
        ...     loss = model(torch.randn(4, 32)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     _ = balancer.step()
        >>> sorted(balancer.ratios.values())  # nothing but noise: these weights are random
        [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        preset: Preset | None = None,
        spectrum: SpectrumOptions | None = None,
        ratios: RatioOptions | None = None,
        **options: Unpack[BalancingKeywords],
    ) -> None:
        named = with_preset(preset, {"spectrum": spectrum, "ratios": ratios}, options)
        chosen = resolved(SpectrumOptions, spectrum, named), resolved(RatioOptions, ratios, named)
        self.preset = preset
        optimizers = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        self._detached = False
        self._balancer = LayerBalancer(model, optimizers, *chosen, share=_is_sharded(model))
        try:
            self._balancer.update()
        except BaseException:  # Ctrl-C too, while the first measurement runs
            self._balancer.detach()
            raise

    @property
    def report(self) -> Report:
        """The latest measurement."""
        assert self._balancer.report is not None
        return self._balancer.report

    @property
    def ratios(self) -> dict[str, float]:
        """Current learning-rate ratio of each layer by name."""
        return dict(self._balancer.ratios)

    def settings(self) -> str:
        """Return which options are active and where they come from, to be printed."""
        return described(self.preset, self._balancer.spectrum_options, self._balancer.ratio_options)

    def step(self) -> Report:
        """Measure the model and apply the ratios that follow; on every process where there are several.

        Raises:
            RuntimeError: after `detach()`, since no optimizer would step with the ratios.
        """
        self._check_attached("step()")
        return self._balancer.update()

    def parameter_ratios(self) -> dict[str, float]:
        """Return the current ratio of each parameter of the model by name."""
        return self._balancer.parameter_ratios()

    def param_groups(self, optimizer: Optimizer) -> list[StepGroup]:
        """Return the groups that `optimizer` really steps with, their layers, parameters, ratio and lr.

        After `detach()` their ratio is 1; `parameter_ratios()` has the last ones.
        """
        return self._balancer.param_groups(optimizer)

    def detach(self) -> None:
        """Stop balancing: the optimizer steps as without this object, whose report and ratios stay to be read."""
        self._detached = True
        self._balancer.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the current ratios and the report as plain values, for a checkpoint."""
        return self._balancer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; where options or layers changed since, warn and measure anew.

        Raises:
            ValueError: not such a state, one of a newer version, or a damaged one. Nothing was changed then.
            RuntimeError: after `detach()`, since no optimizer would step with the ratios.
        """
        self._check_attached("load_state_dict()")
        if not self._balancer.load_state_dict(state):
            self._balancer.update()

    def _check_attached(self, call: str) -> None:
        """Raise if the optimizers were given back before this call."""
        if self._detached:
            raise RuntimeError(
                f"{call} after detach(): the optimizers step without ratios. Make a new TempBalance"
            )


def _is_sharded(model: nn.Module) -> bool:
    """Return whether the processes train one model together: DDP, or FSDP2's DTensor weights."""
    if any(isinstance(wrapper, nn.parallel.DistributedDataParallel) for wrapper in wrappers(model)):
        return True
    return isinstance(model, nn.Module) and any(hasattr(p, "full_tensor") for p in model.parameters())
