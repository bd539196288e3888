"""Damaged, hostile and foreign files: an error that names the file, or the layer listed; nothing is executed."""

from __future__ import annotations

import argparse
import enum
import functools
import json
import os
import pickle
import random
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from farms_tb import analyze, analyze_checkpoint
from farms_tb.weights.files import stored_tensors
from farms_tb.weights.stored_layers import stored_layers


def safetensors(header: bytes | dict[str, Any], data: bytes = b"") -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


def entry(shape: list[Any], offsets: list[Any], dtype: Any = "F32") -> bytes:
    return safetensors({"a.weight": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, bytes(16))


DAMAGED = {
    "deep.safetensors": safetensors(b"[" * 10**6),
    "deeper.safetensors": safetensors(b'{"a":' * 10**5),
    "long.safetensors": struct.pack("<Q", 2**63) + b"{}",
    "negative.safetensors": entry([-1, -4], [0, 16]),
    "boolean.safetensors": entry([True, 4], [0, 16]),
    "larger.safetensors": entry([2**40, 2**40], [0, 16]),
    "behind.safetensors": entry([2, 2], [0, 10**30]),
    "overlapping.safetensors": safetensors(
        {name: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]} for name in ("a.weight", "b.weight")},
        bytes(16),
    ),
    "fractions.safetensors": entry([2, 2], [0.0, 16.0]),
    "type.safetensors": entry([2, 2], [0, 16], dtype=[1]),
    "text.safetensors": safetensors({"a.weight": "x"}),
    "digits.safetensors": safetensors(b'{"a":' + b"9" * 10_000 + b"}"),
    "empty.pt": b"",
    "memo.pt": pickle.dumps(0x1950A86A20F9469CFC6C) + b"\x80\x02K\x01r\xff\xff\xff\xff.",
    "model.h5": b"\x89HDF\r\n\x1a\n" + bytes(100),
}


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])

    def read() -> None:
        with pytest.raises(ValueError, match=rf"cannot read .*{name}"):
            analyze_checkpoint(path)

    assert seconds(read) < 1


def test_errors_hold_no_control_character_of_a_file(tmp_path: Path) -> None:
    """A terminal would take it for a command; files, tensors and keys that somebody else named are quoted."""
    evil = "b\x1b[31m"
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {evil: f"{evil}.safetensors"}}))
    odd = safetensors({evil: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 4]}}, bytes(4))
    messages = []
    for make in (
        lambda: None,
        lambda: (tmp_path / f"{evil}.safetensors").write_bytes(b"cut"),
        lambda: (tmp_path / f"{evil}.safetensors").write_bytes(odd),
        lambda: save_file({"other": torch.ones(4, 4)}, tmp_path / f"{evil}.safetensors"),
    ):
        make()
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            analyze_checkpoint(index)
        messages.append(str(caught.value))
    assert all(message.isprintable() for message in messages)
    assert all(r"b\x1b[31m" in message for message in messages)


