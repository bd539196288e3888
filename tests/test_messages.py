"""Every error and every warning of the package can happen, and says what is written here.

`MESSAGES` names the words of each and triggers it. A `raise` or a warning that none of them reaches fails the last
test: add it to the table.
"""

from __future__ import annotations

import ast
import json
import math
import runpy
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from farms_tb.training.overhead import TIMINGS_FILE, Overhead
from torch import nn

import farms_tb
from farms_tb import (
    FARMSTempBalance,
    MatrixStack,
    Report,
    TempBalance,
    analyze,
    analyze_checkpoint,
    lr_ratios,
)
from farms_tb import options as options_module
from farms_tb.balancing import layerwise_step
from farms_tb.balancing.layerwise_step import LayerwiseStep
from farms_tb.options import SpectrumOptions
from farms_tb.spectra import eigenvalues as spectra
from farms_tb.spectra import measure as analysis_module
from farms_tb.spectra import solvers
from farms_tb.spectra.distributed import Team
from farms_tb.spectra.measure import measure
from farms_tb.training import wandb_workspace as wandb_report
from farms_tb.training.metrics import MAX_LOGGED_LAYERS, warn_of_many_layers
from farms_tb.training.wandb_workspace import build_workspace
from farms_tb.viewing.plots import (
    Curve,
    History,
    plot_alpha_by_depth,
    plot_alpha_curves,
    plot_esd,
    plot_esds,
    plot_full_against_farms,
    save_all,
)
from farms_tb.viewing.run_folder import RunFolder, read_run_folder
from farms_tb.weights.files import StoredTensor, _stacks
from farms_tb.weights.layers import find_layers, read_stacks
from farms_tb.weights.matrices import layer_matrices
from tests.balancing.test_layerwise_step import AddsGroups, KeepsLrSum, ReplacesGroups, WritesLr
from tests.helpers import make_net

PACKAGE = Path(farms_tb.__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore")


def balanced(net: nn.Module | None = None, cls: Any = torch.optim.SGD, **options: Any) -> TempBalance:
    net = make_net() if net is None else net
    return TempBalance(net, cls(net.parameters(), lr=0.1), **options)


def step(cls: Any) -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer = cls(parameters, lr=0.1)
    LayerwiseStep(optimizer).ratios = {id(parameters[0]): 0.5, id(parameters[1]): 2.0}
    optimizer.step()


def captured_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise_step, "_is_capturing", lambda: True)
    step(torch.optim.SGD)


def balanced_after_a_captured_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise_step, "_is_capturing", lambda: True)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    stepper = LayerwiseStep(optimizer)
    optimizer.step()
    stepper.ratios = {0: 0.5}


def stored(key: str, weight: torch.Tensor) -> list[MatrixStack]:
    return _stacks(StoredTensor(key, tuple(weight.shape), lambda: weight, key), weight)


def write(path: Path, content: Any) -> Path:
    if isinstance(content, str):
        path.write_text(content)
    else:
        torch.save(content, path)
    return path


def written(name: str, content: Any) -> Callable[[Path, pytest.MonkeyPatch], Any]:
    return lambda folder, _: analyze_checkpoint(write(folder / name, content))


def indexed(folder: Path, names: str, held: Any) -> Path:
    write(folder / "a.bin", held)
    return write(folder / "a.bin.index.json", json.dumps({"weight_map": {names: "a.bin"}}))


def in_folder(**files: str) -> Callable[[Path, pytest.MonkeyPatch], Any]:
    def trigger(folder: Path, _: pytest.MonkeyPatch) -> None:
        for name, content in files.items():
            write(folder / name.replace("__", "."), content)
        analyze_checkpoint(folder)

    return trigger


