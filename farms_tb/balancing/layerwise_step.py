"""Learning rates of their own for parameters, shown to `optimizer.step()` and to nobody else.

Outside `step` the optimizer's `param_groups` are exactly the user's: schedulers, checkpoints, clipping and
learning-rate monitors never see anything else. For the length of a step the optimizer is replaced, through its
own step hooks, by a view of itself: an instance of a subclass that shares all of its state and whose
`param_groups` are the user's groups split by ratio, each with lr = the group's lr * ratio. Of SGD, Adam and AdamW
the step may see a group without parameters: `foreach_update` then moves all of them at once, after the step.

In the order of a step: `_before_step` hands torch the view; the step asks the view for its groups
(`_groups_to_show`); a closure may change the user's groups (`_refresh`); `_after_step` carries over what the
step wrote. `_OtherSteps` finds optimizers that move the same parameters without ratios.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from farms_tb.balancing.first_steps import FirstSteps, Traces
from farms_tb.balancing.optimizer_checks import (
    Group,
    all_parameters,
    captured,
    check_optimizer,
    incompatible,
    parameter_ids,
    stepping_optimizers,
)
from farms_tb.balancing.split_groups import ShownGroups
from farms_tb.balancing.targets import Ratio
from farms_tb.balancing.unseen_steps import ReplacedStep, UnseenSteps

# By a weak reference: what is attached holds its optimizer, which would never be freed otherwise.
_attached: WeakKeyDictionary[Optimizer, ReferenceType[LayerwiseStep]] = WeakKeyDictionary()


class LayerwiseStep:
    """Give parameters of one optimizer learning rates of their own while it steps.

    Args:
        optimizer: any `torch.optim.Optimizer` whose groups have an `lr`.
        renew: called before a step with ratios, where the optimizer holds a parameter that has none: it sets
            `ratios` anew. Without it such a parameter has ratio 1.

    Attributes:
        optimizer: the optimizer.
        steps: how many of its steps were followed.

    Raises:
        TypeError: not a torch optimizer.
        ValueError: an optimizer that cannot have layer-wise learning rates, or that already has them.
    """

    def __init__(self, optimizer: Optimizer, renew: Callable[[], None] | None = None) -> None:
        check_optimizer(optimizer)
        if optimizer in _attached:
            raise ValueError(
                f"this {type(optimizer).__name__} already has layer-wise learning rates: use one FARMSTempBalance "
                "or TempBalance, and first detach() an earlier TempBalance, or FARMSTrainerCallback after an "
                "error. If that one is lost, make a new optimizer"
            )
        self.optimizer = optimizer
        self.steps = 0
        self._ratios: Mapping[int, Ratio] = {}
        self._renew = renew
        self._captured = self._compiled = False
        self._view = _make_view(optimizer, property(lambda _: self._groups_to_show(), self._refuse_new_groups))
        self._first_steps, self._unseen = FirstSteps(optimizer), UnseenSteps(optimizer)
        # While a step runs and once it has asked for its groups: those that it sees.
        self._shown: ShownGroups | None = None
        # Whether the present step was handed the view.
        self._handed = False
        # How the last step's groups were split, and by which ratios.
        self._kept: list[Any] = []
        self._kept_ratios: Mapping[int, Ratio] = {}
        self._handles: list[Any] = []
        self._replaced = ReplacedStep(optimizer, lambda: self.steps, lambda: self.is_active)
        self._attach()

    @property
    def ratios(self) -> Mapping[int, Ratio]:
        """Ratio of a parameter by its `id`: of its learning rate, or a `Scale`; 1 where there is none.

        It may be replaced at any time between steps. While every ratio is 1 the optimizer steps as if nothing were
        attached. Setting it raises RuntimeError once a step was captured in a CUDA graph.
        """
        return self._ratios

    @ratios.setter
    def ratios(self, ratios: Mapping[int, Ratio]) -> None:
        if self._captured and not _all_one(ratios):
            raise captured(self.optimizer)
        self._ratios = ratios
        self._first_steps.expect(ratios)

    def replace_ratios(self, ratios: Mapping[int, Ratio]) -> bool:
        """Set the ratios of a new measurement.

        Returns:
            Whether parameters were trained since the last call by steps that did not have the ratios of then.
        """
        was_active = self.is_active
        self.ratios = ratios
        return self._unseen.since_last(self.steps) and was_active

    @property
    def is_active(self) -> bool:
        """Whether some ratio is not 1."""
        return not _all_one(self._ratios)

    def detach(self) -> None:
        """Leave the optimizer as it was found. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._kept = [], []
        self._replaced.restore()
        attached = _attached.get(self.optimizer)
        if attached is not None and attached() is self:
            del _attached[self.optimizer]
        _other_steps.watch_if(bool(_attached))

    def _attach(self) -> None:
        """Register the hooks."""
        optimizer = self.optimizer
        # Does what torch does when an optimizer is made, for a step that was assigned to its class since: without
        # it that step would call no hooks.
        optimizer._patch_step_function()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        # Before the user's own hooks, which find the parameters updated and the groups written.
        optimizer._optimizer_step_post_hooks.move_to_end(self._handles[1].id, last=False)  # type: ignore[attr-defined]
        _attached[optimizer] = ref(self)
        _other_steps.watch_if(True)

    def _groups_to_show(self) -> list[Group]:
        """Return the groups of the present step: the value of the view's `param_groups`."""
        if self._shown is not None:
            return self._shown.groups
        watched = self._first_steps.pending
        kept, self._kept = self._kept, []
        same_ratios = not watched and self._kept_ratios == self._ratios
        if not same_ratios:
            self._kept_ratios = dict(self._ratios)
        self._shown = ShownGroups(
            self.optimizer,
            self._ratios,
            kept,
            same_ratios=same_ratios,
            compiled=self._compiled,
            watched=watched and not self._compiled,
        )
        return self._shown.groups

    def _refuse_new_groups(self, _: Optimizer, groups: list[Group]) -> None:
        """Refuse what a step assigns to the view's `param_groups`."""
        raise incompatible(self.optimizer, "replaced its param_groups")

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Return the arguments of a step with the view in place of the optimizer; None where no ratio is set.

        Raises:
            RuntimeError: the step is being captured in a CUDA graph, or `FirstSteps` refuses the optimizer.
        """
        # `super().step()` in a subclass calls the hooks again, for the view: scaled already.
        if optimizer is self._view:
            return None
        self.steps += 1
        # A step that raised never came to its end.
        self._shown, self._handed = None, False
        # Asked here, where it is known: later, parts of a compiled step run without the compiler.
        self._compiled = torch.compiler.is_compiling()
        capturing, active = _is_capturing(), self.is_active
        if active and not self._compiled and self._renew is not None and self._has_new_parameters():
            self._renew()
        self._captured |= capturing
        if capturing and active:
            raise captured(self.optimizer)
        if not self._compiled:
            self._first_steps.begin(active)
        if not active:
            return None
        self._handed = True
        return _with_view(self._view, args, kwargs, self._refresh)

    def _has_new_parameters(self) -> bool:
        """Return whether the optimizer holds a parameter that has no ratio: one that was replaced, or added."""
        ratios = self._ratios
        return any(id(parameter) not in ratios for parameter in all_parameters(self.optimizer.param_groups))

    def _refresh(self) -> None:
        """Follow what a closure set in the user's groups, the lr above all: it holds for this step."""
        if self._shown is not None:
            self._shown.refresh()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Check what the step did, and carry over to the user's groups what it wrote.

        Raises:
            RuntimeError: a pre-hook that ran later put the optimizer back in place of the view, or the step did
                what cannot be combined with layer-wise learning rates.
        """
        if optimizer is self._view:
            return
        shown, self._shown = self._shown, None
        if self._handed and not self._compiled and args[0] is not self._view:
            raise RuntimeError(
                f"a step pre-hook of this {type(optimizer).__name__} put another optimizer into the arguments of "
                "the step, so layer-wise learning rates had no effect: return args[0] as it came, or register the "
                "hook before balancing begins"
            )
        if not self._compiled:
            self._first_steps.end(None if shown is None else shown.groups)
        if shown is not None:
            self._kept = shown.finish()


def _with_view(
    view: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], after_closure: Callable[[], None]
) -> tuple[Any, Any]:
    """Return the arguments of a step with a view in place of the optimizer, which comes first.

    If the step has a closure, `after_closure` is called after each call of it.
    """
    _, *rest = args
    if rest and callable(rest[0]):
        rest[0] = _followed_by(rest[0], after_closure)
    elif callable(kwargs.get("closure")):
        kwargs = {**kwargs, "closure": _followed_by(kwargs["closure"], after_closure)}
    return (view, *rest), kwargs


def _followed_by(closure: Callable[[], Any], after: Callable[[], None]) -> Callable[[], Any]:
    """Return a closure that calls another function after each call of the user's, whose result it returns."""

    def both() -> Any:
        result = closure()
        after()
        return result

    return both


