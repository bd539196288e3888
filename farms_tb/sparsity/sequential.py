"""Visit the blocks of a model one after the other, each with statistics of the inputs that it really gets.

Nothing is assumed of a block's arguments: they are captured from the model's own forward pass as they come. So any
architecture works whose blocks are modules that it calls, and not containers whose parts it calls one by one.

Where a block gets tensors that blocks before it returned, or that were captured already (masks, position
embeddings), it is called directly; so a decoder is run once in all, not once for each block. Where something else
happens between two blocks, the model itself is run up to the next block. `_trace` finds out which is the case by
the identity of tensors. A block that gets an object, in which anything of the batch may be, is captured each time.

In memory are, for each batch, the tensors that blocks yet to come will need, and statistics of one block.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from farms_tb.printable import printable
from farms_tb.sparsity.calibration import Batch, tensor_bytes, text_of_value
from farms_tb.sparsity.evaluating import call_on_copy
from farms_tb.sparsity.prunable import PrunableWeight
from farms_tb.sparsity.statistics import InputStatistics, observed
from farms_tb.weights.layers import unwrap


@dataclass(frozen=True)
class Block:
    """A module whose weights are pruned together.

    Attributes:
        path: its path in the model.
        module: the module.
        weights: the planned weights in it.
    """

    path: str
    module: nn.Module
    weights: tuple[PrunableWeight, ...]


@dataclass(frozen=True)
class _Token:
    """Stands for a tensor in a traced call: equal where it is the same tensor with the same content."""

    number: int


@dataclass(frozen=True)
class _Call:
    """One call of a block in one forward pass of the model.

    Attributes:
        structure: how arguments and keyword arguments are nested.
        leaves: the arguments, tokens in place of tensors.
        outputs: tokens of the returned tensors.
        changes_inputs: whether the block writes into tensors that it is given.
    """

    structure: pytree.TreeSpec
    leaves: tuple[Any, ...]
    outputs: tuple[_Token, ...]
    changes_inputs: bool

    @property
    def needed(self) -> set[_Token]:
        """The tensors that the call is given."""
        return {leaf for leaf in self.leaves if isinstance(leaf, _Token)}

    @property
    def is_direct(self) -> bool:
        """Whether it can be repeated with tensors at hand: any other object may hold something of its batch."""
        return all(isinstance(leaf, (_Token, *_PLAIN)) for leaf in self.leaves)

    def arguments(self, known: Known) -> Arguments:
        """Return the arguments, tensors in place of tokens."""
        leaves = [known[leaf] if isinstance(leaf, _Token) else leaf for leaf in self.leaves]
        arguments: Arguments = pytree.tree_unflatten(leaves, self.structure)
        return arguments


_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.dtype, torch.device, torch.layout, torch.Size),
)
"""Types of values that cannot hold anything but what they show."""

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Known = dict[_Token, Tensor]
"""Tensors of one batch that are at hand."""
Trace = dict[str, list[_Call]]
"""The calls of each block in one forward pass, by the block's path, in order of the first call."""


class _Stop(BaseException):
    """Ends a forward pass early; models that catch every Exception do not catch this."""


def planned_blocks(model: nn.Module, weights: Sequence[PrunableWeight]) -> list[Block]:
    """Group weights by their blocks.

    Args:
        model: the model; wrappers are looked through.
        weights: the planned weights.

    Returns:
        The blocks in the order of the plan. One that lies in another is part of it.

    Raises:
        ValueError: the plan names a block that is no module of the model, or does not hold the layer.
    """
    modules = dict(unwrap(model).named_modules())
    paths = {weight.block for weight in weights}
    inside = {path: set(modules[path].modules()) for path in paths if path in modules}
    found: dict[str, list[PrunableWeight]] = {}
    for weight in weights:
        if weight.block not in modules:
            raise ValueError(f"the plan names a block {weight.block!r}, which is no module of the model")
        if weight.module not in inside[weight.block]:
            raise ValueError(
                f"the plan says that {printable(weight.name)} is in the block {weight.block!r}, which does not "
                "hold it: name the block that the layer is in, whose inputs it gets, or none"
            )
        found.setdefault(_outermost(weight.block, paths), []).append(weight)
    return [Block(path, modules[path], tuple(members)) for path, members in found.items()]


def _outermost(path: str, paths: set[str]) -> str:
    """Return the shortest of `paths` that leads to `path` or is the same."""
    parts = path.split(".")
    ancestors = ["", *(".".join(parts[: end + 1]) for end in range(len(parts)))]
    return next(ancestor for ancestor in ancestors if ancestor in paths)


