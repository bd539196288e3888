"""PDEBench's files: what batches hold, which samples go where, what is read, what is refused."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import lightning
import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recipes.config import build
from recipes.data.pdebench import PDEBenchDarcy, PDEBenchFlow, split_samples
from recipes.errors import RecipeError
from recipes.train import train
from tests.helpers import LIGHTNING_NOISE
from tests.recipes.pdebench_files import FLOW_KEYS, write_darcy, write_flow, write_sparse_flow

pytestmark = LIGHTNING_NOISE

Settings = Callable[..., DictConfig]
IN_FILE = {"memory_gb": 0.0, "num_workers": 0}  # nothing kept, read by this process
KEPT = {"memory_gb": 1.0}
READING = pytest.mark.parametrize("reading", [IN_FILE, KEPT], ids=["in_file", "kept"])


def _collect(loader: DataLoader[Any]) -> tuple[Tensor, Tensor]:
    first, second = zip(*loader, strict=True)
    return torch.cat(first), torch.cat(second)


def _ready(data: Any) -> Any:
    data.prepare_data()
    data.setup("fit")
    return data


def _assert_same_set(found: Tensor, expected: np.ndarray) -> None:
    """Compare two batches of samples, whatever their order."""
    order, reference = (np.argsort(x.reshape(len(x), -1)[:, 0]) for x in (found.numpy(), expected))
    np.testing.assert_array_equal(found.numpy()[order], expected[reference])


# --- what batches hold ------------------------------------------------------------------------------------------


@READING
@pytest.mark.parametrize("every_point", [1, 4])
def test_darcy_batches(tmp_path: Path, reading: dict[str, Any], every_point: int) -> None:
    path = write_darcy(tmp_path / "darcy.hdf5")
    data = _ready(PDEBenchDarcy(tmp_path, path=path, every_point=every_point, batch_size=7, **reading))
    with h5py.File(path) as file:
        nu, u = (
            file["nu"][:][:, None, ::every_point, ::every_point],
            file["tensor"][:, :, ::every_point, ::every_point],
        )
    for loader, rows in (
        (data.test_dataloader(), np.r_[0:4]),
        (data.val_dataloader(), np.r_[13, 23, 33]),
    ):
        inputs, targets = _collect(loader)
        np.testing.assert_array_equal(inputs, nu[rows])
        np.testing.assert_array_equal(targets, u[rows])
    rows = np.setdiff1d(np.r_[4:40], [13, 23, 33])
    inputs, targets = _collect(data.train_dataloader())
    assert inputs.dtype == targets.dtype == torch.float32
    assert inputs.shape[1:] == targets.shape[1:] == data.sample_shape
    both = torch.cat([targets, inputs], dim=1)  # the solution first: it tells samples apart
    _assert_same_set(both, np.concatenate([u, nu], axis=1)[rows])


@READING
@pytest.mark.parametrize(
    ("dimensions", "thin"),
    [
        (1, {"every_point": 1, "every_frame": 1, "history": 10, "rollout_to": 21}),
        (1, {"every_point": 8, "every_frame": 5, "history": 2, "rollout_to": 5}),
        (1, {"every_point": 2, "every_frame": 3, "history": 1, "rollout_to": 4}),
        (2, {"every_point": 2, "every_frame": 1, "history": 10, "rollout_to": 12}),
        (2, {"every_point": 4, "every_frame": 4, "history": 3, "rollout_to": 6}),
    ],
)
def test_flow_batches(tmp_path: Path, reading: dict[str, Any], dimensions: int, thin: dict[str, int]) -> None:
    path = write_flow(tmp_path / "flow.hdf5", dimensions)
    options: dict[str, Any] = {"fraction": "1/6", "val_every": 12, "batch_size": 4, **thin, **reading}
    data = _ready(PDEBenchFlow(tmp_path, dimensions=dimensions, path=path, **options))
    with h5py.File(path) as file:
        everything = np.stack([file[key][:] for key in FLOW_KEYS[dimensions]], axis=2)  # (N, T, C, *space)
    points = (slice(None, None, thin["every_point"]),) * dimensions
    frames = everything[:, :: thin["every_frame"]][:, : thin["rollout_to"]][(..., *points)]
    past = thin["history"]

    for loader, rows in ((data.test_dataloader(), np.r_[0:4]), (data.val_dataloader(), np.r_[15, 27, 39])):
        history, future = _collect(loader)
        np.testing.assert_array_equal(history, frames[rows, :past])
        np.testing.assert_array_equal(future, frames[rows, past:])
    history, future = _collect(data.train_dataloader())
    assert history.dtype == future.dtype == torch.float32
    assert history.shape[1:] == (data.history, *data.sample_shape)
    assert future.shape[1:] == (thin["rollout_to"] - past, data.channels, *data.sample_shape[1:])
    _assert_same_set(torch.cat([history, future], dim=1), frames[4:40:6])


def test_published_grids_and_frames(settings: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "pdebench"
    folder.mkdir(parents=True)
    for dimensions, name, shape, expected in (
        (1, "1D_CFD_Rand_Eta0.01_Zeta0.01_periodic_Train.hdf5", (10_000, 101, 1024), (3, 128)),
        (2, "2D_CFD_Rand_M0.1_Eta0.01_Zeta0.01_periodic_128_Train.hdf5", (10_000, 21, 128, 128), (4, 64, 64)),
    ):
        write_sparse_flow(folder / name, shape)
        cfg = settings(f"data=pdebench_cfd{dimensions}d", "data.memory_gb=0", "data.num_workers=0")
        data = _ready(build(cfg, "data"))
        assert data.sample_shape == expected
        assert (cfg.task.in_channels, cfg.task.out_channels) == (data.history * data.channels, data.channels)
        assert {split: len(samples) for split, samples in data.datasets.items()} == {
            "train": 8100,
            "val": 900,
            "test": 1000,
        }
        history, future = next(iter(data.test_dataloader()))
        assert history.shape == (cfg.data.batch_size, 10, *expected)
        assert future.shape == (cfg.data.batch_size, 11, *expected)
    write_darcy(folder / "2D_DarcyFlow_beta0.1_Train.hdf5", side=8)
    data = _ready(build(settings("data=pdebench_darcy", "data.beta=0.1"), "data"))
    assert data.sample_shape == (1, 8, 8)


# --- which samples go where -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, 4, 10, 40, 180])
def test_published_training_sets(step: int) -> None:
    splits = split_samples(10_000, step, val_every=10)
    assert splits["test"] == list(range(1000))
    assert splits["train"] == [index for index in range(10_000) if index >= 1000 and (index - 1000) % step == 0]
    assert len(splits["train"]) == 9000 // step
    assert splits["val"] == split_samples(10_000, 1, val_every=10)["val"]


@pytest.mark.parametrize("total", [10, 57, 1000])
@pytest.mark.parametrize("step", [1, 3, 5, 8])
@pytest.mark.parametrize("val_every", [2, 3, 9])
def test_splits_are_disjoint_and_complete(total: int, step: int, val_every: int) -> None:
    splits = split_samples(total, step, val_every)
    together = [index for split in splits.values() for index in split]
    assert len(set(together)) == len(together)
    assert all(splits.values())
    assert splits["test"] == list(range(total // 10))
    assert step > 1 or sorted(together) == list(range(total))
    for split in ("val", "test"):
        assert splits[split] == split_samples(total, 1, val_every)[split]


@pytest.mark.parametrize(
    ("fraction", "count"), [(1, 36), (0.5, 18), ("1/4", 9), (1 / 18, 2), (0.02777777777777778, 1), ("0.1", 4)]
)
def test_fraction_counts_what_is_trained_on(tmp_path: Path, fraction: float | str, count: int) -> None:
    path = write_darcy(tmp_path / "darcy.hdf5", side=2)
    data = _ready(PDEBenchDarcy(tmp_path, path=path, fraction=fraction, val_every=36))
    held_out_of_training = 1 if fraction == 1 else 0
    assert len(data.datasets["train"]) == count - held_out_of_training
    assert len(data.datasets["val"]) == 1


def test_batches_depend_on_seed_and_epoch_alone(tmp_path: Path) -> None:
    path = write_darcy(tmp_path / "darcy.hdf5", side=4)
    orders = []
    for seed, epoch, reading in ((5, 0, KEPT), (5, 1, KEPT), (5, 1, IN_FILE), (6, 1, KEPT)):
        data = _ready(PDEBenchDarcy(tmp_path, path=path, batch_size=4, shuffle_seed=seed, **reading))
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        orders.append(_collect(loader)[1])
    assert torch.equal(orders[1], orders[2])
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[1], orders[3])


# --- how they are read ------------------------------------------------------------------------------------------


def test_kept_in_memory_up_to_the_limit(tmp_path: Path) -> None:
    path = write_flow(tmp_path / "flow.hdf5", 2)
    used = 40 * 4 * 12 * 8 * 8 * 4  # samples, channels, frames, points, bytes
    for limit, kept in ((1.001 * used / 1e9, True), (0.999 * used / 1e9, False)):
        options: dict[str, Any] = {"every_point": 2, "history": 2, "rollout_to": 12, "memory_gb": limit}
        data = _ready(PDEBenchFlow(tmp_path, dimensions=2, path=path, num_workers=2, **options))
        assert isinstance(data.datasets["train"], TensorDataset) == kept
        assert data.train_dataloader().num_workers == (0 if kept else 2)
    path.unlink()
    with pytest.raises(RecipeError, match=r"flow\.hdf5 is not in"):
        data.datasets["train"][0]


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_loader_processes(tmp_path: Path) -> None:
    path = write_flow(tmp_path / "flow.hdf5", 1)
    options: dict[str, Any] = {"history": 2, "rollout_to": 4, "batch_size": 5, "memory_gb": 0.0}
    expected, found = (_ready(PDEBenchFlow(tmp_path, path=path, num_workers=n, **options)) for n in (0, 2))
    found.datasets["train"][0]  # this process has the file open when the others start
    loader = found.train_dataloader()
    loader.multiprocessing_context = "fork"
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        reference = expected.train_dataloader()
        reference.sampler.set_epoch(epoch)
        for got, wanted in zip(_collect(loader), _collect(reference), strict=True):
            assert torch.equal(got, wanted)


def test_samples_travel_to_processes_that_are_spawned(tmp_path: Path) -> None:
    path = write_flow(tmp_path / "flow.hdf5", 1)
    samples = _ready(PDEBenchFlow(tmp_path, path=path, **IN_FILE)).datasets["train"]
    before = samples[3]
    copy = pickle.loads(pickle.dumps(samples))
    assert all(torch.equal(got, wanted) for got, wanted in zip(copy[3], before, strict=True))


LARGE = """
import resource, sys
from pathlib import Path
import h5py, torch
from recipes.data.pdebench import PDEBenchFlow

