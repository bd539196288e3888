"""`farms-tb prune`: the files it writes, what it refuses, and what becomes of a run that is stopped."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner, Result

from farms_tb.cli.app import app
from farms_tb.sparsity import PlannedLayer, SparsityPlan, prune
from farms_tb.sparsity.calibration import calibration_batches
from farms_tb.sparsity.masks import pruned_count
from tests.sparsity.models import VOCABULARY, gpt2, llama, plan_of, uniform_plan

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(straight line|large for a target|calibration is short|nearly singular|damping|torch.jit|forkpty)"
)
ROOT = Path(__file__).resolve().parents[2]


def save_sharded(model: nn.Module, folder: Path, shard: str = "30KB") -> Path:
    """Write a model of transformers as a folder with several files of weights."""
    model.save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "original").mkdir()
    (folder / "original" / "consolidated.pth").write_bytes(b"dense")
    (folder / "original" / "params.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model in bfloat16, in several files, that no test changes."""
    return save_sharded(llama().to(torch.bfloat16), tmp_path_factory.mktemp("dense") / "model", "60KB")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    plan_of(llama()).save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    """Token ids, enough for 16 sequences of 32."""
    generator = torch.Generator().manual_seed(3)
    torch.save(torch.randint(VOCABULARY, (512,), generator=generator), tmp_path / "ids.pt")
    return tmp_path / "ids.pt"


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, ["prune", *map(str, arguments)])


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def files(folder: Path) -> dict[str, bytes]:
    """All files of a folder by their names in it."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def load(folder: Path) -> nn.Module:
    """The model of a folder, its weights in the type of the files."""
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(folder)
    name = "dtype" if hasattr(config, "dtype") else "torch_dtype"
    return LlamaForCausalLM.from_pretrained(folder, **{name: torch.bfloat16}).eval()


def assert_same_weights(folder: Path, model: nn.Module) -> None:
    """Check that a folder holds the weights of a model, bit for bit."""
    expected = model.state_dict()
    found = tensors(folder)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype, name
        assert torch.equal(value.view(torch.int16), expected[name].view(torch.int16)), name


def zeros_of(folder: Path, plan: SparsityPlan) -> dict[str, int]:
    found = tensors(folder)
    return {name: int((found[f"{name}.weight"] == 0).sum()) for name in plan.layers}


def counts_of(plan: SparsityPlan) -> dict[str, int]:
    return {name: pruned_count(layer.size, layer.sparsity) for name, layer in plan.layers.items()}


def test_magnitude_streams_what_python_prunes(dense: Path, plan: Path, tmp_path: Path) -> None:
    done = run(dense, "--plan", plan, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    model = load(dense)
    prune(model, SparsityPlan.load(plan), "magnitude")
    assert_same_weights(tmp_path / "out", model)
    assert zeros_of(tmp_path / "out", SparsityPlan.load(plan)) == counts_of(SparsityPlan.load(plan))


def test_files_names_types_and_order_stay(dense: Path, plan: Path, tmp_path: Path) -> None:
    done = run(dense, "--plan", plan, "-o", tmp_path / "out", "--seed", 7)
    assert done.exit_code == 0, done.stderr
    before, after = files(dense), files(tmp_path / "out")
    assert after.keys() - before.keys() == {"sparsity.json"}
    assert before.keys() - after.keys() == {"original/consolidated.pth"}
    assert "dense weights: original/consolidated.pth\n" in done.stderr
    shards = [name for name in before if name.endswith(".safetensors")]
    assert len(shards) > 1
    for name in after.keys() & before.keys() - set(shards):
        assert after[name] == before[name], name
    for name in shards:
        with safe_open(dense / name, "pt") as old, safe_open(tmp_path / "out" / name, "pt") as new:
            assert new.offset_keys() == old.offset_keys()
            metadata = new.metadata()
            assert old.metadata().items() <= metadata.items()
        assert metadata["farms_tb_method"] == "magnitude"
        assert metadata["farms_tb_structure"] == "unstructured"
        assert metadata["farms_tb_seed"] == "7"
        assert metadata["farms_tb_version"]
        (tmp_path / "again.json").write_text(metadata["farms_tb_plan"])
        assert SparsityPlan.load(tmp_path / "again.json") == SparsityPlan.load(plan)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    load(tmp_path / "out")


def test_of_other_files_the_output_has_what_belongs_to_the_model(dense: Path, plan: Path, tmp_path: Path) -> None:
    """Weights of the modules after the model are copied; dense weights in other formats and other models not."""
    folder = shutil.copytree(dense, tmp_path / "sentences")
    names = ["rust_model.ot", "w.npy", "onnx/model.onnx.data", "m.tflite", "tf.pb", "w.pkl", "W.ONNX"]
    names += ["keras.hdf5", "tf.ckpt.data-00000-of-00001", "tf.ckpt.index"]
    kept = ["2_Dense/model.safetensors", "2_Dense/config.json", "1_Pooling/config.json", "tokenizer.model"]
    others = ["checkpoint-500/trainer_state.json", "old50/sparsity.json", "old50/tokenizer.json"]
    for name in [*names, *kept, *others]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"content")
    paths = [{"path": path} for path in ("", "1_Pooling", "2_Dense")]
    (folder / "modules.json").write_text(json.dumps(paths))
    done = run(folder, "--plan", plan, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    before, after = files(folder), files(tmp_path / "out")
    assert before.keys() - after.keys() == {*names, *others, "original/consolidated.pth"}
    assert all(after[name] == before[name] for name in kept)
    said = done.stderr.replace("\n", " ")
    assert "not pruned" in said
    assert "modules.json" in said
    for name in [*names, "2_Dense/model.safetensors", "checkpoint-500/", "old50/"]:
        assert name in said
    # The output of a pruning may be pruned itself.
    again = run(tmp_path / "out", "--plan", plan, "-o", tmp_path / "again")
    assert again.exit_code == 0, again.stderr
    assert files(tmp_path / "again").keys() == after.keys()


def test_the_table_and_the_report_say_what_was_done(dense: Path, plan: Path, ids: Path, tmp_path: Path) -> None:
    options = ("--plan", plan, "--calibration", ids, "--length", 32, "--sequences", 4)
    done = run(dense, *options, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    header = next(line for line in done.stdout.splitlines() if line.startswith("layer"))
    assert header.split() == ["layer", "block", "entries", "planned", "achieved", "output", "error"]
    asked = SparsityPlan.load(plan)
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    for name, layer in asked.layers.items():
        assert rows[name][3] == f"{layer.sparsity:.4f}"
        assert 0 < float(rows[name][5]) < 1
    assert rows["total"][-3] == f"{asked.total:.4f}"
    report = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    assert report["calibration"] == {"file": "ids.pt", "sequences": 4, "tokens": 128}
    assert [row["layer"] for row in report["layers"]] == list(asked.layers)
    # Statistics of inputs change nothing of what magnitude chooses.
    without = run(dense, "--plan", plan, "-o", tmp_path / "without")
    assert "output" not in next(line for line in without.stdout.splitlines() if line.startswith("layer"))
    assert tensors(tmp_path / "without").keys() == tensors(tmp_path / "out").keys()
    for name, value in tensors(tmp_path / "without").items():
        assert torch.equal(value, tensors(tmp_path / "out")[name])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_methods_with_data_give_what_python_gives(
    dense: Path, plan: Path, ids: Path, tmp_path: Path, method: str
) -> None:
    options = ("--method", method, "--calibration", ids, "--length", 32, "--sequences", 6, "--seed", 5)
    done = run(dense, "--plan", plan, *options, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    model = load(dense)
    batches = calibration_batches(torch.load(ids), number=6, length=32, seed=5)
    prune(model, SparsityPlan.load(plan), method, calibration=batches)
    assert_same_weights(tmp_path / "out", model)
    assert zeros_of(tmp_path / "out", SparsityPlan.load(plan)) == counts_of(SparsityPlan.load(plan))


def test_text_is_read_with_the_tokenizer_of_the_folder(dense: Path, plan: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = shutil.copytree(dense, tmp_path / "with_words")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    ids = torch.arange(512) * 31 % VOCABULARY
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{index}" for index in ids.tolist()))
    save_file({"input_ids": ids}, tmp_path / "ids.safetensors")
    for name, calibration in (("a", text), ("b", tmp_path / "ids.safetensors")):
        done = run(
            folder, "--plan", plan, "--method", "wanda", "--calibration", calibration, "-o", tmp_path / name
        )
        assert done.exit_code == 0, done.stderr
    one, other = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (tmp_path / "a" / "tokenizer.json").is_file()
    # The context of the model, 64 tokens, is the default length.
    assert json.loads((tmp_path / "a" / "sparsity.json").read_text())["calibration"]["tokens"] == 512


def test_a_single_file_without_a_model(tmp_path: Path) -> None:
    """A matrix, attention packed into one weight, and a convolution; types that are not pruned are copied."""
    torch.manual_seed(0)
    state = {
        "blocks.0.up.weight": torch.randn(24, 16),
        "blocks.0.attn.in_proj_weight": torch.randn(24, 8),
        "blocks.0.attn.in_proj_bias": torch.zeros(24),
        "blocks.0.conv.weight": torch.randn(6, 4, 3, 3),
        "blocks.0.steps": torch.arange(5, dtype=torch.int32),
        "empty": torch.zeros(0, 4),
    }
    save_file(state, tmp_path / "weights.safetensors", metadata={"note": "kept"})
    shares = {"blocks.0.up": 0.5, "blocks.0.attn.q": 0.25, "blocks.0.attn.v": 0.75, "blocks.0.conv": 0.6}
    sizes = {"blocks.0.up": 384, "blocks.0.attn.q": 64, "blocks.0.attn.v": 64, "blocks.0.conv": 216}
    layers = {name: PlannedLayer(sizes[name], share, "blocks.0") for name, share in shares.items()}
    SparsityPlan(layers, 0.5, "alpha").save(tmp_path / "plan.json")
    done = run(tmp_path / "weights.safetensors", "--plan", tmp_path / "plan.json", "-o", tmp_path / "new" / "out")
    assert done.exit_code == 0, done.stderr
    after = load_file(tmp_path / "new" / "out" / "weights.safetensors")
    queries, keys, values = after["blocks.0.attn.in_proj_weight"].chunk(3)
    assert [int((part == 0).sum()) for part in (queries, keys, values)] == [16, 0, 48]
    assert int((after["blocks.0.up.weight"] == 0).sum()) == 192
    assert int((after["blocks.0.conv.weight"] == 0).sum()) == 130
    kept = after["blocks.0.conv.weight"] != 0
    assert torch.equal(after["blocks.0.conv.weight"][kept], state["blocks.0.conv.weight"][kept])
    assert after["blocks.0.conv.weight"][kept].abs().min() >= state["blocks.0.conv.weight"][~kept].abs().max()
    assert torch.equal(after["blocks.0.steps"], state["blocks.0.steps"])
    with safe_open(tmp_path / "new" / "out" / "weights.safetensors", "pt") as file:
        assert file.metadata()["note"] == "kept"


def test_links_and_an_index_stand_for_the_folder(dense: Path, plan: Path, tmp_path: Path) -> None:
    """The cache of the hub holds links; the output holds files of its own."""
    links = tmp_path / "links"
    links.mkdir()
    for file in dense.iterdir():
        if file.is_file():
            (links / file.name).symlink_to(file)
    assert run(links, "--plan", plan, "-o", tmp_path / "a").exit_code == 0
    assert run(dense / "model.safetensors.index.json", "--plan", plan, "-o", tmp_path / "b").exit_code == 0
    assert not [path for path in (tmp_path / "a").iterdir() if path.is_symlink()]
    one, other = files(tmp_path / "a"), files(tmp_path / "b")
    assert one == {name: content for name, content in other.items() if not name.startswith("original/")}


def test_folders_behind_links_are_copied_and_loops_end(dense: Path, plan: Path, tmp_path: Path) -> None:
    model = shutil.copytree(dense, tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.json").write_text("{}")
    (tmp_path / "elsewhere" / "back").symlink_to(model)
    (model / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    (model / "self").symlink_to(model)
    assert run(model, "--plan", plan, "-o", tmp_path / "out").exit_code == 0
    added = files(tmp_path / "out").keys() - files(dense).keys()
    assert added == {"sparsity.json", "1_Pooling/config.json"}
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]


def refuse_constant(text: str) -> None:
    raise AssertionError(f"{text} is no JSON")


def test_an_error_that_is_not_a_number_is_null(plan: Path, ids: Path, tmp_path: Path) -> None:
    """JavaScript and most other readers refuse a file with NaN."""
    model = llama()
    model.get_input_embeddings().weight.data[:] = torch.nan
    folder = save_sharded(model, tmp_path / "model", "1MB")
    done = run(folder, "--plan", plan, "--calibration", ids, "--length", 32, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    content = json.loads((tmp_path / "out" / "sparsity.json").read_text(), parse_constant=refuse_constant)
    assert {layer["output_error"] for layer in content["layers"]} == {None}


def test_a_tensor_in_two_files_is_that_of_the_index(plan: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "model"
    folder.mkdir()
    weights = {f"layers.{index}.fc.weight": torch.randn(64, 48) for index in range(3)}
    first, second, third = weights
    save_file(
        {first: weights[first], "0": torch.randn(64, 48), second: torch.randn(64, 48)}, folder / "a.safetensors"
    )
    save_file({second: weights[second], third: weights[third]}, folder / "b.safetensors")
    parts = {"0": "a.safetensors", first: "a.safetensors", second: "b.safetensors", third: "b.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    layers = {f"layers.{index}.fc": PlannedLayer(64 * 48, 0.5) for index in range(3)}
    SparsityPlan(layers, 0.5, "uniform").save(plan)
    done = run(folder, "--plan", plan, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    for file in ("a.safetensors", "b.safetensors"):
        held = load_file(tmp_path / "out" / file)
        assert held.keys() == {name for name, part in parts.items() if part == file}
        for name in held.keys() & weights.keys():
            kept = held[name] != 0
            assert int(kept.sum()) == 64 * 24
            assert torch.equal(held[name][kept], weights[name][kept])


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    state = {f"blocks.{index}.up.weight": torch.randn(512, 512) for index in range(12)}
    save_file(state, tmp_path / "weights.safetensors")
    layers = {f"blocks.{index}.up": PlannedLayer(512 * 512, 0.5) for index in range(12)}
    SparsityPlan(layers, 0.5, "uniform").save(tmp_path / "plan.json")
    options = ("--plan", tmp_path / "plan.json")
    run(tmp_path / "weights.safetensors", *options, "-o", tmp_path / "first")  # imports what a run needs
    tracemalloc.start()
    done = run(tmp_path / "weights.safetensors", *options, "-o", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert done.exit_code == 0, done.stderr
    # Of twelve tensors of a megabyte: one, and the one that is read next.
    assert peak < 3 * 2**20


def test_names_may_lack_the_prefix_of_the_model(ids: Path, tmp_path: Path) -> None:
    """Files of GPT-2 lack the `transformer.` of its model, and store matrices as (in, out)."""
    folder = save_sharded(gpt2(), tmp_path / "gpt2")
    uniform_plan(gpt2(), 0.5).save(tmp_path / "plan.json")
    options = ("--plan", tmp_path / "plan.json", "--calibration", ids, "--length", 32)
    for name, more in (("stream", options[:2]), ("wanda", (*options, "--method", "wanda"))):
        done = run(folder, *more, "-o", tmp_path / name)
        assert done.exit_code == 0, done.stderr
        matrix = next(value for key, value in tensors(tmp_path / name).items() if "h.1.mlp.c_fc.weight" in key)
        assert int((matrix == 0).sum()) == matrix.numel() // 2
    done = run(folder, *options, "--structure", "2:4", "-o", tmp_path / "groups")
    assert done.exit_code == 0, done.stderr
    matrix = next(value for key, value in tensors(tmp_path / "groups").items() if "h.1.mlp.c_fc.weight" in key)
    assert ((matrix.mT.reshape(-1, 4) == 0).sum(1) == 2).all()
    square = {"h.0.attn.c_proj": PlannedLayer(32 * 32, 0.5)}  # whose own bias does not tell
    SparsityPlan(square, 0.5, "uniform").save(tmp_path / "square.json")
    for plan_file in ("plan.json", "square.json"):
        refused = run(folder, "--plan", tmp_path / plan_file, "--structure", "2:4", "-o", tmp_path / "refused")
        assert refused.exit_code == 2
        assert "(in, out)" in refused.stderr


@pytest.mark.parametrize(("structure", "n", "m"), [("2:4", 2, 4), ("4:8", 4, 8), ("mixed:8", 4, 8)])
def test_structures_are_streamed(dense: Path, tmp_path: Path, structure: str, n: int, m: int) -> None:
    asked = uniform_plan(llama(), 0.5)
    asked.save(tmp_path / "plan.json")
    done = run(dense, "--plan", tmp_path / "plan.json", "--structure", structure, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    model = load(dense)
    prune(model, asked, "magnitude", structure=structure)
    assert_same_weights(tmp_path / "out", model)
    matrix = tensors(tmp_path / "out")["model.layers.0.mlp.up_proj.weight"]
    assert ((matrix.view(-1, m) == 0).sum(1) == n).all()


# What is refused, before anything is written.


def as_it_is(folder: Path) -> None:
    pass


def change_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Replace a tensor in the file of a folder that holds it."""
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        if name in held:
            held[name] = change(held[name])
            save_file(held, file, metadata={"format": "pt"})