def without(module: str, function: Callable[[Path], Any]) -> Callable[[Path, pytest.MonkeyPatch], Any]:
    def trigger(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        function(folder)

    return trigger


def workspace_messages() -> list[tuple[str, Any]]:
    def unknown_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without an account nothing is asked of the network."""
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
        monkeypatch.setenv("NETRC", str(folder / "none"))
        try:
            wandb_report._logged_keys("team/project/run")
        finally:
            wandb.teardown()  # it would keep the environment of this test

    return [
        (
            "a run is named ENTITY/PROJECT/RUN_ID, as in the address of its page, got 'run'",
            always(lambda: wandb_report._split("run")),
        ),
        ("can't read the run team/project/run from W&B", unknown_run),
        (
            "team/project/run has no farms/ metrics: train with FARMSTempBalance() and a WandbLogger",
            always(lambda: build_workspace("team/project/run", ["loss"])),
        ),
    ]


def always(function: Callable[[], Any]) -> Callable[[Path, pytest.MonkeyPatch], Any]:
    return lambda folder, monkeypatch: function()


class NoMatrix(nn.Module):
    pass


class TwoOfOneName(nn.Module):
    pass


layer_matrices.register(NoMatrix, lambda module: [])
layer_matrices.register(TwoOfOneName, lambda module: [MatrixStack(torch.randn(1, 9, 9))] * 2)


def cupy_out_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy needs a GPU: what is called of it is played."""

    def eigvalsh(_: Any) -> None:
        raise MemoryError("2 bytes too many")

    cuda = SimpleNamespace(
        ExternalStream=lambda stream, device: nullcontext(),
        Device=lambda device: nullcontext(),
        memory=SimpleNamespace(OutOfMemoryError=MemoryError),
    )
    played = SimpleNamespace(cuda=cuda, linalg=SimpleNamespace(eigvalsh=eigvalsh), from_dlpack=lambda array: array)
    monkeypatch.setitem(sys.modules, "cupy", played)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    solvers._cupy(torch.eye(3)[None])


def without_cupy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options_module, "find_spec", lambda name: None)
    sgd(solver="cupy")


def fails_on_one_rank(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise FloatingPointError

    monkeypatch.setattr(analysis_module, "measure_stacks", fail)
    measure(find_layers(make_net()), SpectrumOptions(), team=Team(0, 2, lambda table: table))


def out_of_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gram = spectra._gram

    def gram_of_one(matrices: torch.Tensor, *rest: object) -> torch.Tensor:
        if len(matrices) > 1:
            raise torch.OutOfMemoryError
        return gram(matrices, *rest)

    monkeypatch.setattr(spectra, "_gram", gram_of_one)
    analyze(nn.Conv2d(9, 9, 3))


def single_on_top() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Conv2d(16, 16, size) for size in (3, 1, 3, 3)))
    with torch.no_grad():
        nn.init.orthogonal_(net[1].weight).mul_(torch.linspace(1, 1.2, 16)[:, None, None, None])
    balanced(net, exclude_first=False).step()


def refused_strategy() -> None:
    callback = FARMSTempBalance()
    strategy = type("DeepSpeedStrategy", (), {})()
    callback.setup(SimpleNamespace(callbacks=[callback], strategy=strategy), None, "fit")  # type: ignore[arg-type]


def two_callbacks() -> None:
    both = [FARMSTempBalance(), FARMSTempBalance()]
    both[0].setup(SimpleNamespace(callbacks=both), None, "fit")  # type: ignore[arg-type]


