"""Which layers a model has, what each one owns, and why some cannot be analysed."""

import copy
import re

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, parametrize, prune

from farms_tb import MatrixStack, NoSpectrumError, TempBalance, analyze, layer_matrices
from farms_tb.balancing.norms import layers_before_norms
from farms_tb.weights.layers import find_layers, read_stacks, unwrap


def problems(model):
    return {layer.name: layer.problem for layer in find_layers(model)}


def owned(model):
    return {layer.name: layer.parameters for layer in find_layers(model)}


def step_of_loop(model):
    TempBalance(model, torch.optim.SGD(model.parameters(), lr=0.1)).step()


class Table(nn.Module):
    """A type without a rule, with a matrix and a vector."""

    def __init__(self):
        super().__init__()
        self.table, self.gain = nn.Parameter(torch.randn(6, 5)), nn.Parameter(torch.ones(5))


def state(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(module, before):
    after = module.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


class TestFindLayers:
    def test_lists_matrix_layers_in_order_of_registration(self):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 5))
        layers = find_layers(model)
        assert [(layer.name, layer.kind, layer.shape) for layer in layers] == [
            ("0", "real", (9, 8, 3)),
            ("4", "real", (1, 8, 5)),
        ]
        assert owned(model) == {"0": ("0.weight", "0.bias"), "4": ("4.weight", "4.bias")}
        assert set(problems(model).values()) == {""}

    def test_a_layer_alone_is_called_weight(self):
        assert [layer.name for layer in find_layers(nn.Linear(4, 4))] == ["weight"]

    def test_attention_is_three_layers_of_one_packed_weight(self):
        model = nn.Sequential(nn.MultiheadAttention(8, 2))
        assert list(owned(model)) == ["0.q", "0.k", "0.v", "0.out_proj"]
        for part in "qkv":
            assert owned(model)[f"0.{part}"] == ("0.in_proj_weight", "0.in_proj_bias")
        assert owned(model)["0.out_proj"] == ("0.out_proj.weight", "0.out_proj.bias")

    def test_separate_attention_weights_belong_to_one_part_each(self):
        model = nn.MultiheadAttention(8, 2, kdim=4, vdim=6)
        for part in "qkv":
            assert owned(model)[part] == (f"{part}_proj_weight", "in_proj_bias")

    def test_gates_share_the_parameters_of_their_layer(self):
        layers = owned(nn.Sequential(nn.LSTM(5, 6, num_layers=2)))
        assert list(layers) == [
            f"0.weight_{kind}_l{depth}.{gate}" for depth in (0, 1) for kind in ("ih", "hh") for gate in "ifgo"
        ]
        biases = tuple(f"0.bias_{kind}_l0" for kind in ("ih", "hh"))
        for gate in "ifgo":
            assert layers[f"0.weight_hh_l0.{gate}"][:3] == ("0.weight_hh_l0", *biases)
            assert layers[f"0.weight_ih_l0.{gate}"][0] == "0.weight_ih_l0"

    def test_parametrized_gates(self):
        layer = parametrizations.weight_norm(nn.LSTM(5, 6), "weight_hh_l0")
        stacks = {stack.part: stack for stack in read_stacks(layer)}
        assert len(stacks) == 8
        torch.testing.assert_close(stacks["weight_hh_l0.i"].matrices[0], layer.weight_hh_l0[:6].detach())

    def test_all_factors_of_a_spectral_weight_belong_to_its_layer(self):
        from neuralop.layers.spectral_convolution import SpectralConv

        conv = SpectralConv(3, 4, (4, 4), factorization="Tucker", rank=0.5)
        model = nn.Sequential(conv)
        (layer,) = find_layers(model)
        assert (layer.name, layer.kind, layer.problem) == ("0", "spectral", "")
        assert set(layer.parameters) == {name for name, _ in model.named_parameters()}
        assert len(layer.parameters) == 6  # a core, four factors and the bias

    def test_every_layer_of_a_fourier_neural_operator(self):
        from neuralop.models import FNO

        model = FNO(n_modes=(6, 6), in_channels=1, out_channels=1, hidden_channels=8, n_layers=2)
        layers = find_layers(model)
        spectral = [layer.name for layer in layers if layer.kind == "spectral"]
        assert spectral == ["fno_blocks.convs.0", "fno_blocks.convs.1"]
        claimed = [name for layer in layers for name in layer.parameters]
        assert len(claimed) == len(set(claimed))
        matrices = {name for name, p in model.named_parameters() if sum(size > 1 for size in p.shape) > 1}
        assert matrices <= set(claimed)

    def test_every_matrix_of_a_transformer_is_listed_once(self):
        model = nn.TransformerEncoderLayer(16, 2, 20)
        assert list(owned(model)) == [
            *("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.out_proj"),
            *("linear1", "linear2"),
        ]

    @pytest.mark.parametrize(
        "make", [nn.DataParallel, torch.compile, lambda model: torch.compile(nn.DataParallel(model))]
    )
    def test_wrappers_are_looked_through(self, make):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
        assert unwrap(make(model)) is model
        assert owned(make(model)) == owned(model)

    @pytest.mark.parametrize(
        "wrap", [torch.compile, checkpoint_wrapper, lambda module: torch.compile(checkpoint_wrapper(module))]
    )
    def test_compiled_and_checkpointed_parts_keep_their_names(self, wrap):
        model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), nn.Linear(4, 3))
        before, followed = owned(model), layers_before_norms(model, find_layers(model))
        model[0] = wrap(model[0])
        model[1] = wrap(model[1])
        assert owned(wrap(model)) == before
        assert owned(model) == before
        assert layers_before_norms(model, find_layers(model)) == followed == {"0.1": "0.0"}

    def test_a_name_that_ends_like_a_wrapper_stays(self):
        model = nn.ModuleDict({"pre_orig_mod": nn.ModuleDict({"fc": nn.Linear(4, 6)})})
        assert owned(model) == {"pre_orig_mod.fc": ("pre_orig_mod.fc.weight", "pre_orig_mod.fc.bias")}
        model["pre_orig_mod"]["fc"] = torch.compile(model["pre_orig_mod"]["fc"])
        assert owned(model) == {"pre_orig_mod.fc": ("pre_orig_mod.fc.weight", "pre_orig_mod.fc.bias")}

    def test_a_module_used_twice_is_one_layer(self):
        shared = nn.Linear(4, 4)
        assert list(owned(nn.Sequential(shared, nn.ReLU(), shared))) == ["0"]

    def test_parametrized_weights_own_what_they_are_made_of(self):
        model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Linear(5, 5))
        made_of = {f"0.parametrizations.weight.original{i}" for i in (0, 1)}
        assert set(owned(model)["0"]) == {"0.bias"} | made_of
        torch.testing.assert_close(read_stacks(model[0])[0].matrices[0].mT, model[0].weight.detach())

    def test_registered_modules_with_several_parts(self):
        class Pair(nn.Module):
            def __init__(self):
                super().__init__()
                self.left, self.right = (nn.Parameter(torch.randn(6, 5)) for _ in range(2))
                self.bias = nn.Parameter(torch.zeros(5))
                self.inner = nn.Linear(5, 5)

        @layer_matrices.register
        def _(module: Pair) -> list[MatrixStack]:
            return [
                MatrixStack(getattr(module, name).detach()[None], part=name, parameter=name)
                for name in ("left", "right")
            ]

        assert owned(nn.Sequential(Pair())) == {
            "0.left": ("0.left", "0.bias"),
            "0.right": ("0.right", "0.bias"),
            "0.inner": ("0.inner.weight", "0.inner.bias"),
        }


