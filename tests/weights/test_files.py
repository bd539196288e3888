"""Files of weights: the alphas of the model they come from, and nothing in them is ever run."""

from __future__ import annotations

import inspect
import json
import math
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from farms_tb import analyze, analyze_checkpoint
from farms_tb.report import Report
from farms_tb.weights.layers import find_layers
from farms_tb.weights.names import no_rule
from tests.helpers import LIGHTNING_NOISE, Module, fit


def save_torch(model: nn.Module, folder: Path) -> Path:
    torch.save(weights(model), folder / "weights.pt")
    return folder / "weights.pt"


def save_safetensors(model: nn.Module, folder: Path) -> Path:
    save_file(weights(model), folder / "weights.safetensors")
    return folder / "weights.safetensors"


def save_sharded(model: nn.Module, folder: Path) -> Path:
    """Write three parts and an index, as Hugging Face does; tensors of one layer end up in different parts."""
    parts: dict[str, dict[str, Any]] = {}
    for number, (name, tensor) in enumerate(weights(model).items()):
        parts.setdefault(f"model-0000{number % 3}-of-00003.safetensors", {})[name] = tensor
    for file, tensors in parts.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    # neuraloperator's models add their arguments, functions among them.
    return {name: value for name, value in model.state_dict().items() if name != "_metadata"}


SAVERS = [save_torch, save_safetensors, save_sharded]


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(num_classes=10)


def vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=11, num_heads=2, hidden_dim=24, mlp_dim=32, num_classes=10
    )


def fno() -> nn.Module:
    from neuralop.models import FNO

    return FNO(n_modes=(8, 8), hidden_channels=12, in_channels=1, out_channels=1, n_layers=2)


def mixed() -> nn.Module:
    return nn.ModuleDict(
        {
            "linear": nn.Linear(40, 120),
            "thin": nn.Linear(9, 1),
            "conv1d": nn.Conv1d(8, 12, 3),
            "conv3d": nn.Conv3d(8, 6, 2),
            "transposed": nn.ConvTranspose2d(8, 16, 3),
            "attention": nn.MultiheadAttention(16, 2),
            "apart": nn.MultiheadAttention(16, 2, kdim=12, vdim=8),
            "bf16": nn.Linear(16, 24).to(torch.bfloat16),
            "complex": nn.Linear(16, 24, dtype=torch.complex64),
            "norm": nn.BatchNorm2d(16),
        }
    )


def assert_same_layers(actual: Report, expected: Report) -> None:
    """Compare every record bitwise, but for layers of types without a rule: a file does not have types."""
    known = {name: record for name, record in expected.layers.items() if not record.status.startswith("no rule")}
    found = {name: record for name, record in actual.layers.items() if name in known}
    if torch.__version__ < "2.7":  # whose products depend, by rounding, on where a weight lies in the memory
        alphas = {name: record.alpha or math.nan for name, record in known.items()}
        of_file = {name: record.alpha or math.nan for name, record in found.items()}
        assert of_file == pytest.approx(alphas, rel=5e-5, nan_ok=True)
        shapes = {name: (record.shape, record.status) for name, record in known.items()}
        assert {name: (record.shape, record.status) for name, record in found.items()} == shapes
        return
    assert found == known


@pytest.mark.parametrize("save", SAVERS)
@pytest.mark.parametrize("make", [resnet18, vit, fno, mixed])
def test_the_alphas_of_the_model(make: Any, save: Any, tmp_path: Path) -> None:
    model = make()
    expected = analyze(model)
    found = analyze_checkpoint(save(model, tmp_path))
    assert sum(record.alpha is not None for record in expected.layers.values()) >= 6
    assert_same_layers(found, expected)
    assert found.options == expected.options


def test_names_and_order_of_a_resnet(tmp_path: Path) -> None:
    model = resnet18()
    names = [layer.name for layer in find_layers(model)]
    assert list(analyze_checkpoint(save_torch(model, tmp_path)).layers) == names
    assert "layer2.0.downsample.0" in names
    assert "fc" in names


def test_safetensors_are_sorted_by_name_and_number(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(12)))
    save_safetensors(model, tmp_path)
    for path in (tmp_path, save_sharded(model, tmp_path)):
        assert list(analyze_checkpoint(path).layers) == [str(number) for number in range(12)]


