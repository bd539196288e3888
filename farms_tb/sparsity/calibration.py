"""Calibration data: from text to batches, and what is checked before they are used.

Calibration data are, everywhere in this package, an iterable of batches, and a batch is a dict of keyword
arguments for the model. Nothing here reads from a network.

- From text files: `tokens_of_text`, then `calibration_batches`.
- From a data set of `datasets`: `dataset_texts`, then `tokens_of_texts` and `calibration_batches`, or
  `document_batches`, which draws one window a document.
- Made up: `random_tokens`, then `calibration_batches`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from farms_tb.missing import cannot_import
from farms_tb.options import check_integer
from farms_tb.weights.layers import unwrap

Batch = Mapping[str, Any]
"""Keyword arguments of one call of the model."""

Tokenizer = Callable[[str], Any]


def tokens_of_text(path: str | PathLike[str] | Sequence[str | PathLike[str]], tokenizer: Tokenizer) -> Tensor:
    """Tokenise text files as a whole.

    Args:
        path: a text file in UTF-8, or several, which are joined by two newlines.
        tokenizer: of `transformers`, or any function from a text to an object or a dict with `input_ids`.

    Returns:
        The ids, int64 `(tokens,)`; special tokens at the start come once.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is no text in UTF-8, or there is no text.
    """
    paths = [path] if isinstance(path, (str, PathLike)) else list(path)
    return tokens_of_texts([_text_of(each) for each in paths], tokenizer, name=", ".join(map(str, paths)))


def _text_of(path: str | PathLike[str]) -> str:
    """Return the text of a file in UTF-8."""
    try:
        return Path(path).read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from error


def tokens_of_texts(texts: Iterable[str], tokenizer: Tokenizer, name: str = "the text") -> Tensor:
    """Tokenise texts as a whole, joined by two newlines: with the lines of WikiText-2 this is what the papers do.

    Args:
        texts: documents, or lines of a data set, see `dataset_texts`.
        tokenizer: of `transformers`, or any function from a text to an object or a dict with `input_ids`.
        name: what the text is called in messages.

    Returns:
        The ids, int64 `(tokens,)`; special tokens at the start come once.

    Raises:
        TypeError: `texts` is one text, which would be joined letter by letter.
        ValueError: there is no text.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be several texts, got one: pass [text]")
    text = "\n\n".join(texts)
    ids = _ids_of(text, tokenizer)
    if not text.strip() or len(ids) == 0:
        raise ValueError(f"{name} is empty: expected text for calibration")
    return ids


def _ids_of(text: str, tokenizer: Tokenizer) -> Tensor:
    """Return the ids of a text, int64 `(tokens,)`: some tokenizers return a batch of one text, or lists."""
    return torch.as_tensor(tokenizer(text)["input_ids"], dtype=torch.int64).flatten()


def dataset_texts(name: str, *, split: str, config: str | None = None, column: str = "text") -> Sequence[str]:
    """Read the texts of a data set of Hugging Face's `datasets` that is on this machine already.

    Args:
        name: a folder of data files, or the name of a data set that `datasets` has in its cache,
            `"Salesforce/wikitext"`.
        split: `"train"`, `"test"`, or a part, `"train[:1%]"`.
        config: which configuration of the data set: `"wikitext-2-raw-v1"`.
        column: which column holds the text.

    Returns:
        The texts in the order of the data set, read from the disk when they are asked for.

    Raises:
        ImportError: `datasets` is not installed.
        FileNotFoundError: the data set is not on this machine. The message says how to fetch it; nothing is
            downloaded here.
        ValueError: there is no such configuration, split or column.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            cannot_import("a data set by name", error, 'pip install "farms-tb[datasets]"')
        ) from error
    try:
        with without_network():
            rows = load_dataset(name, config, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        arguments = ", ".join(repr(value) for value in (name, config) if value is not None)
        raise FileNotFoundError(
            f"the data set {name!r} is not on this machine, and nothing is downloaded without being asked for: "
            f"run datasets.load_dataset({arguments}) once where there is a network, or pass a folder of data files"
        ) from error
    if column not in rows.column_names:
        raise ValueError(f"the data set {name!r} has no column {column!r}: it has {', '.join(rows.column_names)}")
    texts: Sequence[str] = rows[column]
    return texts


@contextmanager
def without_network() -> Iterator[None]:
    """Keep `datasets` and the client of Hugging Face's hub from the network meanwhile, as `HF_HUB_OFFLINE=1` does.

    The variable of the environment itself is read only when they are imported.
    """
    import datasets.config
    import huggingface_hub.constants

    switches: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in switches]
    try:
        for module in switches:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(switches, before, strict=True):
            module.HF_HUB_OFFLINE = value


def random_tokens(vocabulary: int, number: int, seed: int = 0) -> Tensor:
    """Draw tokens at random, for a trial without text. What a model does with them says little of its real inputs.

    Args:
        vocabulary: size of the model's vocabulary, see `vocabulary_size`.
        number: tokens to draw.
        seed: of the draw.

    Returns:
        The ids, int64 `(number,)`.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (number,), generator=generator)


