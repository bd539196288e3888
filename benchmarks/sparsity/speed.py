"""What planning and pruning cost: processor time and memory.

- Wanda of SmolLM2-135M in float32 with 8 sequences of 256 tokens, and the research code's way, in turn in one
  process.
- `farms-tb sparsity` and `farms-tb analyze`, each in a process of its own, of SmolLM2-135M and of folders with the
  matrices of two and of eight blocks of LLaMA-7B, filled with random numbers. One tensor is in memory at a time:
  more blocks take more time, not more memory.
- What Wanda and SparseGPT collect of one block of that size, for the latter the Hessians of its seven matrices.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.results import markdown_table
from benchmarks.rows import Row, Rows
from benchmarks.sparsity.reference import wanda
from benchmarks.timing import rounds
from farms_tb.sparsity import PlannedLayer, SparsityPlan, prune
from farms_tb.sparsity.evaluating import evaluating
from farms_tb.sparsity.prunable import planned_weights
from farms_tb.sparsity.sequential import planned_blocks, visit_blocks
from recipes.real import smollm2_folder

__all__ = ["KEYS", "collect_statistics", "measure_speed", "save_blocks", "speed_table"]

KEYS = ("what", "way")

_TARGET = 0.6
_ROUNDS = 2
_WANDA, _STATISTICS = "Wanda, SmolLM2, 8 x 256 tokens", "statistics of one block of LLaMA-7B, 256 tokens"
_BLOCKS = (2, 8)

_LLAMA_7B = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (4096, 4096),
    "self_attn.v_proj": (4096, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}

# Both print processor seconds and KiB. The first one runs a command of farms-tb.
_COMMAND = """
import json, pathlib, sys, time, torch
from typer.testing import CliRunner
from farms_tb.cli.app import app
torch.set_num_threads(1)
done = CliRunner().invoke(app, json.loads(sys.argv[1]))
assert done.exit_code == 0, done.output
peak = pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(time.process_time(), peak)
"""
_COLLECT = """
import json, sys
from benchmarks.sparsity.speed import collect_statistics
print(*collect_statistics(hessian=json.loads(sys.argv[1])))
"""


def measure_speed(rows: Rows) -> None:
    """Measure what has no row yet.

    Args:
        rows: of the file of costs: processor seconds, and memory in MiB where it is of interest.
    """
    if not any(row["what"] == _WANDA for row in rows):
        rows.add(_wanda_rows())
    wanted = [{"what": _STATISTICS, "way": way} for way in ("Wanda", "SparseGPT")]
    for run in rows.missing(wanted):
        rows.add([{**run, **_in_process(_COLLECT, run["way"] == "SparseGPT")}])
    _measure_commands("SmolLM2", smollm2_folder(), rows)
    for number in _BLOCKS:
        with tempfile.TemporaryDirectory() as folder:
            save_blocks(Path(folder), number)
            _measure_commands(f"{number} blocks of LLaMA-7B", Path(folder), rows)


def _measure_commands(what: str, folder: Path, rows: Rows) -> None:
    """Time a plan of a folder, and its measurement alone, where they have no row yet."""
    commands = {
        "farms-tb sparsity": ["sparsity", str(folder), "--target", str(_TARGET)],
        "farms-tb analyze": ["analyze", str(folder), "--no-null"],
    }
    for run in rows.missing([{"what": what, "way": way} for way in commands]):
        rows.add([{**run, **_in_process(_COMMAND, commands[str(run["way"])])}])


def speed_table(rows: Sequence[Row]) -> str:
    """Return a line for each thing that was measured; ratios are to the last way of the same thing."""
    last = {row["what"]: row for row in rows}
    return markdown_table(
        [
            {
                "what": str(row["what"]),
                "way": str(row["way"]),
                "processor seconds": f"{float(row['seconds']):.1f}",
                "ratio": _ratio(row, last[row["what"]]),
                "memory, MiB": f"{float(row['memory']):.0f}" if row["memory"] == row["memory"] else "",
            }
            for row in rows
        ]
    )


def _ratio(row: Row, last: Row) -> str:
    """Return the ratio of the seconds of two rows; nothing for a row and itself."""
    return "" if row is last else f"{float(row['seconds']) / float(last['seconds']):.2f}"


def _wanda_rows() -> list[Row]:
    """Time Wanda of farms_tb and of the research code, each on the dense model."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(smollm2_folder(), dtype=torch.float32).eval()
    blocks = list(model.model.layers)
    layers = {
        name: PlannedLayer(module.weight.numel(), _TARGET, block=".".join(name.split(".")[:3]))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.layers.")
    }
    plan = SparsityPlan(layers, _TARGET, "uniform")
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(49152, (1, 256), generator=generator)} for _ in range(8)]
    dense = {name: value.clone() for name, value in model.state_dict().items()}

    def ours() -> None:
        prune(model, plan, "wanda", calibration=batches)

    def theirs() -> None:
        wanda(model, blocks, batches, _TARGET)

    def put_back() -> None:
        model.load_state_dict(dense)

    times = rounds([ours, put_back, theirs, put_back], _ROUNDS)
    ways = {"farms_tb": min(times[0]), "research code's way": min(times[2])}
    return [
        {"what": _WANDA, "way": way, "seconds": seconds, "memory": float("nan")} for way, seconds in ways.items()
    ]


