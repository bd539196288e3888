"""Pruning models: what is planned is what happens, block after block on pruned ones, or an error comes first."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

from farms_tb.sparsity import PlannedLayer, SparsityPlan, prune
from farms_tb.sparsity.masks import pruned_count
from farms_tb.sparsity.options import PRUNE_METHODS, PruneMethod
from farms_tb.sparsity.owl import outlier_shares
from tests.reference.pruning import prune_blocks
from tests.sparsity.models import ARCHITECTURES, VOCABULARY, llama, plan_of, token_batches, uniform_plan

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(straight line|large for a target|calibration is short|nearly singular|damping)"
)
METHODS = list(PRUNE_METHODS)


def matrices(model: nn.Module, plan: SparsityPlan) -> dict[str, Tensor]:
    """The weights that are pruned."""
    return {name: model.get_submodule(name).weight for name in plan.layers}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_achieved_is_what_was_planned(name: str, method: str) -> None:
    make, batches = ARCHITECTURES[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    plan = plan_of(model)
    report = prune(model, plan, method, calibration=batches())
    for layer, weight in matrices(model, plan).items():
        count = pruned_count(weight.numel(), plan.sparsity[layer])
        assert int((weight == 0).sum()) == count
        assert report.layers[layer].sparsity == count / weight.numel()
        assert 0 < report.layers[layer].output_error < 1
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{layer}.weight" for layer in plan.layers}
    assert report.sparsity == pytest.approx(plan.total, abs=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_methods_need_and_change_what_their_traits_say(method: PruneMethod) -> None:
    model, traits = llama(), PRUNE_METHODS[method]
    plan = plan_of(model)
    before = {name: matrix.clone() for name, matrix in matrices(model, plan).items()}
    if traits.needs_inputs:
        with pytest.raises(ValueError, match="calibration"):
            prune(model, plan, method)
        prune(model, plan, method, calibration=token_batches())
    else:
        prune(model, plan, method)
    kept_as_they_were = [
        bool((after[after != 0] == before[name][after != 0]).all())
        for name, after in matrices(model, plan).items()
    ]
    assert all(kept_as_they_were) != traits.corrects


@pytest.mark.parametrize("method", METHODS)
def test_the_same_masks_each_time(method: str) -> None:
    models = [llama(), llama()]
    for model in models:
        plan = plan_of(model)
        prune(model, plan, method, calibration=token_batches())
    for one, other in zip(*(matrices(model, plan).values() for model in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "resnet"])
def test_a_block_sees_the_pruned_blocks_before_it(name: str) -> None:
    """As in the reference implementation, which runs the whole model anew for each block."""
    make, batches = ARCHITECTURES[name]
    model, expected = make(), make()
    plan = plan_of(model)
    prune(model, plan, "wanda", calibration=batches())
    blocks: dict[str, dict[str, int]] = {}
    for layer, planned in plan.layers.items():
        count = pruned_count(planned.size, planned.sparsity)
        blocks.setdefault(planned.block, {})[layer] = count
    prune_blocks(expected, batches(), blocks)
    for one, other in zip(matrices(model, plan).values(), matrices(expected, plan).values(), strict=True):
        # Scores that are equal but for rounding may change places.
        assert ((one == 0) != (other == 0)).double().mean() <= 0.002


@pytest.mark.parametrize("kernel", [1, 3])
def test_images_without_a_batch_count_like_a_batch_of_one(kernel: int) -> None:
    torch.manual_seed(0)
    single = nn.Sequential(nn.Conv2d(6, 8, kernel), nn.ReLU(), nn.Conv2d(8, 4, kernel))
    batched = copy.deepcopy(single)
    layers = {name: PlannedLayer(single.get_submodule(name).weight.numel(), 0.5) for name in ("0", "2")}
    plan = SparsityPlan(layers, 0.5, "uniform")
    images = [torch.randn(6, 6, 6) * torch.arange(1, 7)[:, None, None] for _ in range(3)]
    prune(single, plan, "wanda", calibration=[{"input": image} for image in images])
    prune(batched, plan, "wanda", calibration=[{"input": image[None]} for image in images])
    for one, other in zip(single.parameters(), batched.parameters(), strict=True):
        assert torch.equal(one, other)


def small_encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()


def plan_of_feed_forward(model: nn.Module) -> SparsityPlan:
    names = [f"layers.{block}.linear{place}" for block in range(2) for place in (1, 2)]
    layers = {
        name: PlannedLayer(model.get_submodule(name).weight.numel(), 0.5, name.rpartition(".")[0])
        for name in names
    }
    return SparsityPlan(layers, 0.5, "uniform")


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_encoders_of_torch_are_seen_layer_by_layer() -> None:
    """Their fast path calls no layer, and refuses hooks where positions are hidden."""
    model = small_encoder()
    hidden = torch.zeros(3, 9, dtype=torch.bool)
    hidden[1, 6:] = True
    batches = [{"src": torch.randn(3, 9, 16), "src_key_padding_mask": hidden}]
    report = prune(model, plan_of_feed_forward(model), "wanda", calibration=batches)
    assert {layer.method for layer in report.layers.values()} == {"wanda"}
    assert torch.backends.mha.get_fastpath_enabled()


def compile_in_place(model: nn.Module) -> None:
    for block in model.layers:
        block.compile(backend="eager")


def compile_as_wrappers(model: nn.Module) -> None:
    for index, block in enumerate(model.layers):
        model.layers[index] = torch.compile(block, backend="eager")


def compile_forward(model: nn.Module) -> None:
    for block in model.layers:
        block.forward = torch.compile(block.forward, backend="eager")


@pytest.mark.parametrize("compile_blocks", [compile_in_place, compile_as_wrappers, compile_forward])
def test_compiled_blocks_are_seen_layer_by_layer(compile_blocks: Callable[[nn.Module], None]) -> None:
    written, compiled = small_encoder(), small_encoder()
    compile_blocks(compiled)
    batches = [{"src": torch.randn(3, 9, 16)}]
    for model in (written, compiled):
        report = prune(model, plan_of_feed_forward(model), "wanda", calibration=batches)
        assert {layer.method for layer in report.layers.values()} == {"wanda"}
    for one, other in zip(written.parameters(), compiled.parameters(), strict=True):
        assert torch.equal(one, other)


class Experts(nn.Module):
    """No token is sent to the first expert, and nothing but zeros to the second; the third gets a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        empty, zeros, vector = self.layers
        none = empty(x[:0]).sum()
        result: Tensor = x + zeros(0 * x) + vector(x[0]) + none
        return result


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.filterwarnings("ignore:calibration is short", "ignore:the Hessians")
def test_layers_that_see_no_inputs_or_zeros_are_pruned_by_magnitude(method: Any) -> None:
    model, expected = Experts(), Experts()
    plan = SparsityPlan({f"layers.{i}": PlannedLayer(64 * 64, 0.5) for i in range(3)}, 0.5, "uniform")
    prune(expected, plan, "magnitude")
    with pytest.warns(UserWarning, match=r"2 layers .*by magnitude"):
        report = prune(model, plan, method, calibration=[{"x": torch.randn(80, 64)}])
    assert [layer.method for layer in report.layers.values()] == ["magnitude", "magnitude", method]
    for index in (0, 1):
        assert torch.equal(model.layers[index].weight, expected.layers[index].weight)


