"""The two ways in: `analyze` for a model, `analyze_checkpoint` for a file of weights."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

from torch import nn

from farms_tb.keywords import SpectrumKeywords, resolved, takes_options
from farms_tb.options import SpectrumOptions, as_plain, check_bool
from farms_tb.report import LayerRecord, Report
from farms_tb.spectra.measure import Nulls, measure, measure_nulls, weight_record, with_nulls
from farms_tb.weights.files import stored_layers, stored_tensors
from farms_tb.weights.layers import checked_layers

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options(SpectrumOptions)
def analyze(
    model: nn.Module,
    *,
    null: bool = False,
    histogram: bool = False,
    spectrum: SpectrumOptions | None = None,
    **options: Unpack[SpectrumKeywords],
) -> Report:
    """Measure how well each layer of a model is trained.

    Args:
        model: any module, on any device. Nothing of it is changed. On the meta device the report is a plan: the
            layers, their shapes and how many eigenvalues a measurement would solve for.
        null: also measure layers with their entries shuffled, 8 to 32 times for each shape, which tells what alpha
            a random layer of that shape has: `null_mean`, `null_std` and `z_score` of a record.
        histogram: also count each layer's ESD, the `histogram` of its record.
        spectrum: the options below as one object; an option given by name overrides its field.

    Returns:
        A report; `report.layers["conv1"].alpha`, `print(report)`, `report.to_dataframe()`.

    Raises:
        ValueError: an option is out of range, or the model has no layer with a weight matrix.
        TypeError: an option is unknown or has the wrong type, or `model` is not a module.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> report = analyze(nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 1024)))
        >>> {name: round(record.alpha, 1) for name, record in report.layers.items()}
        {'0': 2.1, '2': 2.1}
    """
    chosen = resolved(SpectrumOptions, spectrum, options)
    check_bool("null", null)
    check_bool("histogram", histogram)
    layers = checked_layers(model, plan=True)
    report = measure(layers, chosen, histogram=histogram)
    return with_nulls(report, measure_nulls(layers, report, chosen)) if null else report


@takes_options(SpectrumOptions)
def analyze_checkpoint(
    path: str | PathLike[str],
    *,
    null: bool = False,
    histogram: bool = False,
    spectrum: SpectrumOptions | None = None,
    **options: Unpack[SpectrumKeywords],
) -> Report:
    """Measure how well each layer is trained, from a file of weights, also of one that somebody else made.

    Nothing in the file is executed: safetensors hold no code, and of a pickle only tensors and plain containers
    are read (`torch.load(weights_only=True)`). One layer's weights are in memory at a time, but for torch files:
    those of before version 1.6 are read whole, later ones are mapped into memory, which the system takes back
    when it needs it.

    The alphas are those of `analyze` on the model that the weights come from, with the exception of what a file
    does not tell: the groups of a convolution (it is measured as if it had one), the modes in use of a spectral
    one, layers registered by the user. See `farms_tb.weights.files` for how a layer's type is told.

    Args:
        path: a `.safetensors` file; a directory as Hugging Face saves it, or its `model.safetensors.index.json`
            or `pytorch_model.bin.index.json`; a file by `torch.save` of a state dict or of a dict that holds one
            as `"state_dict"` (a Lightning checkpoint), `"model_state_dict"` or `"model"`.
        null: also measure a layer of each shape with its entries shuffled.
        histogram: also count each layer's ESD, the `histogram` of its record.
        spectrum: the options below as one object; an option given by name overrides its field.

    Returns:
        A report, its layers called by the path of their parameter without `.weight`; in the order of a torch file,
        and sorted by name from safetensors, which have no order.

    Raises:
        TypeError: an option is unknown or has the wrong type.
        FileNotFoundError: no such file, or one of several parts is missing.
        ValueError: an option is out of range; or the file is cut short, is no checkpoint, holds no matrix, or is a
            pickle of more than weights.
        ImportError: a `.safetensors` file, and the package safetensors is not installed.

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
    chosen = resolved(SpectrumOptions, spectrum, options)
    check_bool("null", null)
    check_bool("histogram", histogram)
    nulls: Nulls | None = {} if null else None
    records = {
        name: found
        if isinstance(found, LayerRecord)
        else weight_record(found, chosen, histogram=histogram, nulls=nulls)
        for name, found in stored_layers(stored_tensors(path))
    }
    if not any(record.shape and min(record.shape[1:]) > 1 for record in records.values()):
        reasons = "".join(f"\n  {name}: {record.status}" for name, record in list(records.items())[:10])
        raise ValueError(f"{path} has no weight that can be analysed" + reasons)
    return Report(records, as_plain(chosen))
