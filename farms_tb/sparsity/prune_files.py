"""Prune a model in files: from a folder or a safetensors file to a new folder of the same files.

By magnitude, weights are streamed: one tensor is in memory at a time, and no class of a model is needed. With
calibration data, the model is loaded by `transformers` and pruned block after block, and then its planned weights
are written into the same places of the files. Either way everything else is copied byte by byte.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import farms_tb
from farms_tb.options import check_choice, check_integer
from farms_tb.printable import printable
from farms_tb.sparsity.calibration import Batch, batch_bytes, check_vocabulary
from farms_tb.sparsity.calibration_files import CalibrationFile, batches_of_file
from farms_tb.sparsity.methods import Structure, smallest_entries
from farms_tb.sparsity.options import PRUNE_METHODS, PruneMethod
from farms_tb.sparsity.other_files import FolderFiles, files_of_folder
from farms_tb.sparsity.plan import SparsityPlan
from farms_tb.sparsity.planned_tensors import (
    StoredLayer,
    StoredModel,
    check_finite,
    check_oriented,
    planned_tensors,
)
from farms_tb.sparsity.prunable import PrunableWeight, planned_weights, to_matrix
from farms_tb.sparsity.prune import prune
from farms_tb.sparsity.prune_report import PrunedLayer, PruneReport
from farms_tb.sparsity.rewriting import rewrite
from farms_tb.sparsity.transformers_models import (
    context_length,
    load_config,
    load_model,
    load_tokenizer,
    vocabulary_of,
)
from farms_tb.sparsity.unfinished import UnfinishedFolder, check_output, open_unfinished
from farms_tb.weights.files import INDEX, part_of_each

Progress = Callable[[str, int, int], None]
"""Called with what is done, how much of it is finished, and how much there is."""


@dataclass(frozen=True)
class PruneWish:
    """What is to be pruned, and how.

    Attributes:
        model: a safetensors file, an index of several, or a folder of Hugging Face's.
        plan: which share of each layer.
        output: the folder to make.
        method: which entries become zero, see `farms_tb.sparsity.prune`.
        structure: the structure of the zeros.
        calibration: needed but for `"magnitude"`, for which it only adds the output errors to the report.
        seed: what is written into the files; that of the calibration.
        device: where the model runs, where it is loaded.
    """

    model: Path
    plan: SparsityPlan
    output: Path
    method: PruneMethod = "magnitude"
    structure: Structure = "unstructured"
    calibration: CalibrationFile | None = None
    seed: int = 0
    device: str = "cpu"

    @property
    def folder(self) -> Path:
        """The folder of the model where the user named an index of its files, else what the user named."""
        return self.model.parent if self.model.name.endswith(INDEX) else self.model


@dataclass(frozen=True)
class PreparedRun:
    """A wish that was checked.

    Attributes:
        wish: the wish.
        stored: the planned layers in the files.
        batches: the calibration data; none where the weights are streamed.
        config: of the model of transformers; None where the weights are streamed.
        unfinished: where the pruned model is written until it is whole.
        others: the other files of the model's folder.
    """

    wish: PruneWish
    stored: StoredModel
    batches: Sequence[Batch]
    config: Any
    unfinished: UnfinishedFolder
    others: FolderFiles


def prepare(wish: PruneWish) -> PreparedRun:
    """Check what can be checked without the values of the weights, and make the folder of the run's state.

    Args:
        wish: what is to be pruned.

    Raises:
        ValueError: the weights are no safetensors; the plan was made for another model or does not go with the
            structure; a layer is tied or quantised; calibration data are missing, too short or of another
            vocabulary; the output exists, or a stopped run with other arguments had begun to write it.
        FileNotFoundError: there is no such model.
        OSError: the folder cannot be made, or the disk has no room for the model.
        ImportError: there are calibration data, and transformers is not installed.
    """
    check_choice("method", wish.method, PruneMethod)
    check_choice("structure", wish.structure, Structure)
    check_integer("seed", wish.seed, at_least=0)
    check_output(wish.output)
    stored = planned_tensors(wish.model, wish.plan, wish.structure)
    batches, config = _calibration(wish)
    if config is None:
        check_oriented(stored)
    facts = _facts(wish, stored, batches, config)
    unfinished = open_unfinished(wish.output, facts, _size(wish, stored))
    written = {file.name for file in stored.files}
    others = files_of_folder(wish.folder)
    others = replace(others, left_out=[name for name in others.left_out if name not in written])
    return PreparedRun(wish, stored, batches, config, unfinished, others)


def _size(wish: PruneWish, stored: StoredModel) -> int:
    """Return the bytes that a run writes: the model, and of finished blocks masks and, corrected, the entries."""
    if wish.calibration is None:
        return stored.size
    entries = sum(layer.size for layer in stored.plan.layers.values())
    corrected = entries * stored.dtype.itemsize if PRUNE_METHODS[wish.method].corrects else 0
    return stored.size + entries // 8 + corrected


def _calibration(wish: PruneWish) -> tuple[list[dict[str, Tensor]], Any]:
    """Return calibration data and the configuration of the model; neither where weights are streamed."""
    if wish.calibration is None:
        if not PRUNE_METHODS[wish.method].needs_inputs:
            return [], None
        raise ValueError(
            f"calibration is missing: --method {wish.method} needs the inputs of each layer. Pass --calibration "
            "FILE, a text or token ids, or use --method magnitude"
        )
    config = load_config(wish.folder)
    batches = batches_of_file(wish.calibration, partial(load_tokenizer, wish.folder), context_length(config))
    for batch in batches:
        check_vocabulary("calibration", batch["input_ids"], vocabulary_of(config))
    return batches, config


def _facts(wish: PruneWish, stored: StoredModel, batches: Sequence[Batch], config: Any) -> dict[str, list[bytes]]:
    """Return what two runs must have in common for the one to go on where the other stopped."""
    files = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in stored.files]
    return {
        "version": [farms_tb.__version__.encode()],
        "method": [wish.method.encode()],
        "structure": [wish.structure.encode()],
        "seed": [str(wish.seed).encode()],
        "plan": [stored.plan.to_json().encode()],
        "model": [repr(files).encode()],
        "config.json": [] if config is None else [config.to_json_string().encode()],
        "calibration": [part for batch in batches for part in batch_bytes(batch)],
    }


def prune_files(run: PreparedRun, progress: Progress) -> PruneReport:
    """Prune a model and write it; the output appears when it is whole.

    Args:
        run: from `prepare`.
        progress: told what is being done.

    Returns:
        What was done to each layer.

    Raises:
        ValueError: a planned weight is not finite, before anything is pruned; or the model of transformers does
            not hold its weights as the files do, or the inputs of a layer are not finite.
        OSError: the disk is full. What is finished stays, and the same run goes on there.
    """
    start = time.perf_counter()
    try:
        layers = _stream(run, progress) if run.config is None else _with_model(run, progress)
        in_order = {name: layers[name] for name in run.stored.layers}
        report = PruneReport(in_order, run.wish.method, run.wish.structure, time.perf_counter() - start)
        run.unfinished.finish(run.others.copied, _as_json(run, report))
    except ValueError:
        run.unfinished.remove_if_empty()
        raise
    finally:
        run.unfinished.release()
    return report


def _stream(run: PreparedRun, progress: Progress) -> dict[str, PrunedLayer]:
    """Prune tensor by tensor, by magnitude."""
    files = run.stored.files
    if not any(run.unfinished.has(file.name) for file in files):
        check_finite(run.stored, partial(progress, "checking weights"))
    _write(run, _prune_stored, progress)
    return run.unfinished.layers([file.name for file in files])


def _prune_stored(layer: StoredLayer, weight: Tensor) -> PrunedLayer:
    """Make entries of a layer's weight zero, in place, by magnitude."""
    start = time.perf_counter()
    weight.masked_fill_(smallest_entries(weight, layer.layout, layer.target), 0)
    return PrunedLayer(
        block=layer.block,
        size=weight.numel(),
        planned=layer.target.sparsity,
        sparsity=int((weight == 0).sum()) / weight.numel(),
        columns=to_matrix(weight, layer.layout).shape[1],
        inputs=0,
        output_error=None,
        method="magnitude",
        damping=None,
        seconds=time.perf_counter() - start,
    )