class TestProblems:
    def test_one_row_or_one_column(self):
        model = nn.Sequential(nn.Linear(1, 9), nn.Linear(9, 1), nn.Conv2d(1, 1, 1), nn.Conv2d(8, 8, 3, groups=8))
        assert set(problems(model).values()) == {"one row or one column: no spectrum"}

    def test_lazy(self):
        assert problems(nn.LazyLinear(4)) == {
            "weight": "not initialised yet: run one batch through the model first"
        }
        assert problems(nn.Sequential(nn.LazyConv2d(4, 3), nn.Linear(4, 4)))["1"] == ""

    def test_lazy_after_its_first_batch(self):
        layer = nn.LazyLinear(4)
        layer(torch.zeros(1, 6))
        assert problems(layer) == {"weight": ""}

    def test_meta(self):
        assert problems(nn.Linear(4, 4, device="meta")) == {"weight": "on the meta device: no values"}

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
    def test_integer_weights(self, dtype):
        layer = nn.Linear(4, 4)
        layer.weight = nn.Parameter(torch.ones(4, 4, dtype=dtype), requires_grad=False)
        assert problems(layer) == {"weight": f"quantised weights ({dtype}): dequantise the model first"}

    def test_tied(self):
        model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Linear(6, 4), nn.Linear(4, 6))
        model[2].weight = model[0].weight
        assert problems(model) == {"0": "", "1": "", "2": "tied to '0'"}
        assert owned(model)["0"] == ("0.weight",)
        assert owned(model)["2"] == ("2.bias",)

    def test_a_shared_bias_is_no_tie(self):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].bias = model[0].bias
        assert problems(model) == {"0": "", "1": ""}
        assert owned(model)["1"] == ("1.weight",)

    def test_embedding(self):
        for table in (nn.Embedding(9, 4), nn.EmbeddingBag(9, 4)):
            assert problems(table) == {"weight": "embedding: not analysed without embeddings=True"}
            (layer,) = find_layers(table, embeddings=True)
            assert (layer.shape, layer.problem, layer.parameters) == ((1, 9, 4), "", ("weight",))

    def test_a_head_tied_to_an_embedding_is_measured_once(self):
        model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9, bias=False))
        model[1].weight = model[0].weight
        table, head = find_layers(model)
        assert "embeddings=True" in table.problem
        assert not head.problem
        assert [layer.problem for layer in find_layers(model, embeddings=True)] == ["", "tied to '0'"]

    def test_unknown_types_are_listed_by_parameter(self):
        model = nn.Sequential(nn.Bilinear(3, 4, 5), Table(), nn.Linear(4, 4))
        found = problems(model)
        assert list(found) == ["0", "1.table", "2"]
        assert found["2"] == ""
        for name, parameter in (("0", "weight"), ("1.table", "table")):
            assert re.search(rf"no rule for .*'{parameter}'.*layer_matrices\.register", found[name])

    def test_parameters_of_the_model_itself(self):
        class WithToken(nn.Module):
            def __init__(self):
                super().__init__()
                self.token, self.positions = nn.Parameter(torch.ones(1, 1, 8)), nn.Parameter(torch.ones(1, 9, 8))
                self.head = nn.Linear(8, 3)

        assert list(problems(WithToken())) == ["positions", "head"]

    def test_separable_spectral_convolution(self):
        from neuralop.layers.spectral_convolution import SpectralConv

        found = problems(nn.Sequential(SpectralConv(4, 4, (4, 4), separable=True)))
        assert found == {"0": "separable spectral convolution: no in x out matrix"}

    def test_a_layer_called_as_a_part_of_the_module_that_it_is_in(self):
        """It goes by its weight, in a model as in a file, and costs the other layers nothing."""

        class Attention(nn.MultiheadAttention):
            def __init__(self):
                super().__init__(32, 4)
                self.q = nn.Linear(32, 32)
                self.v = nn.Linear(32, 48)

        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), Attention())
        report = analyze(model)
        attention = ["1.q", "1.k", "1.v", "1.out_proj"]
        assert list(report.layers) == ["0", *attention, "1.q.weight", "1.v.weight"]
        assert report.layers == analyze(model.state_dict()).layers
        assert report.alphas["1.q"] != report.alphas["1.q.weight"]
        assert owned(model)["1.q.weight"] == ("1.q.weight", "1.q.bias")

    def test_vectors_are_not_listed(self):
        assert find_layers(nn.Sequential(nn.LayerNorm(4), nn.BatchNorm2d(4), nn.PReLU(4))) == []

    def test_a_rule_without_a_matrix(self):
        class Hollow(nn.Linear):
            pass

        @layer_matrices.register
        def _(module: Hollow) -> list[MatrixStack]:
            return []

        assert problems(Hollow(4, 4)) == {"weight": "Hollow holds no matrix"}
        with pytest.raises(NoSpectrumError, match="Hollow holds no matrix"):
            read_stacks(Hollow(4, 4))

    def test_two_parts_of_one_name(self):
        class Twins(nn.Linear):
            pass

        @layer_matrices.register
        def _(module: Twins) -> list[MatrixStack]:
            return [MatrixStack(module.weight.detach()[None])] * 2

        with pytest.raises(
            ValueError, match=r"two weights called 'weight': .* Twins must give each its own `part`"
        ):
            find_layers(Twins(4, 4))


