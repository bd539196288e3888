"""Sparsity: how much of each layer is pruned, and the pruning itself.

- `allocate(alphas, sizes, target)`: a plan, the sparsity of each layer.
- `plan_from_report(analyze(model), target)`: the same from a measurement.
- `SparsityPlan`, `PlannedLayer`: what a plan holds; `SparsityPlan.load(path)`.
- `SparsityOptions`: what an allocation can be asked for.
- `compare_with_depth(plan)`: how far the plan is from the uniform one and from a straight line in depth.
"""

from farms_tb.sparsity.advice import DepthComparison, compare_with_depth
from farms_tb.sparsity.allocation import allocate
from farms_tb.sparsity.from_report import plan_from_report
from farms_tb.sparsity.options import SparsityOptions
from farms_tb.sparsity.plan import PlannedLayer, SparsityPlan

__all__ = [
    "DepthComparison",
    "PlannedLayer",
    "SparsityOptions",
    "SparsityPlan",
    "allocate",
    "compare_with_depth",
    "plan_from_report",
]