def visit_blocks(
    model: nn.Module,
    blocks: Sequence[Block],
    batches: Sequence[Batch],
    *,
    hessian: bool = False,
    done: Collection[str] = (),
) -> Iterator[tuple[Block, dict[str, InputStatistics]]]:
    """Yield each block with statistics of the inputs of its layers.

    What the caller changes in a block before it asks for the next one is seen by all blocks after it.

    Args:
        model: any module, inside of `farms_tb.sparsity.evaluating.evaluating`.
        blocks: the blocks.
        batches: keyword arguments for the model.
        hessian: whether to sum X X^T of the inputs.
        done: paths of the blocks to leave out.

    Yields:
        The blocks in the order in which the model calls them, and the statistics of each weight by name.

    Raises:
        ValueError: the model calls a block never.
    """
    traces = _Traces(unwrap(model), blocks, batches)
    known: list[Known] = [{} for _ in batches]
    order = traces.order()
    for index, block in enumerate(order):
        if block.path in done:
            continue
        calls = _arguments(traces, known, block)
        number = sum(len(of_batch) for of_batch in calls)
        with observed(block.weights, hessian=hessian, calls=number) as statistics:
            for place, of_batch in enumerate(calls):
                _run(block, of_batch, traces.calls(place, block))
        yield block, statistics
        _advance(traces, known, block, calls, order[index + 1 :])


def _advance(
    traces: _Traces, known: list[Known], block: Block, calls: list[list[Arguments]], later: Sequence[Block]
) -> None:
    """Run a block after it was changed, for what it returns to later blocks, and drop what none of them needs."""
    for place, of_batch in enumerate(calls):
        needed = traces.needed(place, later)
        # A block is not run twice with an object, a cache for example, that it may write into.
        call = traces.direct_call(place, block)
        if call is not None and needed & set(call.outputs):
            (output,) = _run(block, of_batch, [call])
            known[place].update(zip(call.outputs, _tensors(output), strict=True))
        known[place] = {token: tensor for token, tensor in known[place].items() if token in needed}


def _run(block: Block, calls: Sequence[Arguments], traced: Sequence[_Call]) -> list[Any]:
    """Call a block with given arguments; return what it returns."""
    outputs = []
    for (args, kwargs), call in zip(calls, traced, strict=True):
        if call.changes_inputs:
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        outputs.append(block.module(*args, **kwargs))
    return outputs


def _arguments(traces: _Traces, known: list[Known], block: Block) -> list[list[Arguments]]:
    """Return the arguments of a block's calls, for each batch: tensors at hand if all are, else captured."""
    found = []
    for place in range(len(traces.batches)):
        call = traces.direct_call(place, block)
        if call is not None and call.needed and call.needed <= known[place].keys():
            found.append([call.arguments(known[place])])
        else:
            found.append(_captured(traces, known[place], block, place))
    return found


def _captured(traces: _Traces, known: Known, block: Block, place: int) -> list[Arguments]:
    """Run the model on one batch for the arguments that a block gets, and note the tensors among them."""
    batch, traced = traces.batches[place], traces.calls(place, block)
    calls = _capture(traces.model, batch, block, traced)
    if len(traced) != len(calls) or not all(map(_matches, traced, calls)):
        # A mask of ones is often dropped by the model, one with zeros is not: equal shapes are no proof.
        traces.renew(place)
        known.clear()
        traced = traces.calls(place, block)
        calls = _capture(traces.model, batch, block, traced)
    if len(calls) == 1:
        pairs = zip(traced[0].leaves, pytree.tree_leaves(calls[0]), strict=True)
        known.update((token, leaf) for token, leaf in pairs if isinstance(token, _Token))
    return calls


def _capture(model: nn.Module, batch: Batch, block: Block, traced: Sequence[_Call]) -> list[Arguments]:
    """Run the model for the arguments that a block gets; no further than to its call, where one was traced."""
    calls: list[Arguments] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The block may write into its inputs, and the model into them between this call and the next.
        if len(traced) != 1 or traced[0].changes_inputs:
            args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        calls.append((args, kwargs))
        if len(traced) == 1:
            raise _Stop

    handle = block.module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        call_on_copy(model, batch)
    except _Stop:
        pass
    finally:
        handle.remove()
    return calls