def with_nan(folder: Path) -> None:
    def change(weight: Tensor) -> Tensor:
        weight[1, 1] = torch.nan
        return weight

    change_tensor(folder, "model.layers.1.mlp.up_proj.weight", change)


def in_int8(folder: Path) -> None:
    change_tensor(folder, "model.layers.1.mlp.up_proj.weight", lambda weight: weight.to(torch.int8))


def in_four_bits(folder: Path) -> None:
    """As bitsandbytes stores a weight: two entries a byte, one column."""
    packed = torch.zeros(1408, 1, dtype=torch.uint8)
    change_tensor(folder, "model.layers.1.mlp.up_proj.weight", lambda weight: packed)


def in_float8(folder: Path) -> None:
    change_tensor(folder, "model.layers.1.mlp.up_proj.weight", lambda weight: weight.to(torch.float8_e4m3fn))


def as_gguf(folder: Path) -> None:
    remove_weights(folder)
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))


def as_pickle(folder: Path) -> None:
    remove_weights(folder)
    torch.save(llama().state_dict(), folder / "pytorch_model.bin")


def remove_weights(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()


def cut(folder: Path) -> None:
    """End a file before its last tensor does."""
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-100])


def with_an_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def with_odd_metadata(folder: Path) -> None:
    """Let a header have a list where texts by name belong."""
    file = sorted(folder.glob("*.safetensors"))[0]
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps({**json.loads(content[8:end]), "__metadata__": ["pt"]}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])


