"""From a model to its report: slow implementation, known answers, what alpha does not depend on, bad input."""

import dataclasses
import math
from collections import OrderedDict
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import farms_tb
from farms_tb import MatrixStack, TempBalance, analyze, analyze_checkpoint, layer_matrices, lr_ratios
from farms_tb.options import SpectrumOptions
from farms_tb.spectra.distributed import Team, layers_of_this_process
from farms_tb.spectra.measure import cost, measure
from farms_tb.weights.layers import Layer, checked_layers, find_layers
from recipes.models.resnet import SmallImageResNet
from recipes.models.unet import UNet
from tests.reference import spectrum, stacks, windows
from tests.reference.compare import FIGURES, alphas, assert_same_figures, figures

FITS = ["median", "goodness-of-fit", "xmin_peak"]


class Kernel(nn.Module):
    """A registered layer: whatever stack it is given."""

    def __init__(self, *shape, dtype=torch.float32, values=None):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(shape, dtype=dtype) if values is None else values)


@layer_matrices.register
def _(module: Kernel) -> list[MatrixStack]:
    return [MatrixStack(module.stack.detach())]


def linear(weight):
    layer = nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight)
    return layer


def alpha_of(module, **options):
    (record,) = analyze(module, **options).layers.values()
    assert record.status == "ok" or record.collapsed
    return record.alpha


def status_of(module, **options):
    """The status of one layer that has no alpha, beside one that has."""
    good = nn.Linear(40, 40)
    record, beside = analyze(nn.Sequential(module, good), **options).layers.values()
    assert beside.status == "ok"
    assert record.alpha is record.ks_distance is record.alpha_hat is None
    assert all(value is None or math.isfinite(value) for value in figures(record).values())
    return record.status


class TestAgainstTheTwin:
    @staticmethod
    def model():
        from neuralop.layers.spectral_convolution import SpectralConv

        return nn.ModuleDict(
            {
                "linear": nn.Linear(23, 37),
                "conv1d": nn.Conv1d(12, 25, 3),
                "conv2d": nn.Conv2d(16, 8, 3, groups=2),
                "up3d": nn.ConvTranspose3d(7, 11, 2),
                "up_groups": nn.ConvTranspose2d(14, 24, (2, 1), groups=2),
                "attention": nn.MultiheadAttention(18, 2, bias=False),
                "spectral": SpectralConv(9, 13, (4, 4)),
            }
        )

    @staticmethod
    def slow_stacks(model):
        """Each layer's matrices, how they are windowed, and the factor on their eigenvalues."""
        attention = stacks.attention(model["attention"].in_proj_weight.detach().numpy())
        spectral = model["spectral"].weight.to_tensor().detach().numpy()

        def weight(module):
            return module.weight.detach().numpy()

        return {
            "linear": (stacks.linear(weight(model["linear"])), "grid", 1.0),
            "conv1d": (stacks.convolution(weight(model["conv1d"])), "blocks", 0.5),
            "conv2d": (stacks.convolution(weight(model["conv2d"]), 2), "blocks", 0.5),
            "up3d": (stacks.transposed_convolution(weight(model["up3d"])), "blocks", 0.5),
            "up_groups": (stacks.transposed_convolution(weight(model["up_groups"]), 2), "blocks", 0.5),
            **{f"attention.{part}": (stack, "grid", 1.0) for part, stack in zip("qkv", attention, strict=True)},
            "attention.out_proj": (stacks.linear(weight(model["attention"].out_proj)), "grid", 1.0),
            "spectral": (stacks.spectral(spectral), "blocks", 1.0),
        }

    @pytest.mark.parametrize("fit", FITS)
    @pytest.mark.parametrize(
        "options",
        [
            {"esd": "full"},
            {},
            {"aspect_ratio": 0.5},
            {"aspect_ratio": 1.5, "min_eigenvalues": 3},
            {"window": 10, "windows_per_dim": 3},
            {"window": 12, "window_step": 5},
        ],
        ids=str,
    )
    def test_every_layer_type(self, options, fit):
        model = self.model()
        shape = {name: value for name, value in options.items() if name != "min_eigenvalues"}
        expected = {
            name: spectrum.layer_metrics(windows.samples(stack, sampling, **shape), scale, fit)
            for name, (stack, sampling, scale) in self.slow_stacks(model).items()
        }
        for precision, rtol in (("float64", 1e-6), ("auto", 5e-5)):
            report = analyze(model, fit=fit, precision=precision, **options)
            assert {record.status for record in report.layers.values()} == {"ok"}
            actual = {name: figures(record) for name, record in report.layers.items()}
            assert_same_figures(actual, expected, rtol)

    @pytest.mark.parametrize("xmin_pos", [1.2, 3, 4.5])
    def test_where_the_tail_begins(self, xmin_pos):
        weight = torch.randn(33, 18)
        (sample,) = windows.samples(stacks.linear(weight.numpy()), "grid", "full")
        expected = spectrum.fit(spectrum.eigenvalues(sample), "median", xmin_pos)[0]
        found = alpha_of(linear(weight), esd="full", xmin_pos=xmin_pos, precision="float64")
        assert found == pytest.approx(expected)

    def test_filter_zeros_drops_what_lies_below_the_papers_threshold(self):
        weight = torch.diag(torch.logspace(-4, 0, 30, dtype=torch.float64))
        expected = spectrum.layer_metrics([[weight.numpy()]], zero_cutoff=1e-5)
        record = analyze(linear(weight), filter_zeros=True).layers["weight"]
        assert_same_figures({"weight": figures(record)}, {"weight": expected})
        assert record.num_eigenvalues == 19

    def test_filter_zeros_drops_nothing_where_nothing_would_be_left(self):
        weight = 1e-4 * torch.randn(20, 20)
        assert analyze(linear(weight), filter_zeros=True).layers["weight"].num_eigenvalues == 20
        assert alpha_of(linear(weight), filter_zeros=True) == alpha_of(linear(weight))

    def test_relative_cutoff(self):
        weight = torch.diag(torch.logspace(-4, 0, 30, dtype=torch.float64))
        for scale in (1.0, 1e-6):
            record = analyze(linear(weight * scale), relative_cutoff=1e-5).layers["weight"]
            assert record.num_eigenvalues == 19
            assert record.alpha == pytest.approx(alpha_of(linear(weight), filter_zeros=True))

    def test_blocks_are_averaged(self):
        blocks = torch.randn(3, 5, 8, 8)
        tall = Kernel(values=blocks.transpose(0, 1).reshape(5, 24, 8))
        each = [alpha_of(Kernel(values=block)) for block in blocks]
        assert alpha_of(tall) == pytest.approx(sum(each) / 3)
        assert analyze(tall).layers["weight"].num_eigenvalues == 3 * 5 * 8

    def test_three_groups_of_a_convolution_are_pooled(self):
        grouped = nn.Conv2d(12, 12, 1, groups=3)
        pooled = Kernel(values=grouped.weight.detach().reshape(3, 4, 4))
        assert alpha_of(grouped) == pytest.approx(alpha_of(pooled))

    def test_unused_modes_do_not_count(self):
        from neuralop.layers.spectral_convolution import SpectralConv

        conv = SpectralConv(6, 6, (4, 4), max_n_modes=(9, 8))
        before = alpha_of(conv)
        with torch.no_grad():
            conv.weight.tensor[:, :, :2] = 100
            conv.weight.tensor[:, :, -3:] = 100
            conv.weight.tensor[..., 3:] = 100
        assert alpha_of(conv) == before