def test_shares_of_outliers_need_inputs() -> None:
    """Of an expert that no token is sent to, the norm of its inputs is unknown, and that of its block with it."""
    blocks = {f"layers.{index}": "" for index in range(3)}
    batches = [{"x": torch.randn(80, 64)}]
    with pytest.raises(ValueError, match=r"no inputs of layers\.0"):
        outlier_shares(Experts(), blocks, batches)
    del blocks["layers.0"]
    of_zeros, share = outlier_shares(Experts(), blocks, batches, factor=1.5).values()
    assert of_zeros == 0 < share < 1


def test_half_precision_of_the_surroundings_does_not_reach_the_sums() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    plan = SparsityPlan({"0": PlannedLayer(128, 0.5)}, 0.5, "uniform")
    with torch.autocast("cpu", dtype=torch.float16):
        report = prune(model, plan, "sparsegpt", calibration=[{"input": 300 * torch.randn(64, 16)}])
    assert report.layers["0"].method == "sparsegpt"


def test_masks_survive_training_and_can_be_made_permanent() -> None:
    model = llama()
    plan = plan_of(model)
    prune(model, plan, "magnitude", in_place=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**token_batches()[0], labels=token_batches()[0]["input_ids"]).loss.backward()
    optimizer.step()
    name = "model.layers.0.mlp.up_proj"
    module = model.get_submodule(name)
    torch_prune.remove(module, "weight")
    assert int((module.weight == 0).sum()) == pruned_count(module.weight.numel(), plan.sparsity[name])