def _with_model(run: PreparedRun, progress: Progress) -> Mapping[str, PrunedLayer]:
    """Load the model, prune it block after block, and write its weights."""
    wish, stored = run.wish, run.stored
    progress("loading the model", 0, 1)
    model = load_model(wish.folder, run.config, stored.dtype).to(wish.device)
    try:
        weights = dict(zip(stored.layers, planned_weights(model, stored.plan), strict=True))
    except ValueError as error:
        raise ValueError(
            f"the model that transformers loads does not hold its weights as the files do ({error}): prune by "
            "magnitude without --calibration, or use farms_tb.sparsity.prune in Python with a plan of that model"
        ) from error
    _check_same_weights(wish.folder, stored, weights)
    report = prune(
        model,
        stored.plan,
        wish.method,
        calibration=run.batches,
        structure=wish.structure,
        checkpoint=run.unfinished.blocks,
        progress=partial(progress, "pruning blocks"),
    )
    done = dict(zip(stored.layers, report.layers.values(), strict=True))

    def put(layer: StoredLayer, weight: Tensor) -> PrunedLayer:
        weight.copy_(weights[layer.name].tensor)
        return done[layer.name]

    _write(run, put, progress)
    return done


def _check_same_weights(folder: Path, stored: StoredModel, weights: Mapping[str, PrunableWeight]) -> None:
    """Refuse a loaded model whose planned weights are not those of the files; one is read at a time."""
    for layers in stored.by_tensor.values():
        whole = layers[0].tensor.read()
        for layer in layers:
            loaded = weights[layer.name].tensor
            if tuple(loaded.shape) != layer.shape:
                raise ValueError(
                    f"{printable(layer.name)} has shape {tuple(loaded.shape)} in the model and {layer.shape} in "
                    "the file: load the model yourself and use farms_tb.sparsity.prune in Python"
                )
            expected = layer.view(whole).to(loaded.dtype)
            if not torch.allclose(loaded.detach().cpu(), expected, rtol=0, atol=0, equal_nan=True):
                raise ValueError(
                    f"{printable(layer.name)} has other values in the model that transformers loads from "
                    f"{printable(folder)} than in the file that would be written: does the folder have two sets "
                    "of weights, or an adapter?"
                )


