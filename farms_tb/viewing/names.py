"""Names of layers and runs, made safe to show.

Names come from files that somebody else may have made. They can hold sequences that a terminal executes,
characters that no encoding or font has, and thousands of letters.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile

from farms_tb.printable import printable

__all__ = ["file_name", "in_order", "shortened", "told_apart"]

LONGEST_FILE_NAME = 100
"""Characters of a layer's name that are kept in a file's name; most file systems take 255 bytes in all."""


def shortened(name: str, most: int = 60, keep: str = "") -> str:
    """Return a name as `printable` does, at most `most` characters: its end, which tells a model's layers apart.

    Args:
        name: the name.
        most: characters to keep, the ellipsis in place of the others included.
        keep: characters that cannot be printed and stay as they are.

    Example:
        >>> shortened("model.layers.11.mlp.down_proj", 15)
        '….mlp.down_proj'
    """
    shown = printable(name, keep)
    if len(shown) <= most:
        return shown
    return "…" + shown[1 - most :]


def told_apart(names: Sequence[str], most: int = 60) -> list[str]:
    """Return names as `shortened` does, but names that differ beyond the letters that it keeps still differ.

    Of long names that end alike, the end is kept, and what comes before all that they have in common.

    Args:
        names: the names that are shown together.
        most: characters to keep of each, the ellipses in place of the others included.

    Example:
        >>> told_apart(["layers.0.attention.projection", "layers.1.attention.projection"], 20)
        ['layers.0…projection', 'layers.1…projection']
    """
    printed = [printable(name) for name in names]
    labels = {name: shortened(name, most) for name in printed}
    kept = most // 2
    if len(set(labels.values())) < len(labels) and kept:
        by_end: dict[str, list[str]] = {}
        for name in labels:
            if len(name) > most:
                by_end.setdefault(name[-kept:], []).append(name)
        for end, alike in by_end.items():
            if len(alike) > 1:
                starts = told_apart(_without_common_end(alike, kept), most - kept - 1)
                labels.update({name: f"{start}…{end}" for name, start in zip(alike, starts, strict=True)})
    return [labels[name] for name in printed]


def _without_common_end(names: Sequence[str], least: int) -> list[str]:
    """Return names without the end that they have in common, which is at least `least` letters.

    The cut is where a part of the name ends, so that `layers.10.proj` and `layers.20.proj` keep their zeros.
    """
    from_the_end = zip(*map(reversed, names), strict=False)
    common = sum(1 for _ in takewhile(lambda letters: len(set(letters)) == 1, from_the_end))
    end = names[0][-common:]
    boundary = re.search(r"\W", end)
    cut = max(least, len(end) - (boundary.start() if boundary else 0))
    return [name[:-cut] for name in names]


def file_name(name: str) -> str:
    """Return a layer's name as a part of a file's name: no separators of folders, at most 100 characters.

    Names that had to be changed beyond their separators end in a checksum, so that two layers have two files.

    Args:
        name: the layer's name, of any length and with any characters.

    Returns:
        Characters that can be printed, without the file's ending.
    """
    flat = re.sub(r"[/\\]", "_", name)
    if flat.isprintable() and len(flat) <= LONGEST_FILE_NAME:
        return flat
    plain = "".join(letter if letter.isprintable() else "_" for letter in flat)
    checksum = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{plain[:80]}_{checksum[:12]}"


def in_order(names: Iterable[str], order: Sequence[str]) -> list[str]:
    """Sort names as they stand in a list; names that are not in it come last, and keep their order.

    Args:
        names: what to sort, say the layers of a file of weights.
        order: the order, say that in which the model registered its layers.

    Example:
        >>> in_order(["a", "x", "b"], order=["b", "a"])
        ['b', 'a', 'x']
    """
    positions = {name: position for position, name in enumerate(order)}
    last = len(positions)
    return sorted(names, key=lambda name: positions.get(name, last))
