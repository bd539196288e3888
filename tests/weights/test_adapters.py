"""Layers with adapters of PEFT: alpha is that of the weight that the network computes with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from farms_tb import TempBalance, analyze, layer_matrices
from farms_tb.report import Report
from farms_tb.weights.layers import find_layers

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd"),
    pytest.mark.filterwarnings("ignore:All adapters are already merged"),
]

LINEAR = {"target_modules": ["0", "2"]}
PREFIX = "base_model.model."


def linear_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 24))


def conv_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(12, 24, 3), nn.Tanh(), nn.Conv2d(24, 32, 1), nn.Tanh(), nn.Conv2d(32, 12, 3))


def conv1d_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(12, 24, 5), nn.Tanh(), nn.Conv1d(24, 32, 3), nn.Tanh(), nn.Conv1d(32, 12, 3))


def table_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(60, 32), nn.Tanh(), nn.Linear(32, 48))


def adapted(net: nn.Module, **options: Any) -> Any:
    """Return the net with adapters that do something: B is not zero."""
    torch.manual_seed(1)
    config = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **LINEAR, **options}
    return peft.get_peft_model(net, peft.LoraConfig(**config)).eval()


def alphas(report: Report) -> dict[str, float | None]:
    return {name.removeprefix(PREFIX): alpha for name, alpha in report.alphas.items()}


def assert_alphas(report: Report, expected: Mapping[str, float | None]) -> None:
    found = alphas(report)
    expected = {name.removeprefix(PREFIX): alpha for name, alpha in expected.items()}
    assert found.keys() == expected.keys()
    for name, alpha in expected.items():
        assert found[name] == (alpha if alpha is None else pytest.approx(alpha, rel=2e-6)), name


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (linear_net, {}),
    "rank-stabilised": (linear_net, {"use_rslora": True}),
    "DoRA": (linear_net, {"use_dora": True}),
    "convolutions": (conv_net, {}),
    "convolutions, DoRA": (conv_net, {"use_dora": True}),
    "convolutions in one dimension": (conv1d_net, {}),
    "lookup table": (table_net, {}),
    "lookup table, DoRA": (table_net, {"use_dora": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_or_not_it_is_the_plain_layer_of_the_sum(kind: str) -> None:
    make, options = KINDS[kind]
    model = adapted(make(), **options)
    plain = copy.deepcopy(model).merge_and_unload()
    expected = analyze(plain, embeddings=True, min_eigenvalues=4).alphas
    assert all(expected.values())
    before = state(model)
    unmerged = analyze(model, embeddings=True, min_eigenvalues=4)
    assert_alphas(unmerged, expected)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.merge_adapter()
    merged = analyze(model, embeddings=True, min_eigenvalues=4)
    assert_alphas(merged, expected)
    if "DoRA" not in kind:
        for name, record in unmerged.layers.items():
            change = merged.layers[name].adapter_change
            assert (change is None) is (record.adapter_change is None)
            assert change is None or change == pytest.approx(record.adapter_change, rel=1e-4)


def test_the_sum_is_what_the_network_computes() -> None:
    for options in ({}, {"use_dora": True}):
        model = adapted(linear_net(), **options).double()
        layer = model.base_model.model[0]
        (stack,) = [found for found in _stacks(model) if found.shape[-2:] == (48, 24)]
        inputs = torch.randn(5, 24, dtype=torch.float64)
        with torch.no_grad():
            expected = layer(inputs) - layer.base_layer.bias
        assert torch.allclose(inputs @ stack[0].mT, expected, atol=1e-12)


def test_of_copies_that_were_trained_as_a_whole_the_active_one_is_measured() -> None:
    model = adapted(linear_net(), target_modules=["0"], modules_to_save=["4"])
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["0"], modules_to_save=["4"]))
    for copy_of_4 in model.base_model.model[4].modules_to_save.values():
        nn.init.normal_(copy_of_4.weight)
    expected = analyze(copy.deepcopy(model).merge_and_unload()).alphas
    names = ["0", "2", "4.modules_to_save.default"]
    assert dict(zip(names, expected.values(), strict=True)) == pytest.approx(alphas(analyze(model)), rel=2e-6)
    model.set_adapter("other")
    assert list(alphas(analyze(model))) == ["0", "2", "4.modules_to_save.other"]
    with model.disable_adapter():
        assert list(alphas(analyze(model))) == ["0", "2", "4.original_module"]
    assert list(alphas(analyze(model, adapters="base"))) == ["0", "2", "4.original_module"]
    assert len(analyze(model, adapters="separate").layers) == 9


def _stacks(model: nn.Module) -> list[Tensor]:
    from farms_tb.weights.layers import read_layers

    return [stack.matrices for _, stack in read_layers(find_layers(model, adapters="merged"))]


def test_transposed_weights_of_gpt2() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=24, n_head=2, n_positions=8, vocab_size=30)
    for options in ({}, {"use_dora": True}):
        torch.manual_seed(0)
        gpt2 = transformers.GPT2LMHeadModel(config)
        model = adapted(gpt2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **options)
        found = analyze(model)
        expected = analyze(copy.deepcopy(model).merge_and_unload())
        assert_alphas(found, expected.alphas)
        assert found.layers["base_model.model.transformer.h.0.attn.c_attn"].adapter_change is not None
        assert found.layers["base_model.model.transformer.h.0.attn.c_proj"].adapter_change is None


@pytest.mark.parametrize("use_dora", [False, True])
def test_several_adapters(use_dora: bool) -> None:
    model = adapted(linear_net(), use_dora=use_dora)
    torch.manual_seed(2)
    second = {"r": 3, "lora_alpha": 5, "init_lora_weights": False, "use_dora": use_dora, "target_modules": ["2"]}
    model.add_adapter("second", peft.LoraConfig(**second))
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        plain = copy.deepcopy(model).merge_and_unload(adapter_names=active)
        assert_alphas(analyze(model), analyze(plain).alphas)
    with model.disable_adapter():
        off = analyze(model)
    assert_alphas(off, analyze(linear_net()).alphas)
    assert all(record.adapter_change is None for record in off.layers.values())


@pytest.mark.parametrize("adapters", ["merged", "base", "separate"])
def test_a_parametrized_base_is_measured_and_stays_as_it_is(adapters: Any) -> None:
    """Spectral norm moves its power iteration at each reading in training mode."""
    net = linear_net()
    parametrizations.spectral_norm(net[2])
    model = adapted(net, target_modules=["2"]).train()
    before = copy.deepcopy(model.state_dict())
    (name,) = (name for name in analyze(model, adapters=adapters).layers if name.endswith((".2", ".2.base_layer")))
    found = analyze(model, adapters=adapters).alphas[name]
    layer = model.base_model.model[2]
    plain = nn.Linear(48, 64)
    plain.weight.data = layer.base_layer.eval().weight.detach()
    if adapters == "merged":
        plain.weight.data += layer.get_delta_weight("default").detach()
    assert found == pytest.approx(analyze(plain).alphas["weight"], rel=1e-6)
    after = model.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_base_whose_weight_a_hook_computes_is_measured_with_its_adapter() -> None:
    net = linear_net()
    nn.utils.weight_norm(net[0])
    model = adapted(net, target_modules=["0"])
    expected = analyze(adapted(linear_net(), target_modules=["0"])).layers[f"{PREFIX}0"]
    found = analyze(model).layers[f"{PREFIX}0"]
    assert found.adapter_change == pytest.approx(expected.adapter_change, rel=1e-4)
    assert found.alpha == pytest.approx(expected.alpha, rel=1e-4)
    assert analyze(model, adapters="base").layers[f"{PREFIX}0"].alpha != pytest.approx(expected.alpha, rel=1e-4)


def test_the_change_is_the_norm_of_the_product_against_that_of_the_weight() -> None:
    model = adapted(linear_net(), target_modules=["2"])
    model.add_adapter("second", peft.LoraConfig(r=3, init_lora_weights=False, target_modules=["2"]))
    model.base_model.set_adapter(["default", "second"])
    layer = model.base_model.model[2]
    change = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    expected = float((change.norm() / layer.base_layer.weight.norm()).detach())
    assert analyze(model).layers["base_model.model.2"].adapter_change == pytest.approx(expected, rel=1e-5)
    fresh = adapted(linear_net(), init_lora_weights=True)
    assert analyze(fresh).layers["base_model.model.2"].adapter_change == 0
    rows = analyze(fresh).rows()
    assert [row["adapter_change"] for row in rows] == [0, 0, None]


def test_attention() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(24, 2), "norm": nn.LayerNorm(24)})
    model = adapted(net, target_modules=["attention"])
    plain = copy.deepcopy(model).merge_and_unload()
    # Up to version 0.21, peft adds the product to the output projection twice.
    wrapped = model.base_model.model["attention"].base_layer.out_proj
    change = wrapped.get_delta_weight("default").detach()
    plain["attention"].out_proj.weight.data = wrapped.base_layer.weight + change
    assert_alphas(analyze(model), analyze(plain).alphas)
    owned = {layer.name.rpartition(".")[2]: layer.parameters for layer in find_layers(model, adapters="merged")}
    assert list(owned) == ["q", "k", "v", "out_proj"]
    assert owned["q"] == owned["k"] == owned["v"]
    assert sum("lora_" in name for name in owned["q"]) == 2
    assert sum("lora_" in name for name in owned["out_proj"]) == 2


@pytest.mark.parametrize("adapters", ["merged", "base", "separate"])
def test_attention_in_every_layer_of_an_encoder(adapters: Any) -> None:
    """PEFT makes the weights of attention anew, as other parameters, at each `named_modules()`."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True)
    model = adapted(nn.TransformerEncoder(layer, 8, enable_nested_tensor=False), target_modules=["self_attn"])
    for _ in range(3):
        report = analyze(model, adapters=adapters)
        assert {record.status for record in report.layers.values()} == {"ok"}
        assert len(report.layers) == 8 * (6 if adapters != "separate" else 10)
        base = {name for layer in find_layers(model, adapters=adapters) for name in layer.parameters}
        assert base == {name for name, _ in model.named_parameters() if "norm" not in name}
        for layer in find_layers(model, adapters=adapters):
            inside = layer.module_name.rpartition(".base_layer.out_proj")[0] or layer.module_name
            assert all(name.startswith(f"{inside}.") for name in layer.parameters), layer.name


