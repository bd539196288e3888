"""Layer-wise learning rates for a plain PyTorch loop.

Source of the method: TempBalance, Zhou et al., NeurIPS 2023, arXiv 2312.00359.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from farms_tb.balancing.balancer import LayerBalancer, StepGroup
from farms_tb.options import (
    AssignFunc,
    Esd,
    Fit,
    Kind,
    Metric,
    Norms,
    Precision,
    Solver,
    collect_options,
)
from farms_tb.report import Report


class TempBalance:
    """Layer-wise learning rates for a plain PyTorch loop.

    Measures the model when it is made and whenever `step()` is called, once an epoch say, and gives each layer the
    learning rate lr * ratio, where lr is what the param group, and so any scheduler, says at that moment.
    `optimizer.param_groups` itself is never changed.

    Under `DistributedDataParallel` or FSDP2, make it and call `step()` on every process: they share the work.

    Args:
        model: the model that is trained.
        optimizer: the optimizer that trains it, or several.
        esd: see `farms_tb.analyze`, like all options up to `threads`.
        fit: where the power-law tail begins.
        aspect_ratio: columns / rows of a window.
        window: rows of a window of a linear layer.
        windows_per_dim: start positions of windows along each dimension.
        window_step: a fixed distance between start positions instead.
        xmin_pos: the median fit's divisor.
        filter_zeros: drop eigenvalues below 1e-5.
        relative_cutoff: drop eigenvalues below this fraction of the largest one.
        min_eigenvalues: samples with fewer eigenvalues have no alpha.
        precision: `"auto"` solves in single precision where alpha stays within 5e-5 of itself, `"float64"` never.
        solver: what solves on a GPU: `"torch"`, `"cupy"`, `"cpu"`, or `"auto"` for the fastest of them in a trial.
        memory_mb: megabytes (MiB) that solving may take at a time, beside the model.
        threads: threads of the CPU that solve at a time; None for as many as torch may use.
        assign_func: the map from alphas to ratios, see `farms_tb.lr_ratios`, like those to `ratio_levels`.
        lr_min_ratio: ratio of the layer with the smallest alpha.
        lr_max_ratio: ratio of the layer with the largest alpha.
        sigmoid_min: strength of the sigmoid map at or below the mean alpha.
        sigmoid_max: strength of the sigmoid map above it.
        sigmoid_tau: steepness of the sigmoid map.
        ratio_levels: round the ratios to this many values, so that a step has few different learning rates.
        metric: the figure that is mapped, `"alpha"` in the papers.
        exclude_first: leave the first matrix layer, in order of registration, at ratio 1.
        exclude_last: leave the last matrix layer at ratio 1.
        exclude: shell-style patterns of layer names to leave at ratio 1.
        balance: kinds of layers that are balanced, each within itself: `"real"`, `"spectral"` (complex weights).
        norms: `"follow"` gives a norm the ratio of the layer that feeds it, `"base"` ratio 1.

    Attributes:
        report: the latest measurement.
        ratios: ratio in force for each layer by name.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: an option out of range, no layer to analyse, none of its parameters in the optimizer, a pattern
            that matches nothing, or an optimizer that cannot have layer-wise learning rates.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 48), nn.Linear(48, 64), nn.Linear(64, 8))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> balancer = TempBalance(model, optimizer)
        >>> for epoch in range(2):
        ...     loss = model(torch.randn(4, 32)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     _ = balancer.step()
        >>> sorted(balancer.ratios.values())
        [0.5, 1.0, 1.0, 1.5]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        esd: Esd = "farms",
        fit: Fit = "median",
        aspect_ratio: float = 1.0,
        window: int = 100,
        windows_per_dim: int = 9,
        window_step: int | None = None,
        xmin_pos: float = 2.0,
        filter_zeros: bool = False,
        relative_cutoff: float = 0.0,
        min_eigenvalues: int = 5,
        precision: Precision = "auto",
        solver: Solver = "auto",
        memory_mb: int = 512,
        threads: int | None = None,
        assign_func: AssignFunc = "tb_linear_map",
        lr_min_ratio: float = 0.5,
        lr_max_ratio: float = 1.5,
        sigmoid_min: float = 0.5,
        sigmoid_max: float = 0.5,
        sigmoid_tau: float = 10.0,
        ratio_levels: int | None = None,
        metric: Metric = "alpha",
        exclude_first: bool = True,
        exclude_last: bool = True,
        exclude: Sequence[str] = (),
        balance: Sequence[Kind] = ("real",),
        norms: Norms = "follow",
    ) -> None:
        spectral, balancing = collect_options(locals())
        optimizers = optimizer if isinstance(optimizer, Sequence) else [optimizer]
        self._balancer = LayerBalancer(model, optimizers, spectral, balancing, share=_is_sharded(model))
        try:
            self._balancer.update()
        except Exception:
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

    def step(self) -> Report:
        """Measure the model and apply the ratios that follow; on every process where there are several."""
        return self._balancer.update()

    def parameter_ratios(self) -> dict[str, float]:
        """Return the current ratio of each parameter of the model by name."""
        return self._balancer.parameter_ratios()

    def param_groups(self, optimizer: Optimizer) -> list[StepGroup]:
        """Return the groups that `optimizer` really steps with, their layers, parameters, ratio and lr."""
        return self._balancer.param_groups(optimizer)

    def detach(self) -> None:
        """Stop balancing: the optimizer steps as without this object."""
        self._balancer.detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the current ratios and the report as plain values, for a checkpoint."""
        return self._balancer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; where options or layers changed since, warn and measure anew.

        Raises:
            ValueError: not such a state, one of a newer version, or a damaged one. Nothing was changed then.
        """
        if not self._balancer.load_state_dict(state):
            self._balancer.update()


def _is_sharded(model: nn.Module) -> bool:
    """Tell whether the processes train one model together: DDP, or FSDP2's DTensor weights."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return True
    return isinstance(model, nn.Module) and any(hasattr(p, "full_tensor") for p in model.parameters())