def calibration_batches(
    tokens: Tensor, *, number: int = 128, length: int = 2048, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Cut a long sequence of tokens into calibration batches of one sequence each.

    The text is cut into consecutive sequences without overlap, of which `number` are chosen at random. The papers
    use 128 sequences of 2048 tokens.

    Args:
        tokens: ids `(tokens,)`, see `tokens_of_text`.
        number: sequences; all there are where the text is shorter.
        length: tokens of a sequence.
        seed: of the choice.

    Returns:
        Batches `{"input_ids": (1, length)}`.

    Raises:
        ValueError: there are fewer than `length` tokens.

    Example:
        >>> batches = calibration_batches(torch.arange(100), number=2, length=10)
        >>> [batch["input_ids"].shape for batch in batches]
        [torch.Size([1, 10]), torch.Size([1, 10])]
    """
    check_integer("number", number, at_least=1)
    check_integer("length", length, at_least=1)
    available = len(tokens) // length
    if available == 0:
        raise ValueError(
            f"calibration is too short: {len(tokens)} tokens for sequences of length={length}. Pass a longer "
            "text, or a smaller length"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(available, generator=generator)[:number].sort().values.tolist()
    return [{"input_ids": tokens[place * length : (place + 1) * length][None]} for place in chosen]


def document_batches(
    documents: Iterable[str], tokenizer: Tokenizer, *, number: int = 128, length: int = 2048, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Draw calibration batches as the papers do from C4: one window at random from each of some long documents.

    Documents are drawn at random without replacement; those of at most `length` tokens are passed over.

    Args:
        documents: texts, see `dataset_texts`.
        tokenizer: of `transformers`, or any function from a text to an object or a dict with `input_ids`.
        number: documents to draw.
        length: tokens of a window.
        seed: of the draw.

    Returns:
        Batches `{"input_ids": (1, length)}`.

    Raises:
        ValueError: there are fewer than `number` documents of more than `length` tokens.
    """
    check_integer("number", number, at_least=1)
    check_integer("length", length, at_least=1)
    texts = list(documents)
    generator = torch.Generator().manual_seed(seed)
    batches: list[dict[str, Tensor]] = []
    for place in torch.randperm(len(texts), generator=generator).tolist():
        ids = _ids_of(texts[place], tokenizer)
        if len(ids) <= length:
            continue
        start = int(torch.randint(len(ids) - length, (), generator=generator))
        batches.append({"input_ids": ids[start : start + length][None]})
        if len(batches) == number:
            return batches
    raise ValueError(
        f"calibration is too short: {len(batches)} of {len(texts)} documents have more than length={length} "
        f"tokens, and number={number} are needed. Pass more documents or a smaller length, or join them for "
        "calibration_batches"
    )


def vocabulary_size(model: nn.Module) -> int | None:
    """Return how many tokens a model's embedding has; None where it has none or does not say.

    Args:
        model: a model of `transformers`, or any with a method `get_input_embeddings`.
    """
    get: Callable[[], Any] | None = getattr(unwrap(model), "get_input_embeddings", None)
    try:
        embedding = get() if get is not None else None
    except NotImplementedError:  # a model of transformers without any
        return None
    return embedding.num_embeddings if isinstance(embedding, nn.Embedding) else None


def checked_batches(model: nn.Module, calibration: Iterable[Batch] | None, *, required: bool) -> Sequence[Batch]:
    """Return calibration data as a list, after a check that the model can take them.

    Args:
        model: the model.
        calibration: batches; None for none.
        required: whether there must be some.

    Returns:
        The batches, their tensors on the device of the model's first parameter; an empty list where there are
        none.

    Raises:
        TypeError: a batch is no dict.
        ValueError: data are required and missing, ids are outside of the model's vocabulary, or a batch asks for a
            cache of keys and values, which would grow with each call of a block.
        RuntimeError: there are data, and this is called in `torch.inference_mode`.
    """
    batches = [] if calibration is None else list(calibration)
    if batches and torch.is_inference_mode_enabled():
        raise RuntimeError(
            "calibration does not go with torch.inference_mode, whose tensors do not tell when they change: "
            "use torch.no_grad() in its place"
        )
    if required and not batches:
        raise ValueError(
            "calibration is empty: this method needs the inputs of each layer. Pass an iterable of dicts of "
            "keyword arguments for the model, [{'input_ids': ids}, ...], or use method='magnitude'"
        )
    size = vocabulary_size(model)
    for batch in batches:
        _check_batch(batch, size)
    parameter = next(model.parameters(), None)
    if parameter is None:
        return batches
    return [pytree.tree_map_only(Tensor, partial(_usable, parameter.device), dict(batch)) for batch in batches]


def _check_batch(batch: Batch, size: int | None) -> None:
    """Refuse a batch that a model with a vocabulary of `size` tokens cannot take."""
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"calibration must be an iterable of dicts of keyword arguments for the model, got a batch of "
            f"type {type(batch).__name__}; for a model that takes one tensor x, wrap it: {{'x': tensor}}"
        )
    if batch.get("use_cache") or batch.get("past_key_values") is not None:
        raise ValueError(
            "a batch of calibration asks for a cache of keys and values, which would grow with each call: "
            "leave use_cache and past_key_values out of the batches"
        )
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor):
        check_vocabulary("calibration", ids, size)


