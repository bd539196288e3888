"""What a MODEL stands for: a file, a run, a model of torchvision or timm, a function of the user's.

`open_source` decides, in this order: what exists as a path is a file or a folder; `library:name` a model of a
library; `module:function` a function; anything else a model's name. It reads names and shapes alone: weights are
read by `Source.read`, one layer after the other.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from farms_tb.cli.libraries import LIBRARIES, model_by_name, model_of_library
from farms_tb.options import SpectrumOptions
from farms_tb.report import LayerRecord
from farms_tb.viewing.metrics_csv import METRICS_FILE
from farms_tb.viewing.run_files import find_run
from farms_tb.weights.adapter_files import adapter_folder, tensors_with_adapter
from farms_tb.weights.files import ENDINGS, stored_tensors
from farms_tb.weights.layers import Layer, checked_layers, read_stacks
from farms_tb.weights.stacks import MatrixStack
from farms_tb.weights.stored_layers import stored_layers

_FILE_ENDINGS = (*ENDINGS, ".json")


@dataclass(frozen=True)
class Source:
    """Where layers come from.

    Attributes:
        items: what is read, one after the other.
        read: reads items; yields the name of each layer, with its weight or a record that says why it has none.
        damaged: a sentence for each file of several that cannot be read.
        note: what the user should know of it; empty for nothing.
    """

    items: Sequence[Any]
    read: Callable[[Iterable[Any]], Iterator[tuple[str, MatrixStack | LayerRecord]]]
    damaged: Sequence[str] = ()
    note: str = ""


def open_source(
    model: str,
    *,
    pretrained: bool = False,
    key: str | None = None,
    base: str | None = None,
    options: SpectrumOptions | None = None,
) -> Source:
    """Find a model; of a file, nothing is read but names and shapes.

    Args:
        model: a file or directory that `farms_tb.analyze_checkpoint` takes; the folder of a run, for its last
            checkpoint; `"resnet18"`, `"torchvision:resnet18"`, `"timm:vit_base_patch16_224"`; or
            `"module:function"`, called without arguments.
        pretrained: load the weights that torchvision or timm has for a model, which may download them; without it
            they are random, the same each time.
        key: where the weights lie in a file that holds more.
        base: a file of weights, onto which `model`, the folder of an adapter, is merged.
        options: which layers are measured; None for the defaults.

    Returns:
        What the layers are read from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no library has a model of this name; the model has nothing to measure; `pretrained` or `key`
            is not for this kind of model; or the folder holds several runs, or a run without a checkpoint.
        TypeError: the function returns no module.
        ImportError: the library is not installed.

    Example:
        >>> source = open_source("torch.nn:Flatten")
        Traceback (most recent call last):
        ...
        ValueError: Flatten has no layer that can be analysed; linear, convolution, attention and \
