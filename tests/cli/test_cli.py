"""The command line: what it measures, what it prints where, and how it ends."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner, Result

from farms_tb import LayerRecord, analyze, analyze_checkpoint
from farms_tb.cli import measuring
from farms_tb.cli.app import app
from farms_tb.cli.measuring import COLUMNS, MeasureRequest, measure
from farms_tb.cli.pairing import paired
from farms_tb.cli.sources import Source, open_source
from farms_tb.cli.tables import Column
from farms_tb.options import SpectrumOptions, as_plain
from farms_tb.spectra.measure import blank
from farms_tb.spectra.permutation_null import null_seconds, weight_record
from farms_tb.weights.layers import checked_layers
from farms_tb.weights.stacks import MatrixStack

pytestmark = pytest.mark.filterwarnings("ignore:.*(torch.jit|forkpty)")


NET = "tests.cli.test_cli:net"


def other() -> nn.Module:
    return net(1)


def net(seed: int = 0) -> nn.Sequential:
    """Linear and convolution layers, each of its own shape, and two that have no alpha."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(8, 24, 3), nn.Linear(24, 60), nn.Embedding(30, 24), nn.Linear(60, 20), nn.Linear(9, 1)
    )


def without_matrix() -> nn.Module:
    return nn.ReLU()


def no_model() -> int:
    return 3


def failing() -> nn.Module:
    raise KeyError("width")


def quitting() -> nn.Module:
    sys.exit(3)


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def rows_of(*arguments: Any) -> dict[str, dict[str, Any]]:
    result = run(*arguments, "--format", "json")
    assert result.exit_code == 0, result.output
    return {row["layer"]: row for row in json.loads(result.stdout)["layers"]}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.save(net().state_dict(), tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def test_metrics_are_those_of_analyze() -> None:
    rows = rows_of("analyze", NET, "--null")
    farms, full = analyze(net(), null=True).layers, analyze(net(), esd="full").layers
    assert list(rows) == list(farms)
    for name, row in rows.items():
        for metric in (
            "alpha",
            "alpha_error",
            "ks_distance",
            "stable_rank",
            "z_score",
            "null_mean",
            "xmin",
            "status",
        ):
            assert row[metric] == getattr(farms[name], metric)
        assert row["alpha_full"] == full[name].alpha
        assert row["stable_rank_full"] == full[name].stable_rank
        assert row["verdict"] == (None if farms[name].verdict is None else farms[name].verdict.value)
        assert row["bias"] == (full[name].alpha - farms[name].alpha if farms[name].alpha else None)
    assert rows["0"]["bias"] > 0.3
    assert rows["2"]["status"] == "embedding: not analysed without embeddings=True"


def test_esd_full_and_no_full() -> None:
    for arguments, esd in ((["--esd", "full"], "full"), (["--no-full"], "farms")):
        rows = rows_of("analyze", NET, *arguments)
        assert {name: row["alpha"] for name, row in rows.items()} == analyze(net(), esd=esd).alphas
        assert all(row["alpha_full"] is row["bias"] is None for row in rows.values())


def test_measures_as_a_preset_does() -> None:
    rows = rows_of("analyze", NET, "--preset", "model_balancing", "--min-eigenvalues", 6)
    expected = analyze(net(), preset="model_balancing", min_eigenvalues=6).alphas
    assert {name: row["alpha"] for name, row in rows.items()} == expected
    of_whole = analyze(net(), preset="tempbalance").alphas
    of_windows = analyze(net(), preset="tempbalance", esd="farms").alphas
    assert of_whole != of_windows
    for typed, expected in (((), of_whole), (("--esd", "farms"), of_windows)):
        rows = rows_of("analyze", NET, "--preset", "tempbalance", *typed)
        assert {name: row["alpha"] for name, row in rows.items()} == expected
    refused = run("analyze", NET, "--preset", "lrr")
    assert refused.exit_code == 2
    assert "preset" in refused.output


def save_lightning(model: nn.Module, folder: Path) -> Path:
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, folder / "last.ckpt")
    return folder / "last.ckpt"