def test_a_half_precision_base_is_measured_without_rounding_the_sum() -> None:
    model = adapted(linear_net().bfloat16())
    layer = model.base_model.model[2]
    assert layer.lora_A["default"].weight.dtype == torch.float32
    total = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    plain = nn.Linear(48, 64)
    plain.weight.data = total
    assert analyze(model).alphas["base_model.model.2"] == pytest.approx(analyze(plain).alphas["weight"], rel=2e-6)


class TestOptions:
    def test_base_is_the_weight_below(self) -> None:
        model = adapted(linear_net())
        assert_alphas(analyze(model, adapters="base"), analyze(linear_net()).alphas)
        owned = {layer.name: layer.parameters for layer in find_layers(model, adapters="base")}
        assert len(owned["base_model.model.2"]) == 4
        model.merge_adapter()
        status = analyze(model, adapters="base").layers["base_model.model.2"].status
        assert "unmerge" in status

    @pytest.mark.filterwarnings("ignore:.*(cannot be measured|left to balance|sampling noise)")
    def test_base_is_measured_again_once_adapters_are_unmerged(self) -> None:
        model, name = adapted(linear_net()), "base_model.model.2"
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        balancer = TempBalance(model, optimizer, adapters="base", assign_func="tb_linear_map")
        alpha = balancer.report.alphas[name]
        model.merge_adapter()
        merged = balancer.step().layers[name]
        assert merged.alpha is None
        assert "unmerge" in merged.status
        model.unmerge_adapter()
        assert balancer.step().alphas[name] == pytest.approx(alpha, rel=1e-4)

    def test_separate_parts(self) -> None:
        names = list(analyze(adapted(linear_net()), adapters="separate").layers)
        assert "base_model.model.0.base_layer" in names
        assert "base_model.model.0.lora_B.default" in names
        assert len(names) == 7

    def test_merged_and_disabled(self) -> None:
        model = adapted(linear_net())
        model.merge_adapter()
        with model.disable_adapter():
            assert "disabled" in analyze(model).layers["base_model.model.2"].status

    def test_parameters_belong_to_the_layer(self) -> None:
        model = adapted(linear_net(), use_dora=True)
        first, second, last = find_layers(model, adapters="merged")
        assert {name.removeprefix("base_model.model.0.") for name in first.parameters} == {
            "base_layer.weight",
            "base_layer.bias",
            "lora_A.default.weight",
            "lora_B.default.weight",
            "lora_magnitude_vector.default.weight",
        }
        assert last.parameters == ("base_model.model.4.weight", "base_model.model.4.bias")
        assert not second.problem

    def test_a_plan_on_the_meta_device(self) -> None:
        report = analyze(adapted(linear_net()).to("meta"))
        assert [record.shape for record in report.layers.values()] == [(1, 48, 24), (1, 64, 48), (1, 64, 24)]
        assert {record.status for record in report.layers.values()} == {"on the meta device: no values"}

    def test_a_rule_of_the_user_comes_first(self) -> None:
        model = adapted(linear_net())
        kind = type(model.base_model.model[0])

        @layer_matrices.register(kind)
        def _rule(module: Any) -> Any:
            return layer_matrices(module.base_layer)

        try:
            assert analyze(model).alphas["base_model.model.2"] == analyze(linear_net()).alphas["2"]
        finally:
            layer_matrices.register(kind, layer_matrices.dispatch(object))


