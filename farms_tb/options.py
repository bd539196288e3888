"""The options, checked once, as frozen dataclasses.

- `SpectrumOptions`: how an alpha is measured (weights to alpha).
- `RatioOptions`: how alphas become learning-rate ratios, and which layers take part.
- `ScheduleOptions`: when a callback measures.
- `LoggingOptions`: what a callback logs.

Names, types, defaults and documentation of all options are written here; `farms_tb.keywords` and the recipes
repeat names and types, and tests compare them. Every public entry point takes these objects, and each option as a
keyword argument too. Each object is checked when it is made: a wrong type raises a `TypeError` and a value out of
range a `ValueError`, both name the option. Values are stored as plain Python values (tuples for sequences), so
that options can be compared, hashed and saved.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from farms_tb.missing import cannot_import
from farms_tb.warnings import warn_once

Esd = Literal["farms", "full"]
Fit = Literal["median", "goodness-of-fit", "xmin_peak"]
AssignFunc = Literal[
    "tb_linear_map",
    "tb_sqrt",
    "tb_log2",
    "tb_step",
    "tb_sigmoid",
    "noise_aware",
    "shrinkage",
    "depth",
    "constant",
]
Favor = Literal["large_alpha", "small_alpha"]
Metric = Literal[
    "alpha",
    "ks_distance",
    "alpha_hat",
    "spectral_norm",
    "norm",
    "pooled_stable_rank",
    "stable_rank",
    "norm_stable_rank",
    "entropy",
]
Kind = Literal["real", "spectral"]
Norms = Literal["follow", "base"]
Normalize = Literal["mean"]
Unit = Literal["layer", "block"]
BlockMean = Literal["plain", "weighted"]
Target = Literal["lr", "weight_decay", "both"]
Collapsed = Literal["leave_out", "keep"]
Adapters = Literal["merged", "separate", "base"]
Precision = Literal["auto", "float64"]
Solver = Literal["auto", "torch", "cupy", "cpu"]
XAxis = Literal["epoch", "step"]


class MapTraits(NamedTuple):
    """What a map from alphas to ratios takes, and what it keeps to.

    Attributes:
        takes: what is mapped of each layer: any `"metric"`, `"alpha"` alone, its `"z-score"` or its `"effect"`,
            which need the layer's permutation null, or `"nothing"`, for the static arms of a comparison.
        bounded: whether the ratios stay between `lr_min_ratio` and `lr_max_ratio`. Those of the noise-aware map
            may lie between these and 1, where the bounds do not have 1 between them: bounds of 2 and 3 give ratios
            from 1 to 3.
        above: what the mapped values must exceed.
    """

    takes: Literal["metric", "alpha", "z-score", "effect", "nothing"]
    bounded: bool
    above: float = -math.inf

    @property
    def compares_with_random(self) -> bool:
        """Whether each layer is compared with random layers of its shape."""
        return self.takes in ("z-score", "effect")


MAPS: Mapping[AssignFunc, MapTraits] = {
    "tb_linear_map": MapTraits("metric", bounded=True),
    "tb_sqrt": MapTraits("alpha", bounded=False, above=0),
    "tb_log2": MapTraits("alpha", bounded=False, above=1),
    "tb_step": MapTraits("metric", bounded=True),
    "tb_sigmoid": MapTraits("metric", bounded=False),
    "noise_aware": MapTraits("z-score", bounded=True),
    "shrinkage": MapTraits("effect", bounded=True),
    "depth": MapTraits("nothing", bounded=True),
    "constant": MapTraits("nothing", bounded=True),
}

NUMERICS = ("precision", "solver", "memory_mb", "threads")
"""Options that change how eigenvalues are computed, and an alpha by rounding only."""


def check_choice(argument: str, value: object, choices: Any) -> None:
    """Check that a value is one of a few.

    Args:
        argument: name of the option, for the message.
        value: what the user gave.
        choices: a `Literal` type.

    Raises:
        ValueError: it is not; the message lists the choices.
    """
    valid = get_args(choices)
    if value in valid:
        return
    listed = ", ".join(repr(choice) for choice in valid)
    raise ValueError(f"{argument} must be one of {listed}, got {value!r}")


def check_number(
    argument: str,
    value: object,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> None:
    """Check that a value is a finite real number inside some bounds.

    Args:
        argument: name of the option, for the message.
        value: what the user gave.
        above: the value must be larger.
        at_least: the value must be as large or larger.
        at_most: the value must be as small or smaller.

    Raises:
        TypeError: not an int or a float. True and False are no numbers.
        ValueError: infinite, NaN or out of bounds.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number, got {value!r} of type {type(value).__name__}")
    if not abs(value) <= sys.float_info.max:  # nor is an integer that is no float
        raise ValueError(f"{argument} must be finite, got {value!r:.60}")
    if not value > above:
        raise ValueError(f"{argument} must be above {above}, got {value!r}")
    if not value >= at_least:
        raise ValueError(f"{argument} must be at least {at_least}, got {value!r}")
    if not value <= at_most:
        raise ValueError(f"{argument} must be at most {at_most}, got {value!r}")


