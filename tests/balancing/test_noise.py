"""What is noise in an alpha: its standard error, the permutation null, and the map that leaves noise out."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from farms_tb import FARMSTempBalance, MatrixStack, TempBalance, analyze, analyze_checkpoint, lr_ratios
from farms_tb.balancing.ratio_maps import noise_lambda
from farms_tb.options import SpectrumOptions
from farms_tb.report import LayerRecord
from farms_tb.spectra.distributed import Team
from farms_tb.spectra.measure import measure
from farms_tb.spectra.permutation_null import MAX_DRAWS, MIN_DRAWS, measure_nulls, weight_record, with_nulls
from farms_tb.weights.layers import find_layers
from recipes.models.resnet import SmallImageResNet
from recipes.models.vgg import SmallImageVGG
from tests.helpers import LIGHTNING_NOISE, Module, fit, make_net

NETS = 20
DRAWS = 60


def stack_record(stack: MatrixStack, options: SpectrumOptions, null: bool = False) -> LayerRecord:
    return weight_record(stack, options, null=null)


def random_stack(shape: tuple[int, int, int], seed: int, sampling: Any = "blocks") -> MatrixStack:
    return MatrixStack(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), sampling)


def planted(alpha: float, size: int = 24, kernel: int = 3) -> nn.Conv2d:
    """A convolution whose kernel positions all have eigenvalues that follow a power law."""
    layer = nn.Conv2d(size, size, kernel, bias=False)
    quantiles = (torch.arange(size) + 0.5) / size
    singular = (1 - quantiles) ** (-0.5 / (alpha - 1))
    with torch.no_grad():
        for row in range(kernel):
            for column in range(kernel):
                left, right = (torch.linalg.qr(torch.randn(size, size)).Q for _ in range(2))
                layer.weight[:, :, row, column] = left * singular @ right
    return layer


def null_of(matrices: torch.Tensor, **options: Any) -> tuple[float, float]:
    record = stack_record(MatrixStack(matrices), SpectrumOptions(**options), null=True)
    assert record.null_mean is not None
    assert record.null_std is not None
    return record.null_mean, record.null_std


class TestStandardError:
    @pytest.mark.parametrize(
        ("shape", "sampling", "low", "high"),
        [
            ((9, 16, 16), "blocks", 0.75, 1.33),
            ((9, 64, 16), "blocks", 0.75, 1.33),
            ((25, 12, 12), "blocks", 0.75, 1.6),
            ((1, 64, 64), "blocks", 0.6, 1.6),  # quarters of the one window
            ((1, 96, 24), "blocks", 0.6, 1.6),  # quarters of four windows
            ((1, 40, 40), "grid", 0.6, 1.6),
            ((1, 300, 120), "grid", 0.75, 2.2),  # overlapping windows
        ],
    )
    def test_is_the_deviation_over_random_layers(
        self, shape: tuple[int, int, int], sampling: str, low: float, high: float
    ) -> None:
        options = SpectrumOptions(windows_per_dim=4)
        records = [stack_record(random_stack(shape, seed, sampling), options) for seed in range(DRAWS)]
        deviation = torch.tensor([record.alpha for record in records]).std().item()
        errors = [record.alpha_error for record in records if record.alpha_error is not None]
        typical = math.sqrt(math.fsum(error**2 for error in errors) / DRAWS)
        assert low < typical / deviation < high

    def test_tiny_layers_have_hills_own(self) -> None:
        record = stack_record(random_stack((1, 8, 8), 0), SpectrumOptions())
        assert record.alpha is not None
        assert record.alpha_error == pytest.approx((record.alpha - 1) / math.sqrt(4))

    def test_no_alpha_no_error(self) -> None:
        report = analyze(nn.Sequential(nn.Linear(9, 9), nn.Linear(3, 3)))
        assert report.layers["1"].alpha is None
        assert report.layers["1"].alpha_error is None
        assert report.layers["1"].xmin is None

    def test_scale_and_order_do_not_matter(self) -> None:
        stack = random_stack((9, 32, 16), 1)
        plain = stack_record(stack, SpectrumOptions())
        scaled = stack_record(MatrixStack(stack.matrices.flip(0) * 1e3), SpectrumOptions())
        assert scaled.alpha_error == pytest.approx(plain.alpha_error, rel=1e-6)
        assert plain.xmin is not None
        assert scaled.xmin == pytest.approx(plain.xmin * 1e6, rel=1e-6)


class TestXmin:
    def test_is_the_middle_eigenvalue(self) -> None:
        weight = torch.diag(torch.arange(1.0, 11.0))
        assert stack_record(MatrixStack(weight[None]), SpectrumOptions()).xmin == pytest.approx(36)

    def test_is_the_geometric_mean_over_blocks(self) -> None:
        blocks = torch.cat([torch.diag(torch.arange(1.0, 11.0)), torch.diag(torch.arange(1.0, 11.0)) * 10])
        assert stack_record(MatrixStack(blocks[None]), SpectrumOptions()).xmin == pytest.approx(360)


class TestNull:
    @pytest.mark.parametrize("shape", [(9, 16, 16), (1, 24, 24), (4, 48, 16)])
    def test_is_that_of_random_layers(self, shape: tuple[int, int, int]) -> None:
        stacks = [random_stack(shape, seed) for seed in range(1 + DRAWS)]
        alphas = torch.tensor([stack_record(stack, SpectrumOptions()).alpha for stack in stacks[1:]])
        mean, std = null_of(stacks[0].matrices)
        assert mean == pytest.approx(alphas.mean().item(), abs=4 * std / math.sqrt(MAX_DRAWS))
        assert std == pytest.approx(alphas.std().item(), rel=0.5)

    def test_keeps_the_distribution_of_the_entries(self) -> None:
        assert null_of(torch.distributions.StudentT(2.0).sample((9, 16, 16)))[0] < 2

    @pytest.mark.parametrize("fit", ["goodness-of-fit", "xmin_peak"])
    def test_follows_the_options(self, fit: Any) -> None:
        matrices = random_stack((9, 16, 16), 0).matrices
        assert null_of(matrices, fit=fit)[0] > null_of(matrices)[0] + 0.5

    def test_complex_weights(self) -> None:
        mean, std = null_of(torch.randn(9, 16, 16, dtype=torch.complex64))
        assert 1.9 < mean < 2.3
        assert 0 < std < 0.2

    def test_same_every_time_and_no_other_randomness_is_touched(self) -> None:
        matrices, before = random_stack((9, 16, 16), 0).matrices, torch.get_rng_state()
        assert null_of(matrices) == null_of(matrices)
        assert torch.equal(torch.get_rng_state(), before)

    def test_is_the_layers_own_whatever_is_measured_with_it(self, tmp_path: Path) -> None:
        """A layer has the same z-score in a model, alone, in a state dict and in a file."""
        net = nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(2)), nn.Linear(16, 16), nn.Conv2d(16, 16, 1))
        torch.save(net.state_dict(), tmp_path / "net.pt")
        records = analyze(net, null=True).layers
        assert records["0"].null != records["1"].null
        assert analyze(net.state_dict(), null=True).layers == records
        assert analyze_checkpoint(tmp_path / "net.pt", null=True).layers == records
        assert analyze(net[1], null=True).layers["weight"] == records["1"]

    def test_no_alpha_no_null(self) -> None:
        net = nn.Sequential(nn.Linear(9, 9), nn.Linear(3, 3), nn.Linear(9, 7))
        nn.init.ones_(net[2].weight)
        report = analyze(net, null=True)
        assert report.layers["0"].z_score is not None
        assert report.z_scores == {"0": report.layers["0"].z_score, "1": None, "2": None}
        assert report.layers["2"].null_mean is None

    @pytest.mark.parametrize("draws", [MIN_DRAWS, MAX_DRAWS])
    def test_z_scores_of_random_layers_have_variance_one(
        self, draws: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("farms_tb.spectra.permutation_null.MIN_DRAWS", draws)
        monkeypatch.setattr("farms_tb.spectra.permutation_null.MAX_DRAWS", draws)
        scores = [
            stack_record(random_stack((4, 12, 12), seed), SpectrumOptions(), null=True).z_score
            for seed in range(200)
        ]
        z = torch.tensor(scores)
        # The variance of 200 draws of Student's t has a standard error of about 0.15.
        assert z.mean().item() == pytest.approx(0, abs=0.3)
        assert z.var().item() == pytest.approx(1, abs=0.5)

    def test_shared_among_processes(self) -> None:
        layers = find_layers(make_net())
        report = measure(layers, SpectrumOptions())
        alone = measure_nulls(layers, report, SpectrumOptions())
        parts: list[object] = []

        def keep(own: object) -> list[object]:
            parts.append(own)
            return [own]

        for rank in range(3):
            measure_nulls(layers, report, SpectrumOptions(), team=Team(rank, 3, keep))
        team = Team(1, 3, lambda _: parts)
        assert measure_nulls(layers, report, SpectrumOptions(), team=team) == alone

    def test_known_nulls_are_not_shared_again(self) -> None:
        def refuse(_: object) -> list[object]:
            raise AssertionError

        layers = find_layers(make_net())
        report = measure(layers, SpectrumOptions())
        nulls = measure_nulls(layers, report, SpectrumOptions())
        known = with_nulls(report, nulls)
        assert measure_nulls(layers, known, SpectrumOptions(), team=Team(0, 2, refuse)) == nulls


class TestMap:
    def test_lambda(self) -> None:
        assert (
            noise_lambda([]) == noise_lambda([3.0]) == noise_lambda([2.0, 2.0]) == noise_lambda([0.1, -0.1]) == 0
        )
        assert noise_lambda([-2.0, 0.0, 2.0]) == 0.75
        assert noise_lambda([1e300, -1e300]) == 1

    def test_is_the_linear_map_shrunk(self) -> None:
        scores = {"a": -2.0, "b": 0.0, "c": 2.0, "d": None}
        ratios = lr_ratios(scores, "noise_aware", lr_min_ratio=0.1, lr_max_ratio=1.9)
        assert ratios == pytest.approx({"a": 0.1**0.75, "b": 1.0, "c": 1.9**0.75, "d": 1.0})
        assert lr_ratios({"a": 0.5, "b": -0.5}, "noise_aware", lr_min_ratio=0) == {"a": 1, "b": 1}

    @pytest.mark.parametrize("cls", [SmallImageResNet, SmallImageVGG])
    def test_random_nets_keep_their_rates(self, cls: type[nn.Module]) -> None:
        """Of the 20 nets together; the plain map gives the same nets ratios all over its range."""
        off = {"noise_aware": 0.0, "tb_linear_map": 0.0}
        for seed in range(NETS):
            torch.manual_seed(seed)
            net = cls(width=8)
            for module in net.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.reset_parameters()
            for name in off:
                optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
                balancer = TempBalance(net, optimizer, assign_func=name, lr_min_ratio=0.1, lr_max_ratio=1.9)  # type: ignore[arg-type]
                ratios = list(balancer.ratios.values())[1:-1]
                off[name] += math.fsum((ratio - 1) ** 2 for ratio in ratios) / len(ratios) / NETS
        assert math.sqrt(off["noise_aware"]) < 0.15
        assert math.sqrt(off["tb_linear_map"]) > 0.4

    def test_layers_far_apart_keep_the_plain_ratios(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(*(planted(alpha) for alpha in (2.0, 2.0, 4.0, 3.0, 2.5, 3.5, 2.0)))
        ratios = []
        for name in ("noise_aware", "tb_linear_map"):
            balancer = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func=name)  # type: ignore[arg-type]
            ratios.append(list(balancer.ratios.values()))
            balancer.detach()
        assert ratios[0] == pytest.approx(ratios[1], rel=0.005)
        assert max(ratios[0]) == pytest.approx(1.5, rel=0.005)

    def test_a_layer_that_was_zero_joins_when_it_has_weights(self) -> None:
        net = make_net()
        net[5].weight.data.zero_()
        with pytest.warns(UserWarning, match="keep the base learning rate: 5: all weights are zero"):
            balancer = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="noise_aware")
        before = balancer.report.layers["2"]
        assert balancer.report.layers["5"].z_score is None
        nn.init.normal_(net[5].weight)
        balancer.step()
        assert balancer.report.layers["5"].z_score is not None
        assert balancer.report.layers["2"].null_mean == before.null_mean

    def test_its_null_is_that_of_the_first_weights(self) -> None:
        net = make_net()
        balancer = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="noise_aware")
        nulls = {name: (record.null_mean, record.null_std) for name, record in balancer.report.layers.items()}
        net[2].weight.data = torch.distributions.StudentT(1.5).sample(net[2].weight.shape)
        balancer.step()
        assert nulls == {n: (record.null_mean, record.null_std) for n, record in balancer.report.layers.items()}


class TestInTraining:
    pytestmark = LIGHTNING_NOISE

    def test_lambda_and_z_are_logged(self, tmp_path: Path) -> None:
        callback = FARMSTempBalance(assign_func="noise_aware")
        fit(Module(), [callback], logger=CSVLogger(tmp_path, name="", version=""))
        with (tmp_path / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["farms/alpha_mean"]]
        for row in rows[:-1]:
            z = [float(row[f"farms/z/net.{index}"]) for index in (2, 5, 7)]
            assert float(row["farms/lambda"]) == pytest.approx(noise_lambda(z))
            ratios = [float(row[f"farms/ratio/net.{index}"]) for index in (2, 5, 7)]
            assert float(row["farms/ratio_mean"]) == pytest.approx(math.fsum(ratios) / 3)
        assert rows[-1]["farms/lambda"] == ""

    def test_resumed_run_has_the_same_nulls(self, tmp_path: Path) -> None:
        whole, module = FARMSTempBalance(assign_func="noise_aware"), Module()
        fit(module, [whole], max_epochs=4)
        first, resumed = (FARMSTempBalance(assign_func="noise_aware") for _ in range(2))
        trainer = fit(Module(), [first], max_epochs=2)
        trainer.save_checkpoint(tmp_path / "half.ckpt")
        fit(other := Module(), [resumed], max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
        assert resumed.report == whole.report
        assert resumed.ratios == whole.ratios
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))

    def test_plain_map_warns_of_noise(self) -> None:
        """Not of the initial weights, which are random by definition."""
        torch.manual_seed(1)
        net = nn.Sequential(*(nn.Conv2d(16, 16, 3) for _ in range(6)))
        balancer = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map")
        with pytest.warns(
            UserWarning, match=r"\d+% of the variance of alpha between the layers is sampling noise"
        ):
            balancer.step()

    def test_plain_map_warns_of_a_single_matrix_on_top(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Conv2d(16, 16, size) for size in (3, 3, 1, 3, 3)))
        with torch.no_grad():
            nn.init.orthogonal_(net[2].weight).mul_(torch.linspace(1, 1.2, 16)[:, None, None, None])
        balancer = TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map")
        with pytest.warns(UserWarning, match="2 has the largest alpha and is a single matrix"):
            balancer.step()

    def test_no_warning_of_layers_far_apart(self, recwarn: pytest.WarningsRecorder) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(*(planted(alpha) for alpha in (2.0, 2.0, 4.0, 3.0, 2.0)))
        TempBalance(net, torch.optim.SGD(net.parameters(), lr=0.1), assign_func="tb_linear_map").step()
        assert not recwarn.list