@pytest.mark.parametrize(("structure", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8)])
@pytest.mark.parametrize("method", METHODS)
def test_structures(method: str, structure: str, n: int, m: int) -> None:
    model = llama()
    plan = uniform_plan(model, 0.5)
    prune(model, plan, method, calibration=token_batches(), structure=structure)
    for weight in matrices(model, plan).values():
        assert ((weight == 0).view(weight.shape[0], -1, m).sum(-1) == n).all()


def test_mixed_structure_follows_the_plan() -> None:
    model = llama()
    plan = plan_of(model)
    report = prune(model, plan, "wanda", calibration=token_batches(), structure="mixed:8")
    assert report.sparsity == pytest.approx(plan.total, abs=0.05)
    assert all(layer.sparsity * 8 == round(layer.sparsity * 8) for layer in report.layers.values())


def test_a_stopped_run_goes_on_at_the_block_where_it_stopped(tmp_path: Path) -> None:
    expected = llama()
    plan = plan_of(expected)
    prune(expected, plan, "sparsegpt", calibration=token_batches())

    class StopError(Exception):
        pass

    stopped = llama()
    stopped.get_submodule("model.layers.2.mlp").register_forward_pre_hook(fail_with(StopError, after=2))
    with pytest.raises(StopError):
        prune(stopped, plan, "sparsegpt", calibration=token_batches(), checkpoint=tmp_path / "run")
    model = llama()
    told: list[tuple[int, int]] = []
    report = prune(
        model,
        plan,
        "sparsegpt",
        calibration=token_batches(),
        checkpoint=tmp_path / "run",
        progress=lambda *counts: told.append(counts),
    )
    assert told == [(2, 3), (3, 3)]
    assert list(report.layers) == list(plan.layers)
    for one, other in zip(matrices(model, plan).values(), matrices(expected, plan).values(), strict=True):
        assert torch.equal(one, other)
    of_another = llama()
    of_another.get_input_embeddings().weight.data.mul_(2)
    joined = [{"input_ids": torch.cat([batch["input_ids"] for batch in token_batches()])}]
    for changed, method, batches, differs in (
        (llama(), "wanda", token_batches(), "method"),
        (of_another, "sparsegpt", token_batches(), "unplanned weights"),
        (llama(), "sparsegpt", joined, "calibration"),
    ):
        with pytest.raises(ValueError, match=f"another run, with other {differs}"):
            prune(changed, plan, method, calibration=batches, checkpoint=tmp_path / "run")


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 16)) for _ in range(3)))


NORMED_PLAN = SparsityPlan(
    {f"{place}.1": PlannedLayer(256, 0.5, str(place)) for place in range(3)}, 0.5, "uniform"
)