def with_a_second_model(folder: Path) -> None:
    """Put one file with other weights next to the index of several: transformers loads the one file."""
    weights = {name: 2 * weight for name, weight in tensors(folder).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


MAGNITUDE = ()
WANDA = ("--method", "wanda", "--calibration", "ids.pt", "--length", "32")


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (with_nan, MAGNITUDE, ["layers.1.mlp.up_proj", "NaN"]),
        (with_nan, WANDA, ["layers.1.mlp.up_proj", "NaN"]),
        (in_int8, MAGNITUDE, ["layers.1.mlp.up_proj", "quantised", "16 or 32 bits"]),
        (in_int8, WANDA, ["layers.1.mlp.up_proj", "quantised", "16 or 32 bits"]),
        (in_four_bits, MAGNITUDE, ["layers.1.mlp.up_proj", "quantised", "16 or 32 bits"]),
        (in_float8, MAGNITUDE, ["layers.1.mlp.up_proj", "quantised", "16 or 32 bits"]),
        (as_gguf, MAGNITUDE, ["GGUF", "16 or 32 bits"]),
        (as_pickle, MAGNITUDE, ["save_pretrained"]),
        (with_an_adapter, MAGNITUDE, ["adapter", "merge_and_unload"]),
        (with_odd_metadata, MAGNITUDE, ["metadata"]),
        (with_a_second_model, WANDA, ["q_proj", "other values", "two sets of weights"]),
        (remove_weights, MAGNITUDE, ["safetensors"]),
        (cut, MAGNITUDE, ["cut short"]),
        (as_it_is, ("--method", "wanda"), ["calibration", "--calibration FILE"]),
        (as_it_is, ("--method", "wander"), ["wanda"]),
        (as_it_is, ("--structure", "2:4"), ["mixed:8"]),
        (as_it_is, (*WANDA[:4], "--length", "600"), ["context", "--length 64"]),
        (as_it_is, ("--method", "wanda", "--calibration", "short.pt", "--length", "32"), ["too short"]),
        (as_it_is, ("--method", "wanda", "--calibration", "foreign.pt", "--length", "32"), ["vocabulary"]),
        (as_it_is, ("--method", "wanda", "--calibration", "long_rows.pt"), ["long_rows.pt", "100", "model, 64"]),
        (as_it_is, ("--calibration", "long_rows.pt"), ["long_rows.pt", "100", "model, 64"]),
        (as_it_is, ("--calibration", "rows.pt", "--length", "16"), ["rows.pt", "24", "--length 16"]),
        (as_it_is, ("--method", "wanda", "--calibration", "numbers.pt"), ["ids of tokens"]),
        (as_it_is, ("--method", "wanda", "--calibration", "absent.pt"), ["absent.pt"]),
        (as_it_is, ("--method", "wanda", "--calibration", "empty.pt"), ["empty.pt"]),
        (as_it_is, ("--method", "wanda", "--calibration", "short_pickle.pt"), ["cannot read", "short_pickle.pt"]),
        (as_it_is, ("--calibration", "damaged.safetensors"), ["damaged.safetensors", "cut short or damaged"]),
        (as_it_is, ("--method", "wanda", "--calibration", "text.txt"), ["tokenizer", "token ids"]),
        (as_it_is, (*WANDA, "--sequences", "0"), ["sequences"]),
        (as_it_is, ("--seed", "-1"), ["seed"]),
        (as_it_is, ("--plan", "absent.json"), ["absent.json"]),
        (as_it_is, ("--plan", "ids.pt"), ["no plan"]),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    dense: Path,
    plan: Path,
    ids: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path], None],
    options: tuple[str, ...],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(torch.arange(31), "short.pt")
    torch.save(torch.arange(64) + VOCABULARY - 5, "foreign.pt")
    torch.save(torch.randn(64), "numbers.pt")
    torch.save(torch.arange(400).view(4, 100) % VOCABULARY, "long_rows.pt")
    torch.save(torch.arange(96).view(4, 24) % VOCABULARY, "rows.pt")
    Path("text.txt").write_text("some words")
    Path("empty.pt").touch()
    Path("short_pickle.pt").write_bytes(b"junk")
    Path("damaged.safetensors").write_bytes(b"x" * 100)
    folder = shutil.copytree(dense, tmp_path / "changed")
    change(folder)
    before = files(tmp_path)
    done = run(folder, "--plan", plan, "-o", tmp_path / "out", *options)
    assert done.exit_code == 2, done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert files(tmp_path) == before
    assert not list(tmp_path.glob("*out*"))