def refused_backend(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.state

    from farms_tb.training.huggingface import _check_backend

    state = SimpleNamespace(distributed_type=SimpleNamespace(value="DEEPSPEED"), _shared_state={})
    monkeypatch.setattr(accelerate.state, "AcceleratorState", lambda: state)
    _check_backend()


def refused_optimizer() -> None:
    from farms_tb.training.huggingface import _check_optimizer

    _check_optimizer(type("AdaLomo", (torch.optim.SGD,), {})([nn.Parameter(torch.zeros(2))], lr=0.1))


def other_settings() -> None:
    balanced().load_state_dict(balanced(lr_max_ratio=3).state_dict())


def attached_twice() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    first, second = TempBalance(net, optimizer), TempBalance(net, optimizer)
    del first, second


def without_lr() -> None:
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    del optimizer.param_groups[0]["lr"]
    TempBalance(net, optimizer)


def zeroed() -> nn.Module:
    net = make_net()
    nn.init.zeros_(net[5].weight)
    return net


def spectral(name: str) -> nn.Module:
    from neuralop.layers.spectral_convolution import SpectralConv

    return SpectralConv(4, 4, (4, 4), separable=name == "separable")


def timed(folder: Path, *rows: str, max_overhead: float = 0.02) -> Overhead:
    lines = ["what,epoch,step,seconds", *rows]
    return Overhead(max_overhead, write(folder / TIMINGS_FILE, "".join(f"{line}\n" for line in lines)))


def too_slow(folder: Path, _: pytest.MonkeyPatch) -> None:
    overhead = timed(folder, "first,0,0,0.3", "training,1,4,2.0")
    overhead.note_measurement("first", 0, 0, 0.0)
    overhead.note_training(1, 4)
    overhead.affords("plain", "plain")


def used_up(folder: Path, _: pytest.MonkeyPatch) -> None:
    overhead = timed(folder, "first,0,0,0.3")
    overhead.note_training(1, 4)


def start_in(folder: Path | str, overhead: Overhead) -> None:
    overhead.start(str(folder), torch.device("cpu"), share=False, write=True)


def sgd(**options: Any) -> Any:
    return balanced(**options)


MESSAGES: list[tuple[str, Callable[[Path, pytest.MonkeyPatch], Any]]] = [
    ("module 'farms_tb' has no attribute 'alpha'", always(lambda: farms_tb.alpha)),
    # What is measured
    ("expected a torch.nn.Module, got dict", always(lambda: analyze({}))),  # type: ignore[arg-type]
    ("ReLU has no layer that can be analysed; linear, convolution,", always(lambda: analyze(nn.ReLU()))),
    ("on the meta device", always(lambda: balanced(nn.Linear(9, 9, device="meta")))),
    ("measuring the layers failed on 1 of 2 ranks, on this rank 0: ", fails_on_one_rank),
    ("too little free memory on cpu for the windows that are solved at once", out_of_memory),
    ("NoMatrix holds no matrix", always(lambda: read_stacks(NoMatrix()))),
    (
        "two weights called '0': the rule registered for TwoOfOneName must give each its own `part`",
        always(lambda: analyze(nn.Sequential(TwoOfOneName()))),
    ),
    (
        "a matrix stack has three dimensions (K, R, C), got shape (9, 9)",
        always(lambda: MatrixStack(torch.zeros(9, 9))),
    ),
    ("weights of type torch.int64: not floating point", always(lambda: MatrixStack(torch.ones(1, 9, 9).long()))),
    ("separable spectral convolution: no in x out matrix", always(lambda: read_stacks(spectral("separable")))),
    # Options
    (
        "assign_func='noise_aware' compares alpha with that of random layers",
        always(lambda: sgd(assign_func="noise_aware", metric="entropy")),
    ),
    ("esd must be one of 'farms', 'full', got 'half'", always(lambda: sgd(esd="half"))),
    ("xmin_pos must be a number, got '2' of type str", always(lambda: sgd(xmin_pos="2"))),
    ("aspect_ratio must be finite, got inf", always(lambda: sgd(aspect_ratio=math.inf))),
    ("aspect_ratio must be above 0, got 0", always(lambda: sgd(aspect_ratio=0))),
    ("window must be at least 2, got 1", always(lambda: sgd(window=1))),
    ("sigmoid_max must be at most 100, got 101", always(lambda: sgd(sigmoid_max=101))),
    ("window must be an integer, got 9.5 of type float", always(lambda: sgd(window=9.5))),
    ("filter_zeros must be True or False, got 1 of type int", always(lambda: sgd(filter_zeros=1))),
    ("relative_cutoff must be below 1, got 1", always(lambda: sgd(relative_cutoff=1))),
    ("solver='cupy' needs CuPy: pip install cupy-cuda13x", without_cupy),
    ("CuPy: 2 bytes too many", cupy_out_of_memory),
    (
        "lr_min_ratio must not exceed lr_max_ratio, got lr_min_ratio=2 and lr_max_ratio=1.5",
        always(lambda: sgd(lr_min_ratio=2)),
    ),
    ("exclude must be a sequence of strings, got 'net'", always(lambda: sgd(exclude="net"))),
    (
        "assign_func='tb_sqrt' is defined for metric='alpha', whose values are above 1, got metric='norm'",
        always(lambda: sgd(assign_func="tb_sqrt", metric="norm")),
    ),
    (
        "the alpha of 'a' is infinite; pass None for a layer without an alpha",
        always(lambda: lr_ratios({"a": math.inf, "b": 2})),
    ),
    ("tb_log2 needs alphas above 1, got 0.5 for 'a'", always(lambda: lr_ratios({"a": 0.5, "b": 2}, "tb_log2"))),
    # Balancing
    (
        "this Adam is not one that is being balanced",
        always(lambda: balanced().param_groups(torch.optim.Adam([nn.Parameter(torch.zeros(1))]))),
    ),
    (
        "not a state of farms_tb: expected a dict with version, options",
        always(lambda: balanced().load_state_dict({})),
    ),
    (
        "the state has version 99, this farms_tb reads up to",
        always(lambda: balanced().load_state_dict({**balanced().state_dict(), "version": 99})),
    ),
    ("the checkpoint was written with other settings, measuring anew: lr_max_ratio was 3", always(other_settings)),
    ("exclude='head' matches no layer; the layers are 0, 2, 5, 7, 9", always(lambda: sgd(exclude=["head"]))),
    ("there is no optimizer to balance", always(lambda: TempBalance(make_net(), []))),
    (
        "layer-wise learning rates need a torch.optim.Optimizer, got float",
        always(lambda: TempBalance(make_net(), 0.1)),
    ),  # type: ignore[arg-type]
    (
        "none of the model's layers has a parameter in the optimizer: build the optimizer from",
        always(lambda: TempBalance(make_net(), torch.optim.SGD(make_net().parameters(), lr=0.1))),
    ),
    (
        "layers with no alpha keep the base learning rate: 5: all weights are zero",
        always(lambda: balanced(zeroed())),
    ),
    ("of the variance of alpha between the layers is sampling noise", always(lambda: balanced().step())),
    ("1 has the largest alpha and is a single matrix", always(single_on_top)),
    # Optimizers
    ("ReplacesGroups.step() replaced its param_groups during a step", always(lambda: step(ReplacesGroups))),
    ("AddsGroups.step() added or removed param groups during a step", always(lambda: step(AddsGroups))),
    ("WritesLr.step() wrote group['lr'] during a step", always(lambda: step(WritesLr))),
    ("SGD.step() was captured in a CUDA graph, which would go on with the learning rates of that", captured_step),
    ("SGD.step() was captured in a CUDA graph, which would go on with the", balanced_after_a_captured_step),
    ("keeps group['weight_sum'], which depends on the learning rate, during a", always(lambda: step(KeepsLrSum))),
    ("layer-wise learning rates need a torch.optim.Optimizer, got str", always(lambda: LayerwiseStep("SGD"))),  # type: ignore[arg-type]
    ("LBFGS takes one step along one direction for all layers", always(lambda: balanced(cls=torch.optim.LBFGS))),
    (
        "ZeroRedundancyOptimizer steps with parts of parameters: choose a plain optimizer or FSDP2",
        always(lambda: balanced(cls=type("ZeroRedundancyOptimizer", (torch.optim.SGD,), {}))),
    ),
    ("param group 0 of SGD has no 'lr' to scale: choose another optimizer", always(without_lr)),
    (
        "this SGD already has layer-wise learning rates: use one FARMSTempBalance or TempBalance",
        always(attached_twice),
    ),
    (
        "Rprop uses its lr for the first step alone: ratios have no effect",
        always(lambda: balanced(cls=torch.optim.Rprop)),
    ),
    (
        "layer-wise learning rates are untested with Own: check callback.param_groups(optimizer)",
        always(lambda: balanced(cls=type("Own", (torch.optim.SGD,), {"__module__": "own"}))),
    ),
    # Callbacks
    (
        "FARMSTempBalance has nothing to show before training: call trainer.fit first",
        always(lambda: FARMSTempBalance().param_groups(None)),
    ),  # type: ignore[arg-type]
    ("the trainer has two FARMSTempBalance callbacks: keep one", always(two_callbacks)),
    (
        "FARMSTempBalance does not work with DeepSpeedStrategy: DeepSpeed keeps the parameters",
        always(refused_strategy),
    ),
    (
        "lag_steps and max_overhead cannot be combined: what is measured beside training has no time of its own",
        always(lambda: FARMSTempBalance(lag_steps=10, max_overhead=0.02)),
    ),
    (
        "timings_file='a.csv' is for max_overhead, which is None",
        always(lambda: FARMSTempBalance(timings_file="a.csv")),
    ),
    (
        "measuring has taken 0.3 s and training 2 s: within max_overhead=0.02, layers are measured less often",
        too_slow,
    ),
    ("is used up: from here on the clock's timings are taken", used_up),
    (
        "no farms_timings.csv is written: s3://a is not a local folder; checkpoints hold the timings",
        always(lambda: start_in("s3://a", Overhead(0.1))),
    ),
    (
        "is where this run writes its own timings: move it elsewhere",
        lambda folder, _: start_in(folder, timed(folder, "first,0,0,0.3")),
    ),
    ("cannot be read: [Errno 2] No such file", lambda folder, _: Overhead(0.1, folder / "a.csv")),
    ("holds no timings: expected the header 'what,epoch,step,seconds'", lambda folder, _: timed(folder)),
    (
        "expected one of training, first, plain, histogram, table, an epoch, a step and seconds, got '1'",
        lambda folder, _: timed(folder, "1"),
    ),
    (
        "FARMSTrainerCallback has nothing to show before trainer.train",
        always(lambda: farms_tb.FARMSTrainerCallback().param_groups(None)),
    ),  # type: ignore[arg-type]
    ("FARMSTrainerCallback does not work with DeepSpeed: it keeps the parameters", refused_backend),
    (
        "does not work with AdaLomo: it moves the layers during the backward pass, not in step()",
        always(refused_optimizer),
    ),
    (
        "farms/alpha_std alone are logged; the callback's report",
        always(lambda: warn_of_many_layers(MAX_LOGGED_LAYERS + 1, make_net())),
    ),
    # Packages that are not there
    (
        'drawing needs matplotlib: pip install "farms-tb[plot]"',
        without("matplotlib", lambda folder: plot_alpha_curves(History({"a": Curve((0.0,), (0,), (2.0,))}))),
    ),
    (
        "to_dataframe() needs pandas: pip install pandas",
        without("pandas", lambda folder: Report({}).to_dataframe()),
    ),
    (
        'FARMSTrainerCallback needs transformers: pip install "farms-tb[transformers]"',
        without(
            "transformers.integrations.integration_utils",
            lambda _: runpy.run_path(str(PACKAGE / "huggingface.py")),
        ),
    ),
    (
        'reading a.safetensors needs safetensors: pip install "farms-tb[safetensors]"',
        without("safetensors", lambda folder: analyze_checkpoint(write(folder / "a.safetensors", ""))),
    ),
    # Pictures
    (
        "the history holds no farms/ measurement: train with FARMSTempBalance(log=True)",
        always(lambda: plot_alpha_curves(History())),
    ),
    ("the report holds no alpha: print(report) says why", always(lambda: plot_alpha_by_depth(Report({})))),
    (
        "no layer has both a FARMS and a full-matrix alpha: nothing to compare",
        always(lambda: plot_full_against_farms(Report({}), Report({}))),
    ),
    (
        "the report holds no histogram: measure with analyze(..., histogram=True)",
        always(lambda: plot_esds(Report({}))),
    ),
    (
        "no layer 'head' with a histogram; those with one are 0, 2, 5, 7, 9",
        always(lambda: plot_esd(analyze(make_net(), histogram=True), "head")),
    ),
    # A workspace in W&B
    (
        'a workspace needs wandb-workspaces: pip install "farms-tb[workspace]"',
        without("wandb_workspaces", lambda folder: build_workspace("team/project/run", ["farms/alpha_mean"])),
    ),
    *workspace_messages(),
    # Run folders
    ("no format of pictures '.x': matplotlib writes ", lambda folder, _: save_all(folder, suffix=".x")),
    ("there is no picture 'x': there are alpha, ", lambda folder, _: save_all(folder, pictures=["x"])),
    (
        "has no figures for the picture 'esd'. no checkpoint",
        lambda folder, _: save_all(RunFolder(folder, missing=("no checkpoint",)), pictures=["esd"]),
    ),
    ("no such folder: ", lambda folder, _: read_run_folder(folder / "run")),
    (
        "is no run folder: it holds neither a metrics.csv with farms/ columns",
        lambda folder, _: read_run_folder(folder),
    ),
    # Files
    ("no such file: ", lambda folder, _: analyze_checkpoint(folder / "a.pt")),
    ("is a directory without a .safetensors file or model.safetensors.index.json", in_folder()),
    (
        "has several files of weights, pass one of them: a.safetensors, b.safetensors",
        in_folder(a__safetensors="", b__safetensors=""),
    ),
    ("a.safetensors: no safetensors file, or one that is cut short or damaged", in_folder(a__safetensors="")),
    (
        "is no index: expected JSON whose 'weight_map' names a file",
        in_folder(model__safetensors__index__json="{}"),
    ),
    (
        "names files that are not beside it: a.safetensors",
        in_folder(model__safetensors__index__json=json.dumps({"weight_map": {"a.weight": "a.safetensors"}})),
    ),
    (
        "names tensors that its files do not hold: a.weight",
        lambda folder, _: analyze_checkpoint(indexed(folder, "a.weight", {"b.weight": torch.eye(9)})),
    ),
    ("a.pt: no checkpoint, or one that is empty, cut short or damaged (no pickle)", written("a.pt", "[]")),
    (
        "a.pt holds more than weights (torch.nn.modules.linear.Linear), and loading",
        written("a.pt", nn.Linear(9, 9)),
    ),
    (
        "a.pt holds no state dict: expected tensors by name, alone or as 'state_dict', got list",
        written("a.pt", []),
    ),
    ("a.pt has no weight that can be analysed", written("a.pt", {"fc.weight": torch.zeros(1, 9)})),
    ("a sparse weight (torch.sparse_coo)", always(lambda: stored("a.weight", torch.eye(9).to_sparse()))),
    (
        "part of a parametrized or factorised weight: build the model and use analyze(model)",
        always(lambda: stored("a.weight.core", torch.eye(9))),
    ),
    (
        "a parameter called 'table': its name does not tell what it is",
        always(lambda: stored("a.table", torch.eye(9))),
    ),
    (
        "quantised weights (torch.int8): dequantise the model first",
        always(lambda: stored("a.weight", torch.ones(9, 9).to(torch.int8))),
    ),
    ("embedding, by its name: not analysed by default", always(lambda: stored("wte.weight", torch.eye(9)))),
    (
        "a weight of 6 dimensions: neither linear nor convolution",
        always(lambda: stored("a.weight", torch.zeros(2, 2, 2, 2, 2, 2))),
    ),
]


Site = tuple[Path, int]


def run(function: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], set[Site]]:
    """Trigger a message; return what was said, and the lines of the package that were being run then."""
    said: list[str] = []
    lines: set[Site] = set()

    def warn(message: Any, *args: Any, **kwargs: Any) -> None:
        said.append(str(message))
        frame = sys._getframe(1)
        while frame is not None:
            lines.add((Path(frame.f_code.co_filename), frame.f_lineno))
            frame = frame.f_back  # type: ignore[assignment]

    with monkeypatch.context() as patch:
        patch.setattr(warnings, "warn", warn)
        try:
            function(folder, patch)
        except Exception as error:
            said.append(str(error))
            trace = error.__traceback__
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            if trace is not None:
                lines.add((Path(trace.tb_frame.f_code.co_filename), trace.tb_lineno))
    return said, lines