HOOKS = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruning": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
class TestWeightsThatHooksCompute:
    """Such hooks set the attribute `weight` in the forward pass: before the next one it is out of date."""

    @staticmethod
    def read(layer):
        return read_stacks(layer)[0].matrices[0]

    @pytest.mark.parametrize("hook", HOOKS)
    def test_weights_that_were_loaded_are_measured(self, hook):
        loaded, trained = (HOOKS[hook](nn.Linear(32, 32)).eval() for _ in range(2))
        for layer in (loaded, trained):
            layer(torch.ones(2, 32))
        loaded.load_state_dict(trained.state_dict())
        found = self.read(loaded)
        loaded(torch.ones(2, 32))
        assert torch.equal(found, loaded.weight)
        assert torch.equal(found, self.read(trained))
        assert analyze(loaded).alphas == analyze(trained).alphas

    def test_the_power_iteration_stays_as_it_is(self):
        layer = nn.utils.spectral_norm(nn.Linear(32, 32))
        before = state(layer)
        self.read(layer)
        assert_same_state(layer, before)

    def test_gates_of_a_recurrent_layer(self):
        layer = nn.utils.weight_norm(nn.LSTM(6, 5), "weight_hh_l0")
        with torch.no_grad():
            layer.weight_hh_l0_g.mul_(3)
        found = torch.cat([stack.matrices[0] for stack in read_stacks(layer) if "hh" in stack.part])
        layer(torch.ones(2, 6))
        assert torch.equal(found, layer.weight_hh_l0)