class TestKnownAnswers:
    @pytest.mark.parametrize("exponent", [1.8, 2.5, 4.0])
    @pytest.mark.parametrize("fit", ["median", "goodness-of-fit"])
    def test_a_spectrum_that_follows_a_power_law(self, exponent, fit):
        quantiles = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
        eigenvalues = quantiles ** (-1 / (exponent - 1))
        left, right = (torch.linalg.qr(torch.randn(400, 400, dtype=torch.float64)).Q for _ in range(2))
        weight = left @ torch.diag(eigenvalues.sqrt()) @ right
        assert alpha_of(linear(weight), esd="full", fit=fit) == pytest.approx(exponent, rel=0.05)

    def test_gaussian_matrices_have_one_farms_alpha_at_every_aspect_ratio(self):
        model = nn.ModuleList(linear(torch.randn(256 * ratio, 256)) for ratio in (1, 2, 4, 8))
        farms = list(analyze(model).alphas.values())
        full = list(analyze(model, esd="full").alphas.values())
        assert max(farms) / min(farms) < 1.02
        assert max(full) / min(full) > 2
        assert full == sorted(full)

    def test_gaussian_convolutions_have_one_farms_alpha_at_every_aspect_ratio(self):
        model = nn.ModuleList(Kernel(9, 128 * ratio, 128) for ratio in (1, 2, 4, 8))
        farms = list(analyze(model).alphas.values())
        full = list(analyze(model, esd="full").alphas.values())
        assert max(farms) / min(farms) < 1.02
        assert max(full) / min(full) > 2

    def test_a_unet_at_initialisation(self):
        model = UNet(width=32)
        farms, full = (
            [alpha for alpha in analyze(model, esd=esd).alphas.values() if alpha is not None]
            for esd in ("farms", "full")
        )
        assert len(farms) == len(full) == 21
        assert max(farms) - min(farms) < 0.1
        assert max(full) - min(full) > 0.5

    def test_heavier_tails_have_smaller_alphas(self):
        normal = torch.randn(200, 200)
        heavy = torch.distributions.StudentT(2.5).sample((200, 200))
        assert alpha_of(linear(heavy)) < alpha_of(linear(normal)) - 0.1

    def test_metrics_by_hand(self):
        weight = torch.diag(torch.tensor([1.0, 2.0, 2.0, 4.0, 5.0]))
        record = analyze(linear(weight), xmin_pos=3).layers["weight"]
        tail = math.log(4 / 4) + math.log(16 / 4) + math.log(25 / 4)
        alpha = 1 + 4 / tail
        shares = [value / 50 for value in (1, 4, 4, 16, 25)]
        expected = {
            "alpha": alpha,
            "alpha_hat": alpha * math.log10(25),
            "spectral_norm": 25,
            "norm": 50,
            "pooled_stable_rank": 2,
            "norm_stable_rank": 10,
            "entropy": -sum(p * math.log(p) for p in shares) / math.log(5),
            "num_eigenvalues": 5,
        }
        assert_same_figures({"weight": figures(record)}, {"weight": expected})