def plan_for_other_names() -> SparsityPlan:
    return SparsityPlan({"encoder.0.up": PlannedLayer(100, 0.5)}, 0.5, "alpha")


def plan_for_other_sizes() -> SparsityPlan:
    return plan_of(llama(intermediate_size=96))


def plan_with_the_head() -> SparsityPlan:
    return SparsityPlan({"lm_head": PlannedLayer(VOCABULARY * 32, 0.5)}, 0.5, "alpha")


def plan_with_the_embedding() -> SparsityPlan:
    return SparsityPlan({"model.embed_tokens": PlannedLayer(VOCABULARY * 32, 0.5)}, 0.5, "alpha")


@pytest.mark.parametrize("options", [MAGNITUDE, WANDA], ids=["magnitude", "wanda"])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (plan_for_other_names, ["another model", "encoder.0.up"]),
        (plan_for_other_sizes, ["another model", "mlp."]),
        (plan_with_the_head, ["lm_head", "tied", "embed_tokens"]),
        (plan_with_the_embedding, ["model.embed_tokens", "embeddings are not pruned"]),
    ],
)
def test_plans_that_do_not_fit(
    ids: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[], SparsityPlan],
    words: list[str],
    options: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_sharded(llama(tie_word_embeddings=True), tmp_path / "tied")
    make().save(tmp_path / "plan.json")
    done = run(folder, "--plan", tmp_path / "plan.json", "-o", tmp_path / "out", *options)
    assert done.exit_code == 2, done.stderr
    for word in words:
        assert word in done.stderr
    assert not list(tmp_path.glob("*out*"))