class TestSideEffects:
    @pytest.mark.parametrize("training", [True, False])
    def test_spectral_norm_keeps_its_power_iteration(self, training):
        model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(5, 4, 3)), nn.Linear(4, 4)).train(training)
        before, modes = state(model), [module.training for module in model.modules()]
        find_layers(model)
        read_stacks(model[0])
        assert_same_state(model, before)
        assert [module.training for module in model.modules()] == modes

    def test_spectral_norm_is_what_is_measured(self):
        layer = parametrizations.spectral_norm(nn.Linear(8, 8), n_power_iterations=30)
        (stack,) = read_stacks(layer)
        assert torch.linalg.matrix_norm(stack.matrices, 2).item() == pytest.approx(1, rel=0.05)

    @pytest.mark.parametrize("measure", [analyze, step_of_loop])
    def test_a_forward_pass_in_cached_has_its_gradients(self, measure):
        """What is measured inside of `parametrize.cached()` is not what the forward pass computes with."""
        torch.manual_seed(0)
        layers = [
            norm(nn.Linear(32, 32)) for norm in (parametrizations.weight_norm, parametrizations.spectral_norm)
        ]
        model = nn.Sequential(nn.Linear(32, 32), *layers, nn.Linear(32, 32))
        plain = copy.deepcopy(model)
        for net in (model, plain):
            with parametrize.cached():
                if net is model:
                    measure(net)
                net(torch.ones(2, 32)).square().sum().backward()
        assert_same_state(model, state(plain))
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter.grad, plain.get_parameter(name).grad)

    def test_a_weight_that_was_changed_in_cached_is_measured_as_it_is(self):
        layer = parametrizations.weight_norm(nn.Linear(32, 32))
        with parametrize.cached():
            layer(torch.ones(2, 32))
            with torch.no_grad():
                layer.parametrizations.weight.original0.mul_(2)
            (stack,) = read_stacks(layer)
            assert torch.equal(stack.matrices[0], layer.parametrizations.weight())
        assert torch.equal(stack.matrices[0], layer.weight)

    def test_training_mode_is_restored_after_an_error(self):
        class Failing(nn.Linear):
            pass

        @layer_matrices.register
        def _(module: Failing) -> list[MatrixStack]:
            raise RuntimeError("boom")

        layer = parametrizations.spectral_norm(Failing(4, 4))
        with pytest.raises(RuntimeError, match="boom"):
            read_stacks(layer)
        assert all(module.training for module in layer.modules())

    def test_nothing_is_recorded_for_gradients(self):
        layer = nn.Linear(4, 4)
        assert not read_stacks(layer)[0].matrices.requires_grad
        assert layer.weight.grad is None


class TestNormFeeders:
    @staticmethod
    def feeders(model):
        return layers_before_norms(model, find_layers(model))

    def test_by_name_in_a_residual_block(self):
        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv1, self.conv2 = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
                self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
                self.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        assert self.feeders(nn.Sequential(Block())) == {
            "0.bn1": "0.conv1",
            "0.bn2": "0.conv2",
            "0.shortcut.1": "0.shortcut.0",
        }

    def test_nearest_before_of_the_same_width(self):
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6), nn.LayerNorm(8), nn.LayerNorm(6), nn.LayerNorm(7))
        assert self.feeders(model) == {"2": "0", "3": "1"}

    def test_norms_before_any_layer_have_no_feeder(self):
        assert self.feeders(nn.Sequential(nn.GroupNorm(2, 4), nn.Conv1d(4, 4, 3))) == {}
