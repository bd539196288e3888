"""Alpha within 1e-4 of what float64 singular values give: every fit, real nets, and weights made to be hard.

Two things make weights hard. An error d of every ln lam moves alpha by (alpha - 1) d, so nearly flat tails are.
And solvers know an eigenvalue to a fraction of the largest one, so tails that begin far below it are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from farms_tb import analyze, lr_ratios
from recipes.models.resnet import SmallImageResNet
from tests.reference import layers as slow
from tests.reference import ratios as slow_ratios
from tests.reference.compare import FIGURES, assert_same_figures, figures

FITS = ("median", "goodness-of-fit", "xmin_peak")
RTOL = 1e-4
# Sums over eigenvalues: an error of single precision's rounding of the largest one is the most that they may have.
SUMS = ("spectral_norm", "norm", "pooled_stable_rank", "norm_stable_rank", "num_eigenvalues")
SUMS_RTOL = 1e-5

Weights = dict[str, Tensor]


def orthogonal(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=dtype)).Q


def planted(singular: Tensor, rows: int | None = None, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix of these singular values between random bases."""
    columns = len(singular)
    return (
        orthogonal(rows or columns, columns, dtype)
        @ torch.diag(singular).to(dtype)
        @ orthogonal(columns, columns, dtype)
    )


def stacked(matrices: list[Tensor]) -> Tensor:
    """Nine matrices as the weight of a 3x3 convolution."""
    return torch.stack(matrices, -1).unflatten(-1, (3, 3))


def net_of(weights: Weights) -> nn.Module:
    """One layer for each weight: linear of two dimensions, else a convolution."""
    net = nn.Module()
    for name, weight in weights.items():
        out, into, *kernel = weight.shape
        options = {"bias": False, "device": "meta"}
        layer = nn.Conv2d(into, out, tuple(kernel), **options) if kernel else nn.Linear(into, out, **options)
        layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        net.add_module(name, layer)
    return net


def initial() -> nn.Module:
    from neuralop.models import FNO
    from torchvision.models import VisionTransformer

    vit = VisionTransformer(
        image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=24, mlp_dim=40, num_classes=10
    )
    fno = FNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=10, n_layers=2)
    resnet = SmallImageResNet(width=4)
    with torch.no_grad():
        for weight in resnet.parameters():
            weight.mul_(0.3)  # eigenvalues below 1: see test_xmin_peak_of_a_convolution
    return nn.ModuleDict({"resnet": resnet, "vit": vit, "fno": fno})