def test_safetensors_are_sorted_by_numbers_within_names(tmp_path: Path) -> None:
    names = ["conv", *(f"encoder_layer_{number}" for number in range(12)), "head1", "head10"]
    save_safetensors(nn.ModuleDict({name: nn.Linear(8, 8) for name in reversed(names)}), tmp_path)
    assert list(analyze_checkpoint(tmp_path).layers) == names


@pytest.mark.parametrize("name", ["0a1b2c3d4e5f", "model.bin"])
def test_safetensors_without_their_ending(name: str, tmp_path: Path) -> None:
    """As in the folder of blobs of a Hugging Face cache."""
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(12)))
    file = save_safetensors(model, tmp_path)
    expected = analyze_checkpoint(file)
    path = file.rename(tmp_path / name)
    found = analyze_checkpoint(path)
    assert found == expected
    assert list(found.layers) == list(expected.layers)
    with pytest.raises(ValueError, match=f"{name} takes no key"):
        analyze_checkpoint(path, key="ema")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=rf"cannot read .*{name}: no safetensors file, or one that is cut short"):
        analyze_checkpoint(path)


def test_options_arrive_and_agree_with_analyze(tmp_path: Path) -> None:
    model = mixed()
    options: dict[str, Any] = {"esd": "full", "fit": "goodness-of-fit", "min_eigenvalues": 9}
    assert_same_layers(analyze_checkpoint(save_torch(model, tmp_path), **options), analyze(model, **options))
    with pytest.raises(ValueError, match="esd must be one of 'farms', 'full', got 'half'"):
        analyze_checkpoint(tmp_path / "weights.pt", esd="half")  # type: ignore[arg-type]
    own, other = (inspect.signature(function).parameters for function in (analyze_checkpoint, analyze))
    only_in_files = ("path", "key", "base")
    assert [own[name] for name in own if name not in only_in_files] == list(other.values())[1:]


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files(key: str | None, legacy: bool, tmp_path: Path) -> None:
    model = resnet18()
    held = model.state_dict() if key is None else {"epoch": 3, key: model.state_dict(), "optimizer": {"lr": 0.1}}
    torch.save(held, tmp_path / "weights.pt", _use_new_zipfile_serialization=not legacy)
    assert_same_layers(analyze_checkpoint(str(tmp_path / "weights.pt")), analyze(model))


@pytest.mark.filterwarnings(*(mark.args[0] for mark in LIGHTNING_NOISE))
def test_lightning_checkpoints(tmp_path: Path) -> None:
    module = Module()
    fit(module).save_checkpoint(tmp_path / "last.ckpt")
    assert_same_layers(analyze_checkpoint(tmp_path / "last.ckpt"), analyze(module))


def test_directory_with_one_file(tmp_path: Path) -> None:
    model = mixed()
    save_safetensors(model, tmp_path)
    assert_same_layers(analyze_checkpoint(tmp_path), analyze(model))
    save_sharded(model, tmp_path)  # an index goes before single files
    assert_same_layers(analyze_checkpoint(tmp_path), analyze(model))
    assert_same_layers(analyze_checkpoint(tmp_path / "model.safetensors.index.json"), analyze(model))


def test_compiled_models_and_bare_layers(tmp_path: Path) -> None:
    torch.save({f"_orig_mod.{name}": w for name, w in mixed().state_dict().items()}, tmp_path / "compiled.pt")
    assert "attention.q" in analyze_checkpoint(tmp_path / "compiled.pt").layers
    for bare in (nn.Linear(20, 30), nn.MultiheadAttention(8, 2)):
        assert_same_layers(analyze_checkpoint(save_torch(bare, tmp_path)), analyze(bare))


def test_tied_weights_are_measured_once(tmp_path: Path) -> None:
    model = nn.ModuleDict({"wte": nn.Embedding(30, 12), "body": nn.Linear(12, 12), "head": nn.Linear(12, 30)})
    model["head"].weight = model["wte"].weight
    model["again"] = model["body"]
    layers = analyze_checkpoint(save_torch(model, tmp_path)).layers
    assert layers["wte"].status == "embedding: not analysed without embeddings=True"
    assert layers["head"] == analyze(model).layers["head"]
    assert layers["head"].alpha is not None
    assert layers["again"].status == "tied to 'body'"