def save_folder(model: nn.Module, folder: Path) -> Path:
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def save_parts(model: nn.Module, folder: Path) -> Path:
    for name, tensor in model.state_dict().items():
        save_file({name: tensor}, folder / f"{name}.safetensors")
    weight_map = {name: f"{name}.safetensors" for name in model.state_dict()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("save", [save_lightning, save_folder, save_parts])
def test_files(save: Any, tmp_path: Path) -> None:
    path = save(net(), tmp_path)
    rows = rows_of("analyze", path)
    assert {name: row["alpha"] for name, row in rows.items()} == analyze_checkpoint(path).alphas
    assert {name: row["alpha_full"] for name, row in rows.items()} == analyze_checkpoint(path, esd="full").alphas


@pytest.mark.parametrize("name", ["squeezenet1_1", "torchvision:squeezenet1_1", "timm:test_resnet", "test_resnet"])
def test_models_by_name(name: str) -> None:
    rows = rows_of("analyze", name, "--no-full", "--filter", "*conv1", "--filter", "features.3.*")
    assert rows
    assert rows == rows_of("analyze", name, "--no-full", "--filter", "*conv1", "--filter", "features.3.*")
    assert all(1.5 < row["alpha"] < 3 for row in rows.values())


def test_functions_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_nets.py").write_text("from tests.cli.test_cli import net")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert rows_of("analyze", "my_own_nets:net") == rows_of("analyze", NET)
    assert sys.path == before


def talking() -> nn.Module:
    print("loading the weights")
    return net()


def test_what_a_function_prints_is_no_part_of_the_result() -> None:
    result = run("analyze", "tests.cli.test_cli:talking", "--format", "json")
    assert len(json.loads(result.stdout)["layers"]) == 5
    assert "loading the weights" in result.stderr


def moving() -> nn.Module:
    os.chdir("elsewhere")
    return net()


def test_a_function_that_changes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths are those of the folder in which the command is run."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert run("analyze", "tests.cli.test_cli:moving", "-o", "a.csv").exit_code == 0
    assert (tmp_path / "a.csv").exists()
    assert sys.path == before


OTHER_OPTIONS: dict[str, Any] = {
    "esd": "full",
    "fit": "goodness-of-fit",
    "aspect_ratio": 0.5,
    "window": 20,
    "windows_per_dim": 3,
    "window_step": 7,
    "xmin_pos": 3.0,
    "filter_zeros": True,
    "relative_cutoff": 0.01,
    "min_eigenvalues": 6,
    "embeddings": True,
    "adapters": "separate",
    "precision": "float64",
    "solver": "torch",
    "memory_mb": 64,
    "threads": 3,
}


@pytest.mark.parametrize("command", [["analyze", NET], ["compare", *[NET] * 2]])
def test_every_option_of_the_measurement(command: list[str]) -> None:
    """Each has its option, its default and its words, and arrives."""
    arguments = []
    for name, value in OTHER_OPTIONS.items():
        arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    assert json.loads(run(*command, "--format", "json").stdout)["options"] == as_plain(SpectrumOptions())
    changed = json.loads(run(*command, *arguments, "--format", "json").stdout)["options"]
    assert changed == OTHER_OPTIONS
    assert changed == as_plain(SpectrumOptions(**OTHER_OPTIONS))
    help_text = " ".join(run(command[0], "--help").stdout.split())
    assert "The median fit's divisor: 2 takes the upper half of the eigenvalues" in help_text
    assert "instead of --windows-per-dim" in help_text
    assert "Exit codes: 0 measured" in help_text


def test_formats(weights: Path, tmp_path: Path) -> None:
    import pyarrow.parquet

    expected = list(rows_of("analyze", weights).values())
    result = run("analyze", weights, "--format", "csv")
    assert result.stderr == ""
    for text in (result.stdout, write(tmp_path / "a.csv", weights).read_text()):
        found = list(csv.DictReader(text.splitlines()))
        assert [{k: "" if v is None else str(v) for k, v in row.items()} for row in expected] == found
    assert json.loads(write(tmp_path / "a.json", weights).read_text())["layers"] == expected
    table = pyarrow.parquet.read_table(write(tmp_path / "a.parquet", weights))
    assert table.to_pylist() == expected
    assert {str(table.schema.field(name).type) for name in ("alpha", "z_score", "alpha_full")} == {"double"}
    assert "0      9x24x8" in write(tmp_path / "a.txt", weights).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.csv",
        "a.json",
        "a.parquet",
        "a.txt",
        "weights.pt",
    ]


