"""One odd layer costs that layer, never the measurement: it is listed with the reason, the others are measured."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from farms_tb import TempBalance, analyze, analyze_checkpoint
from farms_tb.weights.layers import find_layers


class Quantised(Tensor):
    """Knows how to detach and, like those of torchao, how to dequantise."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: float) -> Quantised:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined,no-any-return]

    def __init__(self, codes: Tensor, scale: float) -> None:
        self.codes, self.scale = codes, scale

    def dequantize(self, *_: Any) -> Tensor:
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"attempting to run unimplemented operator {func}")


class Opaque(Quantised):
    def dequantize(self, *_: Any) -> Tensor:
        raise NotImplementedError("not yet")


class NoWeight(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight = None  # type: ignore[assignment]


class DeletedWeight(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        del self.weight


class Vector(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight = nn.Parameter(torch.randn(64))


class Cube(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight = nn.Parameter(torch.randn(4, 64, 64))


class Failing(nn.Linear):
    def __init__(self) -> None:
        nn.Module.__init__(self)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        raise RuntimeError("no kernel for this device")


def with_weight(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(64, 64)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def codes() -> Tensor:
    return torch.randint(-127, 127, (64, 64), dtype=torch.int8)


ODD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "tensor subclass": (lambda: with_weight(Opaque(codes(), 0.01)), "Opaque"),
    "sparse": (lambda: with_weight(torch.randn(64, 64).to_sparse()), "layout torch.sparse_coo"),
    "CSR": (lambda: with_weight(torch.randn(64, 64).to_sparse_csr()), "layout torch.sparse_csr"),
    "CSC": (lambda: with_weight(torch.randn(64, 64).to_sparse_csc()), "layout torch.sparse_csc"),
    "BSR": (lambda: with_weight(torch.randn(64, 64).to_sparse_bsr((8, 8))), "layout torch.sparse_bsr"),
    "BSC": (lambda: with_weight(torch.randn(64, 64).to_sparse_bsc((8, 8))), "layout torch.sparse_bsc"),
    "mkldnn": (lambda: with_weight(torch.randn(64, 64).to_mkldnn()), "layout torch._mkldnn"),
    "meta": (lambda: nn.Linear(64, 64, device="meta"), "on the meta device"),
    "integers": (lambda: with_weight(codes()), "torch.int8"),
    "no weight": (lambda: NoWeight(64, 64), "None"),
    "deleted weight": (lambda: DeletedWeight(64, 64), "None"),
    "vector": (lambda: Vector(64, 64), "shape (64,)"),
    "cube": (lambda: Cube(64, 64), "shape (4, 64, 64)"),
    "rule that fails": (Failing, "no kernel for this device"),
}


class CodesInBuffers(nn.Module):
    """A linear layer as GPTQ and AWQ pack it: 8 codes of 4 bits in an integer, and no parameter."""

    def __init__(self, **more: Tensor) -> None:
        super().__init__()
        integers = {"qweight": (8, 64), "qzeros": (2, 8), "g_idx": (64,)}
        for name, shape in integers.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("scales", torch.ones(2, 64))
        for name, buffer in more.items():
            self.register_buffer(name, buffer)


def packed(layer: nn.Module) -> nn.Module:
    pytest.importorskip("torch.ao.quantization")
    quantised: nn.Sequential = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {type(layer)})
    return quantised[0]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:.*quantized tensor creation")
@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 64), lambda: nn.GRUCell(64, 64)])
def test_what_torch_packed_is_listed(make: Callable[[], nn.Module]) -> None:
    layers = analyze(nn.Sequential(nn.Linear(64, 64), packed(make()))).layers
    assert list(layers) == ["0", "1"]
    assert "packed by torch.ao" in layers["1"].status


def test_codes_in_buffers_are_listed_as_in_a_file() -> None:
    net = nn.ModuleDict({"up": CodesInBuffers(), "act": nn.ReLU(), "head": nn.Linear(64, 64)})
    net["act"].register_buffer("position_index", torch.zeros(8, 8, dtype=torch.long))
    layers = analyze(net).layers
    assert list(layers) == ["up", "head"]
    assert "torch.int32" in layers["up"].status
    assert layers == analyze(net.state_dict()).layers
    with pytest.raises(ValueError, match="up: quantised weights"):
        analyze(nn.ModuleDict({"up": CodesInBuffers()}))