UNKNOWN: dict[str, Any] = {
    "IA3": lambda: peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"]),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=["0", "2"]),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=["0", "2"]),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["2"]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["0", "2"]),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_adapters_of_another_kind_are_named_and_not_measured(kind: str) -> None:
    model = peft.get_peft_model(linear_net(), UNKNOWN[kind]())
    report = analyze(model)
    assert list(alphas(report)) == ["0", "2", "4"]
    record = report.layers["base_model.model.2"]
    assert "unknown kind (peft." in record.status
    assert record.alpha is None
    assert_alphas(analyze(model, adapters="base"), analyze(linear_net()).alphas)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    named = pytest.warns(UserWarning, match=r"cannot be measured.*unknown kind \(peft\.")
    with named, pytest.warns(UserWarning, match="no layer is left to balance"):
        balancer = TempBalance(
            model,
            torch.optim.SGD(trained, lr=0.1),
            exclude_first=False,
            exclude_last=False,
            assign_func="tb_linear_map",
        )
    assert set(balancer.parameter_ratios().values()) == {1.0}


def test_adapters_that_do_not_fit() -> None:
    grouped = nn.Sequential(nn.Conv2d(8, 16, 3, groups=2), nn.Conv2d(16, 16, 3))
    record = analyze(adapted(grouped, target_modules=["0"])).layers["base_model.model.0"]
    assert "does not fit" in record.status

    class OwnLinear(nn.Linear):
        def __init__(self) -> None:
            super().__init__(24, 32)
            self.lora_A, self.lora_B = nn.Parameter(torch.randn(4, 24)), nn.Parameter(torch.zeros(32, 4))

    record = analyze(nn.Sequential(OwnLinear(), nn.Linear(32, 24))).layers["0"]
    assert "unknown kind" in record.status
    assert analyze(nn.Sequential(OwnLinear(), nn.Linear(32, 24)), adapters="separate").layers["0"].alpha


def test_a_variant_of_lora_with_another_weight() -> None:
    model = adapted(linear_net())
    variants = getattr(model.base_model.model[2], "lora_variant", None)
    if variants is None:
        pytest.skip("this peft has no variants")
    variants["default"] = type("ArrowLinearVariant", (), {})()
    assert "ArrowLinearVariant" in analyze(model).layers["base_model.model.2"].status


def test_a_layer_without_adapters_has_the_same_record_as_in_a_model_without_any() -> None:
    model = adapted(linear_net(), target_modules=["0"])
    plain = analyze(linear_net()).layers
    assert analyze(model).layers["base_model.model.2"] == plain["2"]
    assert analyze(linear_net(), adapters="separate").layers == plain


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_dequantised(bits: int) -> None:
    modules = pytest.importorskip("bitsandbytes").nn
    kind, options = (modules.Linear4bit, {}) if bits == 4 else (modules.Linear8bitLt, {"has_fp16_weights": False})
    net = linear_net()
    quantised = kind(48, 64, **options)
    quantised.load_state_dict(net[2].state_dict())
    expected = analyze(adapted(linear_net(), target_modules=["2"])).layers["base_model.model.2"]
    net[2] = quantised.to("cpu")
    found = analyze(adapted(net, target_modules=["2"])).layers["base_model.model.2"]
    assert found.alpha == pytest.approx(expected.alpha, abs=0.05)
    assert found.adapter_change == pytest.approx(expected.adapter_change, rel=0.05)