@pytest.mark.parametrize(
    ("shape", "offsets"), [([1] * 100_000 + [2, 2], [0, 16]), ([0, 2**62, 2**62], [0, 0])], ids=["many", "large"]
)
def test_impossible_shapes_are_listed(shape: list[int], offsets: list[int], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        safetensors({"a.weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}, bytes(offsets[1]))
    )
    assert seconds(lambda: list(stored_layers(stored_tensors(path)))) < 1
    with pytest.raises(ValueError, match="has no weight that can be analysed"):
        analyze_checkpoint(path)


def zip_of_directories(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl/", b"")
        archive.writestr("a/data/", b"")


def zip_of_many(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(5000):
            archive.writestr(f"{number}/data.pkl", b"")


def zip_that_swells(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(10**7))


@pytest.mark.parametrize("write", [zip_of_directories, zip_of_many, zip_that_swells])
def test_odd_zip_files(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "a.pt")

    def read() -> None:
        with pytest.raises(ValueError, match=r"cannot read .*a\.pt"):
            analyze_checkpoint(tmp_path / "a.pt")

    assert seconds(read) < 1


@pytest.mark.parametrize("name", ["a.pt", "old.pt", "a.safetensors"])
def test_flipped_bytes(name: str, tmp_path: Path) -> None:
    """Every mutated file is read, or refused by a documented error."""
    path = tmp_path / name
    held = {"a.weight": torch.randn(6, 5), "l.weight_ih_l0": torch.randn(8, 3), "b": torch.randn(3, 3, 3)}
    if name == "a.safetensors":
        save_file(held, path)
    else:
        torch.save(held, path, _use_new_zipfile_serialization=name == "a.pt")
    original = path.read_bytes()
    refused: list[str] = []
    for seed in range(300):
        draw = random.Random(seed)
        content = bytearray(original)
        for _ in range(draw.choice([1, 2, 5])):
            content[draw.randrange(min(len(content), 2000))] = draw.randrange(256)
        path.write_bytes(content[: draw.randrange(len(content))] if seed % 10 == 0 else content)
        try:
            list(stored_layers(stored_tensors(path)))
        except ValueError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 300
    assert [words for words in refused if name not in words] == []


@pytest.mark.parametrize("name", ["a.pt", "old.pt", "a.safetensors"])
@pytest.mark.parametrize("change", ["cut", "rewritten", "of another model", "deleted"])
def test_files_that_change_while_they_are_read(name: str, change: str, tmp_path: Path) -> None:
    def save(size: int) -> None:
        held = {f"{size}.{number}.weight": torch.randn(size, size) for number in range(4)}
        if name == "a.safetensors":
            save_file(held, tmp_path / "new")
        else:
            torch.save(held, tmp_path / "new", _use_new_zipfile_serialization=name == "a.pt")
        path.write_bytes((tmp_path / "new").read_bytes())

    path = tmp_path / name
    save(40)
    layers = stored_layers(stored_tensors(path))
    next(layers)
    if change == "cut":
        os.truncate(path, 100)
    elif change == "rewritten":
        path.write_bytes(bytes(path.stat().st_size + 1))
    elif change == "of another model":
        save(50)
    else:
        path.unlink()
    with pytest.raises(FileNotFoundError if change == "deleted" else ValueError, match=name):
        list(layers)


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_time_grows_with_the_number_of_tensors_alone(save: Callable[..., None], tmp_path: Path) -> None:
    def reading(number: int) -> float:
        path = tmp_path / ("a.safetensors" if save is save_file else "a.pt")
        save({f"layer.{i}.weight": torch.randn(6, 6) for i in range(number)}, path)
        return min(seconds(lambda: list(stored_layers(stored_tensors(path)))) for _ in range(3))

    assert reading(8000) < 12 * reading(2000)  # 16 if each tensor parsed the header


class Colour(enum.Enum):
    RED = 1


class Settings:
    """An object of a user's class, with state."""

    def __init__(self) -> None:
        self.lr = 0.1


def hyperparameters() -> dict[str, Any]:
    from omegaconf import OmegaConf

    return {
        "path": Path("/data"),
        "namespace": argparse.Namespace(lr=0.1),
        "config": OmegaConf.create({"model": {"widths": [1, 2]}}),
        "settings": Settings(),
        "colour": Colour.RED,
        "partial": functools.partial(int, 3),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "set": {1, 2},
    }


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
def test_foreign_objects_are_skipped(protocol: int, legacy: bool, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20))
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(2, 20)).sum().backward()
    optimizer.step()
    held = {
        "epoch": 3,
        "hyper_parameters": hyperparameters(),
        "optimizer_states": [optimizer.state_dict()],
        "state_dict": net.state_dict(),
    }
    path = tmp_path / "last.ckpt"
    torch.save(held, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    layers = analyze(net).layers  # imports modules of its own
    modules = set(sys.modules)
    assert analyze_checkpoint(path).layers == layers
    assert set(sys.modules) == modules


@pytest.mark.parametrize("key", ["model_state", "module", "params", "ema", "net", "weights_optimal"])
def test_weights_under_another_key(key: str, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(20, 30))
    torch.save({"epoch": 3, key: net.state_dict(), "optimizer": {"state": {}}}, tmp_path / "weights.pt")
    assert analyze_checkpoint(tmp_path / "weights.pt").layers == analyze(net).layers


def test_several_dicts_of_weights_ask_for_a_key(tmp_path: Path) -> None:
    path = tmp_path / "gan.pt"
    torch.save(
        {"generator": {"ema": {"a.weight": torch.randn(9, 9)}}, "critic": {"b.weight": torch.randn(9, 9)}}, path
    )
    with pytest.raises(ValueError, match=r"gan.pt .*key=: 'generator.ema', 'critic'"):
        stored_tensors(path)
    assert [tensor.key for tensor in stored_tensors(path, key="critic")] == ["b.weight"]
    assert [tensor.key for tensor in stored_tensors(path, key="generator.ema")] == ["a.weight"]
    with pytest.raises(ValueError, match=r"no state dict under key='ema'.*'generator.ema', 'critic'"):
        stored_tensors(path, key="ema")


def test_weights_that_are_saved_twice_are_found_by_either_key(tmp_path: Path) -> None:
    """As an average of the weights is that has not begun."""
    path, weights = tmp_path / "gan.pt", {"a.weight": torch.randn(9, 9)}
    torch.save({"net": weights, "ema.0": {"module": weights}, "critic": {"b.weight": torch.randn(9, 9)}}, path)
    for key in ("net", "ema.0.module"):
        assert [tensor.key for tensor in stored_tensors(path, key=key)] == ["a.weight"]
    for key in ("", "ema", "ema.0", "ema.0.module.a", "optimizer"):
        with pytest.raises(ValueError, match=r"no state dict under key=.*'net', 'critic'"):
            stored_tensors(path, key=key)


def test_values_are_those_that_torch_reads(tmp_path: Path) -> None:
    """Views, strides and types; a storage that several tensors share."""
    storage = torch.randn(100)
    held: dict[str, Tensor] = {
        "view.weight": storage[3:99].view(12, 8),
        "shared.weight": storage[:96].view(8, 12),
        "transposed.weight": torch.randn(20, 30).T,
        "parameter.weight": nn.Parameter(torch.randn(9, 7)),
        "half.weight": torch.randn(9, 7).to(torch.bfloat16),
        "eighth.weight": torch.randn(9, 7).to(torch.float8_e5m2),
        "double.weight": torch.randn(9, 7, dtype=torch.float64),
        "complex.weight": torch.randn(9, 7, dtype=torch.complex64),
    }
    for legacy in (False, True):
        torch.save(held, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
        for stored in stored_tensors(tmp_path / "a.pt"):
            assert torch.equal(stored.read().to(torch.complex128), held[stored.key].to(torch.complex128))


def test_formats_that_are_not_read_name_the_way_out(tmp_path: Path) -> None:
    for address in ("https://example.org/model.safetensors", "s3://bucket/model.pt"):
        with pytest.raises(ValueError, match="URL: download"):
            analyze_checkpoint(address)
    (tmp_path / "__0_0.distcp").touch()
    with pytest.raises(ValueError, match="dcp_to_torch"):
        analyze_checkpoint(tmp_path)
    pipeline = tmp_path / "pipeline"
    (pipeline / "unet").mkdir(parents=True)
    (pipeline / "model_index.json").touch()
    save_file({"a.weight": torch.randn(9, 9)}, pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"diffusers .*unet"):
        analyze_checkpoint(pipeline)
    assert list(analyze_checkpoint(pipeline / "unet").layers) == ["a"]


OTHER_FORMATS = {
    "HDF5": b"\x89HDF\r\n\x1a\n",
    "numpy": b"\x93NUMPY\x01\0",
    "ONNX": b"\x08\x08\x12\x07pytorch",
    "GGUF": b"GGUF\x03\0\0\0",
}


@pytest.mark.parametrize("name", OTHER_FORMATS)
def test_other_formats_are_known_by_their_first_bytes(name: str, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(OTHER_FORMATS[name] + bytes(100))
    with pytest.raises((ValueError, ImportError), match=rf"file\.bin.* an? {name} "):
        analyze_checkpoint(tmp_path / "file.bin")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.safetensors"])
def test_adapters(name: str, tmp_path: Path) -> None:
    held = {"base.q.lora_A.weight": torch.randn(4, 32), "base.q.lora_B.weight": torch.randn(32, 4)}
    if name.endswith(".bin"):
        torch.save(held, tmp_path / name)
    else:
        save_file(held, tmp_path / name)
    assert list(analyze_checkpoint(tmp_path).layers) == ["base.q.lora_A", "base.q.lora_B"]


def split_gguf(folder: Path) -> list[Path]:
    """Write three layers to a file each, as llama.cpp splits large models."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama", split_max_tensors=1)
    for number in range(3):
        writer.add_tensor(f"blk.{number}.attn_q.weight", torch.randn(64, 32).numpy())
    for write in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, write)()
    return sorted(folder.glob("*.gguf"))


def test_all_files_of_a_split_gguf_are_read(tmp_path: Path) -> None:
    parts = split_gguf(tmp_path)
    for path in (tmp_path, *parts):
        assert list(analyze_checkpoint(path).layers) == [f"blk.{number}.attn_q" for number in range(3)]
    parts[1].unlink()
    for path in (tmp_path, parts[0]):
        with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.gguf"):
            analyze_checkpoint(path)


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    weight = torch.randn(64, 32)
    try:
        import gguf
    except ImportError:
        path.write_bytes(b"GGUF\x03\0\0\0" + bytes(100))
        with pytest.raises(ImportError, match=r"model.gguf is a GGUF file.*farms-tb.gguf"):
            analyze_checkpoint(path)
        return
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.attn_q.weight", weight.numpy())
    writer.add_tensor("token_embd.weight", weight.half().numpy())
    codes = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("output.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up_exps.weight", torch.randn(4, 32, 16).numpy())
    writer.add_tensor("blk.0.map.weight", torch.zeros(64, 32, dtype=torch.int32).numpy())
    for write in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, write)()
    layers = analyze_checkpoint(path).layers
    linear = nn.Linear(32, 64)
    linear.weight.data = weight
    assert layers["blk.0.attn_q"] == analyze(nn.Sequential(linear)).layers["0"]
    assert abs(layers["output"].alpha - layers["blk.0.attn_q"].alpha) < 0.05  # type: ignore[operator]
    assert layers["token_embd"].status.startswith("embedding")
    assert layers["blk.0.ffn_up_exps"].shape == (4, 32, 16)
    assert "I32" in layers["blk.0.map"].status
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cannot read .*model.gguf"):
        analyze_checkpoint(path)


def test_analyze_takes_a_state_dict_and_names_the_function_for_files(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(20, 30), nn.LayerNorm(30))
    assert analyze(net.state_dict()).layers == analyze(net).layers
    for path in ("weights.pt", tmp_path / "weights.pt"):
        with pytest.raises(TypeError, match="analyze_checkpoint"):
            analyze(path)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no tensor by name"):
        analyze({})


def test_embeddings_of_a_file_are_measured_where_asked_for(tmp_path: Path) -> None:
    torch.save({"emb.weight": torch.randn(20, 8), "fc.weight": torch.randn(8, 8)}, tmp_path / "a.pt")
    names = {
        name: getattr(found, "matrices", torch.empty(0)).shape
        for name, found in stored_layers(stored_tensors(tmp_path / "a.pt"), embeddings=True)
    }
    assert names == {"emb": (1, 20, 8), "fc": (1, 8, 8)}