def check_integer(argument: str, value: object, at_least: int) -> None:
    """Check that a value is an integer that is large enough.

    Args:
        argument: name of the option, for the message.
        value: what the user gave.
        at_least: the smallest value that is allowed.

    Raises:
        TypeError: not an int. True, False and 2.0 are no integers.
        ValueError: smaller than `at_least`.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be an integer, got {value!r} of type {type(value).__name__}")
    check_number(argument, value, at_least=at_least)


def check_integer_or_none(argument: str, value: object, at_least: int) -> None:
    """Check as `check_integer` does a value that may be None as well."""
    if value is not None:
        check_integer(argument, value, at_least=at_least)


def check_bool(argument: str, value: object) -> None:
    """Check that a value is True or False.

    Args:
        argument: name of the option, for the message.
        value: what the user gave.

    Raises:
        TypeError: it is something else, such as 1 or "yes".
    """
    if not isinstance(value, bool):
        raise TypeError(f"{argument} must be True or False, got {value!r} of type {type(value).__name__}")


def plain_value(value: Any) -> Any:
    """Return a numpy scalar, or an instance of a subclass of str, int or float, as a plain Python value.

    Options end up in checkpoints, and `torch.load(weights_only=True)` refuses all but plain values. Other values
    are returned as they are.
    """
    if isinstance(value, np.longdouble):
        return float(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, str):
        return str.__str__(value)
    # A bool is an int as well, and has no subclasses.
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    return value


def plain_strings(argument: str, values: object) -> tuple[str, ...]:
    """Return a sequence of strings as a tuple of plain strings.

    Args:
        argument: name of the option, for the message.
        values: what the user gave; Hydra and YAML have list types of their own.

    Raises:
        TypeError: `values` is None, a single string, or no sequence of strings.
    """
    if values is None:
        raise TypeError(f"{argument} must be a sequence of strings, got None; for no entry use {argument}=()")
    if isinstance(values, (str, bytes)):
        raise TypeError(f"{argument} must be a sequence of strings, got {values!r}; use {argument}=[{values!r}]")
    if not isinstance(values, Iterable) or isinstance(values, Mapping):
        raise TypeError(
            f"{argument} must be a sequence of strings, got {values!r} of type {type(values).__name__}"
        )
    found = tuple(plain_value(value) for value in values)
    if not all(isinstance(value, str) for value in found):
        raise TypeError(f"{argument} must be a sequence of strings, got {values!r}")
    return found


def plain_fixed(ratios: object) -> tuple[tuple[str, float], ...]:
    """Return the option `fixed`, ratios by pattern, as a tuple of pairs, which can be compared, hashed and saved.

    Args:
        ratios: what the user gave: a mapping, or pairs, as a checkpoint gives them back.

    Raises:
        TypeError: neither, or a pattern or a ratio of the wrong type.
        ValueError: a ratio that is negative or not finite.
    """
    pairs = ratios.items() if isinstance(ratios, Mapping) else ratios
    if isinstance(pairs, (str, bytes)) or not isinstance(pairs, Iterable):
        raise TypeError(f'fixed must map patterns to ratios, as {{"embed*": 5.0}}, got {ratios!r}')
    found = []
    for pair in pairs:
        if isinstance(pair, (str, bytes)) or not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(f'fixed must map patterns to ratios, as {{"embed*": 5.0}}, got {ratios!r}')
        pattern, ratio = plain_value(pair[0]), plain_value(pair[1])
        if not isinstance(pattern, str):
            raise TypeError(f"fixed must have patterns of names as keys, got {pattern!r}")
        check_number(f"fixed[{pattern!r}]", ratio, at_least=0)
        found.append((pattern, float(ratio)))
    return tuple(found)


@dataclass(frozen=True)
class Time:
    """A point of a training run: so many epochs or optimizer steps, or a fraction of all its steps.

    Attributes:
        amount: how many.
        unit: of what.
    """

    amount: float
    unit: Literal["epochs", "steps", "fraction"]

    def __str__(self) -> str:
        return f"{self.amount:g}" if self.unit == "fraction" else f"{self.amount:g} {self.unit}"


def parsed_time(argument: str, value: object) -> Time:
    """Return the point of time that an option names.

    Args:
        argument: name of the option, for the message.
        value: a number from 0 to 1, the fraction of the run, or a text such as `"2 epochs"` or `"500 steps"`.

    Raises:
        TypeError: neither a number nor a text.
        ValueError: a fraction out of range, or a text of another form.
    """
    if isinstance(value, str):
        found = re.fullmatch(r"(\d+) (epoch|step)s?", value.strip())
        if found is None:
            raise ValueError(f"{argument} must be a fraction, 'N epochs' or 'N steps', got {value!r}")
        return Time(int(found[1]), "epochs" if found[2] == "epoch" else "steps")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a fraction, 'N epochs' or 'N steps', got {value!r}")
    check_number(f"{argument}, a fraction of the run,", value, at_least=0, at_most=1)
    return Time(value, "fraction")


def make_plain(options: Any) -> None:
    """Replace the numpy values among the fields of a frozen dataclass by plain ones."""
    for field in fields(options):
        object.__setattr__(options, field.name, plain_value(getattr(options, field.name)))


@dataclass(frozen=True)
class SpectrumOptions:
    """How a layer's alpha is measured.

    Attributes:
        esd: `"farms"` fits windows of one fixed aspect ratio (Hu et al., ICML 2025), `"full"` the whole weight
            matrix (TempBalance, Zhou et al., NeurIPS 2023).
        fit: where the power-law tail begins. `"median"`: at the eigenvalue of rank N / `xmin_pos`;
            `"goodness-of-fit"`: where the Kolmogorov-Smirnov distance is smallest; `"xmin_peak"`: the same
            search near the peak of the ESD.
        aspect_ratio: columns / rows of a window.
        window: rows of a window of a linear layer. Smaller matrices get the largest window of the same aspect
            ratio that fits.
        windows_per_dim: start positions of windows along each dimension of a linear layer.
        window_step: a fixed distance between start positions, instead of `windows_per_dim`.
        xmin_pos: the median fit's divisor: 2 takes the upper half of the eigenvalues as the tail.
        filter_zeros: drop eigenvalues below 1e-5 before the fit, as the papers do on request (all are kept
            where none would be left).
        relative_cutoff: drop eigenvalues below this fraction of the largest one. Unlike `filter_zeros` it does
            not depend on the scale of the weights. 0 drops none.
        min_eigenvalues: a sample with fewer eigenvalues has no alpha.
        embeddings: measure lookup tables as well, each as one matrix (entries, width). Balancing then treats them
            as any other layer.
        adapters: what is measured of a layer with adapters by PEFT. `"merged"`: the sum of weight and active
            adapters, LoRA or DoRA, that the network computes with; `"base"`: the weight without them. Both are one
            layer, whose ratio all of its trained parts take. `"separate"`: weight, A and B are three layers.
        precision: `"auto"` solves in single precision where the relative error that this makes in alpha is at most
            5e-5, `"float64"` never does.
        solver: what solves for eigenvalues on a GPU: `"torch"`, `"cupy"`, `"cpu"`, or `"auto"` for whichever is
            the fastest in a trial of each size of windows, see `farms_tb.spectra.solvers`.
        memory_mb: megabytes (MiB) that solving may take at a time, on top of the model.
        threads: threads of the CPU that solve at a time; None for as many as torch may use.
    """

    esd: Esd = "farms"
    fit: Fit = "median"
    aspect_ratio: float = 1.0
    window: int = 100
    windows_per_dim: int = 9
    window_step: int | None = None
    xmin_pos: float = 2.0
    filter_zeros: bool = False
    relative_cutoff: float = 0.0
    min_eigenvalues: int = 5
    embeddings: bool = False
    adapters: Adapters = "merged"
    precision: Precision = "auto"
    solver: Solver = "auto"
    memory_mb: int = 512
    threads: int | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        check_choice("esd", self.esd, Esd)
        check_choice("fit", self.fit, Fit)
        check_number("aspect_ratio", self.aspect_ratio, above=0)
        check_integer("window", self.window, at_least=2)
        check_integer("windows_per_dim", self.windows_per_dim, at_least=1)
        check_integer_or_none("window_step", self.window_step, at_least=1)
        check_number("xmin_pos", self.xmin_pos, above=1)
        check_bool("filter_zeros", self.filter_zeros)
        check_number("relative_cutoff", self.relative_cutoff, at_least=0)
        if self.relative_cutoff >= 1:
            raise ValueError(f"relative_cutoff must be below 1, got {self.relative_cutoff!r}")
        check_integer("min_eigenvalues", self.min_eigenvalues, at_least=2)
        check_bool("embeddings", self.embeddings)
        check_choice("adapters", self.adapters, Adapters)
        check_choice("precision", self.precision, Precision)
        check_choice("solver", self.solver, Solver)
        if self.solver == "cupy":
            try:
                import_module("cupy")
            except Exception as error:  # one that is installed for another CUDA raises anything
                remedy = "pip install cupy-cuda13x (or 12x), or use solver='auto'"
                raise ValueError(cannot_import("solver='cupy'", error, remedy)) from error
        check_integer("memory_mb", self.memory_mb, at_least=1)
        check_integer_or_none("threads", self.threads, at_least=1)

    @property
    def memory_bytes(self) -> int:
        """`memory_mb` in bytes."""
        return self.memory_mb * 2**20


@dataclass(frozen=True)
class RatioOptions:
    """How alphas become learning-rate ratios, and which layers take part.

    Attributes:
        assign_func: the map from alphas to ratios, see `farms_tb.lr_ratios`. The default, `"shrinkage"`, compares
            each layer with random layers of its shape, so that differences that are noise hardly move learning
            rates; it measures shuffled layers once, at the start. `"tb_linear_map"` is that of the papers.
        lr_min_ratio: lower bound of the ratios; with `"tb_linear_map"` that of the smallest alpha. `"tb_sqrt"`,
            `"tb_log2"` and `"tb_sigmoid"` have no such bounds.
        lr_max_ratio: upper bound of the ratios; with `"tb_linear_map"` that of the largest alpha. With both bounds
            at 1 nothing is balanced, only measured, whatever the map.
        sigmoid_min: strength of the sigmoid map at or below the mean alpha.
        sigmoid_max: strength of the sigmoid map above it.
        sigmoid_tau: steepness of the sigmoid map.
        ratio_levels: round the mapped ratios to this many values, so that a step has few different learning rates.
        metric: the metric of a layer that is mapped; `"alpha"` in the papers. `"stable_rank"` is an older name of
            `"pooled_stable_rank"`, the papers' metric, and not the stable rank of the matrix.
        exclude_first: leave the first matrix layer, in order of registration, at ratio 1.
        exclude_last: leave the last matrix layer at ratio 1.
        exclude: shell-style patterns of layer names to leave at ratio 1, matched from any dot: `"lifting.*"`.
        balance: the kinds of layers that are balanced, each kind within itself: `"real"` weights, complex
            `"spectral"` ones, or both. The others are measured and keep ratio 1.
        collapsed: `"leave_out"` keeps layers whose spectrum has collapsed out of the map, at ratio 1: their alpha
            is small, but not because they are well trained. `"keep"` maps them like any other, as in the papers.
        norms: `"follow"` gives a normalisation layer the ratio of the layer before it: of `conv1` for `bn1`, else
            of the last one registered before it with as many outputs; `"base"` ratio 1, which `unit="block"`
            refuses.
        favor: which layers get the larger ratios: `"large_alpha"`, as in the papers, those that have learnt less;
            `"small_alpha"` those that have learnt more. `"depth"` and `"constant"` look at neither.
        normalize: `"mean"` divides the mapped ratios by their mean, in which a layer weighs as much as it has
            entries, so that balancing does not change the overall learning rate. Ratios may lie outside the bounds
            then. None leaves them as mapped.
        exclude_heads: leave the layers of a transformers model that are not in its base model at ratio 1.
        fixed: ratios that are set instead of mapped, by shell-style patterns of layers or parameters, matched as
            in `exclude`: `{"embed*": 5.0, "lm_head": 5.0}`. Where several match, the first one counts. A layer
            whose weights are named is fixed as well; norms follow a fixed layer as any other.
        unit: what has a ratio of its own: a `"layer"`, or a `"block"` of repeated ones. The mean over the layers
            of a block is mapped, and all of its parameters, norms and biases too, take its ratio. Layers outside
            of blocks keep ratio 1, and `exclude_first` and `exclude_last` have no effect.
        blocks: shell-style patterns of the paths of blocks, `"encoder.layer.*"`, where they are not found by
            themselves, see `farms_tb.weights.blocks.blocks_of`.
        block_mean: how the layers of a block are averaged: all alike, `"plain"`, or `"weighted"` by 1 / squared
            standard error.
        permute: seed of a permutation by which the mapped ratios are dealt out among the layers: a placebo, whose
            layers train at unequal rates that have nothing to do with their alphas. Layers without an alpha are
            dealt one, too. Where other layers take part than before, all are dealt anew. None leaves ratios in
            place.
        target: what the ratios scale: the learning rate, `"weight_decay"`, or `"both"`.
        decay_follows_lr: whether a parameter's decay in a step, lr * weight_decay, is scaled along with its
            learning rate, as it is in torch. False keeps it, or leaves it to `target`.
    """

    assign_func: AssignFunc = "shrinkage"
    lr_min_ratio: float = 0.5
    lr_max_ratio: float = 1.5
    sigmoid_min: float = 0.5
    sigmoid_max: float = 0.5
    sigmoid_tau: float = 10.0
    ratio_levels: int | None = None
    metric: Metric = "alpha"
    exclude_first: bool = True
    exclude_last: bool = True
    exclude: Sequence[str] = ()
    balance: Sequence[Kind] = ("real",)
    norms: Norms = "follow"
    collapsed: Collapsed = "leave_out"
    favor: Favor = "large_alpha"
    normalize: Normalize | None = None
    exclude_heads: bool = False
    fixed: Mapping[str, float] | Sequence[tuple[str, float]] = ()
    unit: Unit = "layer"
    blocks: Sequence[str] = ()
    block_mean: BlockMean = "plain"
    permute: int | None = None
    target: Target = "lr"
    decay_follows_lr: bool = True

    def __post_init__(self) -> None:
        make_plain(self)
        check_choice("assign_func", self.assign_func, AssignFunc)
        check_number("lr_min_ratio", self.lr_min_ratio, at_least=0)
        check_number("lr_max_ratio", self.lr_max_ratio, above=0)
        if self.lr_min_ratio > self.lr_max_ratio:
            raise ValueError(
                f"lr_min_ratio must not exceed lr_max_ratio, got lr_min_ratio={self.lr_min_ratio!r} and "
                f"lr_max_ratio={self.lr_max_ratio!r}"
            )
        # Powers of ten: far stronger than any use, and far from where a float overflows.
        check_number("sigmoid_min", self.sigmoid_min, at_least=0, at_most=100)
        check_number("sigmoid_max", self.sigmoid_max, at_least=0, at_most=100)
        check_number("sigmoid_tau", self.sigmoid_tau, above=0)
        check_integer_or_none("ratio_levels", self.ratio_levels, at_least=2)
        check_choice("metric", self.metric, Metric)
        check_bool("exclude_first", self.exclude_first)
        check_bool("exclude_last", self.exclude_last)
        check_choice("norms", self.norms, Norms)
        check_choice("collapsed", self.collapsed, Collapsed)
        check_choice("favor", self.favor, Favor)
        if self.normalize is not None:
            check_choice("normalize", self.normalize, Normalize)
        check_bool("exclude_heads", self.exclude_heads)
        check_choice("unit", self.unit, Unit)
        check_integer_or_none("permute", self.permute, at_least=0)
        check_choice("block_mean", self.block_mean, BlockMean)
        check_choice("target", self.target, Target)
        check_bool("decay_follows_lr", self.decay_follows_lr)
        object.__setattr__(self, "fixed", plain_fixed(self.fixed))
        for argument in ("exclude", "balance", "blocks"):
            # Hydra hands over its own list type; a tuple is comparable, hashable and safe to store.
            object.__setattr__(self, argument, plain_strings(argument, getattr(self, argument)))
        for kind in self.balance:
            check_choice("balance", kind, Kind)
        self._check_unit()
        traits = MAPS[self.assign_func]
        if self.metric != "alpha" and traits.takes == "alpha":
            raise ValueError(
                f"assign_func={self.assign_func!r} is defined for metric='alpha', whose values are "
                f"above 1, got metric={self.metric!r}; use 'tb_linear_map', 'tb_step' or 'tb_sigmoid'"
            )
        if self.metric != "alpha" and traits.compares_with_random:
            raise ValueError(
                f"assign_func={self.assign_func!r} compares alpha with that of random layers, it knows no other "
                f"metric: got metric={self.metric!r}; pass assign_func='tb_linear_map' to map it"
            )

    @property
    def fixed_pairs(self) -> tuple[tuple[str, float], ...]:
        """`fixed` as pairs of pattern and ratio, which is how it is stored."""
        return plain_fixed(self.fixed)

    @property
    def maps_nothing(self) -> bool:
        """Whether every ratio of the map is 1 by the options alone."""
        return self.lr_min_ratio == self.lr_max_ratio == 1 or not self.balance

    @property
    def only_measures(self) -> bool:
        """Whether every learning rate is the base one by the options alone: no optimizer has to be changed."""
        return self.maps_nothing and all(ratio == 1 for _, ratio in self.fixed_pairs)

    @property
    def compares_with_random(self) -> bool:
        """Whether the map needs the permutation null of each layer, which takes many measurements.

        Where nothing is mapped, nothing is compared.
        """
        return MAPS[self.assign_func].compares_with_random and not self.maps_nothing

    def _check_unit(self) -> None:
        """Raise where options of blocks contradict each other."""
        if self.unit == "layer" and (self.blocks or self.block_mean != "plain"):
            raise ValueError("blocks and block_mean are for unit='block', got unit='layer'")
        if self.unit == "block" and MAPS[self.assign_func].takes == "z-score":
            raise ValueError("unit='block' has no z-scores: use assign_func='shrinkage' in place of 'noise_aware'")
        if self.unit == "block" and self.norms == "base":
            raise ValueError(
                "norms='base' has no effect with unit='block', where norms have the ratio of their block: leave "
                "it out, or fix the ratios of the norms by their names, as in fixed={'*norm*': 1.0}"
            )
        if self.block_mean == "weighted" and self.metric != "alpha":
            raise ValueError(
                f"block_mean='weighted' needs standard errors, which alpha alone has, got metric={self.metric!r}"
            )


@dataclass(frozen=True)
class ScheduleOptions:
    """When a callback measures.

    With Lightning's manual optimization, where a batch may have any number of optimizer steps, a step is a batch.

    Attributes:
        every_n_epochs: measure at the start of every n-th epoch.
        every_n_steps: measure every n optimizer steps instead of by epochs.
        lag_steps: let a GPU measure in the background, on CUDA streams of its own, and apply the ratios this many
            optimizer steps after the weights were read, exactly, so that runs stay reproducible; at the next
            measurement, where that is sooner. Training waits
            for the first measurement and for that of the final weights. Needs memory for a copy of the layers'
            weights; models on the CPU are measured at once, with the same results. 0 waits at each measurement.
        measurements_per_epoch: measure this many times an epoch, at equal numbers of optimizer steps, instead of
            once. Every epoch is taken to be as long as the one in which the run began or was resumed: where
            dataloaders grow or shrink, use `every_n_steps`.
        start: when ratios begin to apply: a fraction of the run from 0 to 1, `"2 epochs"` or `"500 steps"`. Before
            it layers are measured and logged, and every ratio is 1.
        until: when measuring ends, likewise: from then on the last ratios stay, and only the final weights are
            measured, for report and loggers. 1 is the end of the run.
        ramp_steps: let the ratios grow from 1 to their values over this many optimizer steps after `start`.
    """

    every_n_epochs: int = 1
    every_n_steps: int | None = None
    lag_steps: int = 0
    measurements_per_epoch: int | None = None
    start: float | str = 0
    until: float | str = 1
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        make_plain(self)
        check_integer("every_n_epochs", self.every_n_epochs, at_least=1)
        check_integer_or_none("every_n_steps", self.every_n_steps, at_least=1)
        check_integer("lag_steps", self.lag_steps, at_least=0)
        check_integer_or_none("measurements_per_epoch", self.measurements_per_epoch, at_least=1)
        check_integer("ramp_steps", self.ramp_steps, at_least=0)
        self._check_one_spacing()
        start, until = parsed_time("start", self.start), parsed_time("until", self.until)
        if start.unit == until.unit and not start.amount < until.amount:
            raise ValueError(f"until must be later than start, got start={self.start!r} and until={self.until!r}")

    @property
    def by_steps(self) -> bool:
        """Whether optimizer steps say when to measure, and not epochs."""
        return self.every_n_steps is not None or self.measurements_per_epoch is not None

    @property
    def needs_length(self) -> bool:
        """Whether the options depend on how many steps the run, or an epoch of it, has."""
        times = parsed_time("start", self.start), parsed_time("until", self.until)
        has_fraction = any(time.unit == "fraction" and 0 < time.amount < 1 for time in times)
        # Only with the length of an epoch can the two be compared.
        has_both = {time.unit for time in times} == {"epochs", "steps"}
        return has_fraction or has_both or self.measurements_per_epoch is not None

    def _check_one_spacing(self) -> None:
        """Warn of an option that has no effect next to another, and refuse two that contradict each other."""
        if self.every_n_steps is not None and self.measurements_per_epoch is not None:
            raise ValueError(
                f"every_n_steps={self.every_n_steps} and measurements_per_epoch={self.measurements_per_epoch} "
                "both say when to measure: leave one of the two out, or set it to None"
            )
        chosen = "every_n_steps" if self.every_n_steps is not None else "measurements_per_epoch"
        number = getattr(self, chosen)
        if number is not None and self.every_n_epochs != 1:
            warn_once(
                f"{chosen}={number} replaces every_n_epochs={self.every_n_epochs}, which has no effect: leave one "
                "of the two out",
                ScheduleOptions,
            )


@dataclass(frozen=True)
class LoggingOptions:
    """What a callback logs.

    Attributes:
        log: log to the trainer's loggers, under Hugging Face to its reporters and to `state.log_history`.
        histogram_every_n: log the ESD of each layer, as a histogram of log10 of the eigenvalues, at every n-th
            measurement (W&B and TensorBoard).
        table_every_n: log the whole report as a table, and with matplotlib pictures of the run so far, at every
            n-th measurement and of the final weights (W&B, TensorBoard, MLflow). In a resumed run, the pictures
            begin where it was resumed.
        verdicts: compare each layer with its own entries shuffled, and log effects and the shares of verdicts. The
            first weights are shuffled, once, which takes as long as 8 to 32 measurements.
        x_axis: what W&B plots the curves against, `"epoch"` or `"step"`. None: epochs, and steps with
            `every_n_steps` or `measurements_per_epoch`.
    """

    log: bool = True
    histogram_every_n: int | None = None
    table_every_n: int | None = None
    verdicts: bool = False
    x_axis: XAxis | None = None

    def __post_init__(self) -> None:
        make_plain(self)
        check_bool("log", self.log)
        check_integer_or_none("histogram_every_n", self.histogram_every_n, at_least=1)
        check_integer_or_none("table_every_n", self.table_every_n, at_least=1)
        check_bool("verdicts", self.verdicts)
        if self.x_axis is not None:
            check_choice("x_axis", self.x_axis, XAxis)


Options = SpectrumOptions | RatioOptions | ScheduleOptions | LoggingOptions


def as_plain(*options: Options) -> dict[str, Any]:
    """Return options as one flat dict of plain values, safe in a checkpoint loaded with `weights_only`.

    Args:
        *options: options of different classes, which have no field in common.

    Returns:
        Values by name, in the order of the fields; tuples as lists, as JSON would give them back.
    """
    plain: dict[str, Any] = {}
    for part in options:
        for name, value in asdict(part).items():
            plain[name] = _as_lists(value)
    return plain


def _as_lists(value: Any) -> Any:
    """Return a tuple as a list, and the tuples in it too; other values as they are."""
    return [_as_lists(one) for one in value] if isinstance(value, tuple) else value