MODULES = {
    "linear": lambda: nn.Linear(150, 60),
    "conv": lambda: nn.Conv2d(8, 20, 3),
    "complex": lambda: Kernel(5, 24, 9, dtype=torch.complex128),
}


class TestInvariance:
    @pytest.mark.parametrize("esd", ["farms", "full"])
    @pytest.mark.parametrize("fit", ["median", "goodness-of-fit"])
    @pytest.mark.parametrize("scale", [10.0**power for power in (-30, -12, -3, -1, 1, 3, 12)] + [-1.0, 3.7])
    @pytest.mark.parametrize("name", MODULES)
    def test_scale(self, name, scale, fit, esd):
        module = MODULES[name]().double()
        before = analyze(module, fit=fit, esd=esd)
        with torch.no_grad():
            next(module.parameters()).mul_(scale)
        assert_same_figures(alphas(analyze(module, fit=fit, esd=esd)), alphas(before))

    @pytest.mark.parametrize("fit", ["median", "goodness-of-fit"])
    @pytest.mark.parametrize("scale", [1e300, 1e160, 1e-160, 1e-300])
    def test_scales_whose_squares_leave_float64(self, scale, fit):
        weight = torch.randn(30, 30, dtype=torch.float64)
        before = analyze(linear(weight), fit=fit).layers["weight"]
        after = analyze(linear(weight * scale), fit=fit).layers["weight"]
        assert after.status == "ok"
        assert after.alpha == pytest.approx(before.alpha)
        shift = before.alpha * 2 * math.log10(scale)
        assert after.alpha_hat == pytest.approx(before.alpha_hat + shift)
        assert after.entropy == pytest.approx(before.entropy)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_denormal_weights(self, dtype):
        # Denormal numbers have few digits: enough of them for an alpha.
        tiny = torch.finfo(dtype).smallest_normal * 1e-2
        weight = torch.randn(30, 30, dtype=dtype)
        assert alpha_of(linear(weight * tiny)) == pytest.approx(alpha_of(linear(weight)), rel=1e-3)

    @pytest.mark.parametrize("fit", FITS)
    @pytest.mark.parametrize("esd", ["farms", "full"])
    @pytest.mark.parametrize("shape", [(150, 60), (60, 60), (130, 130)])
    def test_transpose_of_a_linear_layer(self, shape, esd, fit):
        weight = torch.randn(shape)
        options = {"esd": esd, "fit": fit, "window": 50, "windows_per_dim": 3}
        assert alpha_of(linear(weight.T.clone()), **options) == pytest.approx(alpha_of(linear(weight), **options))

    @pytest.mark.parametrize("esd", ["farms", "full"])
    def test_transpose_of_a_convolution(self, esd):
        conv, up = nn.Conv2d(8, 20, 3), nn.ConvTranspose2d(8, 20, 3)
        up.weight.data = conv.weight.data.transpose(0, 1).clone()
        assert alpha_of(conv, esd=esd) == pytest.approx(alpha_of(up, esd=esd))

    @pytest.mark.parametrize("name", MODULES)
    def test_permutations_of_whole_matrices(self, name):
        # Promised where the sample is of whole matrices, or of windows as large as they are.
        module = MODULES[name]()
        options = {"esd": "full", "precision": "float64"}
        before = analyze(module, **options)
        with torch.no_grad():
            weight = next(module.parameters())
            for dim in (0, 1, 2)[: weight.ndim]:
                weight.copy_(weight.index_select(dim, torch.randperm(weight.shape[dim])))
        assert_same_figures(alphas(analyze(module, **options)), alphas(before))

    def test_permutation_of_rows_inside_a_block(self):
        kernel = Kernel(4, 20, 10)
        order = torch.cat([torch.randperm(10), 10 + torch.randperm(10)])
        permuted = Kernel(values=kernel.stack.detach()[:, order])
        assert alpha_of(permuted) == pytest.approx(alpha_of(kernel))

    def test_permutation_where_one_window_holds_the_matrix(self):
        weight = torch.randn(80, 80)
        permuted = weight[torch.randperm(80)][:, torch.randperm(80)]
        assert alpha_of(linear(permuted)) == pytest.approx(alpha_of(linear(weight)))

    def test_rotation(self):
        weight = torch.randn(50, 50, dtype=torch.float64)
        rotation = torch.linalg.qr(torch.randn(50, 50, dtype=torch.float64)).Q
        assert alpha_of(linear(rotation @ weight)) == pytest.approx(alpha_of(linear(weight)))

    def test_ill_conditioned_weights(self):
        # A condition number of 1e9: the search for the best tail needs the small eigenvalues too.
        left, right = (torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64)).Q for _ in range(2))
        singular = torch.logspace(0, -9, 40, dtype=torch.float64)
        for fit in ("median", "goodness-of-fit"):
            expected = spectrum.fit(sorted((singular**2).tolist()), fit)[0]
            found = alpha_of(linear(left @ torch.diag(singular) @ right), fit=fit)
            assert found == pytest.approx(expected, rel=1e-4)