@pytest.mark.parametrize(("words", "trigger"), MESSAGES, ids=[words[:50] for words, _ in MESSAGES])
def test_message(words: str, trigger: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said, _ = run(trigger, tmp_path, monkeypatch)
    assert any(words in message for message in said), said


def sites() -> list[tuple[Path, ast.AST]]:
    """Every statement of the package that raises an exception of its own making, or warns."""
    return [
        (path, node)
        for path in sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("plots/*.py")])
        for node in ast.walk(ast.parse(path.read_text()))
        if is_warning(node) or (isinstance(node, ast.Raise) and not is_raised_again(node))
    ]


def is_warning(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("warn", "warn_once")


def is_raised_again(node: ast.Raise) -> bool:
    """A bare `raise`, or that of a variable: somebody else's exception, on its way."""
    return node.exc is None or (isinstance(node.exc, ast.Name) and node.exc.id.islower())


def test_nothing_is_missing_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: set[Site] = set()
    for number, (_, trigger) in enumerate(MESSAGES):
        (tmp_path / str(number)).mkdir()
        reached |= run(trigger, tmp_path / str(number), monkeypatch)[1]
    missing = [
        f"{path.name}:{node.lineno} {ast.unparse(node)}"  # type: ignore[attr-defined]
        for path, node in sites()
        if not any((path, line) in reached for line in range(node.lineno, node.end_lineno + 1))  # type: ignore[attr-defined]
    ]
    assert not missing, "no entry of MESSAGES reaches\n" + "\n".join(missing)
    assert len(sites()) > 60