@functools.cache
def trained_net() -> nn.Sequential:
    """A net trained on scikit-learn's digits until its tails are heavy, alphas of 1.3 to 1.9."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32)[:, None]
    labels = torch.tensor(digits.target)
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 40),
        nn.ReLU(),
        nn.Linear(40, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=3e-3)
    for _ in range(25):
        for batch in torch.randperm(len(labels)).split(64):
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return net.requires_grad_(False)


def trained_weights() -> Weights:
    layers = {name: module for name, module in trained_net().named_children() if hasattr(module, "weight")}
    return {f"{type(module).__name__}{name}": module.weight.clone() for name, module in layers.items()}


def pruned() -> Weights:
    """By magnitude, entry by entry, and whole rows or columns."""
    found = {}
    for name, weight in trained_weights().items():
        for share in (0.5, 0.9):
            found[f"{name}_{share}".replace(".", "_")] = weight * (weight.abs() > weight.abs().quantile(share))
        size = weight.flatten(1).norm(dim=1)
        found[f"{name}_rows"] = weight * (size > size.quantile(0.3)).view(-1, *[1] * (weight.ndim - 1))
        found[f"{name}_columns"] = weight * (torch.arange(weight.shape[1]) % 3 > 0).view(
            1, -1, *[1] * (weight.ndim - 2)
        )
    return found


def low_rank() -> Weights:
    """Where exactly half of the eigenvalues are zero the median's tail begins at the first that is not."""
    found = {}
    for rank in (1, 8, 15, 16, 17, 24):
        exact = planted(torch.linspace(1, 3, 32, dtype=torch.float64) * (torch.arange(32) < rank), 40)
        found[f"double_{rank}"] = exact
        found[f"single_{rank}"] = exact.float()  # rounding fills the rank up, at 1e-8 of the largest
        factors = torch.randint(-3, 4, (2, 9, 16, max(1, rank // 2)))
        found[f"integers_{rank}"] = stacked(list((factors[0] @ factors[1].mT).float()))
    return found


def formats() -> Weights:
    found = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn):
        name = str(dtype).removeprefix("torch.")
        found[f"{name}_random"] = torch.randn(40, 24).to(dtype)
        found[f"{name}_conv"] = torch.randn(24, 12, 3, 3).to(dtype)
        found |= {f"{name}_{layer}": weight.to(dtype) for layer, weight in trained_weights().items()}
    found["complex64"] = torch.randn(30, 20, dtype=torch.complex64)
    found["complex128"] = torch.randn(30, 20, dtype=torch.complex128)
    return found


def ill_conditioned() -> Weights:
    found = {}
    for digits in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12):
        singular = torch.logspace(0, -digits, 24, dtype=torch.float64)
        found[f"square_1e{digits}"] = planted(singular)
        found[f"tall_1e{digits}"] = planted(singular[::2], 20).float()
        found[f"conv_1e{digits}"] = stacked([planted(singular[::2] * 1.05**k) for k in range(9)])
        found[f"complex_1e{digits}"] = planted(singular[::2], 16, torch.complex128)
        found[f"single_1e{digits}"] = planted(singular[::2], 16, torch.complex128).to(torch.complex64)
    return found


def outliers() -> Weights:
    """One eigenvalue far above all others, which may have any shape."""
    bulks = {
        "normal": torch.randn(30, 20, dtype=torch.float64) / 7,
        "flat": orthogonal(30, 20) + 1e-2 * torch.randn(30, 20, dtype=torch.float64),
        "steep": planted(torch.logspace(0, -2, 20, dtype=torch.float64), 30),
    }
    found = {}
    for power in range(11):
        for name, bulk in bulks.items():
            spiked = bulk + 10 ** (power / 2) * orthogonal(30, 1) @ orthogonal(20, 1).T
            found[f"{name}_1e{power}"] = spiked.float()
            if power in (4, 8, 10):
                found[f"{name}_double_1e{power}"] = spiked
    return found


def scales() -> Weights:
    weight, kernel = torch.randn(30, 30), torch.randn(20, 10, 3, 3)
    powers = (-44, -40, -38, -30, -25, -22, -19, -15, -8, 8, 15, 18, 20, 25, 30, 37)
    found = {f"linear_1e{p}": weight * 10.0 ** (p / 2) * 10.0 ** (p / 2) for p in powers}
    found |= {f"conv_1e{p}": kernel * 10.0 ** (p / 2) * 10.0 ** (p / 2) for p in powers[::3]}
    found |= {f"bfloat16_1e{p}": (weight * 10.0**p).bfloat16() for p in (-38, -20, 20, 37)}
    found |= {f"float16_1e{p}": (weight * 10.0**p).half() for p in (-7, -5, 4)}
    return found


def degenerate() -> Weights:
    weight = torch.randn(40, 24)
    spread = torch.logspace(-6, 6, 40)[:, None]
    index = torch.arange(24.0)
    return {
        "copied_columns": torch.cat([weight[:, :12], weight[:, :12]], 1),
        "copied_rows": weight[:12].repeat(2, 1),
        "almost_copied": torch.cat([weight[:, :12], weight[:, :12] * (1 + 1e-4 * torch.randn(40, 12))], 1),
        "constant": torch.full((24, 24), 0.3),
        "constant_and_noise": 0.3 + 1e-3 * weight,
        "constant_and_bits": 1 + torch.finfo(torch.float32).eps * torch.randint(0, 2, (40, 24)),
        "rows_of_all_scales": weight * spread,
        "columns_of_all_scales": weight * spread[:24, 0],
        "both_of_all_scales": weight * spread * spread[:24, 0],
        "rows_of_far_scales": torch.randn(40, 40) * torch.logspace(-18, 18, 40)[:, None],
        "one_large_entry": weight + 1e6 * (torch.arange(960).reshape(40, 24) == 77),
        "sparse": weight * (torch.rand(40, 24) < 0.2),
        "one_entry_a_row": torch.diag(torch.rand(24)) + torch.eye(24),
        "hilbert": 1 / (1 + index + index[:, None]),
        "vandermonde": (index / 24) ** index[:, None],
        "triangle": torch.ones(24, 24).tril(),
        "jordan": 0.5 * torch.eye(24) + torch.ones(23).diag(1),
        "cauchy": torch.randn(40, 24) / torch.randn(40, 24),
        "cubed": (torch.randn(40, 24) / torch.randn(40, 24)).pow(3),
        "conv_of_copies": weight[:, :8, None, None].expand(40, 8, 3, 3).clone(),
    }


def nearly_flat() -> Weights:
    """Alphas of tens to thousands: what is left of an error of ln lam is that many times as large."""
    found = {}
    for digits in (1, 2, 3, 4, 5):
        matrices = [
            orthogonal(20, 20) + 10.0**-digits * torch.randn(20, 20, dtype=torch.float64) for _ in range(10)
        ]
        found[f"linear_1e{digits}"] = matrices[0].float()
        found[f"double_1e{digits}"] = matrices[0]
        found[f"bfloat16_1e{digits}"] = matrices[0].bfloat16()
        found[f"tall_1e{digits}"] = torch.cat(matrices[:2]).float()
        found[f"conv_1e{digits}"] = stacked(matrices[1:]).float()
    return found


def windows_of_all_scales() -> Weights:
    found = {}
    for power in (1, 2, 3, 4, 6, 12):
        exponents = torch.linspace(-2 * power, 0, 9) - 1
        kernel = torch.randn(24, 12, 9) * 10**exponents
        found[f"conv_1e{power}"] = kernel.unflatten(-1, (3, 3))
        flat = torch.stack([orthogonal(12, 12) * 10**exponent for exponent in exponents.tolist()], -1)
        found[f"flat_1e{power}"] = (flat + 1e-2 * torch.randn(12, 12, 9)).float().unflatten(-1, (3, 3))
        quarters = (
            torch.randn(2, 20, 2, 20) * 10 ** torch.tensor([[-2 * power, -power], [-power, 0.0]])[:, None, :, None]
        )
        found[f"linear_1e{power}"] = quarters.reshape(40, 40)
    return found


def one_sign() -> Weights:
    """Far from zero mean, in long sums: rounding errors add up in one direction, and to one large eigenvalue."""
    found = {}
    for spread in (0.3, 0.1, 0.03, 0.01):
        columns = 1 + torch.rand(24)
        found[f"tall_{spread}"] = columns * (1 + spread * torch.randn(2000, 24))
        found[f"wide_{spread}"] = (columns * (1 + spread * torch.randn(600, 24))).T.contiguous()
        found[f"conv_{spread}"] = 1 + spread * torch.rand(48, 24, 3, 3)
    return {name.replace(".", "_"): weight for name, weight in found.items()}


def near_the_cutoffs() -> Weights:
    """Many eigenvalues near 1e-5, and near 1e-5 of the largest, below a tail that is easy."""
    found = {}
    for top in (0.5, 1.0, 1.5, 2.0):
        for depth in (-2.2, -2.6, -3.0, -3.5):
            low = torch.logspace(depth, -2.0, 24, dtype=torch.float64)
            singular = torch.cat([low, torch.logspace(0, top, 24, dtype=torch.float64)])
            name = f"{top}_{-depth}".replace(".", "_")
            found[f"absolute_{name}"] = planted(singular).float()
            found[f"relative_{name}"] = planted(singular * 10**top).float()
    return found


def large() -> Weights:
    """Of sizes at which solvers cut the work into blocks."""
    flat = orthogonal(200, 160) + 1e-3 * torch.randn(200, 160, dtype=torch.float64)
    spike = 100 * orthogonal(200, 1) @ orthogonal(160, 1).T
    cauchy = torch.randn(200, 160) / torch.randn(200, 160)
    return {
        "linear": torch.randn(200, 160) / 13,
        "conv": torch.randn(128, 64, 3, 3) / 24,
        "spike_on_normal": (torch.randn(200, 160, dtype=torch.float64) / 13 + spike).float(),
        "spike_on_flat": (flat + spike).float(),
        "spike_on_flat_double": flat + 10_000 * spike,
        "one_sign": (1 + torch.rand(160)) * (1 + 0.02 * torch.randn(3000, 160)),
        "cauchy": cauchy.clamp(-1e4, 1e4),
        "ill_conditioned": planted(torch.logspace(0, -12, 160, dtype=torch.float64), 200),
        "ill_conditioned_single": planted(torch.logspace(0, -6, 160, dtype=torch.float64), 200).float(),
    }


MAKERS: dict[str, Callable[[], Weights | nn.Module]] = {
    function.__name__: function
    for function in (
        initial,
        trained_weights,
        pruned,
        low_rank,
        formats,
        ill_conditioned,
        outliers,
        scales,
        degenerate,
        nearly_flat,
        windows_of_all_scales,
        one_sign,
        near_the_cutoffs,
        large,
    )
}
CASES = [case for case in MAKERS if case != "large"]


@functools.cache
def net(case: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MAKERS[case]()
    return made if isinstance(made, nn.Module) else net_of(made)


@functools.cache
def spectra(case: str, esd: str, aspect_ratio: float) -> dict[str, list[list[float]]]:
    """The slow implementation's eigenvalues of every layer that has samples."""
    return {
        name: slow.spectra(layer, esd=esd, aspect_ratio=aspect_ratio)
        for name, layer in slow.layers(net(case)).items()
    }


def assert_accurate(report, samples, fit="median", xmin_pos=2.0, dtypes=None, **cutoffs) -> None:
    """Compare every figure with the slow implementation's."""
    actual, expected = {}, {}
    for name, record in report.layers.items():
        counted = [slow.kept(values, **cutoffs) for values in samples.get(name, ())]
        if not counted or min(values[-1] for values in counted) == 0 or min(map(len, counted)) < 2:
            assert record.alpha is None, name
            continue
        if "rounding errors of the stored weights" in record.status:
            # A tail that is measured all the same says nothing: it lies below the largest error of the entries.
            eps = torch.finfo(torch.float32).eps if dtypes is None else torch.finfo(dtypes[name]).eps
            # The fits that search may begin the tail anywhere.
            starts = [
                values[int(len(values) / xmin_pos) if fit == "median" else 0] / values[-1] for values in counted
            ]
            assert min(starts) < 4 * eps**2 * max(record.shape), name
            continue
        numbers = [len(values) for values in samples[name]]
        actual[name], expected[name] = figures(record), slow.figures(counted, numbers, fit, xmin_pos)
        if fit != "median" and _differ(record.alpha, expected[name]["alpha"]):
            choices = slow.equal_choices(counted, fit)
            same = [choice for choice in choices if not _differ(record.alpha, choice["alpha"])]
            expected[name] |= same[0] if same else {}
    rest = [name for name in FIGURES if name not in SUMS]
    # Alpha is above 1: of it the absolute tolerance asks no less than the relative one.
    assert_same_figures(actual, _only(expected, rest), rtol=RTOL, atol=RTOL)
    assert_same_figures(actual, _only(expected, SUMS), rtol=SUMS_RTOL, atol=0)


def _differ(found: float | None, wanted: float | None) -> bool:
    return found is not wanted if None in (found, wanted) else not math.isclose(found, wanted, rel_tol=RTOL)


def _only(expected, names):
    return {layer: {name: wanted[name] for name in names} for layer, wanted in expected.items()}


OPTIONS = [{"esd": esd, "fit": fit} for esd in ("farms", "full") for fit in FITS]
OPTIONS += [
    {"fit": fit, **cutoff} for fit in FITS for cutoff in ({"filter_zeros": True}, {"relative_cutoff": 1e-5})
]
OPTIONS += [{"aspect_ratio": ratio, "fit": "median"} for ratio in (0.5, 2.0)]
OPTIONS += [{"aspect_ratio": 0.5, "fit": "goodness-of-fit"}, {"aspect_ratio": 2.0, "fit": "xmin_peak"}]
OPTIONS += [{"esd": esd, "xmin_pos": xmin_pos} for esd in ("farms", "full") for xmin_pos in (1.5, 4.0)]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(map(str, options.values())))
@pytest.mark.parametrize("case", CASES)
def test_every_case_fit_and_option(case: str, options: dict) -> None:
    report = analyze(net(case), **options)
    assert_accurate(report, spectra(case, *_shape_of(options)), **_fit_of(options))


@pytest.mark.parametrize(
    "options", [options for options in OPTIONS if options.get("fit", "median") == "median"], ids=str
)
@pytest.mark.parametrize("case", MAKERS)
def test_single_precision_at_all_sizes(case: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also at sizes for which single precision is no faster, and so not tried by default."""
    monkeypatch.setattr("farms_tb.spectra.precision.SMALLEST_SINGLE", 2)
    report = analyze(net(case), **options)
    assert_accurate(report, spectra(case, *_shape_of(options)), **_fit_of(options))
    if case == "initial" and options == OPTIONS[0]:
        assert "cpu float32" in {record.solver for record in report.layers.values()}


def _shape_of(options: dict) -> tuple[str, float]:
    return options.get("esd", "farms"), options.get("aspect_ratio", 1.0)


def _fit_of(options: dict) -> dict:
    return {name: value for name, value in options.items() if name not in ("esd", "aspect_ratio")}


def test_cases_are_what_they_are_called() -> None:
    """So that a case that is made in another way one day is still a hard one."""
    found = {case: list(analyze(net(case)).alphas.values()) for case in CASES}
    known = {case: [alpha for alpha in alphas if alpha] for case, alphas in found.items()}
    assert min(known["trained_weights"]) < 1.6
    assert max(known["nearly_flat"]) > 1000
    assert None in found["low_rank"]
    assert len(known["low_rank"]) > 5
    assert max(values[-1] / values[0] for (values,) in spectra("ill_conditioned", "full", 1.0).values()) > 1e23


@pytest.mark.parametrize(
    "options", [{}, {"xmin_pos": 4.0}, {"esd": "full"}, {"esd": "full", "xmin_pos": 1.5}], ids=str
)
def test_layers_of_the_size_of_real_ones(options: dict) -> None:
    report = analyze(net("large"), **options)
    assert_accurate(report, spectra("large", *_shape_of(options)), **_fit_of(options))


@pytest.mark.parametrize(
    ("size", "xmin_pos", "alpha", "seed"), [(100, 6.0, 190, 8256), (256, 4.0, 170, 2672), (100, 4.0, 170, 1914)]
)
def test_tails_whose_alpha_is_in_the_hundreds(size: int, xmin_pos: float, alpha: float, seed: int) -> None:
    """The worst of thousands: Gram matrices in single precision move these alphas by more than 1e-4."""
    torch.manual_seed(seed)
    base, noise = orthogonal(size, size), torch.randn(size, size, dtype=torch.float64)
    scale = 0.5 + float(torch.rand(1))
    model = net_of({"linear": (scale * (base + 0.5 / alpha / math.sqrt(size) * noise)).float()})
    samples = {name: slow.spectra(layer, esd="full") for name, layer in slow.layers(model).items()}
    assert_accurate(analyze(model, esd="full", xmin_pos=xmin_pos), samples, xmin_pos=xmin_pos)


@pytest.mark.parametrize("case", CASES)
def test_weights_in_double_have_the_same_records(case: str) -> None:
    """What has no slow implementation: the standard error, where the tail begins, and the histogram."""
    wider, plain = (
        analyze(weights, histogram=True).layers for weights in (deepcopy(net(case)).double(), net(case))
    )
    for name, record in plain.items():
        wanted = wider[name]
        if record.status.startswith("low rank"):
            continue  # judged by the type that the weight is stored in
        assert record.status == wanted.status, name
        if record.alpha:
            assert record.alpha_error == pytest.approx(wanted.alpha_error, rel=1e-3), name
            assert record.xmin == pytest.approx(wanted.xmin, rel=RTOL), name
        if record.histogram:
            assert record.histogram.low == pytest.approx(wanted.histogram.low, abs=1e-3), name
            assert record.histogram.high == pytest.approx(wanted.histogram.high, abs=1e-5), name


@pytest.mark.parametrize("assign_func", ["tb_linear_map", "tb_sqrt", "tb_log2", "tb_step", "tb_sigmoid"])
def test_ratios_are_those_of_singular_values(assign_func: str) -> None:
    found = {name: alpha for name, alpha in analyze(net("trained_weights")).alphas.items() if alpha}
    samples = spectra("trained_weights", "farms", 1.0)
    alphas = [slow.figures(samples[name], map(len, samples[name]))["alpha"] for name in found]
    wanted = getattr(slow_ratios, assign_func)(alphas)
    # The steepest is the sigmoid, of slope 2.9 a unit of alpha; the linear map's is 1 over the range of alphas.
    assert list(lr_ratios(found, assign_func).values()) == pytest.approx(wanted, abs=1e-3)


@contextmanager
def setting(holder: object, name: str, value: object) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextmanager
def called(function: Callable, value: object, before: object) -> Iterator[None]:
    function(value)
    try:
        yield
    finally:
        function(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager]] = {
    "matmul precision medium": lambda: called(
        torch.set_float32_matmul_precision, "medium", torch.get_float32_matmul_precision()
    ),
    "matmul precision high": lambda: called(
        torch.set_float32_matmul_precision, "high", torch.get_float32_matmul_precision()
    ),
    "autocast to bfloat16": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "deterministic algorithms": lambda: called(torch.use_deterministic_algorithms, True, False),
    "default of float64": lambda: called(torch.set_default_dtype, torch.float64, torch.get_default_dtype()),
    "default of bfloat16": lambda: called(torch.set_default_dtype, torch.bfloat16, torch.get_default_dtype()),
    "denormals flushed": lambda: called(torch.set_flush_denormal, True, False),
    "inference mode": torch.inference_mode,
    "anomaly detection": torch.autograd.detect_anomaly,
}
if hasattr(torch.backends, "fp32_precision"):  # from torch 2.9 on
    SETTINGS |= {
        "fp32 precision tf32": lambda: setting(torch.backends, "fp32_precision", "tf32"),
        "oneDNN fp32 precision bf16": lambda: setting(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    }


def measured() -> list[dict[str, float]]:
    """Alphas by every route: by products of single and of double precision, and by singular values."""
    cases = [(case, "median") for case in ("trained_weights", "initial", "low_rank", "one_sign")]
    reports = [analyze(net(case), fit=fit) for case, fit in [*cases, ("trained_weights", "goodness-of-fit")]]
    return [{name: alpha for name, alpha in report.alphas.items() if alpha} for report in reports]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_numeric_settings_of_the_user_do_not_matter(name: str) -> None:
    before = measured()
    with SETTINGS[name]():
        within = measured()
    for found, wanted in zip(within, before, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5, abs=0)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
def test_numeric_settings_of_the_user_change_no_metric(name: str, threads: int) -> None:
    model = net("trained_weights")
    before = analyze(model, null=True, threads=threads).rows()
    with SETTINGS[name]():
        within = analyze(model, null=True, threads=threads).rows()
    for found, wanted in zip(within, before, strict=True):
        for metric, value in wanted.items():
            number = isinstance(value, float)
            assert found[metric] == (pytest.approx(value, rel=1e-5, abs=1e-6) if number else value), metric


@pytest.mark.parametrize("threads", [2, 3])
def test_number_of_threads_changes_no_bit(threads: int) -> None:
    model = net_of({name: getattr(net("large"), name).weight for name in ("linear", "conv", "spike_on_flat")})
    before = analyze(model).layers, measured()
    with called(torch.set_num_threads, threads, torch.get_num_threads()):
        assert (analyze(model).layers, measured()) == before


def test_xmin_peak_of_a_convolution() -> None:
    """The search's lower bound is a logarithm beside plain values, so it depends on their scale."""
    law = 40 / (torch.arange(40, dtype=torch.float64) + 0.5)
    peak, body = (
        8 + 0.02 * torch.arange(6, dtype=torch.float64),
        torch.linspace(0.01, 0.5, 20, dtype=torch.float64),
    )
    model = net_of({"conv": planted(torch.cat([law, peak, body]).sqrt())[:, :, None, None]})
    samples = {name: slow.spectra(layer) for name, layer in slow.layers(model).items()}
    assert_accurate(analyze(model, fit="xmin_peak"), samples, "xmin_peak")


def between(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_subnormal=False)


@st.composite
def weights_of_planted_spectra(draw: st.DrawFn) -> Weights:
    """Random bases, and singular values of clusters, gaps, zeros and slopes of all kinds, none above 1."""
    rows = draw(st.integers(6, 30))
    columns = draw(st.integers(6, rows))
    exponents = st.floats(-12, 0) | st.sampled_from([-9.0, -4.0, -2.0, 0.0]) | between(-1, 0)
    few = torch.tensor(draw(st.lists(exponents, min_size=1, max_size=5)), dtype=torch.float64)
    torch.manual_seed(draw(st.integers(0, 2**16)))
    chosen = few[torch.randint(len(few), (columns,))] - draw(st.sampled_from([1e-3, 0.1, 1.0])) * torch.rand(
        columns
    )
    singular = 10.0 ** chosen.double() * (torch.rand(columns) >= draw(st.sampled_from([0.0, 0.0, 0.3])))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.complex64]))
    if dtype.is_complex or draw(st.booleans()):
        basis = torch.complex128 if dtype.is_complex else torch.float64
        return {"linear": planted(singular, rows, basis).to(dtype)}
    spread = torch.rand(4, dtype=torch.float64) ** draw(st.sampled_from([0, 1, 6]))
    kernel = torch.stack([planted(singular, rows) * factor for factor in spread], -1)
    return {"conv": kernel.unflatten(-1, (2, 2)).to(dtype)}