def test_what_is_listed_with_a_reason(tmp_path: Path) -> None:
    kept = {
        "tok_emb.weight": torch.randn(20, 8),
        "embeds.0.weight": torch.randn(20, 8),
        "h.wpe.weight": torch.randn(20, 8),
        "patch_embed.proj.weight": torch.randn(8, 3, 4, 4),
        "lstm.weight_ih_l0": torch.randn(20, 8),
        "fc.weight_g": torch.randn(20, 1),
        "fc.weight_v": torch.randn(20, 8),
        "normed.parametrizations.weight.original1": torch.randn(20, 8),
        "tucker.weight.core": torch.randn(8, 8, 4, 4, dtype=torch.complex64),
        "tucker.weight.factors.factor_0": torch.randn(8, 8, dtype=torch.complex64),
        "int8.weight": torch.zeros(20, 8, dtype=torch.int8),
        "sparse.weight": torch.eye(8).to_sparse(),
        "meta.weight": torch.zeros(8, 8, device="meta"),
        "six.weight": torch.randn(2, 2, 2, 2, 2, 2),
        "wide.weight": torch.randn(20, 1),
        "nan.weight": torch.full((8, 8), torch.nan),
        "empty.weight": torch.zeros(0, 8),
        "odd.in_proj_weight": torch.randn(20, 8),
        "good": torch.zeros(3, 3),
        "good.weight": torch.randn(20, 8),
        "bias": torch.randn(20),
        "token": torch.randn(1, 1, 20),
        "steps": torch.tensor(3),
        "good._extra_state": {"scale": 3},
        7: torch.randn(20, 8),
    }
    torch.save(kept, tmp_path / "weights.pt")
    layers = analyze_checkpoint(tmp_path / "weights.pt").layers
    embedding = "embedding: not analysed without embeddings=True"
    part = "part of a parametrized or factorised weight: build the model and use analyze(model)"
    assert {name: record.status for name, record in layers.items()} == {
        "tok_emb": embedding,
        "embeds.0": embedding,
        "h.wpe": embedding,
        "patch_embed.proj": "ok",
        "lstm.weight_ih_l0": no_rule("weight_ih_l0"),
        "fc.weight_v": no_rule("weight_v"),
        "normed.parametrizations.weight.original1": part,
        "tucker.weight.core": part,
        "tucker.weight.factors.factor_0": part,
        "int8": "quantised weights (torch.int8): dequantise the model first",
        "sparse": "a weight of layout torch.sparse_coo: make it dense first, weight.to_dense()",
        "meta": "on the meta device: no values",
        "six": "a weight of shape (2, 2, 2, 2, 2, 2): expected 3 to 5 dimensions",
        "wide": "one row or one column: no spectrum",
        "nan": "weights contain NaN or infinity",
        "empty": "empty, a weight without entries: no spectrum",
        "odd": no_rule("in_proj_weight"),
        "good": no_rule("good"),
        "good.weight": "ok",
    }


def test_classic_fourier_weights_are_spectral(tmp_path: Path) -> None:
    torch.save({"conv0.weights1": torch.randn(12, 12, 5, 5, dtype=torch.complex64)}, tmp_path / "fno.pt")
    record = analyze_checkpoint(tmp_path / "fno.pt").layers["conv0.weights1"]
    assert (record.kind, record.shape, record.status) == ("spectral", (25, 12, 12), "ok")