def test_several_codes_of_one_module_have_names_of_their_own() -> None:
    net = nn.ModuleDict({"up": CodesInBuffers(weight=codes()), "head": nn.Linear(64, 64)})
    assert set(analyze(net).layers) == {"up", "up.qweight", "head"}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_model_is_refused_with_the_way_out() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(20, 30), nn.ReLU()))
    with pytest.raises(ValueError, match=r"0: no rule .*\n.*state_dict"):
        analyze(scripted)
    assert analyze(scripted.state_dict()).layers["0"].alpha


@pytest.mark.filterwarnings("ignore:Sparse ... tensor support is in beta")
@pytest.mark.parametrize("kind", ODD)
def test_is_listed_and_the_others_are_measured(kind: str) -> None:
    make, words = ODD[kind]
    net = nn.Sequential(nn.Linear(64, 64), make(), nn.Linear(64, 64))
    layers = analyze(net).layers
    assert list(layers) == ["0", "1", "2"]
    assert words in layers["1"].status
    assert [layers[name].status for name in "02"] == ["ok", "ok"]


@pytest.mark.parametrize(
    "view",
    [lambda w: w.t().contiguous().t(), lambda w: torch.stack((w, w + 1), 2).reshape(64, 96)[:, ::2]],
    ids=["transposed", "every second column"],
)
@pytest.mark.parametrize("esd", ["farms", "full"])
def test_views_are_measured_as_what_they_show(esd: Any, view: Callable[[Tensor], Tensor]) -> None:
    weight = torch.randn(64, 48) * torch.arange(1, 49)
    seen, plain = (analyze(with_weight(matrix), esd=esd).layers["weight"] for matrix in (view(weight), weight))
    assert seen.alpha == pytest.approx(plain.alpha, rel=1e-4)


