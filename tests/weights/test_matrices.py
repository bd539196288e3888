"""Every layer type as a stack of matrices, against slow reference layouts and against what the layer computes."""

from importlib import import_module

import numpy as np
import pytest
import torch
from torch import nn

from farms_tb import MatrixStack, NoSpectrumError, layer_matrices
from farms_tb.weights.matrices import has_rule
from farms_tb.weights.stacks import CONV_NORM
from tests.reference import stacks as reference


def assert_same_stack(stack, expected):
    """The same matrices in any order: alpha pools them."""
    found = sorted(matrix.numpy().tobytes() for matrix in stack.matrices.contiguous())
    wanted = sorted(np.ascontiguousarray(m, stack.matrices.numpy().dtype).tobytes() for m in expected)
    assert stack.matrices.shape == (len(expected), *expected[0].shape)
    assert found == wanted
    assert not stack.matrices.requires_grad


@pytest.mark.parametrize("shape", [(7, 3), (3, 7), (5, 5)])
def test_linear(shape):
    module = nn.Linear(*shape)
    (stack,) = layer_matrices(module)
    assert_same_stack(stack, reference.linear(module.weight.detach().numpy()))
    assert (stack.sampling, stack.kind, stack.eigenvalue_scale) == ("grid", "real", 1.0)


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("into", "out", "groups"), [(4, 8, 1), (8, 4, 1), (6, 6, 1), (6, 12, 3), (12, 6, 2)])
def test_convolutions(transposed, dims, into, out, groups):
    name = f"Conv{'Transpose' if transposed else ''}{dims}d"
    kernel = (3, 2, 4)[:dims]
    module = getattr(nn, name)(into, out, kernel, groups=groups)
    (stack,) = layer_matrices(module)
    slow = reference.transposed_convolution if transposed else reference.convolution
    assert_same_stack(stack, slow(module.weight.detach().numpy(), groups))
    assert (stack.sampling, stack.kind, stack.eigenvalue_scale) == ("blocks", "real", CONV_NORM)


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
def test_matrices_are_those_the_convolution_multiplies_with(transposed):
    # A kernel of one position multiplies each group of channels by one matrix.
    cls = nn.ConvTranspose2d if transposed else nn.Conv2d
    module = cls(6, 4, 1, groups=2, bias=False).double()
    (stack,) = layer_matrices(module)
    x = torch.randn(1, 6, 1, 1, dtype=torch.float64)
    channels = [x[0, 3 * group : 3 * group + 3, 0, 0] @ stack.matrices[group] for group in range(2)]
    torch.testing.assert_close(module(x).flatten(), torch.cat(channels))


def test_depthwise_convolution_has_matrices_of_one_entry():
    (stack,) = layer_matrices(nn.Conv2d(8, 8, 3, groups=8))
    assert stack.matrices.shape == (72, 1, 1)


def test_packed_attention():
    module = nn.MultiheadAttention(12, 3)
    found = layer_matrices(module)
    for stack, expected in zip(found, reference.attention(module.in_proj_weight.detach().numpy()), strict=True):
        assert_same_stack(stack, expected)
    assert [(stack.part, stack.parameter, stack.sampling) for stack in found] == [
        (part, "in_proj_weight", "grid") for part in "qkv"
    ]


def test_attention_with_separate_projections():
    module = nn.MultiheadAttention(12, 3, kdim=5, vdim=20)
    found = layer_matrices(module)
    for stack, part in zip(found, "qkv", strict=True):
        weight = getattr(module, f"{part}_proj_weight")
        assert_same_stack(stack, reference.linear(weight.detach().numpy()))
        assert (stack.part, stack.parameter) == (part, f"{part}_proj_weight")
    assert [stack.matrices.shape[1:] for stack in found] == [(12, 12), (12, 5), (20, 12)]


@pytest.mark.parametrize(
    ("cls", "gates"), [(nn.LSTM, "ifgo"), (nn.GRU, "rzn"), (nn.LSTMCell, "ifgo"), (nn.GRUCell, "rzn")]
)
def test_gates(cls, gates):
    module = cls(7, 5)
    names = [name for name, _ in module.named_parameters() if name.startswith("weight")]
    found = layer_matrices(module)
    assert [stack.part for stack in found] == [f"{name}.{gate}" for name in names for gate in gates]
    expected = [s for name in names for s in reference.gates(getattr(module, name).detach().numpy(), len(gates))]
    for stack, matrices in zip(found, expected, strict=True):
        assert_same_stack(stack, matrices)
        assert (stack.sampling, stack.kind, stack.eigenvalue_scale) == ("grid", "real", 1.0)