class Touch:
    """What an attacker would put into a pickle."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("how", ["zip", "legacy", "pickle"])
def test_nothing_is_executed(how: str, protocol: int, tmp_path: Path) -> None:
    mark, path = tmp_path / "executed", tmp_path / "model.pt"
    held = {"fc.weight": torch.randn(20, 8), "payload": Touch(mark)} if how != "pickle" else Touch(mark)
    if how == "pickle":
        path.write_bytes(pickle.dumps(held, protocol=protocol))
    else:
        torch.save(held, path, pickle_protocol=protocol, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(ValueError, match=r"model.pt holds more than weights|cannot read .*model.pt") as caught:
        analyze_checkpoint(path)
    assert not mark.exists()
    if (how, protocol) == ("legacy", 0):
        return  # torch itself cannot tell that from a text
    for words in ("save the state dict", "safetensors", "if you trust the file", "analyze(model)"):
        assert words in str(caught.value)
    if protocol == 2:
        assert "(posix.system)" in str(caught.value)


def test_a_whole_module_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(nn.Linear(8, 8), tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"model.pt holds more than weights \(torch.nn.modules.linear.Linear\)"):
        analyze_checkpoint(tmp_path / "model.pt")


def test_a_whole_module_in_a_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "model": nn.Linear(8, 8), "ema": None}, tmp_path / "yolo.pt")
    with pytest.raises(ValueError, match=r"yolo.pt .*'model'.* torch.nn.modules.linear.Linear.*state_dict"):
        analyze_checkpoint(tmp_path / "yolo.pt")


def test_a_pipe_is_refused_by_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe is a pipe or a device.* save"):
        analyze_checkpoint(tmp_path / "pipe")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(8, 8)).save(str(tmp_path / "model.pt"))
    with pytest.raises(ValueError, match=r"model.pt holds more than weights, .* save the state dict"):
        analyze_checkpoint(tmp_path / "model.pt")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*weights.pt"):
        analyze_checkpoint(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"is a directory without a .safetensors file or model.safetensors.index"):
        analyze_checkpoint(tmp_path)
    for name in ("a", "b"):
        save_file({"fc.weight": torch.randn(9, 9)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"several files of weights, .*: a.safetensors, b.safetensors"):
        analyze_checkpoint(tmp_path)


@pytest.mark.parametrize("save", [save_torch, save_safetensors, save_sharded])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.999])
def test_files_cut_short(save: Any, share: float, tmp_path: Path) -> None:
    path = save(resnet18().layer1, tmp_path)
    file = path if path.is_file() else path / "model-00001-of-00003.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=rf"cannot read .*{file.name}: .* cut short or damaged \(.+\)"):
        analyze_checkpoint(path)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.999])
def test_old_torch_files_cut_short(share: float, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(resnet18().layer1.state_dict(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(
        ValueError, match=r"cannot read .*weights.pt: .* cut short or damaged \(.+\)|weights.pt holds"
    ):
        analyze_checkpoint(path)


def write_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros((9, 9)))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("hello world\n"),
        lambda path: path.write_text('{"fc.weight": [[1, 2], [3, 4]]}'),
        lambda path: path.write_bytes(np.random.default_rng(0).bytes(3000)),
        write_npz,
    ],
    ids=["text", "json", "random", "npz"],
)
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_files_that_are_no_checkpoint(write: Any, name: str, tmp_path: Path) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"cannot read .*{name}: no (checkpoint|safetensors file), or one that"):
        analyze_checkpoint(tmp_path / name)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (torch.zeros(9, 9), "expected tensors by name, alone or as 'state_dict', got Tensor"),
        ([1, 2], "got list"),
        ({}, "got a dict without names"),
        ({"epoch": 3, "loss": 0.5}, "got a dict with 'epoch', 'loss'"),
        ({"state_dict": {"epoch": 3}}, "got a dict with 'epoch'"),
        ({"fc.weight": np.zeros((9, 9))}, "got a dict with 'fc.weight'. Save its numpy arrays as tensors"),
    ],
)
def test_files_without_a_state_dict(held: Any, words: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=f"weights.pt holds no state dict: .*{words}"):
        analyze_checkpoint(tmp_path / "weights.pt")


LAYERS = {"a.weight": torch.randn(20, 30), "b.weight": torch.randn(20, 30)}
OTHERS = {"c.weight": torch.randn(20, 30)}


@pytest.mark.parametrize(
    "held",
    [
        {"net": LAYERS, "best_loss": torch.tensor(0.3)},
        {"best_loss": torch.tensor(0.3), "classes": torch.ones(9), "net": LAYERS, "rng": {"cpu": torch.ones(9)}},
        {"state_dict": {"net": LAYERS, "best_loss": torch.tensor(0.3)}, "ema": OTHERS},
        {**LAYERS, "scores": {"loss": torch.tensor(0.3)}},
        {**LAYERS, "a._extra_state": {"amax": torch.ones(9, 9)}},
    ],
)
def test_a_stray_tensor_does_not_hide_the_state_dict(held: Any, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "weights.pt")
    assert list(analyze_checkpoint(tmp_path / "weights.pt").layers) == ["a", "b"]


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"net": LAYERS, "proj.weight": torch.randn(20, 30)}, "'', 'net'"),
        ({"net": LAYERS, "ema": OTHERS, "best_loss": torch.tensor(0.3)}, "'net', 'ema'"),
        ({"model": {"net": LAYERS, "proj.weight": torch.randn(20, 30)}}, "'model', 'model.net'"),
    ],
)
def test_of_several_state_dicts_one_must_be_named(held: Any, words: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=rf"weights.pt holds several .*--key.*: {words}$"):
        analyze_checkpoint(tmp_path / "weights.pt")
    assert list(analyze_checkpoint(tmp_path / "weights.pt", key=words.split("'")[-2]).layers)


def test_of_a_tensor_in_two_parts_the_one_of_the_index_is_measured(tmp_path: Path) -> None:
    save_file({"a.weight": LAYERS["a.weight"], "b.weight": OTHERS["c.weight"]}, tmp_path / "1.safetensors")
    save_file({"b.weight": LAYERS["b.weight"]}, tmp_path / "2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "1.safetensors", "b.weight": "2.safetensors"}}))
    torch.save(LAYERS, tmp_path / "weights.pt")
    assert_same_layers(analyze_checkpoint(index), analyze_checkpoint(tmp_path / "weights.pt"))


@pytest.mark.parametrize("save", SAVERS)
def test_files_without_a_matrix(save: Any, tmp_path: Path) -> None:
    path = save(
        nn.ModuleDict({"bn": nn.BatchNorm2d(3), "emb": nn.Embedding(5, 5), "fc": nn.Linear(3, 1)}), tmp_path
    )
    with pytest.raises(
        ValueError, match=r"has no weight that can be analysed\n  emb: embedding.*\n  fc: one row or one column"
    ):
        analyze_checkpoint(path)


@pytest.mark.parametrize(
    ("index", "error", "words"),
    [
        ("hello", ValueError, "expected JSON whose 'weight_map' names a file next to it"),
        ('["a"]', ValueError, "expected JSON whose 'weight_map'"),
        ("{}", ValueError, "expected JSON whose 'weight_map'"),
        ('{"weight_map": ["a"]}', ValueError, "expected JSON whose 'weight_map'"),
        ('{"weight_map": {"fc.weight": 3}}', ValueError, "expected JSON whose 'weight_map'"),
        ('{"weight_map": {"fc.weight": "../a.safetensors"}}', ValueError, "expected JSON whose 'weight_map'"),
        ('{"weight_map": {"fc.weight": "/a.safetensors"}}', ValueError, "expected JSON whose 'weight_map'"),
        ('{"weight_map": {"fc.weight": "b.safetensors"}}', FileNotFoundError, "not next to it: b.safetensors"),
        (
            '{"weight_map": {"gone.weight": "a.safetensors"}}',
            ValueError,
            "index.json names tensors that its files do not hold: gone.weight",
        ),
    ],
)
def test_bad_indices(index: str, error: type[Exception], words: str, tmp_path: Path) -> None:
    save_file({"fc.weight": torch.randn(9, 9)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(error, match=words):
        analyze_checkpoint(tmp_path)


@pytest.mark.parametrize("save", [save_safetensors, save_sharded, save_torch])
@pytest.mark.parametrize("legacy", [False, True])
def test_one_layer_at_a_time(save: Any, legacy: bool, tmp_path: Path) -> None:
    """Sixteen layers of 16 MiB: reading the file takes far less memory than it holds."""
    if legacy and save is not save_torch:
        pytest.skip("one format")
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16)))
    path = save(model, tmp_path)
    if legacy:
        torch.save(weights(model), path, _use_new_zipfile_serialization=False)
    code = f"""
