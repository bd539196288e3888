"""The blocks that an interrupted run of pruning had finished.

A folder holds `run.json`, which says what was being done, and for each finished block a file with the masks of its
weights and, after SparseGPT, the corrected entries. Each file is written whole or not at all, and begins with the
SHA-256 of the rest: one that a disk or a copy has damaged since is removed, and its block pruned again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from farms_tb.atomic_write import atomic_path, write_text_atomically
from farms_tb.sparsity.calibration import Batch, batch_bytes
from farms_tb.sparsity.methods import Pruned
from farms_tb.sparsity.prunable import PrunableWeight
from farms_tb.sparsity.prune_report import PrunedLayer
from farms_tb.sparsity.sequential import Block
from farms_tb.weights.config import json_object

_RUN = "run.json"
_DIGEST = 32
"""Bytes of the digest at the start of a block's file."""
_WEIGHTS = "weights"
_REST = "unplanned weights or buffers"
_HALF_PRUNED = (
    ". If a call that was stopped has pruned a part of this model, load the model anew and repeat the call"
)
_CHUNK = 2**24
"""Entries of a tensor that are brought to the CPU at a time, so that no copy of an embedding is needed."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder of finished blocks.

    Attributes:
        folder: where they are.
    """

    folder: Path

    def has(self, block: str) -> bool:
        """Return whether a block, given by its path, is finished."""
        return self._file(block).is_file()

    def write(self, block: Block, chosen: Mapping[str, Pruned], reported: Mapping[str, PrunedLayer]) -> None:
        """Write a finished block.

        Args:
            block: the block.
            chosen: mask and corrected entries of each of its weights, by name.
            reported: what is reported of each.

        Raises:
            OSError: the disk is full, or the folder cannot be written to.
        """
        content = {}
        for weight in block.weights:
            result = chosen[weight.name]
            values = {"mask": _packed(result.mask), "report": asdict(reported[weight.name])}
            if result.corrected is not None:
                # As the weight will hold it: half of float32 for most models.
                values["corrected"] = result.corrected.to(weight.tensor.dtype).cpu()
            content[weight.name] = values
        # Through memory, since torch.save turns a full disk into a RuntimeError.
        whole = BytesIO()
        torch.save(content, whole)
        digest = hashlib.sha256(whole.getbuffer()).digest()
        with atomic_path(self._file(block.path)) as path, path.open("wb") as file:
            file.write(digest)
            file.write(whole.getbuffer())

    def read(self, block: Block) -> tuple[dict[str, Pruned], dict[str, PrunedLayer]]:
        """Return the masks and corrected entries of a finished block's weights, and what was reported of them."""
        device = block.weights[0].tensor.device
        with self._file(block.path).open("rb") as file:
            file.seek(_DIGEST)
            content = torch.load(BytesIO(file.read()), map_location=device, weights_only=True)
        chosen = {}
        for weight in block.weights:
            values = content[weight.name]
            mask = _unpacked(values["mask"], weight.tensor.shape).to(device)
            chosen[weight.name] = Pruned(mask, values.get("corrected"))
        return chosen, {name: PrunedLayer(**values["report"]) for name, values in content.items()}

    def remove_damaged(self) -> None:
        """Remove files of blocks that no longer hold what was written, so that those blocks are pruned again."""
        for path in self.folder.glob("block-*.pt"):
            with path.open("rb") as file:
                expected = file.read(_DIGEST)
            if file_digest(path, start=_DIGEST) != expected:
                path.unlink()

    def _file(self, block: str) -> Path:
        """Return the file of a block; any path is made a name that no file system objects to."""
        return self.folder / f"block-{hashlib.sha256(block.encode()).hexdigest()[:16]}.pt"


def open_checkpoint(
    folder: Path,
    facts: Mapping[str, str],
    weights: Sequence[PrunableWeight],
    model: nn.Module,
    batches: Sequence[Batch],
) -> Checkpoint:
    """Open a folder for finished blocks, and check that those in it belong to the same run.

    Args:
        folder: where they are.
        facts: what the run was asked for.
        weights: the weights to prune.
        model: the dense model that they are in. Inputs of blocks depend on its other parameters and buffers, too.
        batches: the calibration data.

    Raises:
        ValueError: another run's blocks are there, or those of another version.
        OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {name: [value.encode()] for name, value in facts.items()}
    # The parameters themselves: `weight.tensor` is a new object each time, and may be a part of one.
    planned = {id(weight.module._parameters[weight.parameter]) for weight in weights}
    contents[_WEIGHTS] = [_tensor_digest(tensor) for tensor in _state(model) if id(tensor) in planned]
    contents[_REST] = [_tensor_digest(tensor) for tensor in _state(model) if id(tensor) not in planned]
    contents["calibration"] = [part for batch in batches for part in batch_bytes(batch)]
    note_run(folder, contents)
    checkpoint = Checkpoint(folder)
    checkpoint.remove_damaged()
    return checkpoint


def note_run(folder: Path, facts: Mapping[str, Sequence[bytes]]) -> None:
    """Write down what a run is, in the folder of its state, or check that it is the run whose state is there.

    Args:
        folder: an existing folder.
        facts: what two runs must have in common for the one to go on where the other stopped, by name. Digests of
            it are written.

    Raises:
        ValueError: the folder holds the state of another run, the message names what differs; or what says so is
            damaged.
        OSError: the folder cannot be written to.
    """
    run = {name: _digest(*contents) for name, contents in facts.items()}
    _check_same_run(folder / _RUN, run)
    write_text_atomically(folder / _RUN, json.dumps(run, indent=1) + "\n")


def _check_same_run(path: Path, run: Mapping[str, str]) -> None:
    """Refuse to go on with the state of another run, or with one that does not say whose it is."""
    if not path.is_file():
        return
    found = json_object(path)
    if found is None:
        raise ValueError(
            f"{path} is damaged, so it is not known whose state is next to it: expected JSON, an object with "
            f"{', '.join(run)}. Delete {path.parent} to start anew"
        )
    if found.keys() != run.keys():
        raise ValueError(
            f"{path.parent} was written by another version of farms_tb and cannot be read: "
            "go on with that version, or delete that folder to start anew"
        )
    differ = [name for name in run if found[name] != run[name]]
    if differ:
        raise ValueError(
            f"{path.parent} holds the state of another run, with other {', '.join(differ)}: pass the same "
            f"arguments as then to go on, or delete that folder{_HALF_PRUNED if _WEIGHTS in differ else ''}"
        )


def _packed(mask: Tensor) -> Tensor:
    """Return a boolean mask as bytes of 8 entries each."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy()))


def _unpacked(bits: Tensor, shape: torch.Size) -> Tensor:
    """Undo `_packed`."""
    entries = np.unpackbits(bits.cpu().numpy(), count=shape.numel())
    return torch.from_numpy(entries).bool().view(shape)


def file_digest(path: Path, start: int = 0) -> bytes:
    """Return the SHA-256 of a file.

    Args:
        path: the file.
        start: the first byte that counts.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while content := file.read(2**20):
            digest.update(content)
    return digest.digest()


def _digest(*contents: bytes) -> str:
    """Return a short digest of bytes."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()[:32]


def _state(model: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters of a model and its persistent buffers, the statistics of BatchNorm for example."""
    yield from model.parameters()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer


def _tensor_digest(tensor: Tensor) -> bytes:
    """Return a digest of a tensor's bytes: the same on any device and with any number of threads."""
    digest = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=_DIGEST)
    for chunk in torch.split(tensor.data.flatten(), _CHUNK):
        # As bytes, since NumPy knows no bfloat16.
        digest.update(chunk.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.digest()
