"""Sparsity: how much of each layer is pruned, and the pruning itself.

- `allocate(alphas, sizes, target)`: a plan, the sparsity of each layer.
- `plan_from_report(analyze(model), target)`: the same from a measurement.
- `SparsityPlan`, `PlannedLayer`: what a plan holds; `SparsityPlan.load(path)`.
- `SparsityOptions`: what an allocation can be asked for.
- `prune(model, plan, "wanda", calibration=batches)`: zeros in the model's weights, or masks, and a report.
- `perplexity(model, tokens)`: of a language model by the protocol of the papers, compared segment by segment.
- `zero_shot(model, tokenizer, tasks)`: accuracies by `lm-eval`.
- `to_llm_compressor(plan, model)`, `to_torchao(plan, model)`: a plan as the tables that these packages prune by.
- `outlier_shares(model, blocks, batches)`: what the method `"owl"` goes by.
- `compare_with_depth(plan)`: how far the plan is from the uniform one and from a straight line in depth.
"""

from farms_tb.sparsity.advice import DepthComparison, compare_with_depth
from farms_tb.sparsity.allocation import allocate
from farms_tb.sparsity.export import to_llm_compressor, to_torchao
from farms_tb.sparsity.from_report import plan_from_report
from farms_tb.sparsity.options import SparsityOptions
from farms_tb.sparsity.owl import outlier_shares
from farms_tb.sparsity.perplexity import Perplexity, PerplexityComparison, perplexity
from farms_tb.sparsity.plan import PlannedLayer, SparsityPlan
from farms_tb.sparsity.prune import prune
from farms_tb.sparsity.prune_report import PrunedLayer, PruneReport
from farms_tb.sparsity.zero_shot import TaskAccuracy, zero_shot

__all__ = [
    "DepthComparison",
    "Perplexity",
    "PerplexityComparison",
    "PlannedLayer",
    "PruneReport",
    "PrunedLayer",
    "SparsityOptions",
    "SparsityPlan",
    "TaskAccuracy",
    "allocate",
    "compare_with_depth",
    "outlier_shares",
    "perplexity",
    "plan_from_report",
    "prune",
    "to_llm_compressor",
    "to_torchao",
    "zero_shot",
]