path = Path(sys.argv[1])
torch.zeros(10) @ torch.zeros(10)  # whatever torch allocates once
taken = 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize")))
resource.setrlimit(resource.RLIMIT_AS, (taken + 2**31, taken + 2**31))
try:
    with h5py.File(path) as file:
        file["density"][:]
except MemoryError:
    print("too large")
for workers in (0, 2):
    data = PDEBenchFlow(path.parent, 2, path, every_point=2, batch_size=8, num_workers=workers)
    data.prepare_data()
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        for _, (history, future) in zip(range(5), loader):
            assert history.shape == (8, 10, 4, 64, 64) and future.shape == (8, 11, 4, 64, 64)
    print("read by", workers)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """55 GB, as published, in a process that may take 2 GB."""
    path = write_sparse_flow(tmp_path / "large.hdf5", (10_000, 21, 128, 128))
    assert path.stat().st_size > 55e9
    assert path.stat().st_blocks * 512 < 1e6
    done = subprocess.run(
        [sys.executable, "-c", LARGE, str(path)], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.stdout.splitlines() == ["too large", "read by 0", "read by 2"], done.stderr


class _Mean(lightning.LightningModule):
    """Predicts one number."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(()))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        return (self.mean - batch[1]).square().mean()

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self.log("val/loss", (self.mean - batch[1]).square().mean())

    def test_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        self.log("test/loss", (self.mean - batch[1]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


@READING
def test_through_a_trainer(tmp_path: Path, reading: dict[str, Any]) -> None:
    path = write_flow(tmp_path / "flow.hdf5", 1)
    data = PDEBenchFlow(tmp_path, path=path, history=2, rollout_to=4, batch_size=100, **reading)
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, **options)
    model = _Mean()
    trainer.fit(model, datamodule=data)
    with h5py.File(path) as file:
        future = np.stack([file[key][:, 2:4] for key in FLOW_KEYS[1]])
    train = np.setdiff1d(np.r_[4:40], [13, 23, 33])
    assert model.mean.item() == pytest.approx(float(future[:, train].mean()), abs=1e-6)  # one step of Newton's
    (score,) = trainer.test(model, datamodule=data, verbose=False)
    assert score["test/loss"] == pytest.approx(
        float(np.square(future[:, :4] - model.mean.item()).mean()), rel=1e-5
    )


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: PDEBenchDarcy(folder, beta=3),
            "data.beta must be one of 0.01, 0.1, 1.0, 10.0, 100.0, got 3",
        ),
        (lambda folder: PDEBenchDarcy(folder, every_point=0), "data.every_point must be .* at least 1, got 0"),
        (lambda folder: PDEBenchDarcy(folder, val_every=1), "data.val_every must be a whole number of at least 2"),
        (
            lambda folder: PDEBenchDarcy(folder, fraction=0.3),
            "data.fraction must be one over a whole number, .* got 0.3",
        ),
        (lambda folder: PDEBenchDarcy(folder, fraction=0), "data.fraction must be one over .* got 0"),
        (lambda folder: PDEBenchDarcy(folder, fraction=2), "data.fraction must be one over .* got 2"),
        (lambda folder: PDEBenchDarcy(folder, fraction="1/0"), "data.fraction must be one over .* got 1/0"),
        (lambda folder: PDEBenchDarcy(folder, fraction="half"), "data.fraction must be one over .* got half"),
        (lambda folder: PDEBenchFlow(folder, dimensions=3), "data.dimensions must be 1 or 2, got 3"),
        (lambda folder: PDEBenchFlow(folder, every_frame=0), "data.every_frame must be .* at least 1, got 0"),
        (lambda folder: PDEBenchFlow(folder, history=0), "data.history must be .* at least 1, got 0"),
        (lambda folder: PDEBenchFlow(folder, history=21), "data.history=21 must be below data.rollout_to=21"),
    ],
)
def test_bad_options(tmp_path: Path, make: Callable[[Path], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


@pytest.mark.parametrize(
    ("name", "download", "generate"),
    [
        ("pdebench_darcy", "darcy_beta1.0 --data-dir {}` .*1.3 GB", "darcy beta=1.0"),
        ("pdebench_cfd1d", "cfd1d --data-dir {}` .*12.4 GB", "cfd1d"),
        ("pdebench_cfd2d", "cfd2d --data-dir {}` .*55.1 GB", None),
    ],
)
def test_missing_file_says_where_and_how(
    settings: Settings, tmp_path: Path, name: str, download: str, generate: str | None
) -> None:
    data = build(settings(f"data={name}"), "data")
    folder = tmp_path / "data"
    with pytest.raises(RecipeError, match=f"Train.hdf5 is not in {folder}/pdebench. ") as caught:
        data.sample_shape  # noqa: B018
    assert str(data.reader.path.name) in str(caught.value)
    with pytest.raises(RecipeError, match=f"`python -m recipes.data.download {download.format(folder)}"):
        data.prepare_data()
    made = f"`python -m recipes.generate {generate} paths.data_dir={folder}` makes one like it"
    assert (made in str(caught.value)) == (generate is not None)
    with pytest.raises(RecipeError, match=r"mine\.hdf5 is not in .* Correct data\.path, or leave it out: `python"):
        build(settings(f"data={name}", "data.path=mine.hdf5"), "data").prepare_data()


def _refuse(data: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        data.prepare_data()


def test_truncated_file(tmp_path: Path) -> None:
    path = write_darcy(tmp_path / "darcy.hdf5")
    path.write_bytes(path.read_bytes()[:-100])
    _refuse(
        PDEBenchDarcy(tmp_path, path=path), "darcy.hdf5 is cut short or no HDF5 file .* move it away.*download"
    )


def test_page_instead_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "flow.hdf5"
    path.write_text("<html>not found</html>")
    _refuse(PDEBenchFlow(tmp_path, path=path), "flow.hdf5 is cut short or no HDF5 file")


def test_file_of_another_problem(tmp_path: Path) -> None:
    path = write_darcy(tmp_path / "darcy.hdf5")
    _refuse(
        PDEBenchFlow(tmp_path, path=path),
        "no dataset 'density' of floats; it holds nu, tensor, x-coordinate, y-coordinate",
    )


def test_dataset_that_is_not_of_floats(tmp_path: Path) -> None:
    path = write_darcy(tmp_path / "darcy.hdf5")
    with h5py.File(path, "a") as file:
        del file["nu"]
        file["nu"] = np.ones((40, 16, 16), dtype=np.int32)
    _refuse(PDEBenchDarcy(tmp_path, path=path), "no dataset 'nu' of floats")


def test_flow_of_another_dimension(tmp_path: Path) -> None:
    path = write_flow(tmp_path / "flow.hdf5", 2)
    _refuse(
        PDEBenchFlow(tmp_path, dimensions=1, path=path), r"must have one shape \(N, T, X\), got density \(40, 21,"
    )


def test_shapes_that_differ(tmp_path: Path) -> None:
    path = write_flow(tmp_path / "flow.hdf5", 1)
    with h5py.File(path, "a") as file:
        del file["Vx"]
        file["Vx"] = np.ones((39, 21, 16), dtype=np.float32)
    _refuse(PDEBenchFlow(tmp_path, path=path), r"must have one shape .* Vx \(39, 21, 16\)")
    path = write_darcy(tmp_path / "darcy.hdf5")
    with h5py.File(path, "a") as file:
        del file["tensor"]
        file["tensor"] = np.ones((40, 16, 16), dtype=np.float32)
    _refuse(PDEBenchDarcy(tmp_path, path=path), r"tensor \(N, 1, X, Y\), got \(40, 16, 16\) and \(40, 16, 16\)")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_point": 3}, "data.every_point=3 does not divide a grid of 16 points"),
        ({"every_frame": 2}, "data.rollout_to=21 exceeds the 11 frames that data.every_frame=2 leaves of 21"),
        ({"rollout_to": 22}, "data.rollout_to=22 exceeds the 21 frames"),
        ({"fraction": "1/37"}, "data.fraction=1/37 of the 36 samples .* is less than one"),
        ({"val_every": 37}, "data.val_every=37 holds out none of the 36 samples"),
    ],
)
def test_options_that_do_not_fit_the_file(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write_flow(tmp_path / "flow.hdf5", 1)
    _refuse(PDEBenchFlow(tmp_path, path=path, **options), message)


def test_too_few_samples(tmp_path: Path) -> None:
    path = write_flow(tmp_path / "flow.hdf5", 1, samples=9)
    _refuse(PDEBenchFlow(tmp_path, path=path), "holds 9 samples; .* at least 10 are needed")


@READING
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_named(tmp_path: Path, reading: dict[str, Any], value: float) -> None:
    path = write_flow(tmp_path / "flow.hdf5", 1)
    with h5py.File(path, "a") as file:
        file["pressure"][17, 20, 3] = value
    options = {"history": 2, "rollout_to": 21, **reading}
    with pytest.raises(RecipeError, match=r"flow\.hdf5: sample 17 of 'pressure' holds NaN or infinity"):
        _collect(_ready(PDEBenchFlow(tmp_path, path=path, **options)).train_dataloader())
    _collect(_ready(PDEBenchFlow(tmp_path, path=path, **{**options, "rollout_to": 20})).train_dataloader())


def test_unreadable_sample(tmp_path: Path) -> None:
    """A compressed block that was damaged on disk."""
    path, shape = tmp_path / "flow.hdf5", (40, 21, 16)
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for key in FLOW_KEYS[1]:
            values = rng.standard_normal(shape, dtype=np.float32)
            file.create_dataset(key, data=values, chunks=(1, *shape[1:]), compression="gzip", fletcher32=True)
        place = file["density"].id.get_chunk_info(5).byte_offset
    damaged = bytearray(path.read_bytes())
    damaged[place + 50] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(RecipeError, match=r"cannot read sample 5 of 'density' .*`python -m recipes.data.download"):
        _ready(PDEBenchFlow(tmp_path, path=path))


# --- in a recipe ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("pdebench_darcy", "unet"),
        ("pdebench_cfd1d", "unet_cfd1d"),
        ("pdebench_cfd2d", "unet_cfd2d"),
    ],
)
@pytest.mark.usefixtures("fake_pdebench")
def test_recipe_runs(settings: Settings, name: str, model: str) -> None:
    small = ("model.net.width=4", "data.batch_size=2", "data.fraction=1/4", "trainer=cpu", "logger=csv")
    facts = train(settings(f"data={name}", f"model={model}", *small, "debug=one_batch"))
    assert np.isfinite(facts["test"]["test/nrmse"])


def test_recipe_without_its_file_stops_at_once(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^1D_CFD_.*_Train\.hdf5 is not in .*`python -m recipes\.data\.download cfd1d"
    ):
        train(settings("data=pdebench_cfd1d", "model=unet_cfd1d"))
    assert not any((tmp_path / "runs").rglob("*.*"))