class _Traces:
    """How the model calls its blocks, for each batch.

    Batches that differ in their tokens alone share a trace, so that a single forward pass is enough for them.
    Where blocks are given numbers, which may come of the tokens, each batch is traced.
    A mask decides how blocks are called: models drop one of ones, some of them for a part of their blocks.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self._blocks = {block.path: block for block in blocks}
        by_signature: dict[Any, Trace] = {}
        self.of_batches: list[Trace] = []
        for batch in batches:
            signature = _signature(batch)
            if signature not in by_signature or _has_numbers(by_signature[signature]):
                by_signature[signature] = _trace(model, blocks, batch)
            self.of_batches.append(by_signature[signature])

    def order(self) -> list[Block]:
        """Return the blocks in the order of their first call.

        Raises:
            ValueError: a block is never called.
        """
        called: dict[str, None] = {}
        for trace in self.of_batches:
            called.update(dict.fromkeys(trace))
        missing = [path for path in self._blocks if path not in called]
        if missing:
            raise ValueError(
                f"the calibration data never reach {missing[0]!r} ({len(missing)} of {len(self._blocks)} blocks): "
                "pass inputs that use the whole model, or leave these layers out of the plan"
            )
        return [self._blocks[path] for path in called]

    def calls(self, place: int, block: Block) -> list[_Call]:
        """Return how a block is called in the pass of a batch."""
        return self.of_batches[place].get(block.path, [])

    def direct_call(self, place: int, block: Block) -> _Call | None:
        """Return the call of a block in the pass of a batch, if it is the only one and can be repeated."""
        calls = self.calls(place, block)
        return calls[0] if len(calls) == 1 and calls[0].is_direct else None

    def needed(self, place: int, blocks: Sequence[Block]) -> set[_Token]:
        """Return the tensors that blocks are given in the pass of a batch, in calls that can be repeated."""
        calls = (call for block in blocks for call in self.calls(place, block) if call.is_direct)
        return {token for call in calls for token in call.needed}

    def renew(self, place: int) -> None:
        """Trace one batch by itself: it is not called like the others of its shape."""
        self.of_batches[place] = _trace(self.model, list(self._blocks.values()), self.batches[place])


def _has_numbers(trace: Trace) -> bool:
    """Return whether a block is given a number, such as a length or a scale."""
    leaves = [leaf for calls in trace.values() for call in calls for leaf in call.leaves]
    return any(isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool) for leaf in leaves)


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in what a block returned, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _signature(batch: Batch) -> Any:
    """Return what batches have in common whose blocks are called alike: all but the numbers of their tokens."""
    leaves, structure = pytree.tree_flatten(dict(batch))
    kinds = [_described(leaf) if isinstance(leaf, Tensor) else text_of_value(leaf) for leaf in leaves]
    return str(structure), tuple(kinds)


def _described(tensor: Tensor) -> tuple[Any, ...]:
    """Return shape and type of a tensor; and its content, unless it is one of tokens: integers, some above 1."""
    if not (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel() and int(tensor.max()) > 1:
        return tuple(tensor.shape), tensor.dtype
    return tuple(tensor.shape), tensor.dtype, tensor_bytes(tensor)


def _matches(call: _Call, arguments: Arguments) -> bool:
    """Return whether a call has the structure, the tensors and the plain values of a traced one."""
    leaves, structure = pytree.tree_flatten(arguments)
    if structure != call.structure:
        return False
    for leaf, traced in zip(leaves, call.leaves, strict=True):
        if isinstance(leaf, Tensor) != isinstance(traced, _Token):
            return False
        if isinstance(leaf, _PLAIN) and leaf != traced:
            return False
    return True


def _trace(model: nn.Module, blocks: Sequence[Block], batch: Batch) -> Trace:
    """Run the model on a batch and note how it calls each block."""
    tracer = _Tracer()
    with ExitStack() as hooks:
        for block in blocks:
            before, after = partial(tracer.before, block.path), partial(tracer.after, block.path)
            hooks.callback(block.module.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(block.module.register_forward_hook(after).remove)
        call_on_copy(model, batch)
    return tracer.trace


class _Tracer:
    """Notes the calls of blocks in one forward pass, and which tensors are the same."""

    def __init__(self) -> None:
        self.trace: Trace = {}
        self._tokens: dict[tuple[int, int], _Token] = {}
        self._alive: list[Tensor] = []  # so that no other tensor gets the identity of one that was seen
        self._open: list[tuple[pytree.TreeSpec, list[Any], list[Any]]] = []

    def before(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note what a block is given; a hook."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tokens = [self._token(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._open.append((structure, leaves, tokens))
        self.trace.setdefault(path, [])

    def after(self, path: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note what it returned, and whether it wrote into what it was given."""
        structure, leaves, tokens = self._open.pop()
        changed = any(
            isinstance(leaf, Tensor) and self._tokens.get((id(leaf), leaf._version)) != token
            for leaf, token in zip(leaves, tokens, strict=True)
        )
        outputs = tuple(self._token(tensor) for tensor in _tensors(output))
        self.trace[path].append(_Call(structure, tuple(tokens), outputs, changed))

    def _token(self, tensor: Tensor) -> _Token:
        """Return the token of a tensor with its present content."""
        key = (id(tensor), tensor._version)
        if key not in self._tokens:
            self._alive.append(tensor)
            self._tokens[key] = _Token(len(self._tokens))
        return self._tokens[key]