def test_gates_are_those_the_layer_computes():
    """From a state of zero, the cell becomes sigmoid(i) * tanh(g), and the output sigmoid(o) * tanh(cell)."""
    module = nn.LSTMCell(3, 4, bias=False)
    matrices = {stack.part: stack.matrices[0] for stack in layer_matrices(module)}
    x = torch.randn(1, 3)
    i, g, o = (matrices[f"weight_ih.{gate}"] for gate in "igo")
    cell = torch.sigmoid(x @ i.mT) * torch.tanh(x @ g.mT)
    hidden, state = module(x)
    torch.testing.assert_close(state, cell)
    torch.testing.assert_close(hidden, torch.sigmoid(x @ o.mT) * torch.tanh(cell))


def test_recurrent_layers_without_gates_and_projections():
    assert [stack.part for stack in layer_matrices(nn.RNN(7, 5))] == ["weight_ih_l0", "weight_hh_l0"]
    projected = layer_matrices(nn.LSTM(7, 5, proj_size=3))
    assert [stack.part for stack in projected][-1] == "weight_hr_l0"
    assert projected[-1].matrices.shape == (1, 5, 3)


@pytest.mark.parametrize(
    ("cls", "config", "shapes"),
    [
        ("mixtral.modeling_mixtral.MixtralExperts", "MixtralConfig", [(4, 48, 16), (4, 24, 16)]),
        ("gpt_oss.modeling_gpt_oss.GptOssExperts", "GptOssConfig", [(4, 48, 16), (4, 24, 16)]),
        ("llama4.modeling_llama4.Llama4TextExperts", "Llama4TextConfig", [(4, 48, 16), (4, 24, 16)]),
    ],
)
def test_stacked_experts(cls, config, shapes):
    """One matrix an expert, whichever of its two dimensions the package stores first."""
    transformers = pytest.importorskip("transformers", minversion="5")
    path, _, name = cls.rpartition(".")
    settings = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 4}
    module = getattr(import_module(f"transformers.models.{path}"), name)(getattr(transformers, config)(**settings))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    found = layer_matrices(module)
    assert [stack.part for stack in found] == ["gate_up_proj", "down_proj"]
    for stack, shape in zip(found, shapes, strict=True):
        assert_same_stack(stack, reference.experts(getattr(module, stack.part).detach().numpy()))
        assert (stack.sampling, stack.eigenvalue_scale) == ("blocks", 1.0)
        assert stack.matrices.shape == shape


def test_complex_linear_is_spectral():
    (stack,) = layer_matrices(nn.Linear(4, 6, dtype=torch.complex64))
    assert stack.kind == "spectral"