def write(path: Path, model: Path) -> Path:
    result = run("analyze", model, "-o", path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"wrote {path}" in result.stderr
    return path


def test_filter_and_sort() -> None:
    alphas = {name: alpha for name, alpha in analyze(net()).alphas.items() if alpha is not None}
    rows = rows_of("analyze", NET, "--sort", "alpha")
    assert list(rows) == [*sorted(alphas, key=lambda name: alphas[name]), "2", "4"]
    rows = rows_of("analyze", NET, "--sort", "alpha", "-r")
    assert list(rows) == [*sorted(alphas, key=lambda name: -alphas[name]), "2", "4"]
    assert list(rows_of("analyze", NET, "--filter", "[13]", "--sort", "layer", "-r")) == [
        "3",
        "1",
    ]


WIDE_REASON = "part of a parametrized or factorised weight: build the model and use analyze(model)"


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A name as long as those of large models, and reasons longer than a terminal is wide."""
    save_file(
        {
            "model.layers.31.self_attn.q_proj.weight": torch.randn(64, 48),
            "model.embed_tokens.weight": torch.randn(64, 48),
            "mlp.weight.core": torch.randn(9, 9),
            "quantised.weight": torch.ones(48, 1, dtype=torch.uint8),
            "half.weight": torch.randn(32, 32).half(),
            "eighth.weight": torch.randn(32, 32).to(torch.float8_e4m3fn),
        },
        tmp_path / "model.safetensors",
    )
    return tmp_path


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal(mixed: Path, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    shown = plain(run("analyze", mixed, "--null").stdout).splitlines()
    assert max(map(len, shown)) <= width
    text = "\n".join(shown)
    if width == 80:  # too narrow for the name and all metrics: the name takes two lines
        text = re.sub(r"\nmodel.layers(.*?) (.*)\n(\S+) ", r"\nmodel.layers\1\3 \2", text)
    for layer in ("model.layers.31.self_attn.q_proj", "eighth", "half"):
        assert re.search(rf"\n{re.escape(layer)} .* 2\.\d\d\d ", text)
    assert "quantised weights (torch.uint8): dequantise the model first" in text
    assert WIDE_REASON in " ".join(text.split())


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_piped_tables_keep_a_line_for_each_layer(mixed: Path) -> None:
    shown = run("analyze", mixed).stdout.split("\n\n")[0].splitlines()
    assert len(shown) == 3 + 6
    assert next(line for line in shown if line.startswith("mlp.weight.core ")).rstrip().endswith(WIDE_REASON)


def exit_code(*arguments: Any) -> int:
    return run(*arguments).exit_code


def test_exit_codes(weights: Path, tmp_path: Path) -> None:
    assert exit_code("analyze", weights) == 0
    assert exit_code("analyze", weights, "--strict") == 1
    assert exit_code("analyze", weights, "--strict", "--filter", "[013]") == 0
    nothing = run("analyze", weights, "--filter", "4")
    assert nothing.exit_code == 1
    assert "Nothing could be measured: the status of each layer says why" in nothing.stderr
    assert (
        "Nothing could be measured: no weight matrix, or none of such a name"
        in run("analyze", weights, "--filter", "x").stderr
    )
    torch.save({"norm.weight": torch.randn(9), "steps": torch.tensor(3)}, tmp_path / "vectors.pt")
    assert exit_code("analyze", tmp_path / "vectors.pt") == 1
    assert exit_code("compare", weights, weights) == 0
    assert exit_code("compare", weights, weights, "--strict") == 1
    assert exit_code("compare", weights, "tests.cli.test_cli:failing") == 2
    assert exit_code() == 2
    assert run("--version").stdout == f"{__import__('farms_tb').__version__}\n"


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("1 of 1 layer with an alpha", ["analyze", "{}/one.pt"]),
        ("entries (1 layer)", ["sparsity", "{}/one.pt", "--target", "0.5", "--granularity", "matrix"]),
        ("alpha of 1 layer, 2.100 to 2.200", ["watch", "{}"]),
        ("(1 cell in place of 3)", ["watch", "{}"]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*straight line")
def test_one_layer_is_not_called_layers(words: str, arguments: list[str], tmp_path: Path) -> None:
    torch.save({"fc.weight": torch.randn(60, 40)}, tmp_path / "one.pt")
    (tmp_path / "metrics.csv").write_text("epoch,farms/alpha/fc,step\n0,2.1,0\n0\n1,2.2,5\n")
    result = run(*(argument.format(tmp_path) for argument in arguments))
    assert result.exit_code == 0, result.output
    assert words in " ".join(result.stdout.split())


MISTAKES: list[tuple[list[str], str]] = [
    (["analyze", "weights.pt"], "no such file: weights.pt"),
    (["analyze", "folder/weights"], "no such file: folder/weights"),
    (["analyze", "openai-community/gpt2"], "hf download openai-community/gpt2"),
    (["analyze", "https://huggingface.co/gpt2"], "is an address: download"),
    (["compare", NET, "https://huggingface.co/gpt2"], "is an address: download"),
    (["analyze", "s3://bucket/model.pt"], "is an address: download"),
    (["analyze", "README.md"], "cannot read README.md: no checkpoint, or one that is empty, cut short or damaged"),
    (["analyze", "conf"], "conf is a directory without a .safetensors file"),
    (
        ["analyze", "resnet19"],
        "'resnet19' is no file, and torchvision and timm know no model of this name; did you",
    ),
    (["analyze", "timm:vit_tny_patch16_224"], "timm knows no model 'vit_tny_patch16_224'; did you mean vit_tiny"),
    (["analyze", "torchvision:x"], "torchvision knows no model 'x'"),
    (["analyze", "timm:resnet18.no_such_tag", "--pretrained"], "timm cannot make 'resnet18.no_such_tag': "),
    (["analyze", "nowhere:net"], "nowhere:net() failed: ModuleNotFoundError: No module named 'nowhere'"),
    (["analyze", "tests.cli.test_cli:gone"], "tests.cli.test_cli:gone() failed: AttributeError: "),
    (["analyze", "tests.cli.test_cli:failing"], "tests.cli.test_cli:failing() failed: KeyError: 'width'"),
    (["analyze", "tests.cli.test_cli:quitting"], "tests.cli.test_cli:quitting() failed: SystemExit: 3"),
    (["analyze", "tests.cli.test_cli:no_model"], "expected a torch.nn.Module, got int"),
    (["analyze", "tests.cli.test_cli:without_matrix"], "ReLU has no layer that can be analysed"),
    (
        ["analyze", "README.md", "--pretrained"],
        "--pretrained is for models of torchvision and timm, README.md is a f",
    ),
    (["analyze", NET, "--pretrained"], "tests.cli.test_cli:net is a function"),
    (["analyze", NET, "--window", "1"], "window must be at least 2, got 1"),
    (["analyze", NET, "--fit", "best"], "'best' is not one of 'median', 'goodness-of-fit', "),
    (
        ["analyze", NET, "--sort", "size"],
        "--sort size: the columns are layer, shape, verdict, alpha, ",
    ),
    (["analyze", NET, "--device", "fast"], "--device fast: Expected one of cpu, cuda"),
    (["analyze", NET, "--device", "meta"], "--device meta: no values"),
    (
        ["analyze", NET, "--format", "parquet"],
        "--output FILE",
    ),
    (
        ["analyze", NET, "-o", "no/such/a.csv"],
        "cannot write no/such/a.csv: No such file or directory",
    ),
    (["analyze", NET, "-o", "tests"], "cannot write tests: it is a folder"),
    (["report", "no/such/run"], "no such folder: no/such/run"),
    (["report", "docs"], "docs is no run folder: it holds neither a metrics.csv"),
    (["plot", "no/such/run"], "no such folder: no/such/run"),
    (["plot", "no/such/run", "--format", "gif3"], "no format of pictures '.gif3': matplotlib writes "),
    (["plot", "no/such/run", "--only", "alphas"], "there is no picture 'alphas': there are alpha, lr_ratio, "),
    (["plot", "README.md"], "cannot read README.md: no checkpoint"),
]


@pytest.mark.parametrize("name", ["metrics.csv", "hparams.yaml", "config.json", "report.html"])
def test_a_file_next_to_the_weights_is_not_called_damaged(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("epoch,farms/alpha/net.0,step\n0,2.1,0\n")
    for command in ("analyze", "report", "plot"):
        result = run(command, tmp_path / name)
        assert result.exit_code == 2
        assert f"{name} holds no weights: pass the folder of the run or the model" in result.stderr


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_mistakes(arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert words in " ".join(result.stderr.split()), result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_packages_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("pyarrow", "torchvision", "timm"):
        monkeypatch.setitem(sys.modules, package, None)
    missing = run("analyze", NET, "-o", tmp_path / "a.parquet").stderr
    assert '--format parquet needs pyarrow: pip install "farms-tb[cli]"' in missing
    assert "needs timm: pip install timm" in run("analyze", "timm:resnet18").stderr
    assert "'resnet18' is no file, and there is no torchvision or timm" in run("analyze", "resnet18").stderr


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_what_cannot_be_written_is_printed(ending: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("farms_tb.cli.output.write_text_atomically", full)
    monkeypatch.setattr("farms_tb.cli.output._write_parquet", full)
    done = run("analyze", NET, "-o", tmp_path / f"a.{ending}")
    assert done.exit_code == 1
    assert "No space left" in done.stderr
    assert done.stdout == run("analyze", NET, "--format", "csv").stdout


def test_packages_that_are_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    for package in ("pyarrow", "torchvision", "timm"):
        (broken / package).mkdir(parents=True)
        (broken / package / "__init__.py").write_text("raise RuntimeError('another CUDA')")
        for module in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(broken)
    in_parquet = ("analyze", NET, "-o", tmp_path / "a.parquet")
    for arguments in (in_parquet, ("analyze", "timm:resnet18"), ("analyze", "resnet18")):
        done = run(*arguments)
        assert done.exit_code == 2
        assert "RuntimeError: another CUDA" in " ".join(done.stderr.split())


def test_without_the_extra() -> None:
    """The library does without; the command says in one sentence what it needs."""
    code = "import sys; sys.modules['typer'] = None; import farms_tb.cli; farms_tb.cli.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == 'farms-tb needs typer: pip install "farms-tb[cli]"\n'


def quiet() -> Console:
    return Console(file=StringIO())


def test_a_file_that_breaks_off_keeps_what_was_measured(tmp_path: Path) -> None:
    source = open_source(str(save_parts(net(), tmp_path)))
    (tmp_path / "1.weight.safetensors").write_bytes(b"")
    found = measure(source, MeasureRequest(SpectrumOptions()), quiet())
    assert list(found.records) == ["0"]
    assert found.stopped.startswith("reading stopped after 0: cannot read ")
    assert "1.weight.safetensors" in found.stopped


def test_a_damaged_part_keeps_the_others(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    folder = save_parts(net(), tmp_path / "model")
    alphas = analyze_checkpoint(folder).alphas
    part = folder / "1.weight.safetensors"
    part.write_bytes(part.read_bytes()[:-100])
    result = run("analyze", folder, "-o", tmp_path / "a.json")
    assert result.exit_code == 1
    assert f"Not all layers were measured: cannot read {part}: " in result.stderr
    written = json.loads((tmp_path / "a.partial.json").read_text())
    assert [row["layer"] for row in written["layers"]] == ["0", "2", "3", "4"]
    assert {row["layer"]: row["alpha"] for row in written["layers"]} == {n: alphas[n] for n in "0234"}
    for other in folder.glob("*.safetensors"):
        other.write_bytes(b"")
    nothing = run("analyze", folder)
    assert nothing.exit_code == 1
    assert "Nothing could be measured" in nothing.stderr


@pytest.mark.nightly
def test_7_billion_parameters_in_4_gb(tmp_path: Path) -> None:
    """A directory of the shapes of a large language model, in files that are mostly holes and take no disk."""
    shapes = {f"self_attn.{name}_proj": (4096, 4096) for name in "qkvo"}
    shapes |= {"mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008)}
    layers, parts, weight_map = 35, 7, {}
    corner = torch.randn(20, 4096).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    for part in range(parts):
        header, start = {}, 0
        for layer in range(part * layers // parts, (part + 1) * layers // parts):
            for name, shape in shapes.items():
                key, end = f"model.layers.{layer}.{name}.weight", start + 2 * math.prod(shape)
                header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
                weight_map[key], start = f"{part}.safetensors", end
        text = json.dumps(header).encode()
        with (tmp_path / f"{part}.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for entry in header.values():
                file.seek(8 + len(text) + entry["data_offsets"][0])
                file.write(corner)
            file.truncate(8 + len(text) + start)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert layers * sum(math.prod(shape) for shape in shapes.values()) > 7e9
    code = "import resource, sys; from farms_tb.cli.app import app; app(standalone_mode=False)\n"
    code += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)"
    command = f"analyze {tmp_path} --no-full --window 20 --windows-per-dim 1 --format csv".split()
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, timeout=250, check=True
    )
    assert len(done.stdout.splitlines()) == 1 + layers * len(shapes)
    assert int(done.stderr) < 4e9


class TooLargeForTheDevice(torch.Tensor):
    """A tensor that no device has room for."""

    def to(self, *arguments: Any, **options: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")


class TooLarge(torch.Tensor):
    """A tensor that can be looked at, and not computed with: no room for any result."""

    LOOKS = ("__get__", "to", "detach", "is_floating_point", "is_complex", "element_size")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in cls.LOOKS:
            return super().__torch_function__(func, types, args, kwargs or {})
        raise RuntimeError("not enough memory: you tried to allocate 99 bytes\nmore")


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (TooLarge, "failed: not enough memory: you tried to allocate 99 bytes"),
        (TooLargeForTheDevice, "failed: CUDA out of memory"),
    ],
)
def test_a_layer_that_fails_does_not_stop_the_others(kind: type[torch.Tensor], status: str) -> None:
    def read(items: Iterable[Any]) -> Iterator[tuple[str, MatrixStack]]:
        for name, matrices in items:
            yield name, MatrixStack(matrices)

    weights = torch.randn(1, 60, 20)
    layers = [("first", weights.as_subclass(kind)), ("second", weights)]
    found = measure(Source(layers, read), MeasureRequest(SpectrumOptions()), quiet())
    first, second = found.records.values()
    assert first.status == status
    assert (first.alpha, first.shape) == (None, (1, 60, 20))
    assert second.alpha is not None
    assert found.stopped == ""


def test_a_whole_matrix_without_alpha_says_so(tmp_path: Path) -> None:
    torch.save({"a.weight": torch.randn(200, 50).repeat(1, 4)}, tmp_path / "a.pt")
    row = rows_of("analyze", tmp_path / "a.pt", "--window", 20)["a"]
    assert row["alpha"] is not None
    assert row["status"] == "whole matrix: low rank: zero eigenvalues in the tail of 1 sample(s)"


def test_interrupted() -> None:
    """What was measured is kept."""
    whole = open_source(NET)

    def read(items: Iterable[Any]) -> Iterator[tuple[str, Any]]:
        yield from islice(whole.read(items), 2)
        raise KeyboardInterrupt

    found = measure(Source(whole.items, read), MeasureRequest(SpectrumOptions()), quiet())
    assert (found.interrupted, found.stopped) == (True, "interrupted at 1")
    assert {name: record.alpha for name, record in found.records.items()} == {
        name: analyze(net()).alphas[name] for name in "01"
    }


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (KeyboardInterrupt(), 130, "interrupted at 1"),
        (OSError("the disk is gone"), 1, "reading stopped after 1: the disk is gone"),
        (MemoryError(), 1, "reading stopped after 1: MemoryError"),
    ],
)
def test_compare_keeps_what_was_measured_of_the_differences(
    error: BaseException, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, readings = open_source(NET), []

    def read(items: Iterable[Any]) -> Iterator[tuple[str, Any]]:
        readings.append(1)
        is_for_differences = len(readings) > 2  # each model is measured first
        yield from islice(whole.read(items), 2 if is_for_differences else None)
        if is_for_differences:
            raise error

    monkeypatch.setattr("farms_tb.cli.compare.open_source", lambda *_, **options: Source(whole.items, read))
    stopped = run("compare", NET, NET, "-o", tmp_path / "a.json")
    assert stopped.exit_code == code
    assert words in stopped.stderr
    written = json.loads((tmp_path / "a.partial.json").read_text())
    assert not written["complete"]
    norms = {row["layer"]: row["difference_norm"] for row in written["layers"]}
    assert norms == {"0": 0, "1": 0, "2": None, "3": None, "4": None}
    assert all(row["change"] == 0 for row in written["layers"] if row["alpha_a"])


@pytest.mark.parametrize("error", [RuntimeError("not enough memory\nmore"), MemoryError()])
def test_a_difference_that_fails_does_not_stop_the_others(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing_once(stack: MatrixStack, *arguments: Any, **options: Any) -> LayerRecord:
        if stack.matrices.shape[1:] == (24, 8):
            raise error
        return weight_record(stack, *arguments, **options)

    monkeypatch.setattr("farms_tb.cli.differences.weight_record", failing_once)
    rows = rows_of("compare", NET, "tests.cli.test_cli:other")
    expected = f"B - A: failed: {str(error).partition(chr(10))[0] or 'MemoryError'}"
    assert (rows["0"]["status"], rows["0"]["difference_rank"]) == (expected, None)
    assert rows["1"]["status"] == "ok"
    assert rows["1"]["difference_rank"] > 10


def test_compare(tmp_path: Path) -> None:
    before, after = net().state_dict(), net().state_dict()
    after["3.weight"] = 2 * after["3.weight"]  # alpha does not depend on the scale
    after["1.weight"] = torch.randn(60, 24).exp()
    after["0.weight"] = after["0.weight"] + 0.03 * torch.randn(24, 8, 3, 3)
    after["new.weight"] = torch.randn(30, 30)
    del after["4.weight"]
    for name, state in (("a", before), ("b", after)):
        torch.save(state, tmp_path / f"{name}.pt")
    a, b = (analyze_checkpoint(tmp_path / f"{name}.pt").layers for name in "ab")
    rows = rows_of("compare", tmp_path / "a.pt", tmp_path / "b.pt")
    assert list(rows)[:2] == ["1", "0"]
    for name in "013":
        row = rows[name]
        assert row["change"] == b[name].alpha - a[name].alpha  # type: ignore[operator]
        assert row["change_error"] == pytest.approx(math.sqrt(a[name].alpha_error ** 2 + b[name].alpha_error ** 2))
        assert row["change_in_errors"] == pytest.approx(row["change"] / row["change_error"])
    assert abs(rows["3"]["change"]) < 1e-6
    assert rows["4"]["status"] == "only in A; A: one row or one column: no spectrum"
    assert (rows["new"]["status"], rows["new"]["alpha_b"]) == ("only in B", b["new"].alpha)
    assert "B - A" in run("compare", tmp_path / "a.pt", tmp_path / "b.pt").stdout


def test_compare_models_of_other_names(weights: Path, tmp_path: Path) -> None:
    torch.save({f"net.{name}": tensor for name, tensor in net().state_dict().items()}, tmp_path / "b.pt")
    result = run("compare", weights, tmp_path / "b.pt")
    assert result.exit_code == 1
    assert "No layer has the same name in both: 0, 1, 2 in A, net.0, net.1, net.2 in B." in result.stderr


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "model._orig_mod.", "module.model."])
def test_compare_pairs_names_with_prefixes_of_wrappers(weights: Path, tmp_path: Path, prefix: str) -> None:
    torch.save({f"{prefix}{name}": tensor for name, tensor in net().state_dict().items()}, tmp_path / "b.pt")
    for models in ((weights, tmp_path / "b.pt"), (tmp_path / "b.pt", weights)):
        rows = rows_of("compare", *models)
        assert sorted(rows) == ["0", "1", "2", "3", "4"]
        assert rows["1"]["change"] == 0
        assert rows["4"]["status"].count("one row or one column") == 2
        assert list(rows_of("compare", *models, "--filter", "1")) == ["1"]


def test_compare_does_not_guess_between_equal_names() -> None:
    record = LayerRecord(alpha=2.0)
    pairs = paired({"model.a": record, "module.a": record, "b": record}, {"a": record, "b": record})
    assert [(pair.name, pair.a is not None, pair.b is not None) for pair in pairs] == [
        ("model.a", True, False),
        ("module.a", True, False),
        ("b", True, True),
        ("a", False, True),
    ]


def test_tables_have_no_more_digits_than_are_known() -> None:
    column = Column("alpha", "alpha", 3, signed=True, error="error")
    for row, shown in (
        ({"alpha": 2.0344, "error": 0.0312}, "+2.034"),
        ({"alpha": 2.0344, "error": 0.31}, "+2.03"),
        ({"alpha": 2.0344, "error": 31.0}, "+2"),
        ({"alpha": 2.0344, "error": 1e-9}, "+2.034"),
        ({"alpha": -0.0004, "error": None}, "0.000"),
        ({"alpha": None, "error": None}, "-"),
    ):
        assert column.cell(row) == shown
    z = Column("z", "z", 1, digits=2, signed=True)
    assert [z.cell({"z": value}) for value in (-13.54, -9.94, 0.04, -0.04)] == ["-14", "-9.9", "0.0", "0.0"]


def test_report_and_plot(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("epoch,farms/alpha/0,farms/ratio/0,step\n0,2.1,0.5,0\n1,1.9,1.5,8\n")
    assert run("report", tmp_path).stdout == f"{tmp_path / 'report.html'}\n"
    assert run("report", tmp_path, "-o", tmp_path / "b.html").stdout == f"{tmp_path / 'b.html'}\n"
    assert (tmp_path / "b.html").read_text() == (tmp_path / "report.html").read_text()
    for arguments, folder, ending in (
        ([], "figures", ".png"),
        (["-o", tmp_path / "p", "--format", "svg"], "p", ".svg"),
    ):
        drawn = run("plot", tmp_path, *arguments).stdout.splitlines()
        assert str(tmp_path / folder / f"alpha{ending}") in drawn
        assert all(Path(path).stat().st_size > 1000 for path in drawn)
    assert "No checkpoint (*.ckpt) yet, so no spectra" in run("plot", tmp_path).stderr
    only = run("plot", tmp_path, "--only", "lr_ratio").stdout
    assert only == f"{tmp_path / 'figures' / 'lr_ratio.png'}\n"


def test_pictures_and_page_of_a_file_of_weights(weights: Path, tmp_path: Path) -> None:
    one = run("plot", weights, "--layer", "1", "--layer", "3", "-o", tmp_path / "p")
    assert one.stdout.splitlines() == [str(tmp_path / "p" / f"esd_{layer}.png") for layer in "13"]
    assert one.stderr == ""
    all_of_them = run("plot", weights, "-o", tmp_path / "q").stdout.splitlines()
    assert [Path(path).stem for path in all_of_them] == ["alpha_by_depth", "full_against_farms", "esd"]
    page = Path(run("report", weights, "--null").stdout.strip())
    assert page == tmp_path / "report.html"
    assert '"null_mean":2.' in page.read_text()


def test_random_weights_say_so() -> None:
    """They are what a name alone gives, and nothing in the table tells."""
    assert "--pretrained loads trained ones" in run("analyze", "squeezenet1_1", "--filter", "features.3.*").stderr
    assert run("analyze", NET).stderr == ""


@pytest.mark.parametrize("command", ["plot", "report"])
def test_key_names_the_weights_of_pictures_and_page(command: str, tmp_path: Path) -> None:
    torch.save({"step": 3, "raw": net(1).state_dict(), "ema": net().state_dict()}, tmp_path / "two.pt")
    refused = run(command, tmp_path / "two.pt")
    assert refused.exit_code == 2
    assert "key" in refused.stderr
    assert run(command, tmp_path / "two.pt", "--key", "ema").exit_code == 0


def test_the_command_itself(weights: Path) -> None:
    """In a process of its own: nothing but data on stdout, and no traceback when the reader of a pipe goes."""
    command = [sys.executable, "-m", "farms_tb.cli", "analyze", str(weights), "--format", "csv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith(",".join(COLUMNS[:4]))
    assert done.stderr == ""
    assert len(list(csv.DictReader(done.stdout.splitlines()))) == 5


def test_analyze_says_what_the_numbers_mean(weights: Path) -> None:
    found = run("analyze", weights)
    assert found.exit_code == 0
    assert "verdict" in found.stdout
    assert "No layer can be told from random" in found.stdout
    facts = json.loads(run("analyze", weights, "--format", "json").stdout)
    assert facts["diagnosis"]
    assert {row["verdict"] for row in facts["layers"]} <= {"random", "not measured"}
    assert facts["summaries"][str(weights)]["verdicts"]["random"] >= 1


def test_nulls_can_be_left_out_and_are_where_they_take_long(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(row["null_mean"] is None for row in rows_of("analyze", weights, "--no-null").values())
    layers = [layer for layer in checked_layers(net()) if not layer.problem]
    seconds = [null_seconds(blank(layer), SpectrumOptions()) for layer in layers]
    monkeypatch.setattr(measuring, "QUICK_NULLS", 1.01 * max(seconds))
    assert sum(seconds) > 1.02 * max(seconds)
    assert "over a minute" in run("analyze", weights).stderr
    some = rows_of("analyze", weights, "--filter", layers[0].name)
    assert some[layers[0].name]["null_mean"] is not None, "one layer alone is quick"


@pytest.mark.parametrize("name", ["metrics.csv", "config.yaml", "summary.json", "config.json", "tokenizer.json"])
def test_a_file_of_the_run_is_not_replaced(name: str, tmp_path: Path) -> None:
    torch.save({"state_dict": net().state_dict()}, tmp_path / "last.ckpt")
    (tmp_path / name).write_text("of the run")
    refused = run("analyze", tmp_path, "--output", tmp_path / name)
    assert refused.exit_code != 0
    assert "of the run" in refused.stderr
    assert (tmp_path / name).read_text() == "of the run"


def test_a_file_next_to_the_weights_is_not_replaced(weights: Path, tmp_path: Path) -> None:
    config, other = tmp_path / "config.json", tmp_path / "elsewhere" / "config.json"
    other.parent.mkdir()
    for path in (config, other):
        path.write_text("of the model")
    refused = run("analyze", weights, "-o", config)
    assert refused.exit_code == 2
    assert "of the run or the model" in refused.stderr
    assert config.read_text() == "of the model"
    assert run("analyze", weights, "-o", other).exit_code == 0
    assert "layers" in json.loads(other.read_text())


def test_a_filter_that_takes_nothing_leaves_the_header(weights: Path, tmp_path: Path) -> None:
    run("analyze", weights, "--filter", "nothing*", "--output", tmp_path / "none.CSV")
    assert (tmp_path / "none.CSV").read_text().startswith("layer,")
    for options in ((), ("--no-difference",)):
        arguments = ("compare", weights, weights, "--format", "csv", *options)
        some, none = (run(*arguments, *patterns).stdout for patterns in ((), ("--filter", "nothing*")))
        assert none.splitlines() == some.splitlines()[:1]


@pytest.mark.parametrize("width", [30, 45, 60])
def test_on_a_narrow_terminal_names_are_folded_and_never_gone(
    weights: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    layers = list(rows_of("analyze", weights, "--no-null"))
    shown = plain(run("analyze", weights).stdout).splitlines()
    assert max(map(len, shown)) <= width
    for layer in layers:
        assert any(line.strip().startswith(layer[:12]) for line in shown), layer


def test_a_model_is_compared_as_a_whole_with_another(weights: Path) -> None:
    facts = json.loads(run("analyze", weights, "--against", NET, "--format", "json").stdout)
    assert set(facts["summaries"]) == {str(weights), NET}
    shown = run("analyze", weights, "--against", NET).stdout
    assert f"{NET}: mean alpha" in " ".join(shown.split())


def test_two_states_of_one_file_are_compared_as_a_whole(tmp_path: Path) -> None:
    """Both models have a summary, though they have one name; each has a key of its own."""
    torch.manual_seed(0)
    states = {"first": nn.Linear(40, 40).state_dict(), "second": nn.Linear(40, 80).state_dict()}
    path = tmp_path / "both.pt"
    torch.save(states, path)
    keys = ("--key", "second", "--against-key", "first")
    facts = json.loads(run("analyze", path, "--against", path, *keys, "--format", "json").stdout)
    own, other = facts["summaries"].values()
    assert own["mean_alpha"] != other["mean_alpha"]
    refused = run("analyze", path, "--key", "second", "--against", path)
    assert refused.exit_code != 0
    assert "--against-key" in refused.stderr


def test_both_models_have_the_weights_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, bool]] = []

    def open_net(model: str, *, pretrained: bool = False, **options: Any) -> Source:
        opened.append((model, pretrained))
        return open_source(NET)

    monkeypatch.setattr("farms_tb.cli.analyze.open_source", open_net)
    assert run("analyze", "resnet50", "--pretrained", "--against", "resnet18").exit_code == 0
    assert opened == [("resnet50", True), ("resnet18", True)]


def test_compare_looks_at_the_difference_of_the_weights(tmp_path: Path) -> None:
    """Of a low-rank update, full fine-tuning, a layer left alone, and one of another shape."""
    torch.manual_seed(0)
    base = {name: torch.randn(60, 40) for name in ("low", "full", "same")} | {"other": torch.randn(60, 40)}
    tuned = dict(base)
    tuned["low"] = base["low"] + 0.01 * torch.randn(60, 3) @ torch.randn(3, 40)
    tuned["full"] = base["full"] + 0.1 * torch.randn(60, 40)
    tuned["other"] = torch.randn(50, 40)
    for name, weights in (("a", base), ("b", {f"module.{key}": tuned[key] for key in reversed(tuned)})):
        torch.save({f"{key}.weight": weight for key, weight in weights.items()}, tmp_path / f"{name}.pt")
    rows = rows_of("compare", tmp_path / "a.pt", tmp_path / "b.pt")
    assert rows["low"]["difference_rank"] == 3
    assert rows["low"]["difference_alpha"] is None
    assert rows["full"]["difference_norm"] == pytest.approx(0.1, rel=0.1)
    assert rows["full"]["difference_rank"] > 30
    assert rows["full"]["difference_alpha"] == pytest.approx(2.1, abs=0.4)
    assert (rows["same"]["difference_norm"], rows["same"]["difference_rank"]) == (0.0, 0)
    assert rows["other"]["difference_norm"] is None
    torch.save(
        {f"{key}.weight": weight.to(torch.float8_e4m3fn) for key, weight in base.items()}, tmp_path / "c.pt"
    )
    rounded = rows_of("compare", tmp_path / "a.pt", tmp_path / "c.pt")
    assert rounded["low"]["difference_norm"] == pytest.approx(0.03, abs=0.01)
    plain = rows_of("compare", tmp_path / "a.pt", tmp_path / "b.pt", "--no-difference")
    assert "difference_norm" not in plain["low"]


def test_compare_takes_no_other_layer_for_one_of_the_same_bare_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    a = {"fc.weight": torch.randn(60, 40), "model.fc.weight": torch.randn(60, 40)}
    torch.save(a, tmp_path / "a.pt")
    torch.save({**a, "model.fc.weight": torch.randn(60, 40)}, tmp_path / "b.pt")
    rows = rows_of("compare", tmp_path / "a.pt", tmp_path / "b.pt")
    assert rows["fc"]["difference_norm"] == 0
    assert rows["model.fc"]["difference_norm"] == pytest.approx(math.sqrt(2), rel=0.1)
    torch.save({"fc.weight": a["fc.weight"]}, tmp_path / "b.pt")
    rows = rows_of("compare", tmp_path / "a.pt", tmp_path / "b.pt")
    assert (rows["fc"]["difference_norm"], rows["model.fc"]["difference_norm"]) == (0, None)


def test_compare_names_each_pair_by_a_name_of_its_own() -> None:
    record = LayerRecord(alpha=2.0)
    pairs = paired({"a": record, "model.a": record}, {"a": record, "module.a": record})
    assert [(pair.name, pair.name_in_a, pair.name_in_b) for pair in pairs] == [
        ("a", "a", "a"),
        ("model.a", "model.a", "module.a"),
    ]


def test_compare_writes_json_of_weights_that_are_not_finite(tmp_path: Path) -> None:
    for name, entry in (("a", 1.0), ("b", math.nan), ("c", math.inf)):
        weight = torch.randn(60, 40)
        weight[0, 0] = entry
        torch.save({"fc.weight": weight, "other.weight": torch.ones(60, 40)}, tmp_path / f"{name}.pt")
    for name in ("b", "c"):
        printed = run("compare", tmp_path / "a.pt", tmp_path / f"{name}.pt", "--format", "json").stdout
        layers = json.loads(printed, parse_constant=pytest.fail)["layers"]
        assert {row["layer"]: row["difference_norm"] for row in layers}["fc"] is None


def test_analyze_against_a_damaged_model_is_not_complete(weights: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in ("one", "two"):
        save_file({f"{name}.weight": torch.randn(60, 40)}, shards / f"{name}.safetensors")
    index = {"weight_map": {f"{name}.weight": f"{name}.safetensors" for name in ("one", "two")}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = run("analyze", weights, "--against", shards, "--format", "json")
    assert (whole.exit_code, json.loads(whole.stdout)["complete"]) == (0, True)
    (shards / "two.safetensors").write_bytes((shards / "two.safetensors").read_bytes()[:200])
    damaged = run("analyze", weights, "--against", shards, "--format", "json")
    assert (damaged.exit_code, json.loads(damaged.stdout)["complete"]) == (1, False)
    assert "two.safetensors" in damaged.stderr


@pytest.mark.parametrize("command", ["analyze", "compare", "report"])
def test_output_never_replaces_weights(command: str, weights: Path, tmp_path: Path) -> None:
    odd = tmp_path / "weights"
    odd.write_bytes(weights.read_bytes())
    (tmp_path / "link.csv").symlink_to(odd)
    before = odd.read_bytes()
    inputs = [odd, weights] if command == "compare" else [odd]
    for output in (weights, tmp_path / "new.safetensors", odd, tmp_path / "link.csv"):
        refused = run(command, *inputs, "-o", output)
        assert refused.exit_code == 2
        assert "replace" in refused.stderr
    assert odd.read_bytes() == weights.read_bytes() == before
    assert not (tmp_path / "new.safetensors").exists()


def test_key_is_for_files_that_hold_several_state_dicts(weights: Path, tmp_path: Path) -> None:
    save_file(net().state_dict(), tmp_path / "plain.safetensors")
    torch.save({"ema": net().state_dict(), "raw": net(1).state_dict()}, tmp_path / "two.ckpt")
    for arguments in (
        ("analyze", tmp_path / "plain.safetensors"),
        ("compare", tmp_path / "plain.safetensors", tmp_path / "plain.safetensors"),
    ):
        refused = run(*arguments, "--key", "ema")
        assert refused.exit_code == 2
        assert "key" in refused.stderr
    rows = rows_of("compare", tmp_path / "two.ckpt", tmp_path / "plain.safetensors", "--key", "ema")
    assert rows["1"]["change"] == 0


@pytest.mark.parametrize("path", ["C:\\models\\x.safetensors", "runs/12:00:00/last.ckpt", "12:00.pt"])
def test_missing_path_with_a_colon_is_no_function(path: str) -> None:
    missing = run("analyze", path)
    assert missing.exit_code == 2
    assert "no such file" in missing.stderr
