"""Steps that torch's hooks do not see, and which therefore have no layer-wise learning rates.

`ReplacedStep` finds those of a `step` that was replaced on the optimizer, when they are made; `UnseenSteps` any
others, at the next measurement, by the weights that have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from farms_tb.balancing.optimizer_checks import all_parameters


class UnseenSteps:
    """Finds out, from one measurement to the next, whether parameters were trained by steps that no hook saw.

    An optimizer that is exchanged for something without torch's hooks, or that steps during the backward pass,
    moves its parameters without the learning rates of their layers.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._steps = 0
        self._versions: dict[int, int] = {}

    def since_last(self, steps: int) -> bool:
        """Return whether all parameters with a gradient were written since the last call, without any step.

        Args:
            steps: number of the steps that were seen so far.
        """
        before, self._versions = self._versions, {}
        with_gradient = []
        for parameter in all_parameters(self._optimizer.param_groups):
            if is_lazy(parameter):
                continue
            self._versions[id(parameter)] = parameter._version
            if parameter.grad is not None:
                with_gradient.append(id(parameter))
        written = [before[key] != self._versions[key] for key in with_gradient if key in before]
        no_step, self._steps = steps == self._steps, steps
        return no_step and bool(written) and all(written)


class ReplacedStep:
    """Watches a `step` that was replaced on the optimizer itself, which may never reach torch's hooks.

    The first step decides: after one that torch's hooks have seen the user's own `step` is put back.

    Args:
        optimizer: the optimizer.
        steps: returns how many steps torch's hooks have seen.
        active: tells whether some ratio is not 1.
    """

    def __init__(self, optimizer: Optimizer, steps: Callable[[], int], active: Callable[[], bool]) -> None:
        self._optimizer = optimizer
        self._step = vars(optimizer).get("step")
        self._steps, self._active = steps, active
        self._watching: Any = None
        if self._step is not None and not hasattr(self._step, "_wrapped_by_lr_sched"):
            # A method of the optimizer, as torch's schedulers expect, which wrap it once more.
            self._watching = MethodType(lambda _, *args, **kwargs: self._watch(*args, **kwargs), optimizer)
            optimizer.step = self._watching  # type: ignore[method-assign]

    def restore(self) -> None:
        """Put the user's own `step` back, unless somebody has replaced it since."""
        if self._watching is not None and vars(self._optimizer).get("step") is self._watching:
            self._optimizer.step = self._step  # type: ignore[method-assign, assignment]
        self._watching = None

    def _watch(self, *args: Any, **kwargs: Any) -> Any:
        """Make the user's step, with its arguments and its result.

        Raises:
            RuntimeError: torch's hooks, and so the ratios, took no part in it.
        """
        seen = self._steps()
        assert self._step is not None
        result = self._step(*args, **kwargs)
        if self._steps() > seen:
            self.restore()
        elif self._active():
            raise RuntimeError(
                f"the step of this {type(self._optimizer).__name__} was replaced on the instance by a function "
                "that does not call the step of its class, so layer-wise learning rates have no effect. Define "
                "step in a subclass, or use lr_min_ratio=lr_max_ratio=1 to measure only"
            )
        return result
