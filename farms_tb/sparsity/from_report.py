"""From a measurement to a plan: which layers are pruned, and what their alphas are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from farms_tb.keywords import takes_options
from farms_tb.report import LayerRecord, Report
from farms_tb.sparsity.allocation import allocate
from farms_tb.sparsity.calibration import Batch
from farms_tb.sparsity.options import SparsityKeywords, SparsityOptions
from farms_tb.sparsity.plan import SparsityPlan
from farms_tb.weights.blocks import BlockRule, blocks_of

if TYPE_CHECKING:
    from typing_extensions import Unpack


@takes_options(SparsityOptions)
def plan_from_report(
    report: Report,
    target: float,
    *,
    blocks: Mapping[str, str] | BlockRule | None = None,
    outliers: Mapping[str, float] | None = None,
    model: nn.Module | None = None,
    calibration: Iterable[Batch] | None = None,
    **options: Unpack[SparsityKeywords],
) -> SparsityPlan:
    """Allocate sparsity to the layers of a model that was measured.

    Planned are the matrices of real numbers inside the blocks; with `granularity="matrix"` and no blocks, all
    matrices. Everything else stays dense: vectors, embeddings, depthwise convolutions, complex weights. The alpha
    of a layer whose spectrum has collapsed counts as missing, unless `compat` reproduces research code.

    Args:
        report: what `farms_tb.analyze` or `farms_tb.analyze_checkpoint` returned. For `"uniform"` and `"depth"` it
            needs no alphas: that of a model on the meta device will do.
        target: the sparsity over all entries of the planned layers, 0 to 1.
        blocks: as for `allocate`.
        outliers: as for `allocate`.
        model: as for `allocate`.
        calibration: as for `allocate`.

    Returns:
        The plan. Its options hold those of the measurement; its notes name the weights inside the blocks that
        cannot be pruned, quantised ones for example.

    Raises:
        ValueError: no layer can be pruned; for the others see `allocate`.
        TypeError: `report` is none; for the others see `allocate`.

    Example:
        >>> import torch, farms_tb
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(64, 4, 96, batch_first=True), 2)
        >>> plan = plan_from_report(farms_tb.analyze(model), target=0.6, method="depth", epsilon=0.1)
        >>> {name: round(plan.sparsity[name], 2) for name in ("layers.0.linear1", "layers.1.linear1")}
        {'layers.0.linear1': 0.54, 'layers.1.linear1': 0.66}
    """
    chosen = SparsityOptions(**options)
    if not isinstance(report, Report):
        raise TypeError(f"report must be what farms_tb.analyze returned, got {type(report).__name__}")
    found = _blocks(report, blocks)
    members = {name: record for name, record in report.layers.items() if not found or name in found}
    planned = {name: record for name, record in members.items() if _can_be_pruned(record)}
    dense = {name: record for name, record in members.items() if name not in planned}
    if not planned:
        raise ValueError("no layer can be pruned" + _reasons(dense or report.layers))
    plan = allocate(
        {name: _usable_alpha(record, chosen) for name, record in planned.items()},
        {name: record.shape for name, record in planned.items()},
        target,
        blocks={name: found[name] for name in planned if name in found} or blocks,
        errors={name: record.alpha_error for name, record in planned.items()},
        outliers=outliers,
        model=model,
        calibration=calibration,
        **options,
    )
    notes = (*plan.notes, f"these stay dense:{_reasons(dense)}") if dense else plan.notes
    return replace(plan, options={**plan.options, **report.options}, notes=notes)


def _blocks(report: Report, blocks: Mapping[str, str] | BlockRule | None) -> Mapping[str, str]:
    """Return the block of each layer of a report that is in one, whether it can be pruned or not."""
    if isinstance(blocks, Mapping):
        return blocks
    return blocks_of({name: record.shape for name, record in report.layers.items()}, blocks)


def _can_be_pruned(record: LayerRecord) -> bool:
    """Return whether a layer has real matrices of several rows and columns, be it with an alpha or without."""
    return record.kind == "real" and min(record.shape[1:]) > 1


def _usable_alpha(record: LayerRecord, options: SparsityOptions) -> float | None:
    """Return a layer's alpha; None where it tells of a collapsed spectrum, and not of training."""
    if record.collapsed and options.compat is None:
        return None
    return record.alpha


def _reasons(records: Mapping[str, LayerRecord]) -> str:
    """Return a line for each of the first ten layers, with its status or its kind."""
    lines = []
    for name, record in list(records.items())[:10]:
        reason = "complex weights" if record.kind == "spectral" else record.status
        lines.append(f"\n  {name}: {reason}")
    if len(records) > 10:
        lines.append(f"\n  and {len(records) - 10} more")
    return "".join(lines)