class TestSpectralConvolution:
    """neuraloperator's Fourier layer: the modes that its forward pass reads, and no others."""

    @staticmethod
    def build(**options):
        from neuralop.layers.spectral_convolution import SpectralConv

        return SpectralConv(**{"in_channels": 3, "out_channels": 5, "n_modes": (6, 4), "bias": False} | options)

    @staticmethod
    def modes_read(module, sizes):
        """The modes (True) of the dense weight in which a forward pass differentiates."""
        weight = module.weight.to_tensor().detach().clone().requires_grad_()
        object.__setattr__(module, "_modules", {})
        module.weight = weight
        dtype = torch.complex64 if module.complex_data else torch.float32
        module(torch.randn(2, module.in_channels, *sizes, dtype=dtype)).abs().sum().backward()
        return weight.detach(), weight.grad.abs().sum((0, 1)) > 0

    @pytest.mark.parametrize("factorization", [None, "Tucker", "CP", "TT", "ComplexTucker"])
    def test_every_factorization(self, factorization):
        module = self.build(factorization=factorization, rank=0.5)
        (stack,) = layer_matrices(module)
        expected = reference.spectral(module.weight.to_tensor().detach().numpy())
        assert_same_stack(stack, expected)
        assert (stack.kind, stack.sampling, stack.eigenvalue_scale) == ("spectral", "blocks", 1.0)
        assert stack.matrices.shape == (6 * 3, 5, 3)

    @pytest.mark.parametrize("complex_data", [False, True], ids=["real data", "complex data"])
    @pytest.mark.parametrize(
        ("n_modes", "max_n_modes"),
        [
            ((6, 4), None),
            ((4, 4), (8, 8)),
            ((5, 4), (8, 8)),
            ((7, 5), (8, 8)),
            ((8, 3), (8, 7)),
            ((4,), (10,)),
            ((5,), (10,)),
            ((4, 5, 4), (7, 8, 6)),
        ],
    )
    def test_the_modes_that_the_forward_pass_reads(self, n_modes, max_n_modes, complex_data):
        module = self.build(n_modes=n_modes, max_n_modes=max_n_modes, complex_data=complex_data)
        (stack,) = layer_matrices(module)
        weight, read = self.modes_read(module, [16] * len(n_modes))
        assert 0 < read.sum() <= read.numel()
        expected = [matrix.numpy() for matrix in weight[:, :, read].permute(2, 1, 0)]
        assert_same_stack(stack, expected)

    def test_fewer_modes_set_later(self):
        module = self.build(n_modes=(8, 8))
        module.n_modes = (4, 4)
        assert layer_matrices(module)[0].matrices.shape == (4 * 3, 5, 3)

    def test_separable(self):
        module = self.build(in_channels=4, out_channels=4, separable=True)
        with pytest.raises(NoSpectrumError, match="separable spectral convolution: no in x out matrix"):
            layer_matrices(module)

    def test_subclass(self):
        from neuralop.layers.spectral_convolution import SpectralConv

        class Mine(SpectralConv):
            pass

        module = Mine(3, 5, (6, 4))
        assert has_rule(module)
        assert layer_matrices(module)[0].matrices.shape == (18, 5, 3)


class TestRegistration:
    class Fourier(nn.Module):
        """A layer as in the FNO's first publication: one complex weight."""

        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(4, 6, 3, dtype=torch.complex64))

    def test_unknown_types_have_no_matrices(self):
        module = nn.Bilinear(3, 4, 5)
        assert layer_matrices(module) == []
        assert not has_rule(module)

    def test_own_complex_layer(self):
        class Mine(self.Fourier):
            pass

        @layer_matrices.register
        def _(module: Mine) -> list[MatrixStack]:
            return [MatrixStack(module.kernel.detach().permute(2, 0, 1))]

        module = Mine()
        assert has_rule(module)
        (stack,) = layer_matrices(module)
        assert_same_stack(stack, reference.spectral(module.kernel.detach().numpy()))
        assert stack.kind == "spectral"
        assert not has_rule(self.Fourier())

    def test_a_rule_for_a_subclass_goes_first(self):
        class Halves(nn.Linear):
            pass

        @layer_matrices.register
        def _(module: Halves) -> list[MatrixStack]:
            return [MatrixStack(half[None], part=str(i)) for i, half in enumerate(module.weight.detach().chunk(2))]

        assert [stack.part for stack in layer_matrices(Halves(4, 8))] == ["0", "1"]
        assert len(layer_matrices(nn.Linear(4, 8))) == 1


class TestMatrixStack:
    def test_is_transposed_where_needed(self):
        wide = torch.randn(3, 4, 7)
        assert torch.equal(MatrixStack(wide).matrices, wide.mT)
        assert torch.equal(MatrixStack(wide.mT).matrices, wide.mT)

    @pytest.mark.parametrize("shape", [(4, 4), (1, 2, 3, 4)])
    def test_wrong_number_of_dimensions(self, shape):
        with pytest.raises(ValueError, match=r"three dimensions \(K, R, C\), got shape \(" + f"{shape[0]}, "):
            MatrixStack(torch.zeros(shape))

    @pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool])
    def test_no_numbers_with_a_fraction(self, dtype):
        with pytest.raises(NoSpectrumError, match=f"weights of type {dtype}: not floating point"):
            MatrixStack(torch.zeros(1, 4, 4, dtype=dtype))


def test_gpt2_layer_of_transformers():
    # transformers is not installed; the rule goes by the class's full name.
    conv1d = type("Conv1D", (nn.Module,), {"__module__": "transformers.pytorch_utils"})
    module = conv1d()
    module.weight = nn.Parameter(torch.randn(4, 12))
    (stack,) = layer_matrices(module)
    assert_same_stack(stack, reference.linear(module.weight.detach().numpy()))
    assert stack.sampling == "grid"