def _make_view(optimizer: Optimizer, groups: property) -> Optimizer:
    """Return an object that is `optimizer` in all but its `param_groups`, which are a property.

    The object shares its attributes, so what a step assigns the optimizer has too.
    """
    cls = type(optimizer)
    names = {
        "param_groups": groups,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    view: Optimizer = object.__new__(type(cls.__name__, (_View, cls), names))
    view.__dict__ = optimizer.__dict__
    return view


class _View:
    """Marks the class of a view, and keeps it from classes that list their subclasses in `__init_subclass__`."""

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Do nothing, in place of what the optimizer's class does."""


class _OtherSteps:
    """Looks at the steps of optimizers that are not attached, by hooks of torch for all optimizers.

    An optimizer that steps parameters which are balanced in another one gives them its own learning rate: it was
    exchanged during training, or is hidden inside the other one. The first step of each that holds such parameters
    decides; after it the optimizer is known, and costs a look-up at each step.
    """

    def __init__(self) -> None:
        self._handles: list[Any] = []
        # For optimizers during a step: how many steps of attached ones came before, and their parameters then.
        self._begun: WeakKeyDictionary[Optimizer, tuple[int, Traces]] = WeakKeyDictionary()
        # Optimizers that were found not to move what is balanced, and by which attached ones.
        self._harmless: WeakKeyDictionary[Optimizer, WeakSet[LayerwiseStep]] = WeakKeyDictionary()

    def watch_if(self, any_attached: bool) -> None:
        """Begin to look, or cease where no optimizer has layer-wise learning rates any more."""
        if any_attached and not self._handles:
            self._handles = [
                register_optimizer_step_pre_hook(self._before_step),
                register_optimizer_step_post_hook(self._after_step),
            ]
        elif not any_attached:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Note the parameters of an optimizer that may move what another one balances."""
        if torch.compiler.is_compiling() or self._is_known(optimizer):
            return
        active = _active_steps()
        wraps_attached = any(inner in _attached for inner in stepping_optimizers(optimizer))
        shares_parameters = any(_shares_parameters(optimizer, step) for step in active)
        if wraps_attached or not shares_parameters:
            self._note_as_harmless(optimizer, active)
        else:
            self._begun[optimizer] = _number_of_steps(active), Traces(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Raise if this optimizer moved balanced parameters without stepping the optimizer that balances them."""
        if torch.compiler.is_compiling() or optimizer not in self._begun:
            return
        steps, traces = self._begun.pop(optimizer)
        if _number_of_steps(_active_steps()) > steps:
            self._note_as_harmless(optimizer, _active_steps())
        elif traces.any_touched() and self._conflicts(optimizer):
            raise RuntimeError(
                f"this {type(optimizer).__name__} moves parameters that have layer-wise learning rates in another "
                "optimizer, and does not know of them. After an exchange of the optimizer, detach() the old "
                "TempBalance and make one with the new optimizer; to train on without ratios, detach() it; of "
                "several optimizers, pass all. Under a trainer, exchange it when a batch or an epoch ends, as in "
                "on_train_batch_end"
            )

    @staticmethod
    def _conflicts(optimizer: Optimizer) -> bool:
        """Return whether an optimizer holds parameters that one in use balances.

        One that was dropped without `detach` lives on until Python collects garbage: it refers to what is attached
        to it, and that to it.
        """
        gc.collect()
        return any(_shares_parameters(optimizer, step) for step in _active_steps())

    def _note_as_harmless(self, optimizer: Optimizer, active: list[LayerwiseStep]) -> None:
        self._harmless.setdefault(optimizer, WeakSet()).update(active)

    def _is_known(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer need not be looked at: it has ratios itself, or was found harmless."""
        if optimizer in _attached or isinstance(optimizer, _View):
            return True
        harmless_to = self._harmless.get(optimizer, ())
        return all(step in harmless_to for step in _active_steps())


_other_steps = _OtherSteps()


def _number_of_steps(active: list[LayerwiseStep]) -> int:
    return sum(step.steps for step in active)


def _active_steps() -> list[LayerwiseStep]:
    """Return what is attached to any optimizer and has some ratio that is not 1."""
    steps = [reference() for reference in _attached.values()]
    return [step for step in steps if step is not None and step.is_active]


def _shares_parameters(optimizer: Optimizer, step: LayerwiseStep) -> bool:
    """Return whether an optimizer holds a parameter that another one, which has `step` attached, balances."""
    return not parameter_ids(optimizer).isdisjoint(parameter_ids(step.optimizer))


def _all_one(ratios: Mapping[int, Ratio]) -> bool:
    return all(ratio == 1 for ratio in ratios.values())


def _is_capturing() -> bool:
    """Return whether the user captures a CUDA graph; graphs of `torch.compile` take learning rates as inputs."""
    if torch.compiler.is_compiling() or not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return False
    return torch.cuda.is_current_stream_capturing()