@settings(max_examples=max(120, settings().max_examples))
@given(
    weights=weights_of_planted_spectra(),
    esd=st.sampled_from(["farms", "full"]),
    fit=st.sampled_from(FITS),
    aspect_ratio=st.sampled_from([0.5, 1.0, 2.0]),
    xmin_pos=between(1.1, 5),
    filter_zeros=st.booleans(),
    relative_cutoff=st.sampled_from([0.0, 0.0, 1e-12, 1e-8, 1e-4]),
)
def test_any_spectrum(weights, esd, fit, aspect_ratio, xmin_pos, filter_zeros, relative_cutoff) -> None:
    model = net_of(weights)
    shape = {"esd": esd, "aspect_ratio": aspect_ratio}
    options = {"fit": fit, "xmin_pos": xmin_pos, "filter_zeros": filter_zeros, "relative_cutoff": relative_cutoff}
    samples = {name: slow.spectra(layer, **shape) for name, layer in slow.layers(model).items()}
    report = analyze(model, **shape, **options)
    (record,) = report.layers.values()
    event(record.status.split(":")[0])
    assert_accurate(report, samples, dtypes={name: weight.dtype for name, weight in weights.items()}, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.mark.parametrize("options", [OPTIONS[0], *OPTIONS[3:6], *OPTIONS[-2:]], ids=str)
    @pytest.mark.parametrize("case", MAKERS)
    def test_every_case(self, case: str, options: dict) -> None:
        if case == "large" and options.get("fit", "median") != "median":
            pytest.skip("the slow implementation takes minutes")
        report = analyze(deepcopy(net(case)).cuda(), **options)
        assert_accurate(report, spectra(case, *_shape_of(options)), **_fit_of(options))

    @pytest.mark.parametrize(
        "context",
        [SETTINGS["matmul precision medium"], lambda: torch.autocast("cuda", dtype=torch.bfloat16)],
        ids=["tf32", "autocast"],
    )
    def test_tensor_cores_do_not_matter(self, context: Callable[[], AbstractContextManager]) -> None:
        model = deepcopy(net("large")).cuda()
        before = analyze(model).alphas
        with context():
            within = analyze(model).alphas
        assert within == pytest.approx(before, rel=1e-5, abs=0)