import resource, torch
from farms_tb.weights.files import stored_tensors
from farms_tb.weights.stored_layers import stored_layers
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.set_num_threads(1)
torch.ones(2048, 2048).sum()
before = peak()
names = [name for name, stack in stored_layers(stored_tensors({str(path)!r})) if stack.matrices.sum() != 0]
assert len(names) == 16
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert float(done.stdout) < 100


def test_peak_memory_of_a_sharded_directory(tmp_path: Path) -> None:
    """Sixteen layers of 32 MiB in four files: the peak counts what is mapped of the files too."""
    one = torch.randn(4096, 4096).to(torch.bfloat16)
    weight_map = {}
    for shard in range(4):
        names = [f"{shard}.{number}.weight" for number in range(4)]
        save_file({name: one.roll(shard) for name in names}, tmp_path / f"{shard}.safetensors")
        weight_map.update(dict.fromkeys(names, f"{shard}.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    code = f"""
import resource, torch
from safetensors import safe_open
from farms_tb import analyze, analyze_checkpoint
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.set_num_threads(1)
small = torch.nn.Linear(4096, 4096, dtype=torch.bfloat16)
analyze(small, windows_per_dim=1)
before = peak()
assert len(analyze_checkpoint({str(tmp_path)!r}, windows_per_dim=1).alphas) == 16
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert float(done.stdout) < 150  # of 512


def test_torch_files_in_parts(tmp_path: Path) -> None:
    """As transformers saved models before it used safetensors: `pytorch_model.bin`, one or several."""
    model = resnet18()
    save_torch(model, tmp_path).rename(tmp_path / "pytorch_model.bin")
    assert_same_layers(analyze_checkpoint(tmp_path), analyze(model))
    state = list(weights(model).items())
    for number, part in enumerate((state[::2], state[1::2])):
        torch.save(dict(part), tmp_path / f"part{number}.bin")
    weight_map = {name: f"part{index % 2}.bin" for index, (name, _) in enumerate(state)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_layers(analyze_checkpoint(tmp_path), analyze(model))


def test_null_and_histogram(tmp_path: Path) -> None:
    """The permutation null of a layer is made of its own entries, the same in a model and in its file."""
    model = mixed()
    flags = {"null": True, "histogram": True}
    found = analyze_checkpoint(save_torch(model, tmp_path), **flags)
    assert_same_layers(found, analyze(model, **flags))
    assert found.layers["linear"].null_std
    assert found.layers["linear"].histogram
    for flag in flags:
        with pytest.raises(TypeError, match=f"{flag} must be True or False, got 1"):
            analyze_checkpoint(tmp_path / "weights.pt", **{flag: 1})


QUANTISED: dict[str, dict[str, Any]] = {
    "bitsandbytes 8 bit": {"weight": torch.ones(16, 24, dtype=torch.int8), "SCB": torch.ones(16)},
    "bitsandbytes 4 bit": {
        "weight": torch.ones(192, 1, dtype=torch.uint8),
        "weight.absmax": torch.ones(6),
        "weight.quant_state.bitsandbytes__nf4": torch.ones(80, dtype=torch.uint8),
    },
    "GPTQ and AWQ": {
        "qweight": torch.ones(2, 24, dtype=torch.int32),
        "qzeros": torch.ones(2, 3, dtype=torch.int32),
        "scales": torch.ones(2, 24, dtype=torch.float16),
        "g_idx": torch.ones(16, dtype=torch.int32),
    },
    "compressed-tensors": {
        "weight_packed": torch.ones(16, 3, dtype=torch.int32),
        "weight_scale": torch.ones(16, 1, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([16, 24]),
    },
    "MXFP4": {
        "gate_up_proj_blocks": torch.ones(4, 16, 3, 8, dtype=torch.uint8),
        "gate_up_proj_scales": torch.ones(4, 16, 3, dtype=torch.uint8),
        "gate_up_proj_bias": torch.ones(4, 16),
    },
    "integers of experts": {
        "gate_up_proj": torch.ones(4, 16, 24, dtype=torch.int8),
        "gate_up_proj_scale": torch.ones(4, 16, 1),
    },
    "8-bit floats in blocks of unclear size": {
        "weight": torch.ones(16, 24).to(torch.float8_e4m3fn),
        "weight_scale_inv": torch.ones(2, 5),
    },
}


@pytest.mark.parametrize("layout", QUANTISED)
def test_quantised_weights(layout: str, tmp_path: Path) -> None:
    quantised = {f"body.{name}": tensor for name, tensor in QUANTISED[layout].items()}
    save_file({**quantised, "head.weight": torch.randn(16, 24)}, tmp_path / "a.safetensors")
    layers = analyze_checkpoint(tmp_path / "a.safetensors").layers
    (name,) = layers.keys() - {"head"}
    assert name.startswith("body")
    assert re.fullmatch(
        r"quantised weights \(torch.\w+(, a scale for each block)?\): dequantise the model first",
        layers[name].status,
    )
    assert layers["head"].alpha is not None


def test_8_bit_floats_of_one_scale_are_measured(tmp_path: Path) -> None:
    eighths = torch.randn(64, 48).to(torch.float8_e4m3fn)
    save_file({"a.weight": eighths, "a.weight_scale": torch.tensor([0.1])}, tmp_path / "a.safetensors")
    layers = analyze_checkpoint(tmp_path).layers
    linear = nn.Linear(48, 64)
    linear.weight.data = eighths.float()
    assert list(layers) == ["a"]
    assert layers["a"] == next(iter(analyze(linear).layers.values()))