class TestNothingIsChanged:
    @pytest.mark.parametrize("esd", ["farms", "full"])
    def test_model_and_random_numbers(self, esd):
        model = nn.Sequential(
            parametrizations.spectral_norm(nn.Conv2d(6, 8, 3)),
            nn.BatchNorm2d(8),
            parametrizations.weight_norm(nn.Linear(20, 30)),
            nn.Linear(30, 20).double(),
        )
        state = {name: value.clone() for name, value in model.state_dict().items()}
        random = torch.get_rng_state()
        first, second = analyze(model, esd=esd), analyze(model, esd=esd)
        assert first == second
        assert torch.equal(torch.get_rng_state(), random)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(module.training for module in model.modules())
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_gradients_stay_enabled(self):
        analyze(nn.Linear(9, 9))
        assert torch.is_grad_enabled()

    @pytest.mark.parametrize("threads", [1, 2])
    def test_a_rule_may_forget_to_detach(self, threads, monkeypatch):
        class Forgetful(Kernel):
            pass

        @layer_matrices.register
        def _(module: Forgetful) -> list[MatrixStack]:
            return [MatrixStack(module.stack)]

        module = Forgetful(6, 30, 30)
        solved = []
        solve = torch.linalg.eigvalsh
        monkeypatch.setattr(torch.linalg, "eigvalsh", lambda m: solved.append(m.requires_grad) or solve(m))
        analyze(module, esd="full", threads=threads)
        assert solved
        assert not any(solved)

    def test_inference_mode(self):
        layer = nn.Linear(30, 30)
        wanted = alpha_of(layer)
        with torch.inference_mode():
            assert alpha_of(layer) == wanted

    def test_frozen_layers_are_measured(self):
        assert alpha_of(nn.Linear(30, 30).requires_grad_(False)) is not None


