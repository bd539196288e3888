"""What the name of a weight tells, in a model and in a file alike."""

from __future__ import annotations

EMBEDDING = "embedding: not analysed by default"
"""Problem of a lookup table."""

SCALES = ("weight_scale", "weight_scale_inv", "scale", "scales", "SCB")
"""Names of the scales of a quantised `weight` in its module."""


def scale_names(parameter: str) -> tuple[str, ...]:
    """Return the names that the scales of a quantised parameter may have."""
    return (*SCALES, f"{parameter}_scale", f"{parameter}_scale_inv")


_EMBEDDING_WORDS = ("emb", "wte", "wpe")
_EMBEDDING_NAMES = ("shared", "codebook", "relative_attention_bias", "iou_token", "mask_tokens", "obj_score_token")
_NOT_EMBEDDING_WORDS = ("proj", "patch", "out", "head", "dense", "linear", "class")


def clean_name(name: str) -> str:
    """Drop what `torch.compile` adds to the paths of modules and parameters."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def layer_name(path: str, parameter: str) -> str:
    """Return the name of the layer that a parameter is: `fc` for `fc.weight`, `head.cls_token` for another one."""
    return path or parameter if parameter == "weight" else ".".join(filter(None, (path, parameter)))


def no_rule(parameter: str) -> str:
    """Return the problem of a parameter whose layer type is unknown."""
    return (
        f"no rule for the type of {parameter!r}: add one with farms_tb.layer_matrices.register, use analyze(model)"
    )


def quantised(dtype: object, *, block_scales: bool = False) -> str:
    """Return the problem of a weight that holds codes instead of numbers."""
    scaled = ", a scale for each block" if block_scales else ""
    return f"quantised weights ({dtype}{scaled}): dequantise the model first"


def is_embedding_name(path: str) -> bool:
    """Look at the module's own name: `patch_embed.proj` is no embedding, `tok_emb` and `embeds.0` are.

    GPT-NeoX's head is called `embed_out`, and several vision models project patches by a linear `patch_embed`.
    """
    own = next((part.lower() for part in reversed(path.split(".")) if not part.isdecimal()), "")
    if any(word in own for word in _NOT_EMBEDDING_WORDS):
        return False
    return own in _EMBEDDING_NAMES or any(word in own for word in _EMBEDDING_WORDS)


def is_experts_name(path: str) -> bool:
    """Tell whether a weight of three dimensions at this path holds one matrix an expert."""
    return any(word in path.lower() for word in ("expert", "_exps", "moe"))


def last_name(path: str) -> str:
    """Return the last part of a path, in lower case."""
    return path.rpartition(".")[2].lower()
