"""How often a verdict is wrong: over random layers of every common initialiser, and over planted trained ones.

    python -m benchmarks.verdicts                     # half an hour on one core
    python -m benchmarks.verdicts --layers 200 --largest 128

Half of the layers are random, of initialisers of torch and neuraloperator; the other half are such layers with a
structure planted into them that training makes:

- *power law*: the squared singular values i^(-1 / (a - 1)), a between 1.2 and 1.6, between random bases;
- *few directions*: 1 to 4 directions are added to random entries, each 10 to 40 times as strong, in its squared
  singular value, as one that would just make an outlier of a random matrix;
- *uneven features*: the columns of a random layer are scaled by factors from e^-2 to e^2, evenly spread in their
  logarithms.

Widths are between 8 and 1024, evenly spread in their logarithms: linear layers, convolutions of kernels 1x1 and
3x3, whose widths are a third, and Fourier layers of 4 to 32 modes, whose widths are an eighth; none is below 8.

Writes `verdicts.csv` and the table of `README.md`. Exits with status 1 where more than 1 % of the random layers
are not called random, or more than 1 % of the planted ones are.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor, nn

from benchmarks.machine import describe
from benchmarks.results import Value, markdown_table, publish, write_csv
from farms_tb import MatrixStack, Verdict
from farms_tb.options import SpectrumOptions
from farms_tb.spectra.permutation_null import weight_record
from farms_tb.weights import stacks

AIM = 0.01
SMALLEST = 8
KINDS = ("linear", "convolution 1x1", "convolution 3x3", "spectral")
Fill = Callable[[Tensor], object]


@dataclass(frozen=True)
class Generated:
    """A layer whose right verdict is known.

    Attributes:
        family: the initialiser, or the planted structure.
        kind: one of `KINDS`.
        random: whether it is random.
        stack: its matrices.
    """

    family: str
    kind: str
    random: bool
    stack: MatrixStack


def _sparse(sparsity: float) -> Fill:
    return lambda weight: nn.init.sparse_(weight.view(len(weight), -1), sparsity)


INITIALISERS: Mapping[str, Fill] = {
    "torch's default": lambda weight: nn.init.kaiming_uniform_(weight, a=math.sqrt(5)),
    "Kaiming normal": nn.init.kaiming_normal_,
    "Xavier uniform": nn.init.xavier_uniform_,
    "Xavier normal": nn.init.xavier_normal_,
    "orthogonal": nn.init.orthogonal_,
    "truncated normal": lambda weight: nn.init.trunc_normal_(weight, a=-1.0, b=1.0),
    "positive uniform": nn.init.uniform_,
    "sparse, 10 %": _sparse(0.1),
    "sparse, 50 %": _sparse(0.5),
}
"""Of real weights; Fourier layers are complex normal, or uniform and positive in both parts."""


def random_layer(number: int, largest: int) -> Generated:
    """Return the random layer of a number, by torch's global random state.

    Args:
        number: the kinds and initialisers take turns.
        largest: largest width.
    """
    family = list(INITIALISERS)[number % len(INITIALISERS)]
    kind = KINDS[number // len(INITIALISERS) % len(KINDS)]
    if kind == "spectral":
        modes = int(torch.randint(4, 33, ()))
        positive = number % 2 == 1
        shape = _width(largest, 8), _width(largest, 8), modes
        draw = torch.rand if positive else torch.randn
        weight = draw(shape, dtype=torch.complex64)
        family = "Fourier, positive uniform" if positive else "Fourier, normal"
        return Generated(family, kind, True, stacks.fourier_modes(weight)[0])
    kernel = {"linear": (), "convolution 1x1": (1, 1), "convolution 3x3": (3, 3)}[kind]
    share = 3 if kernel == (3, 3) else 1
    weight = torch.empty(_width(largest, share), _width(largest, share), *kernel)
    INITIALISERS[family](weight)
    (stack,) = stacks.convolution(weight) if kernel else stacks.linear(weight)
    return Generated(family, kind, True, stack)


def _width(largest: int, share: int) -> int:
    exponent = float(torch.rand(())) * math.log(largest / SMALLEST) + math.log(SMALLEST)
    return max(SMALLEST, round(math.exp(exponent) / share))


def trained_layer(number: int, largest: int) -> Generated:
    """Return the layer with a planted structure of a number; the structures take turns."""
    layer = random_layer(number, largest)
    family = list(PLANTED)[number % len(PLANTED)]
    stack = layer.stack
    planted = PLANTED[family](torch.randn_like(stack.matrices))
    stack = MatrixStack(planted, stack.sampling, stack.eigenvalue_scale)
    return Generated(family, layer.kind, False, stack)


def power_law(noise: Tensor) -> Tensor:
    """Return matrices `(K, R, C)` with the singular vectors of random ones, and eigenvalues of a power law."""
    left, _, right = torch.linalg.svd(noise, full_matrices=False)
    exponent = 1.2 + 0.4 * float(torch.rand(()))
    singular = torch.arange(1.0, noise.shape[-1] + 1) ** (-0.5 / (exponent - 1))
    return left * singular @ right


def few_directions(noise: Tensor) -> Tensor:
    """Return random matrices with some directions that stand out."""
    number, rows, columns = noise.shape
    for _ in range(int(torch.randint(1, 5, ()))):
        left, right = noise.new_empty(number, rows, 1).normal_(), noise.new_empty(number, 1, columns).normal_()
        strength = math.sqrt((10 + 30 * float(torch.rand(()))) * math.sqrt(rows * columns))
        noise = noise + strength * nn.functional.normalize(left, dim=1) @ nn.functional.normalize(right, dim=2)
    return noise


def uneven_features(noise: Tensor) -> Tensor:
    """Return random matrices whose columns are of very different norms."""
    return noise * torch.linspace(-2, 2, noise.shape[-1]).exp()


PLANTED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "power law": power_law,
    "few directions": few_directions,
    "uneven features": uneven_features,
}


def generated(layers: int, largest: int, seed: int = 0) -> Iterator[Generated]:
    """Yield layers, random and trained in turn; torch's global random state is restored at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number in range(layers):
            make = trained_layer if number % 2 else random_layer
            yield make(number // 2, largest)


def verdict(layer: Generated) -> Verdict | None:
    """Return the verdict of a generated layer."""
    return weight_record(layer.stack, SpectrumOptions(), null=True).verdict


def is_wrong(layer: Generated, found: Verdict | None) -> bool:
    """Return whether a random layer is called anything else, or a trained one random."""
    return (found is Verdict.RANDOM) != layer.random


def error_rate(found: Sequence[tuple[Generated, Verdict | None]], random: bool) -> float:
    """Return the share of wrong verdicts, of the random layers or of the others."""
    wrong = [is_wrong(layer, verdict) for layer, verdict in found if layer.random == random]
    return sum(wrong) / len(wrong)


def rows_of(found: Sequence[tuple[Generated, Verdict | None]]) -> list[dict[str, Value]]:
    """Return the counts of each family, random ones first."""
    rows: list[dict[str, Value]] = []
    for family in sorted({layer.family for layer, _ in found}, key=lambda name: (name in PLANTED, name)):
        own = [(layer, verdict) for layer, verdict in found if layer.family == family]
        wrong = sum(is_wrong(*pair) for pair in own)
        counts = Counter(str(verdict) for _, verdict in own)
        verdicts = ", ".join(f"{name} {number}" for name, number in counts.most_common())
        rows.append({"family": family, "layers": len(own), "wrong": wrong, "verdicts": verdicts})
    return rows


def headline(found: Sequence[tuple[Generated, Verdict | None]]) -> str:
    """Return the error rates in a sentence each, with the upper ends of Wilson's 95 % intervals."""
    sentences = []
    for random, name in ((True, "random layers are not called random"), (False, "planted ones are called random")):
        own = [pair for pair in found if pair[0].random == random]
        wrong = sum(is_wrong(*pair) for pair in own)
        limit = stats.binomtest(wrong, len(own)).proportion_ci(method="wilson").high
        sentences.append(f"{wrong} of {len(own)} {name} (at most {limit:.1%} at 95 % confidence).")
    return " ".join(sentences)


def main() -> int:
    """Run, print, write; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verdicts", description="Errors of verdicts")
    parser.add_argument("--layers", type=int, default=2000)
    parser.add_argument("--largest", type=int, default=1024, help="largest width of a layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results/verdicts"))
    options = parser.parse_args()
    if options.layers < 2:
        parser.error(f"--layers must be at least 2, a random and a planted one, got {options.layers}")
    found = []
    for number, layer in enumerate(generated(options.layers, options.largest, options.seed)):
        found.append((layer, verdict(layer)))
        if is_wrong(*found[-1]):
            shape = "x".join(map(str, layer.stack.matrices.shape))
            print(f"layer {number}, {layer.family}, {layer.kind}, {shape}: {found[-1][1]}", flush=True)
    rows = rows_of(found)
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(options.out / "verdicts.csv", rows)
    table = markdown_table([{name: str(value) for name, value in row.items()} for row in rows])
    publish(options.out, f"{headline(found)}\n\n{table}\n\n```\n{describe('cpu')}\n```")
    print(f"\n{headline(found)}\n\n{table}\n\nwritten to {options.out}")
    return int(max(error_rate(found, True), error_rate(found, False)) > AIM)


if __name__ == "__main__":
    raise SystemExit(main())