def prune_normed(model: nn.Module, folder: Path, stop: int | None = None) -> None:
    """Prune with a checkpoint, and stop when so many blocks are done."""

    def stop_at(done: int, _: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    batches = [{"input": torch.arange(320.0).view(20, 16).sin()}]
    prune(model, NORMED_PLAN, calibration=batches, checkpoint=folder, progress=stop_at)


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The folder of a run that was stopped after two blocks of three."""
    with pytest.raises(KeyboardInterrupt):
        prune_normed(normed(), tmp_path / "run", stop=2)
    return tmp_path / "run"


def test_a_stopped_run_goes_on_with_other_threads(tmp_path: Path) -> None:
    """Sums of a large weight round otherwise with another number of threads."""
    plan = SparsityPlan({str(place): PlannedLayer(2**18, 0.5) for place in range(3)}, 0.5, "uniform")
    threads = torch.get_num_threads()
    told: list[tuple[int, int]] = []

    def stop(*counts: int) -> None:
        told.append(counts)
        if len(told) == 2:
            raise KeyboardInterrupt

    try:
        for number in (1, 4):
            torch.set_num_threads(number)
            torch.manual_seed(0)
            model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(3)))
            with contextlib.suppress(KeyboardInterrupt):
                prune(model, plan, "magnitude", checkpoint=tmp_path, progress=stop)
    finally:
        torch.set_num_threads(threads)
    assert told == [(0, 3), (1, 3), (1, 3), (2, 3), (3, 3)]


def flipped(model: nn.Sequential) -> None:
    model[1][1].weight.data.neg_()


def other_statistics(model: nn.Sequential) -> None:
    model[0][0].running_var.mul_(9)


def other_bias(model: nn.Sequential) -> None:
    model[0][1].bias.data[0] += 1e-6


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (flipped, "other weights:"),
        (other_statistics, "unplanned weights or buffers:"),
        (other_bias, "other unplanned"),
    ],
)
def test_a_stopped_run_does_not_go_on_with_another_model(stopped: Path, change: Any, differs: str) -> None:
    model = normed()
    change(model)
    with pytest.raises(ValueError, match=differs):
        prune_normed(model, stopped)


def test_a_model_that_a_stopped_run_has_pruned_in_part_is_to_be_loaded_anew(tmp_path: Path) -> None:
    model = normed()
    with pytest.raises(KeyboardInterrupt):
        prune_normed(model, tmp_path, stop=2)
    with pytest.raises(ValueError, match="load the model anew"):
        prune_normed(model, tmp_path)


class Summed(nn.Sequential):
    """Takes a list of inputs, and adds them up."""

    def forward(self, inputs: list[Any]) -> Tensor:  # type: ignore[override]
        return super().forward(sum(map(torch.as_tensor, inputs)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [torch.as_tensor, Tensor.numpy])
def test_a_stopped_run_does_not_go_on_with_other_nested_data(tmp_path: Path, kind: Any) -> None:
    """The text of a large tensor leaves out its middle."""

    def prune_summed(inputs: Tensor, stop: bool = False) -> None:
        def stop_at(done: int, _: int) -> None:
            if stop and done == 1:
                raise KeyboardInterrupt

        batches = [{"inputs": [kind(inputs)]}]
        prune(Summed(*normed()), NORMED_PLAN, calibration=batches, checkpoint=tmp_path, progress=stop_at)

    inputs = torch.arange(6400.0).view(400, 16).sin()
    with pytest.raises(KeyboardInterrupt):
        prune_summed(inputs, stop=True)
    other = inputs.clone()
    other[200, 8] += 1
    with pytest.raises(ValueError, match="other calibration:"):
        prune_summed(other)
    prune_summed(inputs)


def test_blocks_of_an_earlier_version_are_refused(stopped: Path) -> None:
    run = json.loads((stopped / "run.json").read_text())
    run["other weights"] = run.pop("unplanned weights or buffers")
    (stopped / "run.json").write_text(json.dumps(run))
    with pytest.raises(ValueError, match="another version"):
        prune_normed(normed(), stopped)


def fail_with(error: type[Exception], after: int) -> Any:
    """A hook that raises at its call number `after` + 1."""
    calls = []

    def hook(*_: Any) -> None:
        calls.append(None)
        if len(calls) > after:
            raise error

    return hook


def broken(model: nn.Module) -> nn.Module:
    model.get_submodule("model.layers.1.mlp").up_proj.weight.data[0, 0] = torch.nan
    return model


def tied(model: nn.Module) -> nn.Module:
    model.get_submodule("model.layers.1.mlp").up_proj.weight = model.get_submodule(
        "model.layers.0.mlp"
    ).up_proj.weight
    return model


def tied_by_memory(model: nn.Module) -> nn.Module:
    """Two parameters, the second of which is a part of the first."""
    memory = model.get_submodule("model.layers.0.mlp").up_proj.weight.data
    model.get_submodule("model.layers.1.self_attn").q_proj.weight = nn.Parameter(memory[8:40])
    return model


def empty() -> Iterator[Any]:
    yield from ()


@pytest.mark.parametrize(
    ("change", "calibration", "options", "words"),
    [
        (broken, token_batches(), {}, "up_proj"),
        (tied, token_batches(), {}, "up_proj"),
        (tied_by_memory, token_batches(), {}, r"up_proj is tied to model\.layers\.1\.self_attn\.q_proj"),
        (None, None, {}, "calibration"),
        (None, [], {}, "calibration"),
        (None, [{"input_ids": torch.full((1, 8), VOCABULARY)}], {}, "vocab"),
        (None, token_batches(), {"method": "wander"}, "wanda"),
        (None, token_batches(), {"structure": "2:4"}, "mixed:8"),
    ],
)
def test_bad_input_changes_nothing(change: Any, calibration: Any, options: dict[str, Any], words: str) -> None:
    model = llama()
    plan = plan_of(model)
    if change is not None:
        model = change(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        prune(model, plan, calibration=calibration, **options)
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(), before[key].nan_to_num())


def test_a_model_of_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        model = llama()
    with pytest.raises(ValueError, match=r"inference_mode.*load the model"):
        prune(model, plan_of(model), "magnitude")


def test_weights_next_to_each_other_in_memory_are_pruned() -> None:
    """As in files that are mapped into memory, and in flat parameters."""
    memory = torch.randn(3, 8, 8)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    for layer, values in zip(model, memory, strict=True):
        layer.weight = nn.Parameter(values)
    plan = SparsityPlan({str(place): PlannedLayer(64, 0.25 * (place + 1)) for place in range(3)}, 0.5, "alpha")
    prune(model, plan, "magnitude")
    assert [int((layer.weight == 0).sum()) for layer in model] == [16, 32, 48]


def test_inference_mode_is_refused_but_its_tensors_are_not() -> None:
    model = llama()
    plan = plan_of(model)
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        batches = [{"input_ids": batch["input_ids"].clone()} for batch in token_batches()]
        with pytest.raises(RuntimeError, match="no_grad"):
            prune(model, plan, "wanda", calibration=batches)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    prune(model, plan, "wanda", calibration=batches)


def test_a_layer_of_another_block_is_refused() -> None:
    """Its inputs would not be seen."""
    model = llama()
    plan = plan_of(model)
    name = "model.layers.1.mlp.up_proj"
    layers = {**plan.layers, name: replace(plan.layers[name], block="model.layers.0")}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is in the block 'model\.layers\.0'"):
        prune(model, replace(plan, layers=layers), "magnitude")


def test_an_embedding_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4))
    plan = SparsityPlan({"0": PlannedLayer(32, 0.5), "1": PlannedLayer(16, 0.5)}, 0.5, "uniform")
    with pytest.raises(ValueError, match=r"^0 cannot be pruned: embeddings are not pruned\."):
        prune(model, plan, "magnitude")


def test_a_plan_that_fits_two_towers_is_refused() -> None:
    model = nn.ModuleDict({"text": nn.Sequential(nn.Linear(8, 8)), "image": nn.Sequential(nn.Linear(8, 8))})
    plan = SparsityPlan({"0": PlannedLayer(64, 0.5)}, 0.5, "uniform")
    with pytest.raises(ValueError, match=r"text\.0, image\.0.*whole names"):
        prune(model, plan, "magnitude")


def test_a_plan_of_another_model_is_refused() -> None:
    plan = SparsityPlan({"layers.9.up": PlannedLayer(100, 0.5)}, 0.5, "alpha")
    with pytest.raises(TypeError, match="plan must be"):
        prune(llama(), None, "magnitude")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layers\.9\.up"):
        prune(llama(), plan, "magnitude")