@pytest.mark.parametrize("kind", ["tensor subclass", "no weight", "cube"])
def test_training_goes_on(kind: str) -> None:
    net = nn.Sequential(nn.Linear(64, 64), ODD[kind][0](), nn.Linear(64, 64))
    trained = [*net[0].parameters(), *net[2].parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The odd layer keeps its rate, which a warning may say.
        balancer = TempBalance(net, torch.optim.SGD(trained, lr=0.1), assign_func="tb_linear_map")
        balancer.step()
    ratios = [balancer.ratios[name] for name in "02"]
    assert all(0.5 <= ratio <= 1.5 for ratio in ratios)
    assert balancer.ratios.get("1", 1) == 1


def test_quantised_weights_that_can_be_dequantised_are_measured() -> None:
    quantised = Quantised(codes(), 0.01)
    found = analyze(nn.Sequential(with_weight(quantised))).layers["0"]
    expected = analyze(nn.Sequential(with_weight(quantised.dequantize()))).layers["0"]
    assert found == expected


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (lambda: torch.randn(20, 30).to_sparse(), "layout torch.sparse_coo"),
        (lambda: torch.randn(20, 30).to_sparse_csr(), "layout torch.sparse_csr"),
        (lambda: torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)]), "nested tensor"),
        # Larger than their files by little: of 10^12 entries, a test that fails would not end.
        (lambda: torch.ones(1).expand(100, 100), "damaged: it claims 10000 entries"),
        (lambda: torch.randn(1, 100).expand(100, 100), "damaged: it claims 10000 entries"),
        (lambda: torch.randn(2000).as_strided((50, 50, 6, 6), (1, 1, 1, 1)), "damaged: it claims 90000 entries"),
        (lambda: torch.empty(20, 30, device="meta"), "on the meta device"),
        (lambda: torch.zeros(20, 30, dtype=torch.int8), "torch.int8"),
        (lambda: torch.quantize_per_tensor(torch.randn(20, 30), 0.1, 0, torch.qint8), "weights (torch.qint8)"),
        (lambda: torch.zeros(0, 30), "empty"),
        (lambda: torch.zeros(20, 0), "empty"),
    ],
    ids=[
        *("sparse", "CSR", "nested", "expanded", "expanded rows", "overlapping", "meta", "integers"),
        *("qint8", "no rows", "no columns"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR tensor support")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
def test_odd_tensors_of_a_file(weight: Callable[[], Tensor], words: str, legacy: bool, tmp_path: Path) -> None:
    held = {"a.weight": weight(), "b.weight": torch.randn(30, 20)}
    torch.save(held, tmp_path / "weights.pt", _use_new_zipfile_serialization=not legacy)
    layers = analyze_checkpoint(tmp_path / "weights.pt").layers
    assert words in layers["a"].status
    assert layers["b"].status == "ok"


@pytest.mark.filterwarnings("ignore:.*ProcessGroup", "ignore:DTensor random operators")
def test_sharded_tensors_of_a_file(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        shards = distribute_tensor(torch.randn(20, 30), mesh, [Shard(0)])
        torch.save({"a.weight": shards, "b.weight": torch.randn(20, 30)}, tmp_path / "weights.pt")
    finally:
        torch.distributed.destroy_process_group()
    layers = analyze_checkpoint(tmp_path / "weights.pt").layers
    assert "DTensor" in layers["a"].status
    assert layers["b"].status == "ok"


class Scaled(nn.Linear):
    """Block-scaled 8-bit floats, as transformers' FP8Linear holds them."""

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__(*reversed(weight.shape), bias=False)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)


@pytest.mark.parametrize("name", ["weight_scale_inv", "scale", "weight_scale"])
def test_scales_of_blocks_are_multiplied(name: str, tmp_path: Path) -> None:
    """The last blocks are narrower than 128; the same row in a model and a file."""
    torch.manual_seed(0)
    weight = torch.randn(256, 200).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0, 50.0], [0.02, 3.0]])
    real = nn.Linear(200, 256)
    rows, columns = (scale.repeat_interleave(128, 0), lambda wide: wide.repeat_interleave(128, 1)[:, :200])
    real.weight.data = weight.float() * columns(rows)
    expected = analyze(nn.Sequential(real)).layers["0"]
    assert analyze(nn.Sequential(Scaled(weight, scale))).layers["0"] == expected
    save_file({"0.weight": weight, f"0.{name}": scale}, tmp_path / "a.safetensors")
    assert analyze_checkpoint(tmp_path / "a.safetensors").layers == {"0": expected}


