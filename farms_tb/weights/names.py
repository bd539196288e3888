"""What the name of a weight tells, in a model and in a file alike, and how its problem is called there.

A layer has the same name and the same status wherever it is read from, so that two reports can be compared; both
ways in ask this module.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from farms_tb.printable import printable

EMBEDDING = "embedding: not analysed without embeddings=True"
"""Problem of a lookup table."""

PACKED = "quantised weights (packed by torch.ao): analyse the model as it was before"
"""Problem of a weight that torch.ao has packed for its kernels."""

SCALES = ("weight_scale", "weight_scale_inv", "scale", "scales", "SCB")
"""Names of the scales of a quantised `weight` in its module."""

QUANTISED = ("weight", "qweight", "weight_packed")
"""What the codes of a layer's weight are called by bitsandbytes, GPTQ, AWQ and compressed-tensors."""


ALONGSIDE_QUANTISED = (*SCALES, "qzeros", "g_idx", "weight_g_idx", "weight_zero_point", "weight_shape")
"""Names of what such codes are read with."""


def scale_names(parameter: str) -> tuple[str, ...]:
    """Return the names that the scales of a quantised parameter may have, by its own name in its module."""
    return (*SCALES, f"{parameter}_scale", f"{parameter}_scale_inv")


def are_codes(parameter: str, siblings: Collection[str]) -> bool:
    """Return whether integers of this name are a quantised weight, and not a table of indices or a mask.

    Args:
        parameter: their name in the module.
        siblings: names of all tensors of the module.
    """
    if parameter in ALONGSIDE_QUANTISED:
        return False
    if parameter in QUANTISED or parameter.endswith("_blocks"):  # the latter in MXFP4
        return True
    return any(name in siblings for name in scale_names(parameter))


# The attribute under which torch.compile and activation checkpointing keep the module that they wrap.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
# Whole parts of a path alone: `pre_orig_mod.fc` is a name of the user's.
_WRAPPED_PART = re.compile(rf"(?<![^.])(?:{'|'.join(WRAPPED)})(?:\.|$)")
# In names of embeddings, but not in `member`, `ensemble` and `assembly`.
_EMBEDDING_WORDS = re.compile(r"emb(?!er|l[ey])|wte|wpe")
_EMBEDDING_NAMES = ("shared", "codebook", "relative_attention_bias", "iou_token", "mask_tokens", "obj_score_token")
_NOT_EMBEDDING_WORDS = ("proj", "patch", "out", "head", "dense", "linear", "class")


def clean_name(name: str) -> str:
    """Drop what `torch.compile` and activation checkpointing add to the path of a module or parameter."""
    return _WRAPPED_PART.sub("", name).removesuffix(".") if "_" in name else name


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by their clean names, in order of registration.

    A parameter that several modules share comes once, by its first name.
    """
    return {clean_name(name): parameter for name, parameter in model.named_parameters()}


def layer_name(path: str, parameter: str) -> str:
    """Return the name of the layer that a parameter is: `fc` for `fc.weight`, `head.cls_token` for another one.

    Args:
        path: path of the module; empty for the model itself.
        parameter: name of the parameter in its module.
    """
    if not path:
        return parameter
    return path if parameter == "weight" else f"{path}.{parameter}"


def no_rule(parameter: str) -> str:
    """Return the problem of a parameter whose layer type is unknown."""
    return (
        f"no rule for the type of {parameter!r}: add one with farms_tb.layer_matrices.register, use analyze(model)"
    )


def quantised(dtype: object, *, block_scales: bool = False) -> str:
    """Return the problem of a weight that holds codes instead of numbers.

    Args:
        dtype: the type of the codes.
        block_scales: whether they are 8-bit floats whose scales cannot be told to belong to which entries.
    """
    if block_scales:
        return f"quantised weights ({dtype}, a scale for each block): dequantise the model first"
    return f"quantised weights ({dtype}): dequantise the model first"


def is_embedding_name(path: str) -> bool:
    """Return whether it is a lookup table, by its module's own name, the last part of `path` that is no number.

    `tok_emb` and `embeds.0` are embeddings, `patch_embed.proj` is none. GPT-NeoX's head is called `embed_out`, and
    several vision models project patches by a linear `patch_embed`.
    """
    words = [part.lower() for part in path.split(".") if not part.isdecimal()]
    own = words[-1] if words else ""
    if any(word in own for word in _NOT_EMBEDDING_WORDS):
        return False
    return own in _EMBEDDING_NAMES or _EMBEDDING_WORDS.search(own) is not None


def natural_order(name: str) -> list[list[tuple[int, int, str]]]:
    """Return a sort key under which `layer.10` and `layer_10` come after `layer.9` and `layer_9`.

    Names are compared part by part, between dots, so that `conv.weight` comes before `conv2.weight`, and numbers
    before words. Numbers may be of any length.

    Example:
        >>> sorted(["layer.10", "layer.9", "conv10", "conv9", "conv"], key=natural_order)
        ['conv', 'conv9', 'conv10', 'layer.9', 'layer.10']
    """
    key = []
    for part in name.split("."):
        words_and_digits = []
        for index, piece in enumerate(re.split(r"([0-9]+)", part)):
            if index % 2 == 0:
                words_and_digits.append((0, 0, piece))
            else:
                # Of two numbers without leading zeros the longer one is larger; int() refuses very long ones.
                digits = piece.lstrip("0")
                words_and_digits.append((1, len(digits), digits))
        key.append(words_and_digits)
    return key


@dataclass(frozen=True)
class Renaming:
    """A change of the prefix that names have in common.

    Attributes:
        removed: prefix that is taken off the names that have it.
        added: prefix that is put before all.
    """

    removed: str = ""
    added: str = ""

    def __call__(self, name: str) -> str:
        """Return a name with the other prefix."""
        return self.added + name.removeprefix(self.removed)


def renaming(names: Collection[str], known: Collection[str]) -> Renaming | None:
    """Find the prefix by which names differ from those of the same layers elsewhere.

    `h.0.attn.c_attn` of a file that was saved without a head is `transformer.h.0.attn.c_attn` in a
    `GPT2LMHeadModel`.

    Args:
        names: the names.
        known: the names elsewhere, also of other layers.

    Returns:
        What makes all of `names` known; it changes none where they are. None where no prefix does.

    Raises:
        ValueError: several prefixes do, as with two towers of the same layers.
    """
    first = next(iter(names), "")
    candidates = [Renaming()]
    for name in known:
        if name.endswith(f".{first}"):
            candidates.append(Renaming(added=name.removesuffix(first)))
        elif first.endswith(f".{name}"):
            candidates.append(Renaming(removed=first.removesuffix(name)))
    fitting = [found for found in candidates if all(found(name) in known for name in names)]
    if len(fitting) > 1 and fitting[0] != Renaming():
        matches = first_few([found(first) for found in fitting])
        raise ValueError(f"{first!r} could be each of {matches}: give the whole names")
    return fitting[0] if fitting else None


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, which is of the kind that takes an s.

    Example:
        >>> counted(1, "layer"), counted(1200, "layer")
        ('1 layer', '1200 layers')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def first_few(names: Sequence[str], most: int = 5) -> str:
    """Return names in one line, as `printable` shows them: the first few, and how many more there are.

    Example:
        >>> first_few(["a", "b"]), first_few(["a", "b", "c", "d"], most=2)
        ('a, b', 'a, b and 2 more')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + more
