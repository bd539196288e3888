"""Ratios that are set by pattern, heads that are left out, and ratios of mean 1."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from farms_tb import FARMSTempBalance, TempBalance, lr_ratios
from tests.helpers import LIGHTNING_NOISE, Module, fit, make_net


class LanguageModel(nn.Module):
    """An embedding, two blocks and a head, as transformers lays them out: the base model under its prefix."""

    base_model_prefix = "model"

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16), nn.LayerNorm(16)) for _ in range(3)]
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(30, 16), "layers": nn.ModuleList(blocks)})
        self.lm_head = nn.Linear(16, 30, bias=False)
        if tied:
            self.lm_head.weight = self.model["embed_tokens"].weight


def balance(model: nn.Module, **options: Any) -> TempBalance:
    torch.manual_seed(0)
    options = {"exclude_first": False, "exclude_last": False, **options}
    return TempBalance(
        model, torch.optim.SGD(model.parameters(), lr=0.1), **{"assign_func": "tb_linear_map", **options}
    )


def packed_attention() -> nn.Module:
    return nn.Sequential(nn.MultiheadAttention(16, 2), nn.Linear(16, 16), nn.Linear(16, 24))


class TestFixed:
    def test_layers_and_parameters_without_a_layer(self) -> None:
        balancer = balance(LanguageModel(), fixed={"embed*": 5.0, "lm_head": 3.0})
        by_parameter = balancer.parameter_ratios()
        assert by_parameter["model.embed_tokens.weight"] == 5
        assert by_parameter["lm_head.weight"] == balancer.ratios["lm_head"] == 3
        assert balancer.ratios["model.embed_tokens"] == 5

    def test_they_take_no_part_in_the_map(self) -> None:
        model = LanguageModel()
        plain = balance(model, exclude=["lm_head"])
        expected = plain.ratios
        plain.detach()
        assert balance(model, fixed={"lm_head": 3.0}).ratios == expected | {"lm_head": 3.0}

    def test_an_embedding_tied_to_the_head(self) -> None:
        balancer = balance(LanguageModel(tied=True), fixed={"embed*": 5.0, "lm_head": 5.0})
        assert balancer.parameter_ratios()["model.embed_tokens.weight"] == 5

    def test_the_first_of_two_patterns_counts(self) -> None:
        balancer = balance(LanguageModel(), fixed={"layers.0.*": 2.0, "layers.*.0": 4.0})
        ratios = balancer.ratios
        assert [ratios[f"model.layers.{index}.0"] for index in range(3)] == [2, 4, 4]
        assert ratios["model.layers.0.1"] == 2

    def test_a_single_parameter(self) -> None:
        balancer = balance(LanguageModel(), fixed={"layers.1.0.bias": 0.0})
        ratios = balancer.parameter_ratios()
        assert ratios["model.layers.1.0.bias"] == 0
        assert ratios["model.layers.1.0.weight"] == balancer.ratios["model.layers.1.0"] != 0

    def test_a_weight_fixes_its_layer(self) -> None:
        """Ratios and logs show what the weight steps with, and the layer leaves the map; its bias follows it."""
        balancer = balance(make_net(), fixed={"5.weight": 3.0})
        others = [ratio for layer, ratio in balancer.ratios.items() if layer != "5"]
        assert balancer.ratios["5"] == balancer.parameter_ratios()["5.weight"] == 3
        assert balancer.parameter_ratios()["5.bias"] == 3
        assert (min(others), max(others)) == (0.5, 1.5)

    @pytest.mark.parametrize("names", [("lm_head", "*embed*"), ("*embed*", "lm_head")], ids=str)
    def test_of_two_names_of_a_tied_weight_the_first_counts(self, names: tuple[str, str]) -> None:
        balancer = balance(LanguageModel(tied=True), fixed={names[0]: 3.0, names[1]: 5.0})
        assert balancer.ratios["lm_head"] == balancer.parameter_ratios()["model.embed_tokens.weight"] == 3

    @pytest.mark.parametrize("named", [["0.q"], ["0.q", "0.v"]], ids=str)
    def test_a_part_of_packed_attention_is_refused(self, named: list[str]) -> None:
        """q, k and v are one parameter, which has one ratio."""
        with pytest.raises(ValueError, match=r"fixed .*0\.q, 0\.k, 0\.v.* 0\.in_proj_weight.* name all"):
            balance(packed_attention(), fixed=dict.fromkeys(named, 4.0))
        with pytest.raises(ValueError, match=r"exclude .*0\.q, 0\.k, 0\.v.* 0\.in_proj_weight.* name all"):
            balance(packed_attention(), exclude=named)

    def test_packed_attention_with_two_ratios_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"fixed .*one parameter"):
            balance(packed_attention(), fixed={"0.q": 4.0, "0.[kv]": 2.0})

    @pytest.mark.parametrize("named", ["0", "0.[qkv]", "0.in_proj_weight"])
    def test_packed_attention_as_a_whole(self, named: str) -> None:
        balancer = balance(packed_attention(), fixed={named: 4.0})
        assert [balancer.ratios[f"0.{part}"] for part in "qkv"] == [4, 4, 4]
        assert balancer.parameter_ratios()["0.in_proj_weight"] == 4

    def test_attention_with_weights_of_their_own_is_named_by_part(self) -> None:
        """Keys of another width: q, k and v are parameters, and only their bias is one."""
        attention = nn.MultiheadAttention(16, 2, kdim=24, vdim=24, add_bias_kv=True)
        model = nn.Sequential(attention, nn.Linear(16, 16), nn.Linear(16, 24))
        balancer = balance(model, fixed={"0.q": 4.0})
        assert balancer.ratios["0.q"] == balancer.parameter_ratios()["0.q_proj_weight"] == 4
        assert balancer.ratios["0.k"] == balancer.parameter_ratios()["0.k_proj_weight"] < 2

    def test_experts_with_a_bias_each_are_named_by_part(self) -> None:
        """As in gpt-oss: two stacks of matrices, and a row of biases for each, which is no matrix."""
        transformers = pytest.importorskip("transformers")
        experts = transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts
        config = transformers.GptOssConfig(hidden_size=16, intermediate_size=24, num_local_experts=4)
        model = nn.Sequential(nn.Linear(16, 16), experts(config), nn.Linear(16, 24))
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        balancer = balance(model, fixed={"*down_proj": 4.0})
        by_parameter = balancer.parameter_ratios()
        assert balancer.ratios["1.down_proj"] == by_parameter["1.down_proj"] == 4
        assert balancer.ratios["1.gate_up_proj"] == by_parameter["1.gate_up_proj"] < 2

    @pytest.mark.parametrize("embeddings", [False, True])
    @pytest.mark.parametrize("named", ["lm_head", "*embed*"])
    def test_one_name_of_a_tied_weight_is_enough(self, named: str, embeddings: bool) -> None:
        balancer = balance(LanguageModel(tied=True), fixed={named: 3.0}, embeddings=embeddings)
        assert balancer.parameter_ratios()["model.embed_tokens.weight"] == 3
        assert balancer.ratios["lm_head"] == balancer.ratios["model.embed_tokens"] == 3

    def test_alone_with_a_map_that_does_nothing(self) -> None:
        """The control: only the named layers step at another rate, by just that factor."""
        model = make_net()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        balancer = TempBalance(model, optimizer, lr_min_ratio=1.0, lr_max_ratio=1.0, fixed={"5": 3.0})
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        named = zip(model.named_parameters(), before, strict=True)
        moved = {name: (start - now).mean().item() for (name, now), start in named}
        for name, distance in moved.items():
            assert distance == pytest.approx(0.3 if name.startswith("5.") else 0.1, rel=1e-4)
        assert balancer.ratios["5"] == 3

    def test_a_pattern_that_matches_nothing(self) -> None:
        with pytest.raises(ValueError, match=r"fixed=.*'embedding': .* no layer and no parameter; .*lm_head"):
            balance(LanguageModel(), fixed={"embedding": 5.0})


class TestTied:
    """A matrix has one ratio, whatever layers share it: what leaves one of them out leaves out all."""

    @pytest.mark.parametrize("embeddings", [False, True])
    @pytest.mark.parametrize("options", [{"exclude": ["*embed*"]}, {"exclude": ["lm_head"]}], ids=str)
    def test_one_excluded_name_keeps_the_base_rate(self, options: dict[str, Any], embeddings: bool) -> None:
        balancer = balance(LanguageModel(tied=True), embeddings=embeddings, **options)
        assert balancer.parameter_ratios()["model.embed_tokens.weight"] == 1
        assert balancer.ratios["lm_head"] == balancer.ratios["model.embed_tokens"] == 1

    def test_the_last_layer_that_is_tied_keeps_the_base_rate(self) -> None:
        model = LanguageModel(tied=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        balancer = TempBalance(
            model, optimizer, assign_func="tb_linear_map", embeddings=True, exclude_first=False, min_eigenvalues=4
        )
        assert balancer.parameter_ratios()["model.embed_tokens.weight"] == 1

    @pytest.mark.parametrize("embeddings", [False, True])
    def test_both_names_have_the_ratio_that_the_weight_steps_with(self, embeddings: bool) -> None:
        balancer = balance(LanguageModel(tied=True), embeddings=embeddings)
        ratio = balancer.parameter_ratios()["model.embed_tokens.weight"]
        assert balancer.ratios["lm_head"] == balancer.ratios["model.embed_tokens"] == ratio != 1

    def test_the_bias_of_a_layer_steps_as_the_weight_that_it_shares(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(16, 16) for _ in range(4)])
        model[3].weight = model[1].weight
        balancer = balance(model)
        of_parameters = balancer.parameter_ratios()
        assert (
            of_parameters["1.weight"]
            == of_parameters["3.bias"]
            == balancer.ratios["3"]
            == balancer.ratios["1"]
            != 1
        )

    def test_packed_attention_has_the_mean_of_its_parts(self) -> None:
        balancer = balance(packed_attention())
        assert balancer.report is not None
        alone = lr_ratios(balancer.report.alphas, assign_func="tb_linear_map")
        mean = sum(alone[f"0.{part}"] for part in "qkv") / 3
        ratios = balancer.ratios
        assert ratios["0.q"] == ratios["0.k"] == ratios["0.v"] == balancer.parameter_ratios()["0.in_proj_weight"]
        assert ratios["0.q"] == pytest.approx(mean)
        assert len({alone[f"0.{part}"] for part in "qkv"}) == 3

    @pytest.mark.parametrize(
        "wrap",
        [None, nn.utils.weight_norm, nn.utils.parametrizations.weight_norm],
        ids=["plain", "hooks", "parametrized"],
    )
    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
    def test_the_gates_of_a_weight_have_one_ratio(self, wrap: Callable[..., Any] | None) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.LSTM(16, 16), nn.Linear(16, 16))
        if wrap is not None:
            wrap(model[0], "weight_hh_l0")
        balancer = balance(model)
        of_weights: dict[str, set[float]] = {}
        for name, ratio in (balancer.ratios | balancer.parameter_ratios()).items():
            for weight in ("weight_ih_l0", "weight_hh_l0"):
                if weight in name:
                    of_weights.setdefault(weight, set()).add(ratio)
        assert [len(ratios) for ratios in of_weights.values()] == [1, 1]
        assert of_weights["weight_ih_l0"] != of_weights["weight_hh_l0"]

    def test_a_part_without_an_alpha_has_the_mean_of_the_others(self) -> None:
        model = packed_attention()
        with torch.no_grad():
            model[0].in_proj_weight[:16] = 0  # type: ignore[index, union-attr]
        with pytest.warns(UserWarning, match=r"no alpha.* mean ratio of the layers that are one parameter.*0\.q"):
            balancer = balance(model)
        assert balancer.report is not None
        alphas = {name: alpha for name, alpha in balancer.report.alphas.items() if alpha is not None}
        alone = lr_ratios(alphas, assign_func="tb_linear_map")
        mean = (alone["0.k"] + alone["0.v"]) / 2
        assert balancer.ratios["0.q"] == balancer.parameter_ratios()["0.in_proj_weight"] == pytest.approx(mean)

    def test_ratios_of_an_earlier_version_are_shown_as_they_step(self) -> None:
        balancer = balance(packed_attention())
        expected, state = balancer.ratios, balancer.state_dict()
        shared = expected["0.q"]
        state["ratios"] |= {"0.q": shared - 0.1, "0.k": shared + 0.05, "0.v": shared + 0.05}
        balancer.load_state_dict(state)
        assert balancer.ratios == pytest.approx(expected)
        assert balancer.ratios["0.q"] == balancer.ratios["0.v"]


class TestHeads:
    def test_are_what_is_outside_of_the_base_model(self) -> None:
        balancer = balance(LanguageModel(), exclude_heads=True)
        assert balancer.ratios["lm_head"] == 1
        inside = [ratio for name, ratio in balancer.ratios.items() if name.startswith("model.layers")]
        assert (min(inside), max(inside)) == (0.5, 1.5)

    def test_in_a_module_around_the_model(self) -> None:
        around = nn.ModuleDict({"student": LanguageModel(), "other": nn.Linear(16, 16)})
        balancer = balance(around, exclude_heads=True)
        assert balancer.ratios["student.lm_head"] == 1
        assert balancer.ratios["other"] != 1

    def test_of_transformers(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.RobertaConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
        )
        model = transformers.RobertaForSequenceClassification(config)
        ratios = balance(model, exclude_heads=True).ratios
        assert ratios["classifier.dense"] == ratios["classifier.out_proj"] == 1
        assert sum(ratio != 1 for ratio in ratios.values()) >= 4
        base = balance(model.roberta, exclude_heads=True).ratios
        assert max(base.values()) == 1.5

    def test_of_other_models(self) -> None:
        with pytest.raises(ValueError, match="exclude_heads=True needs a transformers model"):
            balance(make_net(), exclude_heads=True)


class TestNormalize:
    @pytest.mark.parametrize("assign_func", ["tb_linear_map", "tb_sigmoid", "shrinkage"])
    def test_the_mean_over_the_entries_is_one(self, assign_func: Any) -> None:
        model = make_net()
        options = {"assign_func": assign_func, "lr_min_ratio": 0.5, "lr_max_ratio": 3.0}
        plain = balance(model, **options)
        mapped = plain.ratios
        plain.detach()
        ratios = balance(model, **options, normalize="mean").ratios
        sizes = {name: model.get_submodule(name).weight.numel() for name in ratios}
        mean = sum(sizes[name] * mapped[name] for name in ratios) / sum(sizes.values())
        assert ratios == pytest.approx({name: ratio / mean for name, ratio in mapped.items()})
        assert math.fsum(sizes[name] * ratio for name, ratio in ratios.items()) == pytest.approx(
            sum(sizes.values())
        )


class TestInTraining:
    pytestmark = LIGHTNING_NOISE

    def test_a_resumed_run_continues_bitwise(self, tmp_path: Path) -> None:
        options: dict[str, Any] = {"assign_func": "tb_linear_map", "fixed": {"net.5": 3.0}, "normalize": "mean"}
        whole, module = FARMSTempBalance(**options), Module()
        fit(module, [whole], max_epochs=4)
        first, resumed = FARMSTempBalance(**options), FARMSTempBalance(**options)
        fit(Module(), [first], max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
        fit(other := Module(), [resumed], max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
        assert resumed.ratios == whole.ratios
        assert resumed.ratios["net.5"] == 3
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