def test_the_layer_of_transformers_is_multiplied_with_its_scales() -> None:
    """Its own class, whose names and shapes `Scaled` imitates."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight, scale = torch.randn(256, 256).to(torch.float8_e4m3fn), torch.tensor([[1.0, 50.0], [0.02, 3.0]])
    layer = fp8.FP8Linear(256, 256, block_size=(128, 128))
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.weight_scale_inv.copy_(scale)
    real = nn.Linear(256, 256)
    real.weight.data = weight.float() * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert analyze(layer).layers == analyze(real).layers


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [
        ((256, 200), (64, 64)),  # The last blocks are narrower.
        ((96, 60), (32, 16)),
        ((64, 48), (1, 48)),  # One scale a row.
        ((64, 96), (1, 32)),
        ((100, 70), (64, 70)),
        ((3, 40, 24), (1, 16, 8)),  # Stacked experts.
    ],
)
def test_the_shape_of_the_scale_tells_the_size_of_the_blocks(
    shape: tuple[int, ...], blocks: tuple[int, ...], tmp_path: Path
) -> None:
    """The same alpha as of the weight that is scaled entry by entry, in a model and a file."""
    torch.manual_seed(0)
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    scale = torch.rand([-(-size // block) for size, block in zip(shape, blocks, strict=True)]) * 10
    values = weight.float()
    for index in itertools.product(*map(range, shape)):
        values[index] *= scale[tuple(i // block for i, block in zip(index, blocks, strict=True))]
    save_file({"experts.weight": weight, "experts.weight_scale_inv": scale}, tmp_path / "a.safetensors")
    save_file({"experts.weight": values}, tmp_path / "b.safetensors")
    expected = analyze_checkpoint(tmp_path / "b.safetensors").layers
    assert analyze_checkpoint(tmp_path / "a.safetensors").layers == expected
    if weight.ndim == 2:
        assert analyze(nn.ModuleDict({"experts": Scaled(weight, scale)})).layers == expected


@pytest.mark.parametrize("shape", [(3, 1), (2, 2, 2), (64,), (65, 1), (5, 5)])
def test_scales_of_unclear_blocks_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    weight = torch.randn(64, 64).to(torch.float8_e4m3fn)
    (found,) = find_layers(Scaled(weight, torch.ones(shape)))
    assert "a scale for each block" in found.problem
    save_file(
        {"a.weight": weight, "a.scale": torch.ones(shape), "b.weight": torch.randn(8, 8)},
        tmp_path / "a.safetensors",
    )
    assert analyze_checkpoint(tmp_path / "a.safetensors").layers["a"].status == found.problem


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
def test_integers_are_called_the_same_in_a_model_and_a_file(dtype: torch.dtype, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 64), with_weight(torch.ones(64, 64, dtype=dtype)))
    expected = analyze(net).layers
    assert f"quantised weights ({dtype})" in expected["1"].status
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    torch.save(net.state_dict(), tmp_path / "a.pt")
    found = [analyze_checkpoint(tmp_path / name).layers for name in ("a.safetensors", "a.pt")]
    assert [*found, analyze(net.state_dict()).layers] == [expected] * 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_weights_that_torchao_quantised(config: str, tmp_path: Path) -> None:
    """A model's are dequantised; in a file they are packed as only torchao knows, and the reason is listed."""
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
    before = analyze(net).layers
    quantization.quantize_(net[1], getattr(quantization, config)())
    after = analyze(net).layers
    assert after["1"].alpha == pytest.approx(before["1"].alpha, abs=0.05)
    assert analyze(net.state_dict()).layers == after
    torch.save(net.state_dict(), tmp_path / "a.pt")
    found = analyze_checkpoint(tmp_path / "a.pt").layers
    assert "dequantise" in found["1"].status
    assert [found[name] for name in "02"] == [before[name] for name in "02"]


class Int8Params(nn.Parameter):
    """As bitsandbytes keeps 8-bit weights: whole numbers, and the largest absolute value of each row."""

    @classmethod
    def of(cls, weight: torch.Tensor) -> Int8Params:
        largest = weight.abs().amax(dim=1)
        made = cls((weight / largest[:, None] * 127).round().to(torch.int8), requires_grad=False)
        made.SCB = largest
        return made


def test_codes_of_8_bits_are_multiplied_with_the_scales_of_their_rows() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    before = analyze(net).layers
    net[1].weight = Int8Params.of(net[1].weight.detach())
    assert analyze(net).layers["1"].alpha == pytest.approx(before["1"].alpha, abs=0.05)
    # At its first call, a layer takes the scales over.
    net[1].state = SimpleNamespace(SCB=net[1].weight.SCB)
    net[1].weight.SCB = None
    assert analyze(net).layers["1"].alpha == pytest.approx(before["1"].alpha, abs=0.05)
    del net[1].state
    assert "dequantise" in analyze(net).layers["1"].status


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_bitsandbytes_quantised(bits: int) -> None:
    modules = pytest.importorskip("bitsandbytes").nn
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 96))
    kind, options = (modules.Linear4bit, {}) if bits == 4 else (modules.Linear8bitLt, {"has_fp16_weights": False})
    quantised = kind(64, 96, **options)
    quantised.load_state_dict(net[1].state_dict())
    quantised = quantised.to("cpu")
    before, after = analyze(net).layers["1"], analyze(nn.Sequential(net[0], quantised)).layers["1"]
    assert after.shape == before.shape
    assert after.alpha == pytest.approx(before.alpha, abs=0.1)
    quantised(torch.randn(2, 64))
    assert analyze(nn.Sequential(net[0], quantised)).layers["1"].alpha == after.alpha
