"""A small alpha that does not come of training: spectra that have collapsed, and tails made of rounding errors."""

import pytest
import torch
from torch import nn

from farms_tb import TempBalance, analyze
from farms_tb.report import COLLAPSED


def linear(weight):
    """A linear layer of this weight, in its type."""
    layer = nn.Linear(*reversed(weight.shape), bias=False).to(weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    return layer


def convolution(weight):
    """A convolution with this matrix at each of its nine places, but for the signs of its rows."""
    layer = nn.Conv2d(*reversed(weight.shape), 3, bias=False).to(weight.dtype)
    signs = torch.randint(0, 2, (len(weight), 1, 3, 3)) * 2 - 1
    layer.weight.data = weight[..., None, None] * signs
    return layer


def planted(singular, size=64):
    """A matrix of these singular values and random singular vectors, in float64."""
    left, right = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64)).Q for _ in "ab")
    return left @ torch.diag(singular.double()) @ right


def record_of(weight):
    (record,) = analyze(linear(weight)).layers.values()
    return record


def collapsed(size=64, directions=1):
    singular = torch.logspace(-2, -7, size, dtype=torch.float64)
    singular[:directions] = 1
    return planted(singular, size)


def trained(size=64):
    return planted((torch.arange(size) + 1.0) ** -0.75, size)


class TestCollapse:
    def test_is_marked_and_its_alpha_reported(self):
        record = record_of(collapsed().float())
        assert record.status.startswith("collapsed")
        assert record.collapsed
        assert record.alpha < 1.3
        assert record.tail_floor < COLLAPSED
        assert (record.rank_99, record.num_eigenvalues) == (1, 64)

    @pytest.mark.parametrize("directions", [1, 2])
    @pytest.mark.parametrize("make", [linear, convolution])
    def test_linear_layers_and_convolutions_are_marked(self, make, directions):
        (record,) = analyze(make(collapsed(directions=directions).float())).layers.values()
        assert record.status.startswith("collapsed")
        assert record.rank_99 == directions * record.shape[0]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_random_and_trained_layers_are_not_marked(self, dtype):
        for weight in (torch.randn(64, 64), torch.rand(64, 64), 1e-3 * torch.randn(64, 64), trained()):
            record = record_of(weight.to(dtype))
            assert record.status == "ok"
            assert record.tail_floor > 1e-5
            assert not record.collapsed

    def test_rank_99_counts_directions(self):
        singular = torch.zeros(64)
        singular[:20] = 10.0
        singular[20:] = 0.1
        record = record_of(planted(singular).float())
        # 99 % of 20 * 100 + 44 * 0.01 is reached by the twentieth.
        assert record.rank_99 == 20

    def test_samples_are_added_up(self):
        record = analyze(nn.Conv2d(16, 48, 3)).layers["weight"]
        assert record.num_eigenvalues == 3 * 9 * 16
        assert 0.5 * record.num_eigenvalues < record.rank_99 < record.num_eigenvalues

    def net(self):
        torch.manual_seed(0)
        weights = (torch.randn(64, 64) / 8, trained() * 3, collapsed() * 3)
        return nn.Sequential(*(linear(weight.float()) for weight in weights))

    def ratios(self, **options):
        net = self.net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        ends = {"exclude_first": False, "exclude_last": False}
        return list(TempBalance(net, optimizer, **ends, assign_func="tb_linear_map", **options).ratios.values())

    @pytest.mark.filterwarnings("ignore:.*sampling noise", "ignore:.*largest alpha")
    def test_stays_out_of_the_map(self):
        with pytest.warns(UserWarning, match="collapsed"):
            assert self.ratios() == [1.5, 0.5, 1.0]

    @pytest.mark.filterwarnings("ignore:.*sampling noise", "ignore:.*largest alpha", "ignore:.*has collapsed")
    def test_is_kept_in_the_map_where_the_user_says_so(self):
        random, middle, smallest = self.ratios(collapsed="keep")
        assert (random, smallest) == (1.5, 0.5)
        assert 0.5 < middle < 1.5


class TestRoundingErrors:
    @pytest.mark.parametrize(
        "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex64]
    )
    @pytest.mark.parametrize("rank", [1, 2, 20])
    def test_low_rank_is_low_rank_in_every_type(self, dtype, rank):
        wide = torch.complex128 if dtype.is_complex else torch.float64
        weight = torch.randn(64, rank, dtype=wide) @ torch.randn(rank, 64, dtype=wide)
        record = record_of(weight.to(dtype)) if not dtype.is_complex else complex_record(weight.to(dtype))
        assert record.alpha is None
        assert record.status.startswith("low rank")

    @pytest.mark.parametrize("make", [linear, convolution])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_product_of_thin_matrices(self, dtype, make):
        weight = torch.randn(192, 4, dtype=dtype) @ torch.randn(4, 192, dtype=dtype)
        (record,) = analyze(make(weight)).layers.values()
        assert record.status.startswith("low rank")

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
    def test_coarse_types_keep_the_alpha_of_trained_layers(self, dtype):
        weight = trained()
        record = record_of(weight.float().to(dtype).float())
        assert record.alpha == pytest.approx(record_of(weight).alpha, rel=0.2)

    def test_rows_of_far_scales_are_no_rounding(self):
        """Their small eigenvalues are known to a roundoff of themselves, however small."""
        weight = torch.randn(40, 40, dtype=torch.float64) * torch.logspace(-8, 8, 40, dtype=torch.float64)[:, None]
        record = record_of(weight.float())
        assert record.alpha is not None


def complex_record(weight):
    from farms_tb import MatrixStack
    from farms_tb.options import SpectrumOptions
    from farms_tb.spectra.measure import measure_stacks

    (record,) = measure_stacks([MatrixStack(weight[None])], SpectrumOptions())
    return record