class TestBadInput:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("make", [lambda: nn.Linear(9, 9), lambda: nn.Conv2d(9, 9, 3)])
    def test_not_finite(self, bad, make):
        layer = make()
        with torch.no_grad():
            layer.weight[3, 4] = bad
        assert status_of(layer) == "weights contain NaN or infinity"

    @pytest.mark.parametrize("value", [complex(math.nan, 0), complex(0, math.inf)])
    def test_complex_not_finite(self, value):
        kernel = Kernel(3, 8, 8, dtype=torch.complex64)
        with torch.no_grad():
            kernel.stack[1, 2, 3] = value
        assert status_of(kernel) == "weights contain NaN or infinity"

    def test_zero(self):
        assert status_of(linear(torch.zeros(9, 9))) == "all weights are zero"

    @pytest.mark.parametrize("fit", FITS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_orthogonal(self, fit, dtype):
        layer = nn.Linear(30, 30)
        nn.init.orthogonal_(layer.weight, gain=1.7)
        found = status_of(linear(layer.weight.detach().to(dtype)), fit=fit)
        assert found == "flat spectrum: the eigenvalues in the tail of 1 sample(s) are all equal"

    @pytest.mark.parametrize("fit", FITS)
    def test_identity_kernels(self, fit):
        layer = nn.Conv2d(8, 24, 3)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(8).repeat(3, 1)[:, :, None, None].expand(24, 8, 3, 3))
        assert (
            status_of(layer, fit=fit) == "flat spectrum: the eigenvalues in the tail of 3 sample(s) are all equal"
        )

    @pytest.mark.parametrize("fit", FITS)
    @pytest.mark.parametrize("value", [1.0, -3e-20])
    def test_all_entries_equal_is_rank_one(self, fit, value):
        found = status_of(linear(torch.full((12, 12), value)), fit=fit)
        assert found == "low rank: zero eigenvalues in the tail of 1 sample(s)"

    def test_rank_below_the_tail(self):
        weight = torch.randn(30, 8, dtype=torch.float64) @ torch.randn(8, 30, dtype=torch.float64)
        assert status_of(linear(weight)) == "low rank: zero eigenvalues in the tail of 1 sample(s)"
        assert alpha_of(linear(weight), fit="goodness-of-fit") > 1
        assert alpha_of(linear(weight), xmin_pos=1.3, relative_cutoff=1e-9) > 1

    def test_one_block_of_zeros(self):
        weight = torch.randn(2, 24, 8)
        weight[:, 8:16] = 0
        assert status_of(Kernel(values=weight)) == "low rank: zero eigenvalues in the tail of 1 sample(s)"

    def test_weights_outside_every_window_are_zero_to_the_fit(self):
        weight = torch.zeros(1, 15, 8)
        weight[:, 14] = 1
        layers = checked_layers(Kernel(values=weight))
        record = measure(layers, SpectrumOptions(), histogram=True).layers["weight"]
        assert record.status == "low rank: zero eigenvalues in the tail of 1 sample(s)"
        assert record.histogram is None

    @pytest.mark.parametrize(
        "make",
        [
            lambda: nn.Conv2d(1, 1, 1),
            lambda: nn.Linear(1, 50),
            lambda: nn.Linear(50, 1),
            lambda: nn.Conv2d(1, 8, 3),
        ],
    )
    def test_one_row_or_column(self, make):
        assert status_of(make()) == "one row or one column: no spectrum"

    def test_too_few_eigenvalues(self):
        assert status_of(nn.Linear(4, 4)) == "too few eigenvalues: 4 in a sample, min_eigenvalues is 5"
        assert alpha_of(nn.Linear(4, 4), min_eigenvalues=4) > 1
        assert status_of(nn.Conv2d(2, 40, 2), min_eigenvalues=9).startswith("too few")

    def test_too_few_eigenvalues_left(self):
        (record,) = analyze(nn.Linear(40, 40), relative_cutoff=0.9).layers.values()
        assert record.status.startswith("too few eigenvalues: ")
        assert record.alpha is None

    def test_two_eigenvalues_in_the_smallest_samples(self):
        for fit in FITS:
            record = analyze(nn.Linear(2, 2), fit=fit, min_eigenvalues=2).layers["weight"]
            assert record.alpha is None or record.alpha > 1

    @pytest.fixture
    def no_convergence(self, monkeypatch):
        """No matrix is known that defeats LAPACK: it is made to fail for those of 20 columns."""
        eigvalsh, svdvals = torch.linalg.eigvalsh, torch.linalg.svdvals

        def unless_hard(solve):
            def solve_or_fail(matrices):
                if matrices.shape[-1] == 20:
                    raise torch.linalg.LinAlgError("no convergence")
                return solve(matrices)

            return solve_or_fail

        monkeypatch.setattr(torch.linalg, "eigvalsh", unless_hard(eigvalsh))
        monkeypatch.setattr(torch.linalg, "svdvals", unless_hard(svdvals))

    @pytest.mark.parametrize("precision", ["auto", "float64"])
    def test_solver_that_does_not_converge(self, precision, no_convergence):
        model = nn.Sequential(nn.Linear(30, 30), Kernel(4, 21, 20), nn.Linear(14, 14))
        records = analyze(model, null=True, histogram=True, precision=precision).layers
        assert [record.status for record in records.values()] == [
            "ok",
            "the eigenvalue solver did not converge",
            "ok",
        ]
        assert set(figures(records["1"]).values()) == {None, 0}
        assert records["1"].histogram is records["1"].null_mean is None

    def test_quarters_that_do_not_converge(self, no_convergence):
        # Their spread is the standard error of a single window: the coarser formula stands in.
        (record,) = analyze(nn.Linear(40, 40)).layers.values()
        assert record.status == "ok"
        assert record.alpha_error == pytest.approx((record.alpha - 1) / 20**0.5)

    def test_no_window_fits(self):
        layer = nn.Linear(40, 3)
        assert status_of(layer, aspect_ratio=10) == "no window of this aspect ratio fits"

    def test_no_eigenvalue_near_the_peak(self):
        # Bins of a quarter of a decade; the fullest begins at p = 1e8 and holds values above 1.5 p alone, and what
        # is smaller lies below log10(0.95 p) = 7.98.
        eigenvalues = torch.tensor([1e-10, *[1.7e8 + 1e6 * i for i in range(6)], 1e14, 1e15], dtype=torch.float64)
        found = status_of(linear(torch.diag(eigenvalues.sqrt())), fit="xmin_peak")
        assert found == "no eigenvalue in the range that fit='xmin_peak' searches in 1 sample(s)"

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
    def test_low_precision_weights(self, dtype):
        weight = torch.randn(40, 40).to(dtype)
        assert alpha_of(linear_of(weight)) == pytest.approx(alpha_of(linear(weight.double())))

    def test_integer_weights_are_listed(self):
        weight = torch.ones(9, 9, dtype=torch.int8)
        assert status_of(linear_of(weight)) == "quantised weights (torch.int8): dequantise the model first"

    def test_meta_and_lazy_layers_are_listed(self):
        assert status_of(nn.Linear(9, 9, device="meta")) == "on the meta device: no values"
        assert "run one batch" in status_of(nn.LazyLinear(9))

    @pytest.mark.parametrize(
        "model", [nn.Sequential(), nn.ReLU(), nn.BatchNorm2d(4), nn.Embedding(4, 4), nn.Linear(5, 1)], ids=str
    )
    def test_models_with_nothing_to_analyse(self, model):
        name = type(model).__name__
        with pytest.raises(
            ValueError, match=f"{name} has no layer that can be analysed; .*layer_matrices.register"
        ):
            analyze(model)

    def test_the_reasons_are_listed(self):
        with pytest.raises(ValueError, match="\n  0: one row or one column: no spectrum\n  1: no rule for"):
            analyze(nn.Sequential(nn.Linear(5, 1), nn.Bilinear(4, 4, 4)))

    @pytest.mark.parametrize("model", [None, {"weight": 1}, torch.zeros(3, 3), nn.Linear])
    def test_not_a_module(self, model):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got "):
            analyze(model)

    def test_options_are_checked_before_the_model(self):
        with pytest.raises(
            ValueError, match="fit must be one of 'median', 'goodness-of-fit', 'xmin_peak', got 'mean'"
        ):
            analyze(nn.Sequential(), fit="mean")
        with pytest.raises(TypeError, match="no option 'fits'; did you mean 'fit'"):
            analyze(nn.Linear(9, 9), fits="median")


