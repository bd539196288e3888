"""The two ways in: `analyze` for a model, `analyze_checkpoint` for a file of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from torch import nn

from farms_tb.keywords import SpectrumKeywords, resolved, takes_options
from farms_tb.options import SpectrumOptions, as_plain, check_bool
from farms_tb.presets import Preset, with_preset
from farms_tb.report import LayerRecord, Report
from farms_tb.spectra.measure import measure
from farms_tb.spectra.permutation_null import measure_nulls, weight_record, with_nulls
from farms_tb.weights.adapter_files import tensors_with_adapter
from farms_tb.weights.files import stored_tensors, tensors_of_state_dict
from farms_tb.weights.layers import checked_layers
from farms_tb.weights.stored import StoredTensor
from farms_tb.weights.stored_layers import stored_layers

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options(SpectrumOptions)
def analyze(
    model: nn.Module | Mapping[str, Any],
    *,
    null: bool = False,
    histogram: bool = False,
    preset: Preset | None = None,
    spectrum: SpectrumOptions | None = None,
    **options: Unpack[SpectrumKeywords],
) -> Report:
    """Measure how well each layer of a model is trained.

    Args:
        model: any module, on any device. Nothing of it is changed. On the meta device the report is a plan: the
            layers, their shapes and how many eigenvalues a measurement would solve for. Or a state dict, whose
            layers are told by name and shape as in `analyze_checkpoint`.
        null: also measure each layer with its entries shuffled, 8 to 32 times, which tells what alpha a random
            layer of its shape has: `effect`, `z_score` and `verdict` of a record; and whole matrices, for
            `stable_rank` and `num_spikes`. It takes about ten times as long.
        histogram: also count each layer's ESD, the `histogram` of its record.
        preset: measure as a published method does, by its name, see `farms_tb.presets`.
        spectrum: the options below as one object; an option given by name overrides its field.

    Returns:
        A report; `report.layers["conv1"].alpha`, `print(report)`, `report.to_dataframe()`.

    Raises:
        ValueError: an option is out of range, or the model has no layer with a weight matrix.
        TypeError: an option is unknown or has the wrong type, or `model` is neither a module nor a state dict; for
            the path of a file, the message names `analyze_checkpoint`.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> report = analyze(nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 1024)))
        >>> {name: round(record.alpha, 1) for name, record in report.layers.items()}
        {'0': 2.1, '2': 2.1}
    """
    chosen = resolved(SpectrumOptions, spectrum, with_preset(preset, {"spectrum": spectrum}, options))
    check_bool("null", null)
    check_bool("histogram", histogram)
    if isinstance(model, (str, PathLike)):
        raise TypeError(
            f"expected a torch.nn.Module, got the path {fspath(model)!r}: use analyze_checkpoint(path)"
        )
    if isinstance(model, Mapping):
        return _measure_stored(tensors_of_state_dict(model), "the state dict", chosen, null, histogram)
    layers = checked_layers(model, embeddings=chosen.embeddings, adapters=chosen.adapters, plan=True)
    report = measure(layers, chosen, histogram=histogram, whole=null)
    return with_nulls(report, measure_nulls(layers, report, chosen)) if null else report


@takes_options(SpectrumOptions)
def analyze_checkpoint(
    path: str | PathLike[str],
    *,
    null: bool = False,
    histogram: bool = False,
    key: str | None = None,
    base: str | PathLike[str] | None = None,
    preset: Preset | None = None,
    spectrum: SpectrumOptions | None = None,
    **options: Unpack[SpectrumKeywords],
) -> Report:
    """Measure how well each layer is trained, from a file of weights, also of one that somebody else made.

    Nothing in the file is executed: safetensors hold no code, and of a pickle only tensors and plain containers
    are read, objects of other classes are skipped. One layer's weights are in memory at a time, and no file is
    mapped into memory.

    Names, shapes, alphas and statuses are those of `analyze` on the model that the weights come from, with the
    exception of what a file does not tell:

    - the groups of a convolution (it is measured as if it had one), the modes in use of a spectral one; a 1x1
      convolution to one channel without a bias, which has no spectrum, is not listed;
    - a `weight` of a layer type without a rule: it counts as a linear layer or a convolution; a bilinear form
      with at most 31 second inputs, too, where its name does not say what it is; a rule that the user registered;
    - an embedding or a head of an unusual name: embeddings are told by theirs (`emb`, `wte`, `wpe`, `shared`);
    - parametrized, factorised and quantised weights, of which each part is listed with the reason (those that
      torch.ao packs are not), and buffers of two and more dimensions;
    - a layer that the model uses twice (its second name is listed as tied); of weights that several layers share,
      safetensors hold one name, except for the head of a language model whose `config.json` says so;
    - names and shapes that a package changes when it saves, as transformers does with experts, PEFT with
      adapters, and data-parallel wrappers by the prefix `module.`.

    See `farms_tb.weights.stored_layers` for how a layer's type is told.

    Args:
        path: a `.safetensors` file; a directory as Hugging Face saves it, or its `model.safetensors.index.json`
            or `pytorch_model.bin.index.json`; a `.gguf` file; a file by `torch.save` of a state dict or of a dict
            that holds one as `"state_dict"` (a Lightning checkpoint), `"model_state_dict"`, `"model"`, or under
            another key if it is the only one.
        null: also measure each layer with its entries shuffled, as `analyze` does.
        histogram: also count each layer's ESD, the `histogram` of its record.
        key: where the weights lie in a file by `torch.save` that holds several things, `"ema"` or `"a.b"` for a
            dict within a dict; None to find them.
        base: where `path` is a folder with an adapter of PEFT (LoRA or DoRA), the weights that it was trained for,
            `path` of these: the sums are measured, called as the weights are. Without it, A and B are measured.
        preset: measure as a published method does, by its name, see `farms_tb.presets`.
        spectrum: the options below as one object; an option given by name overrides its field.

    Returns:
        A report, its layers called by the path of their parameter without `.weight`; in the order of a torch file,
        and sorted by name from safetensors, which have no order.

    Raises:
        TypeError: an option is unknown or has the wrong type, or `path` is no path.
        FileNotFoundError: no such file, one of several parts is missing, or it was deleted while it was read.
        OSError: the file cannot be opened or read, for lack of permission say.
        ValueError: an option is out of range; `path` is a URL, a folder without weights, or one with several files
            of weights; the file is of a format that is not read, is no checkpoint, is cut short or damaged, holds
            no matrix, several state dicts or none under `key`, or is a pickle of a whole module or program; or it
            changed while it was read.
        ImportError: a `.gguf` file, and the package gguf is not installed.

    Example:
        >>> import tempfile
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(512, 128), torch.nn.ReLU(), torch.nn.Linear(128, 1024))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(model.state_dict(), f"{folder}/weights.pt")
        ...     report = analyze_checkpoint(f"{folder}/weights.pt")
        >>> {name: round(record.alpha, 1) for name, record in report.layers.items()}
        {'0': 2.1, '2': 2.1}
    """
    chosen = resolved(SpectrumOptions, spectrum, with_preset(preset, {"spectrum": spectrum}, options))
    check_bool("null", null)
    check_bool("histogram", histogram)
    if base is None:
        return _measure_stored(stored_tensors(path, key=key), path, chosen, null, histogram)
    if chosen.adapters != "merged":
        raise ValueError(f"base is for adapters='merged', got adapters={chosen.adapters!r}: leave one of them out")
    return _measure_stored(tensors_with_adapter(path, base, key=key), path, chosen, null, histogram)


def _measure_stored(
    tensors: Iterable[StoredTensor], where: object, options: SpectrumOptions, null: bool, histogram: bool
) -> Report:
    """Measure the layers among the tensors of a file or a state dict, one after the other.

    Args:
        tensors: what may be layers.
        where: the file or the state dict, for the message of an error.
        options: how to measure.
        null: also measure the permutation null of each layer.
        histogram: also count each layer's ESD.

    Raises:
        ValueError: none of them is a matrix.
    """
    records: dict[str, LayerRecord] = {}
    for name, found in stored_layers(tensors, embeddings=options.embeddings):
        if isinstance(found, LayerRecord):
            records[name] = found
        else:
            records[name] = weight_record(found, options, histogram=histogram, null=null)
    if not any(_is_matrix(record) for record in records.values()):
        reasons = "".join(f"\n  {name}: {record.status}" for name, record in list(records.items())[:10])
        raise ValueError(f"{where} has no weight that can be analysed" + reasons)
    return Report(records, as_plain(options))


def _is_matrix(record: LayerRecord) -> bool:
    """Return whether a layer has at least two rows and columns, measured or not."""
    return bool(record.shape) and min(record.shape[1:]) > 1