def _write(run: PreparedRun, change: Callable[[StoredLayer, Tensor], PrunedLayer], progress: Progress) -> None:
    """Write the files of weights that are not written yet; `change` alters a layer's weight in place."""
    planned = run.stored.by_tensor
    metadata = _metadata(run)
    part_of = part_of_each(run.wish.model)
    total, number = len(run.stored.layers), 0

    def write_file(source: Path, target: Path) -> dict[str, PrunedLayer]:
        done: dict[str, PrunedLayer] = {}

        def change_tensor(key: str, whole: Tensor) -> None:
            for layer in planned[key]:
                done[layer.name] = change(layer, layer.view(whole))
            progress("writing layers", number + len(done), total)

        # A copy of a tensor in a file that the index does not name for it stays dense, so it is not written.
        strays = {key for key, part in part_of.items() if part != source.name}
        rewrite(source, target, {key: partial(change_tensor, key) for key in planned}, metadata, strays)
        return done

    for source in run.stored.files:
        if not run.unfinished.has(source.name):
            run.unfinished.write(source.name, partial(write_file, source))
        number += len(run.unfinished.layers([source.name]))


def _metadata(run: PreparedRun) -> dict[str, str]:
    """Return what is written into the metadata of each file of weights."""
    wish = run.wish
    return {
        "farms_tb_version": farms_tb.__version__,
        "farms_tb_method": wish.method,
        "farms_tb_structure": wish.structure,
        "farms_tb_seed": str(wish.seed),
        "farms_tb_plan": json.dumps(json.loads(run.stored.plan.to_json()), separators=(",", ":")),
    }


def _as_json(run: PreparedRun, report: PruneReport) -> str:
    """Return the content of `sparsity.json`: what was done, without times, so that equal runs give equal files."""
    wish = run.wish
    calibration = None
    if wish.calibration is not None:
        calibration = {
            "file": wish.calibration.path.name,
            "sequences": len(run.batches),
            "tokens": sum(batch["input_ids"].numel() for batch in run.batches),
        }
    rows = report.rows()
    for row in rows:
        del row["seconds"]
        # NaN, the error of an output that is not finite, is no JSON.
        if not math.isfinite(row["output_error"] or 0.0):
            row["output_error"] = None
    content = {
        "farms_tb": farms_tb.__version__,
        "method": wish.method,
        "structure": wish.structure,
        "seed": wish.seed,
        "calibration": calibration,
        "target": run.stored.plan.total,
        "sparsity": report.sparsity,
        "layers": rows,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
