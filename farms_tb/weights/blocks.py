"""Which block a layer is in: `model.layers.3` for `model.layers.3.self_attn.q_proj`.

Language models, vision transformers and residual networks repeat blocks of one kind. In names, a block is a path
that ends in a number, below which lie layers of the same names as below its neighbours. The names of a model's
layers and those in its file are the same, so blocks are found from names and shapes alone, in both alike, and
never by counting: blocks may differ in size, and layers may be missing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

BlockRule = Sequence[str] | Callable[[str], str | None]
"""How blocks are found: shell-style patterns of their paths, or a function from a layer's name to its block's."""


def blocks_of(shapes: Mapping[str, Sequence[int]], rule: BlockRule | None = None) -> dict[str, str]:
    """Return which block each layer is in.

    Without a rule, blocks are found as follows:

    1. Paths that end in a number and share what comes before it are a list: `model.layers.0`, `model.layers.1`
       and so on, or `encoder_layer_0`, `encoder_layer_1`. A list counts where more than half of its members, and
       at least two, hold layers of mostly the same names.
    2. A list inside the members of another one is left out where more than half of these members are equal in
       names and shapes: it holds the experts or the attention heads of a block. Where they are not, the members
       are the stages of a network, and the lists inside hold the blocks.
    3. Of the lists that remain, the longest one decides what a block looks like. The blocks are the members of
       all lists that look like it: those of encoder and decoder, or of all stages of a residual network. Blocks
       that hold no more than half of the layers do not count.

    Args:
        shapes: shape of each layer by name, in any order.
        rule: patterns of the paths of blocks, `["encoder.layers.*", "decoder.layers.*"]`, of which the shortest
            path that matches is the block; or a function from the name of a layer to that of its block, None for a
            layer outside of the blocks; None to find them.

    Returns:
        Name of the block of each layer that is in one, in the order of `shapes`. Layers outside of all blocks, an
        embedding or a head, are not in it. Empty where there are no blocks.

    Example:
        >>> shapes = {f"layers.{i}.{name}": (8, 8) for i in range(2) for name in ("attn.q", "mlp.up")}
        >>> blocks_of({"embed": (100, 8), **shapes, "head": (8, 100)})
        {'layers.0.attn.q': 'layers.0', 'layers.0.mlp.up': 'layers.0', \
'layers.1.attn.q': 'layers.1', 'layers.1.mlp.up': 'layers.1'}
    """
    if callable(rule):
        told = {name: rule(name) for name in shapes}
        return {name: str(block) for name, block in told.items() if block not in (None, "")}
    if rule is not None:
        return _by_patterns(shapes, rule)
    chosen = {found.path for found in _lists_of_blocks(shapes)}
    blocks = {}
    for name in shapes:
        for path in _numbered_paths(name):
            if split_number(path)[0] in chosen:
                blocks[name] = path
    # Less is a detail that repeats by chance, two auxiliary classifiers for example.
    return blocks if 2 * len(blocks) > len(shapes) else {}


def name_in_block(name: str, block: str) -> str:
    """Return the name of a layer inside its block: `self_attn.q_proj` of `model.layers.3.self_attn.q_proj`."""
    return name.removeprefix(f"{block}.") if block else name


def split_number(path: str) -> tuple[str, int]:
    """Split a path before the number that it ends in; -1 stands for none.

    Example:
        >>> split_number("model.layers.12"), split_number("encoder_layer_3"), split_number("head")
        (('model.layers.', 12), ('encoder_layer_', 3), ('head', -1))
    """
    before = path.rstrip("0123456789")
    digits = path[len(before) :]
    # Conversion of longer ones takes time, or is refused.
    if not digits or len(digits) > 9:
        return path, -1
    return before, int(digits)


def _by_patterns(names: Mapping[str, object], patterns: Sequence[str]) -> dict[str, str]:
    """Return the shortest start of each name, up to a dot, that matches a pattern with as many parts.

    Raises:
        TypeError: `patterns` is a single string.
    """
    if isinstance(patterns, str):
        raise TypeError(f"blocks must be a sequence of patterns, got {patterns!r}; use [{patterns!r}]")
    found = {}
    for name in names:
        for path in _starts(name):
            if any(_matches(path, pattern) for pattern in patterns):
                found[name] = path
                break
    return found


def _matches(path: str, pattern: str) -> bool:
    """Return whether a path matches a pattern part by part: a `*` does not reach over a dot."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _starts(name: str) -> Iterator[str]:
    """Yield the paths that lead to a layer, the shortest first, without the layer itself."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        yield ".".join(parts[:length])


def _numbered_paths(name: str) -> Iterator[str]:
    """Return the paths that lead to a layer and end in a number, the shortest first."""
    return (path for path in _starts(name) if split_number(path)[1] >= 0)


@dataclass
class _List:
    """Members of one list: the names and shapes of the layers below each.

    Attributes:
        path: what comes before the number.
        members: for each number, the shapes of the layers by their names below the member.
    """

    path: str
    members: dict[int, dict[str, tuple[int, ...]]] = field(default_factory=dict)

    @property
    def kind(self) -> frozenset[str]:
        """What the layers below a typical member are called."""
        kinds = Counter(map(_kind, self.members.values()))
        return max(kinds, key=lambda kind: (kinds[kind], sorted(kind)))

    def rank(self) -> tuple[int, int, str]:
        """Return what the longest list has most of: members, then entries; then the last path in the alphabet."""
        entries = sum(math.prod(shape) for member in self.members.values() for shape in member.values())
        return len(self.members), entries, self.path

    def is_repeated(self) -> bool:
        """Return whether more than half of its members, at least two, are of the typical kind."""
        kind = self.kind
        alike = sum(_are_alike(_kind(member), kind) for member in self.members.values())
        return alike > 1 and 2 * alike > len(self.members)

    def holds_several_layers(self) -> bool:
        """Return whether more than half of its members hold more than one layer."""
        several = sum(len(member) > 1 for member in self.members.values())
        return 2 * several > len(self.members)

    def has_equal_members(self) -> bool:
        """Return whether more than half of its members have layers of the same names and shapes."""
        equal = Counter(frozenset(member.items()) for member in self.members.values())
        return 2 * max(equal.values()) > len(self.members)

    def is_inside(self, other: _List) -> bool:
        """Return whether it is inside a member of another list."""
        rest = self.path.removeprefix(other.path)
        return self.path.startswith(other.path) and rest[:1].isdecimal()


def _kind(member: Mapping[str, object]) -> frozenset[str]:
    """Return the last part of the name of each layer of a member, with the numbers that follow it.

    The parts before are left out: `layer.1.DenseReluDense.wo` of an encoder is `layer.2.DenseReluDense.wo` in the
    decoder.
    """
    found = []
    for name in member:
        parts = name.split(".")
        words = [index for index, part in enumerate(parts) if not part.isdecimal()]
        found.append(".".join(parts[words[-1] if words else 0 :]))
    return frozenset(found)


def _are_alike(first: frozenset[str], second: frozenset[str]) -> bool:
    """Return whether two kinds have at least half of their names in common."""
    return 2 * len(first & second) >= len(first | second)


def _lists_of_blocks(shapes: Mapping[str, Sequence[int]]) -> list[_List]:
    """Return the lists whose members are the blocks, none of them inside another one."""
    repeated = [found for found in _lists(shapes) if found.is_repeated()]
    of_equals = [found for found in repeated if found.has_equal_members()]
    candidates = [found for found in repeated if not any(map(found.is_inside, of_equals))]
    # Members of one layer are blocks only where nothing else is.
    candidates = [found for found in candidates if found.holds_several_layers()] or candidates
    if not candidates:
        return []
    longest = max(candidates, key=_List.rank)
    alike = [found for found in candidates if _are_alike(found.kind, longest.kind)]
    # A list of stages looks like the lists in it, which hold the blocks.
    return [found for found in alike if not any(other.is_inside(found) for other in alike)]


def _lists(shapes: Mapping[str, Sequence[int]]) -> list[_List]:
    """Return every list that the names tell of."""
    found: dict[str, _List] = {}
    for name, shape in shapes.items():
        for path in _numbered_paths(name):
            before, number = split_number(path)
            members = found.setdefault(before, _List(before)).members
            members.setdefault(number, {})[name[len(path) + 1 :]] = tuple(shape)
    return list(found.values())