def _usable(device: torch.device, tensor: Tensor) -> Tensor:
    """Return a tensor on a device; one that was made in `torch.inference_mode` as a plain copy."""
    return (tensor.clone() if tensor.is_inference() else tensor).to(device)


def check_vocabulary(argument: str, ids: Tensor, size: int | None) -> None:
    """Refuse ids that a model's embedding does not have.

    Args:
        argument: what the ids are called, for the message.
        ids: integers of any shape.
        size: see `vocabulary_size`; None where it is not known.

    Raises:
        ValueError: there is one, or there is none at all.
    """
    if ids.numel() == 0:
        raise ValueError(f"{argument} is too short: there are no tokens")
    smallest, largest = (int(value) for value in ids.aminmax())
    if size is not None and not 0 <= smallest <= largest < size:
        wrong = largest if largest >= size else smallest
        raise ValueError(
            f"{argument} has the token {wrong}, and the model's vocabulary is 0 to {size - 1}: was the text "
            "tokenised for another model?"
        )


def batch_bytes(batch: Batch) -> list[bytes]:
    """Return what tells a batch from another: names, shapes and contents, of nested values too."""
    leaves, structure = pytree.tree_flatten(dict(batch))
    found = [str(structure).encode()]
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            found += [f"{tuple(leaf.shape)} {leaf.dtype}".encode(), tensor_bytes(leaf)]
        else:
            found.append(text_of_value(leaf).encode())
    return found


def text_of_value(value: object) -> str:
    """Return a value as text; an array in full, whose own text leaves out the middle."""
    return f"{value.shape} {value.dtype} {value.tolist()}" if isinstance(value, np.ndarray) else repr(value)


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return the content of a tensor of any type."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
