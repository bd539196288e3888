"""What an allocation of sparsity can be asked for, checked once, as a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypedDict

from farms_tb.options import check_choice, check_integer, check_number, make_plain

Method = Literal["alpha", "uniform", "depth", "shuffled", "owl", "shrinkage", "search"]
Granularity = Literal["block", "matrix", "mixed"]
Compat = Literal["farms", "alphapruning"]
PruneMethod = Literal["magnitude", "wanda", "sparsegpt"]

ALPHA_METHODS: tuple[Method, ...] = ("alpha", "shuffled", "shrinkage", "search")
"""The methods of allocation that go by alphas."""


class PruneTraits(NamedTuple):
    """What a way of pruning needs, and what it does.

    Attributes:
        needs_inputs: it goes by the inputs of each layer, and so needs calibration data.
        needs_hessian: it needs the sums X X^T of the inputs as well, which take memory and time.
        corrects: it changes the entries that stay.
    """

    needs_inputs: bool
    needs_hessian: bool = False
    corrects: bool = False


PRUNE_METHODS: dict[PruneMethod, PruneTraits] = {
    "magnitude": PruneTraits(needs_inputs=False),
    "wanda": PruneTraits(needs_inputs=True),
    "sparsegpt": PruneTraits(needs_inputs=True, needs_hessian=True, corrects=True),
}
"""The methods of pruning; how each chooses entries is in `farms_tb.sparsity.methods`."""


@dataclass(frozen=True)
class SparsityOptions:
    """How the sparsity of a model is allocated to its layers.

    Attributes:
        method: `"alpha"` prunes layers with a large alpha more (AlphaPruning, FARMS), `"shrinkage"` does it as far
            as the alphas are known; `"uniform"` gives every layer the target, `"depth"` a straight line from the
            first block to the last, `"shuffled"` the sparsities of `"alpha"` in random order (a placebo);
            `"owl"` takes each block's share of outliers (Yin et al., 2023); `"search"` mixes line, alpha and
            shrinkage as the loss on calibration data prefers.
        epsilon: half-width of the range of sparsities, relative to the target; the papers call it tau, and have
            0.2 to 0.6 for LLaMA at a target of 0.7. The default is what a small language model bears, see
            `docs/results/sparsity`. With `"search"`, its first step.
        granularity: `"block"` gives all matrices of a block one sparsity, `"matrix"` each its own, `"mixed"` each
            its own within that of its block.
        min_sparsity: no layer gets a smaller sparsity.
        max_sparsity: no layer gets a larger sparsity.
        owl_lambda: with `"owl"`, half-width of the range of sparsities, in absolute terms.
        compat: reproduce the research code of `"farms"` or `"alphapruning"`: no bounds, no protection against
            outliers; `"farms"` cuts sparsities above 1, which misses the target.
        seed: of the order of `"shuffled"`.
        prune_method: with `"search"`, how candidates are pruned: `"magnitude"`, `"wanda"` or `"sparsegpt"`.
        evaluations: with `"search"`, candidates to try at most, the uniform one among them.
    """

    method: Method = "alpha"
    epsilon: float = 0.1
    granularity: Granularity = "block"
    min_sparsity: float = 0.0
    max_sparsity: float = 0.99
    owl_lambda: float = 0.08
    compat: Compat | None = None
    seed: int = 0
    prune_method: PruneMethod = "wanda"
    evaluations: int = 24

    def __post_init__(self) -> None:
        make_plain(self)
        check_choice("method", self.method, Method)
        check_number("epsilon", self.epsilon, at_least=0, at_most=1)
        if self.method == "search" and self.epsilon == 0:
            raise ValueError("epsilon=0 leaves method='search' no step: pass a larger one, or method='uniform'")
        check_choice("granularity", self.granularity, Granularity)
        check_number("min_sparsity", self.min_sparsity, at_least=0, at_most=1)
        check_number("max_sparsity", self.max_sparsity, at_least=0, at_most=1)
        if self.min_sparsity > self.max_sparsity:
            raise ValueError(
                f"min_sparsity must not exceed max_sparsity, got min_sparsity={self.min_sparsity!r} and "
                f"max_sparsity={self.max_sparsity!r}"
            )
        check_number("owl_lambda", self.owl_lambda, at_least=0, at_most=0.5)
        check_integer("seed", self.seed, at_least=0)
        check_choice("prune_method", self.prune_method, PruneMethod)
        check_integer("evaluations", self.evaluations, at_least=1)
        if self.compat is not None:
            check_choice("compat", self.compat, Compat)
            if self.method != "alpha":
                raise ValueError(
                    f"compat={self.compat!r} reproduces method='alpha' of the research code, got "
                    f"method={self.method!r}: leave one of the two out"
                )
            if self.granularity == "mixed":
                raise ValueError(f"compat={self.compat!r} has no granularity='mixed', which no research code has")
        if self.granularity == "mixed" and self.method != "alpha":
            raise ValueError(f"granularity='mixed' is for method='alpha', got method={self.method!r}")


class SparsityKeywords(TypedDict, total=False):
    """The fields of `SparsityOptions`."""

    method: Method
    epsilon: float
    granularity: Granularity
    min_sparsity: float
    max_sparsity: float
    owl_lambda: float
    compat: Compat | None
    seed: int
    prune_method: PruneMethod
    evaluations: int
