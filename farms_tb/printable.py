"""Text that somebody else may have made, such as the name of a layer in a file, made safe for a terminal."""

from __future__ import annotations


def printable(text: object, keep: str = "") -> str:
    r"""Return text with an escape in place of each character that `str.isprintable` refuses.

    Those are control characters, which begin a terminal's commands, marks that change the direction of writing,
    lone surrogates and unassigned characters.

    Args:
        text: any text; of another object, such as a path, what `str` gives.
        keep: characters to leave as they are, say `"\n"` for text of several lines.

    Example:
        >>> printable("conv\x1b[2J")
        'conv\\x1b[2J'
    """
    text = str(text)
    if text.isprintable():
        return text
    shown = []
    for letter in text:
        safe = letter.isprintable() or letter in keep
        shown.append(letter if safe else letter.encode("unicode_escape").decode())
    return "".join(shown)