def linear_of(weight):
    """A linear layer of a weight that takes no gradient."""
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class TestSharedAmongProcesses:
    """Processes played one after the other: each gathers what the others found in an earlier round."""

    @staticmethod
    def parts(layers, world_size):
        """What each process hands to the others."""
        found = []

        def keep(own):
            found.append(own)
            return [own]

        for rank in range(world_size):
            measure(layers, SpectrumOptions(), histogram=True, team=Team(rank, world_size, keep))
        return found

    @pytest.mark.parametrize("world_size", [2, 3, 7])
    def test_every_process_gets_the_whole_report(self, world_size):
        layers = find_layers(nn.Sequential(nn.Linear(20, 30), nn.MultiheadAttention(8, 2), nn.Linear(1, 4)))
        alone = measure(layers, SpectrumOptions(), histogram=True)
        parts = self.parts(layers, world_size)
        for rank in range(world_size):
            team = Team(rank, world_size, lambda _: parts)
            assert measure(layers, SpectrumOptions(), histogram=True, team=team) == alone

    def test_every_layer_is_measured_once(self):
        layers = find_layers(nn.Sequential(*(nn.Linear(8, 8) for _ in range(5))))
        assert [sorted(records) for records, _ in self.parts(layers, 2)] == [["0", "2", "4"], ["1", "3"]]

    @staticmethod
    def shares(costs, processes):
        """The positions that fall to each process, of layers that stand for their costs."""
        layers = [Layer(str(place), "", nn.Identity()) for place in range(len(costs))]
        return [
            {
                int(name)
                for name in layers_of_this_process(
                    layers, lambda layer: costs[int(layer.name)], Team(rank, processes, list)
                )
            }
            for rank in range(processes)
        ]

    @pytest.mark.parametrize("esd", ["farms", "full"])
    @pytest.mark.parametrize("processes", [2, 4])
    @pytest.mark.parametrize(
        "net",
        [
            pytest.param(lambda: SmallImageResNet(18), id="ResNet-18"),
            pytest.param(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(768, 12, 3072), 12), id="BERT"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:enable_nested_tensor")
    def test_processes_have_equal_work(self, net, processes, esd):
        with torch.device("meta"):
            layers = find_layers(net())
        costs = [cost(layer, SpectrumOptions(esd=esd)) for layer in layers]
        shares = self.shares(costs, processes)
        assert sorted(task for share in shares for task in share) == list(range(len(layers)))
        most = max(sum(costs[task] for task in share) for share in shares)
        # No sharing does better than the mean, the largest layer, or two of the n + 1 largest ones on one of n.
        ranked = sorted(costs, reverse=True)
        least = max(sum(costs) / processes, ranked[0], ranked[processes - 1] + ranked[processes])
        assert most <= 1.02 * least
        assert least <= 1.1 * sum(costs) / processes

    @pytest.mark.parametrize("processes", [1, 2, 3, 10])
    @given(costs=st.lists(st.integers(0, 100), max_size=8))
    @settings(max_examples=50)
    def test_shares_are_close_to_the_best(self, costs, processes):
        shares = self.shares(costs, processes)
        assert sorted(task for share in shares for task in share) == list(range(len(costs)))
        most = max(sum(costs[task] for task in share) for share in shares)
        # Graham's bound: the last task to be given to the busiest process went to the one with least to do.
        assert most <= sum(costs) / processes + max(costs, default=0)

    @pytest.mark.parametrize(
        ("layer", "options", "expected"),
        [
            (lambda: nn.Conv2d(16, 40, 3), {}, 9 * 2 * 16**3),
            (lambda: nn.Conv2d(16, 40, 3), {"esd": "full"}, 9 * 40 * 16 * 16),
            (lambda: nn.Linear(300, 200), {"window": 50, "windows_per_dim": 4}, 16 * 50**3),
            (
                lambda: nn.Linear(300, 200),
                {"aspect_ratio": 0.5, "window": 60, "windows_per_dim": 2},
                4 * 60 * 30**2,
            ),
            (lambda: nn.Linear(40, 3), {"aspect_ratio": 10}, 0),
            (lambda: nn.Bilinear(5, 5, 5), {}, 0),
        ],
    )
    def test_cost(self, layer, options, expected):
        assert cost(find_layers(layer())[0], SpectrumOptions(**options)) == expected

    def test_a_failure_is_raised_on_every_process(self, monkeypatch):
        layers = find_layers(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))

        def fail(*_):
            raise MemoryError("no room")

        def other_failed(own):
            return [own, ({}, True)]

        def this_failed(own):
            return [own, ({}, False)]

        with pytest.raises(RuntimeError, match="failed on 1 of 2 ranks, elsewhere"):
            measure(layers, SpectrumOptions(), team=Team(0, 2, other_failed))
        monkeypatch.setattr(torch.linalg, "eigvalsh", fail)
        with pytest.raises(RuntimeError, match="failed on 1 of 2 ranks, on this rank 0: no room"):
            measure(layers, SpectrumOptions(), team=Team(0, 2, this_failed))
        with pytest.raises(MemoryError, match="no room"):
            measure(layers, SpectrumOptions())


class TestHistogram:
    def test_counts_every_positive_eigenvalue(self):
        weight = torch.diag(torch.cat([torch.zeros(2), torch.logspace(-3, 1, 30)])).double()
        record = measure(checked_layers(linear(weight)), SpectrumOptions(), histogram=True).layers["weight"]
        histogram = record.histogram
        assert sum(histogram.counts) == 30
        assert histogram.low == pytest.approx(-6, abs=1e-6)
        assert histogram.high == pytest.approx(2, abs=1e-6)
        # Bins are left-closed; the last is closed on both sides. Equal steps spread evenly.
        assert max(histogram.counts) == 1

    def test_matches_numpy(self):
        layer = nn.Conv2d(10, 22, 3)
        options = SpectrumOptions(precision="float64")
        record = measure(checked_layers(layer), options, histogram=True).layers["weight"]
        samples = windows.samples(stacks.convolution(layer.weight.detach().numpy()), "blocks")
        logs = np.log10([value for sample in samples for value in spectrum.eigenvalues(sample, 0.5)])
        counts, edges = np.histogram(logs, bins=len(record.histogram.counts))
        assert (record.histogram.low, record.histogram.high) == pytest.approx((edges[0], edges[-1]))
        assert list(record.histogram.counts) == counts.tolist()

    @pytest.mark.parametrize("scale", [1e200, 1e-200])
    def test_extreme_scales(self, scale):
        weight = torch.randn(20, 20, dtype=torch.float64)
        plain, scaled = (
            measure(checked_layers(linear(w)), SpectrumOptions(), histogram=True).layers["weight"].histogram
            for w in (weight, weight * scale)
        )
        assert sum(scaled.counts) == 20
        assert scaled.low == pytest.approx(plain.low + 2 * math.log10(scale))

    def test_equal_eigenvalues_and_layers_without_any(self):
        model = nn.Sequential(linear(torch.eye(9)), linear(torch.zeros(9, 9)), nn.Linear(9, 1))
        equal, zero, column = measure(find_layers(model), SpectrumOptions(), histogram=True).layers.values()
        assert sum(equal.histogram.counts) == 9
        assert equal.histogram.low == equal.histogram.high == 0
        assert zero.histogram is column.histogram is None

    def test_changes_no_figure(self):
        # Not even where a solver in single precision would do for alpha alone.
        model = nn.Sequential(
            nn.Linear(70, 70), nn.Conv2d(9, 12, 3), linear(torch.randn(40, 9) @ torch.randn(9, 30))
        )
        plain, counted = analyze(model), analyze(model, histogram=True)
        assert {record.solver for record in plain.layers.values()} > {"cpu float32"}
        for record, other in zip(plain.layers.values(), counted.layers.values(), strict=True):
            assert other.histogram is not None
            assert dataclasses.replace(other, histogram=None) == record

    def test_not_counted_unless_asked_for(self):
        assert analyze(nn.Linear(9, 9)).layers["weight"].histogram is None


FILLINGS = {
    "normal": lambda w: w.normal_(),
    "uniform": lambda w: w.uniform_(-0.1, 0.1),
    "zeros": lambda w: w.zero_(),
    "ones": lambda w: w.fill_(1),
    "nan": lambda w: w.normal_()[:1].fill_(math.nan),
    "infinite": lambda w: w.normal_()[:1].fill_(math.inf),
    "eye": lambda w: w.zero_().flatten(1).fill_diagonal_(1),
    "huge": lambda w: w.normal_().mul_(1e30),
    "tiny": lambda w: w.normal_().mul_(1e-30),
    "denormal": lambda w: w.normal_().mul_(1e-40),
    "sparse": lambda w: w.normal_().mul_(torch.rand_like(w) < 0.1),
    "copies": lambda w: w.copy_(w[:1].clone().expand_as(w)),
    "heavy": lambda w: w.cauchy_().pow_(3),
}
SIZES = st.sampled_from([1, 2, 3, 5, 8, 17, 30])
LAYERS = st.tuples(
    st.sampled_from(["linear", "conv", "up", "complex"]), SIZES, SIZES, st.sampled_from(list(FILLINGS))
)


def build(kind, into, out, filling):
    types = {
        "linear": lambda: nn.Linear(into, out),
        "conv": lambda: nn.Conv2d(into, out, 2),
        "up": lambda: nn.ConvTranspose1d(into, out, 3),
        "complex": lambda: nn.Linear(into, out, dtype=torch.complex64),
    }
    layer = types[kind]()
    with torch.no_grad():
        FILLINGS[filling](layer.weight.real if kind == "complex" else layer.weight)
    return layer


@settings(max_examples=120)
@given(
    layers=st.lists(LAYERS, min_size=1, max_size=5),
    esd=st.sampled_from(["farms", "full"]),
    fit=st.sampled_from(FITS),
    aspect_ratio=st.sampled_from([0.5, 1.0, 2.0]),
    cleaning=st.sampled_from([{}, {"filter_zeros": True}, {"relative_cutoff": 1e-3}]),
    assign_func=st.sampled_from(["tb_linear_map", "tb_step", "tb_sigmoid", "tb_sqrt", "tb_log2"]),
)
def test_any_model_gets_finite_ratios_inside_the_bounds(layers, esd, fit, aspect_ratio, cleaning, assign_func):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30), *(build(*layer) for layer in layers))
    options = {"esd": esd, "fit": fit, "aspect_ratio": aspect_ratio, **cleaning}
    report = analyze(model, **options)
    assert len(report.layers) == len(layers) + 1
    for name, record in report.layers.items():
        assert (record.alpha is not None) == (record.status == "ok" or record.collapsed), f"{name}: {record}"
        known = [getattr(record, figure) for figure in FIGURES if getattr(record, figure) is not None]
        assert all(map(math.isfinite, known)), f"{name}: {record}"
        assert record.alpha is None or record.alpha > 1
        assert record.ks_distance is None or 0 <= record.ks_distance < 1
    ratios = lr_ratios(report.alphas, assign_func)
    low, high = {"tb_sigmoid": (0.56, 1.78), "tb_linear_map": (0.5, 1.5), "tb_step": (0.5, 1.5)}.get(
        assign_func, (0, len(ratios))
    )
    assert all(low <= ratio <= high for ratio in ratios.values()), ratios
    str(report)


def test_every_fit_and_esd_is_reached_through_the_package():
    for esd, fit in product(("farms", "full"), FITS):
        report = farms_tb.analyze(nn.Linear(30, 40), esd=esd, fit=fit)
        assert report.options["esd"] == esd
        assert report.options["fit"] == fit


def test_embeddings_are_measured_where_asked_for(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(emb=nn.Embedding(60, 30), fc=nn.Linear(30, 30)))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    for plain in (analyze(model), analyze_checkpoint(tmp_path / "weights.pt")):
        assert plain.layers["emb"].alpha is None
        assert "embeddings=True" in plain.layers["emb"].status
    found = analyze(model, embeddings=True).layers
    assert found["emb"].shape == (1, 60, 30)
    assert found["emb"].alpha == pytest.approx(2.1, abs=0.4)
    assert analyze_checkpoint(tmp_path / "weights.pt", embeddings=True).layers == found


def test_a_measured_embedding_is_balanced_as_any_layer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(60, 30), *(nn.Linear(30, 30) for _ in range(4)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    balancer = TempBalance(
        model, optimizer, embeddings=True, exclude_first=False, exclude_last=False, assign_func="tb_linear_map"
    )
    balancer.step()
    assert balancer.ratios["0"] != 1