def _in_process(code: str, argument: Any) -> Row:
    """Run Python code in a process of its own; return the seconds and the memory that it prints."""
    command = [sys.executable, "-c", code, json.dumps(argument)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, kibibytes = map(float, done.stdout.split()[-2:])
    return {"seconds": seconds, "memory": kibibytes / 1024}


def save_blocks(folder: Path, number: int, shapes: dict[str, tuple[int, int]] | None = None) -> None:
    """Save the matrices of some blocks in bfloat16, one file a block, as a model of Hugging Face is saved.

    Args:
        folder: an empty folder.
        number: of blocks.
        shapes: `(out, in)` of each matrix by name; None for those of LLaMA-7B.
    """
    weight_map = {}
    generator = torch.Generator().manual_seed(0)
    for block in range(number):
        tensors: dict[str, Tensor] = {}
        for name, shape in (shapes or _LLAMA_7B).items():
            values = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            tensors[f"model.layers.{block}.{name}.weight"] = values
        file = f"model-{block + 1:05}-of-{number:05}.safetensors"
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")


class _LlamaBlock(nn.Module):
    """The seven matrices of a block of LLaMA-7B in bfloat16, each with an input of its size."""

    def __init__(self) -> None:
        super().__init__()
        for name, (rows, columns) in _LLAMA_7B.items():
            layer = nn.Linear(columns, rows, bias=False, dtype=torch.bfloat16)
            self.add_module(name.rpartition(".")[2], layer)

    def forward(self, x: Tensor) -> Tensor:
        """Call every matrix: those of the attention, then those of a gated MLP."""
        layers = dict(self.named_children())
        attended = layers["q_proj"](x) + layers["k_proj"](x) + layers["v_proj"](x)
        hidden = layers["o_proj"](attended)
        output: Tensor = layers["down_proj"](layers["gate_proj"](hidden) * layers["up_proj"](hidden))
        return output


def collect_statistics(*, hessian: bool) -> tuple[float, int]:
    """Collect what a method needs to know of the inputs of one block of LLaMA-7B, in this process.

    Args:
        hessian: whether X X^T is needed, as for SparseGPT.

    Returns:
        Processor seconds, and the rise of the peak memory of this process in KiB, with 256 tokens.
    """
    torch.set_num_threads(1)
    model = nn.Sequential(_LlamaBlock())
    layers = {
        f"0.{name}": PlannedLayer(layer.weight.numel(), _TARGET, "0") for name, layer in model[0].named_children()
    }
    weights = planned_weights(model, SparsityPlan(layers, _TARGET, "uniform"))
    batches = [{"input": torch.randn(1, 256, 4096, dtype=torch.bfloat16)}]
    seconds, memory = time.process_time(), _peak_kibibytes()
    with evaluating(model):
        for _ in visit_blocks(model, planned_blocks(model, weights), batches, hessian=hessian):
            pass
    return time.process_time() - seconds, _peak_kibibytes() - memory


def _peak_kibibytes() -> int:
    """Return the largest memory that this process has held (Linux).

    `getrusage` would not do: it counts also what the parent held when it started the process.
    """
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