spectral-convolution layers can, others by farms_tb.layer_matrices.register
    """
    options = SpectrumOptions() if options is None else options
    if pretrained and Path(model).exists():
        raise ValueError(f"--pretrained is for models of torchvision and timm, {model} is a file")
    if adapter_folder(model) is not None:
        return _open_adapter(Path(model), key, base, options)
    if base is not None:
        raise ValueError(f"--base is for the folder of an adapter, {model} is none")
    if Path(model).exists():
        return _open_file(Path(model), key, options.embeddings)
    if key is not None:
        raise ValueError(f"--key is for files of weights, {model} is none")
    built = _build(model, pretrained)
    note = (
        "" if pretrained or _is_function(model) else f"{model} has random weights: --pretrained loads trained ones"
    )
    layers = checked_layers(built, embeddings=options.embeddings, adapters=options.adapters)
    return Source(layers, _model_layers, note=note)


def _open_file(path: Path, key: str | None, embeddings: bool) -> Source:
    """Open a file or a directory of weights, or the last checkpoint of a run.

    Raises:
        ValueError: there are several runs, or none has a checkpoint; for the others see `open_source`.
    """
    note = ""
    if _is_run_folder(path):
        checkpoints = find_run(path).checkpoints
        if not checkpoints:
            raise ValueError(f"{path} is the folder of a run without a checkpoint (*.ckpt): there are no weights")
        newest = checkpoints[0].relative_to(path)
        note = f"{path} is the folder of a run: measuring its last checkpoint, {newest}"
        path = checkpoints[0]
    damaged: list[str] = []
    read = partial(stored_layers, embeddings=embeddings)
    return Source(stored_tensors(path, damaged, key=key), read, damaged, note)


def _open_adapter(path: Path, key: str | None, base: str | None, options: SpectrumOptions) -> Source:
    """Open the folder of an adapter, or the file in it, merged onto the weights in `base`, under `key` there.

    Without a base, the layers are the adapter's own matrices.

    Raises:
        ValueError: see `farms_tb.weights.adapter_files.tensors_with_adapter`.
    """
    if base is not None and options.adapters != "merged":
        raise ValueError(
            f"--base is for --adapters merged, got --adapters {options.adapters}: leave one of them out"
        )
    if base is None:
        note = f"{path} is an adapter: measuring its matrices A and B. --base merges it onto the weights it is for"
        return replace(_open_file(path, key, options.embeddings), note=note)
    damaged: list[str] = []
    tensors = tensors_with_adapter(path, base, damaged, key=key)
    return Source(tensors, partial(stored_layers, embeddings=options.embeddings), damaged)


def _is_run_folder(path: Path) -> bool:
    """Return whether a folder is that of a run, and not one of weights, as Hugging Face saves them."""
    if not path.is_dir() or any(path.glob("*.safetensors*")) or any(path.glob("*.bin*")):
        return False
    return any(path.rglob("*.ckpt")) or any(path.rglob(METRICS_FILE))


def _model_layers(layers: Iterable[Layer]) -> Iterator[tuple[str, MatrixStack | LayerRecord]]:
    """Yield the name of each layer of a model, with its weight or a record that says why it has no spectrum."""
    for layer in layers:
        if layer.problem:
            yield layer.name, LayerRecord(status=layer.problem, kind=layer.kind, shape=layer.shape)
        else:
            yield layer.name, read_stacks(layer.module, layer.adapters)[layer.index]


def _build(model: str, pretrained: bool) -> nn.Module:
    """Make a model by its name in a library or by a function.

    Random weights are the same each time. For the arguments and errors see `open_source`.
    """
    if "://" in model:
        raise ValueError(f"{model} is an address: download the file first, then pass its path")
    prefix, _, name = model.partition(":")
    torch.manual_seed(0)
    if _is_function(model):
        if pretrained:
            raise ValueError(f"--pretrained is for models of torchvision and timm, {model} is a function")
        return _from_function(prefix, name)
    if prefix in LIBRARIES:
        return model_of_library(prefix, name, pretrained)
    if _is_path(model):
        raise FileNotFoundError(f"no such file: {model}{_hint_of_hub(model)}")
    return model_by_name(model, pretrained)


def _is_function(model: str) -> bool:
    """Return whether it is `module:function`, no path and no name like `timm:resnet18`."""
    prefix, colon, _ = model.partition(":")
    return bool(colon) and not _is_path(model) and prefix not in LIBRARIES


def _is_path(model: str) -> bool:
    """Return whether it is a path, maybe one of another system, and not a name."""
    return "/" in model or "\\" in model or model.endswith(_FILE_ENDINGS)


def _hint_of_hub(model: str) -> str:
    """Return what to do where a name looks like that of a model on the Hugging Face hub, `owner/name`."""
    is_path = model.startswith((".", "/", "~")) or model.endswith(("/", *_FILE_ENDINGS))
    if is_path or model.count("/") != 1:
        return ""
    return f"; for a model of the Hugging Face hub, download it first (hf download {model}) and pass its folder"


def _from_function(module: str, function: str) -> nn.Module:
    """Return what a function of the user's makes; relative paths mean the same after it as before.

    Raises:
        ValueError: the module cannot be imported, or it or the function fails, in whatever way.
    """
    # As with `python -m`: what lies where the command is run can be imported.
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        with redirect_stdout(sys.stderr):  # Standard output is for the result alone, JSON for one.
            make = getattr(importlib.import_module(module), function)
            made: nn.Module = make()
    except (Exception, SystemExit) as error:  # a script that reads its arguments ends the process
        raise ValueError(f"{module}:{function}() failed: {type(error).__name__}: {error}") from error
    finally:
        os.chdir(folder)
        with suppress(ValueError):  # the function may have changed the path, too
            sys.path.remove(folder)
    return made