def test_a_folder_with_other_content_is_not_touched(dense: Path, plan: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    done = run(dense, "--plan", plan, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "other content" in done.stderr
    assert files(tmp_path / "out") == {"thesis.txt": b"mine"}
    (tmp_path / "out" / "thesis.txt").unlink()
    assert run(dense, "--plan", plan, "-o", tmp_path / "out").exit_code == 0
    assert run(dense, "--plan", plan, "-o", dense).exit_code == 2
    assert run(dense, "--plan", plan, "-o", plan).exit_code == 2


def test_an_empty_mount_point_is_refused_before_anything_is_pruned(
    dense: Path, plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is a folder that cannot be renamed or removed."""
    (tmp_path / "disk").mkdir()
    mounted = os.path.ismount
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "disk" or mounted(path))
    done = run(dense, "--plan", plan, "-o", tmp_path / "disk")
    assert done.exit_code == 2
    assert "mount point" in done.stderr
    assert not (tmp_path / ".disk.unfinished").exists()
    assert run(dense, "--plan", plan, "-o", tmp_path / "disk" / "pruned").exit_code == 0


def test_without_transformers(
    dense: Path, plan: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    refused = run(dense, "--plan", plan, "--method", "wanda", "--calibration", ids, "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert "farms-tb[transformers]" in refused.stderr
    assert run(dense, "--plan", plan, "-o", tmp_path / "out").exit_code == 0


def test_models_that_take_no_tokens(dense: Path, plan: Path, ids: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(dense, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    for architecture, word in (
        ("Unheard", "Unheard"),
        ("ViTModel", "token ids"),
        ("LlamaForTokenClassification", "lacks"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": [architecture]}))
        done = run(folder, "--plan", plan, "--method", "wanda", "--calibration", ids, "-o", tmp_path / "out")
        assert done.exit_code == 2
        assert word in done.stderr
    (folder / "config.json").unlink()
    done = run(folder, "--plan", plan, "--method", "wanda", "--calibration", ids, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "config.json" in done.stderr
    assert run(folder, "--plan", plan, "-o", tmp_path / "out").exit_code == 0


# What becomes of a run that is stopped.


def start(*arguments: Any, largest_file: int | None = None) -> subprocess.Popen[str]:
    """Run the command in a process of its own.

    Args:
        arguments: of the command.
        largest_file: bytes to which files may grow, which stands for a full disk.
    """

    def limit() -> None:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    return subprocess.Popen(
        [sys.executable, "-m", "farms_tb.cli", "prune", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit,
    )


def kill_when(process: subprocess.Popen[str], reached: Callable[[], bool], sign: signal.Signals) -> None:
    """Send a signal as soon as something is reached."""
    deadline = time.monotonic() + 200
    while not reached():
        assert process.poll() is None, "the run ended before it was to be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(sign)


@dataclass(frozen=True)
class Deep:
    """A model that takes a while.

    Attributes:
        folder: where it is, with a plan and token ids.
    """

    folder: Path

    def command(self, method: str) -> list[Any]:
        """What prunes it, but for the output."""
        options = [self.folder / "model", "--plan", self.folder / "plan.json", "--method", method]
        if method == "magnitude":
            return options
        return [*options, "--calibration", self.folder / "ids.pt"]

    def undisturbed(self, method: str) -> dict[str, bytes]:
        """The files that a run writes that nothing stops."""
        output = self.folder / method
        if not output.exists():
            done = run(*self.command(method), "-o", output)
            assert done.exit_code == 0, done.stderr
        return files(output)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Deep:
    folder = tmp_path_factory.mktemp("deep")
    model = llama(hidden_size=64, intermediate_size=256, num_hidden_layers=10).to(torch.bfloat16)
    save_sharded(model, folder / "model", "150KB")
    plan_of(model).save(folder / "plan.json")
    torch.save(torch.arange(2048) * 31 % VOCABULARY, folder / "ids.pt")
    return Deep(folder)


@pytest.mark.parametrize(
    ("method", "sign"),
    [
        ("magnitude", signal.SIGKILL),
        ("magnitude", signal.SIGINT),
        ("wanda", signal.SIGKILL),
    ],
)
def test_a_killed_run_goes_on_where_it_stopped(
    deep: Deep, tmp_path: Path, method: str, sign: signal.Signals
) -> None:
    command = deep.command(method)
    state = tmp_path / ".out.unfinished"
    pattern = "model/*.safetensors" if method == "magnitude" else "blocks/*.pt"
    process = start(*command, "-o", tmp_path / "out")
    kill_when(process, lambda: len(list(state.glob(pattern))) >= 2, sign)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (130 if sign == signal.SIGINT else -signal.SIGKILL)
    if sign == signal.SIGINT:
        assert "Repeat the command" in said
    assert not (tmp_path / "out").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in state.glob(pattern)}
    # Another run does not go on with it.
    other = run(*command, "--seed", 1, "-o", tmp_path / "out")
    assert other.exit_code == 2
    assert "seed" in other.stderr
    assert {path.name: path.stat().st_mtime_ns for path in state.glob(pattern)} == finished
    again = run(*command, "-o", tmp_path / "out")
    assert again.exit_code == 0, again.stderr
    assert files(tmp_path / "out") == deep.undisturbed(method)
    assert not state.exists()
    if method == "magnitude":  # The finished files are those of the first run.
        assert (
            finished.items()
            <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}.items()
        )


def cut_file(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("method", "pattern", "damage"),
    [
        ("magnitude", "model/*.safetensors", cut_file),
        ("magnitude", "model/*.safetensors", flip_a_bit),
        ("magnitude", "layers/*.json", lambda path: path.write_text("{")),
        ("magnitude", "layers/*.json", lambda path: path.write_text("[]")),
        ("sparsegpt", "blocks/*.pt", cut_file),
        ("sparsegpt", "blocks/*.pt", flip_a_bit),
        ("sparsegpt", "blocks/*.pt", lambda path: path.write_bytes(b"")),
    ],
)
def test_what_was_damaged_since_it_was_finished_is_done_again(
    deep: Deep,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    pattern: str,
    damage: Callable[[Path], None],
) -> None:
    command = [*deep.command(method), "-o", tmp_path / "out"]
    stop_after(monkeypatch, *(("pruning blocks", 4) if method == "sparsegpt" else ("writing layers", 40)))
    assert run(*command).exit_code == 130
    monkeypatch.undo()
    state = tmp_path / ".out.unfinished"
    finished = sorted(state.glob(pattern))
    assert len(finished) > 1
    damage(finished[0])
    again = run(*command)
    assert again.exit_code == 0, again.stderr
    assert files(tmp_path / "out") == deep.undisturbed(method)


def test_what_a_run_left_that_was_killed_at_its_very_end_is_removed(
    deep: Deep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [*deep.command("sparsegpt"), "-o", tmp_path / "out"]
    monkeypatch.setattr("farms_tb.sparsity.unfinished.shutil.rmtree", lambda *_, **__: None)
    assert run(*command).exit_code == 0
    monkeypatch.undo()
    assert (tmp_path / ".out.unfinished" / "run.json").is_file()
    again = run(*command)
    assert again.exit_code == 2
    assert "a pruned model" in " ".join(again.stderr.split())
    assert not (tmp_path / ".out.unfinished").exists()
    assert files(tmp_path / "out") == deep.undisturbed("sparsegpt")


@pytest.mark.parametrize("content", ["[1]", "3", "{"])
def test_a_state_that_does_not_say_whose_it_is_is_refused(
    plan: Path, dense: Path, tmp_path: Path, content: str
) -> None:
    state = tmp_path / ".out.unfinished"
    state.mkdir()
    (state / "run.json").write_text(content)
    done = run(dense, "--plan", plan, "-o", tmp_path / "out")
    assert done.exit_code == 2, done.stderr
    for word in ("run.json", "damaged", "method", f"Delete {state}"):
        assert word in done.stderr.replace("\n", " ")


def stop_after(monkeypatch: pytest.MonkeyPatch, what: str, number: int) -> None:
    """Interrupt runs of this process as soon as so many blocks or layers are done."""
    import farms_tb.cli.prune

    prune_files = farms_tb.cli.prune.prune_files

    def stopped(prepared: Any, progress: Any) -> Any:
        def told(doing: str, done: int, total: int) -> None:
            progress(doing, done, total)
            if doing == what and done > number:
                raise KeyboardInterrupt

        return prune_files(prepared, told)

    monkeypatch.setattr(farms_tb.cli.prune, "prune_files", stopped)


def test_a_run_that_is_stopped_says_what_it_has_warned_of(
    monkeypatch: pytest.MonkeyPatch, plan: Path, dense: Path, tmp_path: Path
) -> None:
    def stopped(*_: Any) -> Any:
        warnings.warn("a matrix was odd", UserWarning, stacklevel=2)
        raise KeyboardInterrupt

    monkeypatch.setattr("farms_tb.cli.prune.prune_files", stopped)
    done = run(dense, "--plan", plan, "-o", tmp_path / "out")
    assert done.exit_code == 130
    assert "Interrupted" in done.stderr
    assert "a matrix was odd" in done.stderr


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_a_full_disk_leaves_a_state_to_go_on_from(deep: Deep, tmp_path: Path, method: str) -> None:
    """For the first file of weights, or the first block, there is no room."""
    command = deep.command(method)
    process = start(*command, "-o", tmp_path / "out", largest_file=100_000)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 1, said
    assert "Stopped" in said
    assert "repeat the command" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
    state = files(tmp_path / ".out.unfinished")
    assert not [name for name in state if name.endswith((".part", ".pt", ".safetensors"))]
    again = run(*command, "-o", tmp_path / "out")
    assert again.exit_code == 0, again.stderr
    assert files(tmp_path / "out") == deep.undisturbed(method)


def test_of_two_runs_at_once_the_second_is_refused(deep: Deep, tmp_path: Path) -> None:
    command = deep.command("magnitude")
    state = tmp_path / ".out.unfinished"
    state.mkdir()
    with FileLock(state / ".lock"):
        second = run(*command, "-o", tmp_path / "out")
    assert second.exit_code == 2
    assert "another run is at work" in second.stderr
    assert run(*command, "-o", tmp_path / "out").exit_code == 0
    assert files(tmp_path / "out") == deep.undisturbed("magnitude")
    assert not state.exists()


def test_a_disk_without_room_is_refused_before_anything_is_pruned(plan: Path, tmp_path: Path) -> None:
    """A file of holes that claims more bytes than any disk has free."""
    size = shutil.disk_usage(tmp_path).free + 2**30
    side = size // (2 * 64)
    entry = {"dtype": "BF16", "shape": [side, 64], "data_offsets": [0, side * 128]}
    header = json.dumps({"blocks.0.up.weight": entry}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + side * 128)
    layers = {"blocks.0.up": PlannedLayer(side * 64, 0.5)}
    SparsityPlan(layers, 0.5, "uniform").save(plan)
    done = run(tmp_path / "model.safetensors", "--plan", plan, "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "no room" in done.stderr
    assert not list(tmp_path.glob("*out*"))
