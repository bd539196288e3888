"""Data files: their layout, what stops and resumes them, what is refused."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from matplotlib.image import imread
from rich.console import Console

from recipes.config import CONFIG_DIR
from recipes.data.cache import Arrays
from recipes.data.pdebench import PDEBenchDarcy, PDEBenchFlow
from recipes.errors import RecipeError
from recipes.generate.__main__ import main, read_settings
from recipes.generate.cfd1d import CFD1DSpec
from recipes.generate.darcy import DarcySpec, sample
from recipes.generate.files import PartFile, Spec
from recipes.generate.preview import draw_preview
from recipes.generate.run import Job, generate, recorded_settings

ROOT = Path(__file__).resolve().parents[2]
SMALL = DarcySpec(resolution=8)
COARSE = CFD1DSpec(points=16)
SETTINGS = {"generator": "a test", "resolution": 8, "beta": 1.0}


def make(spec: Spec, file: Path, samples: int = 12, **options: bool | int) -> Path:
    generate(spec, Job(file, samples, **{"workers": 1, **options}), Console(quiet=True))  # type: ignore[arg-type]
    return file


def start(*arguments: str, **options: object) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    command = [sys.executable, "-m", "recipes.generate", *arguments, "preview=false"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, **pipes, **options)  # type: ignore[call-overload, no-any-return]


def run(*arguments: str) -> None:
    """Run the command line to its good end."""
    process = start(*arguments)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 0, errors


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def done(part: Path, samples: int) -> int:
    """Samples that a part file has on record; 0 before there is one."""
    return part.read_bytes()[-8 - samples : -8].count(1) if part.exists() else 0


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


@pytest.fixture(scope="module")
def darcy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(SMALL, tmp_path_factory.mktemp("data") / "pdebench" / SMALL.file_name, workers=2)


@pytest.fixture(scope="module")
def flow_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(COARSE, tmp_path_factory.mktemp("data") / "pdebench" / COARSE.file_name)


def test_darcy_file_has_pdebenchs_layout(darcy_file: Path) -> None:
    assert darcy_file.name == "2D_DarcyFlow_beta1.0_Train.hdf5"
    assert DarcySpec(beta=100).file_name == "2D_DarcyFlow_beta100.0_Train.hdf5"
    with h5py.File(darcy_file) as file:
        shapes = {name: (data.shape, data.dtype) for name, data in file.items()}
        assert shapes == {
            "nu": ((12, 8, 8), np.float32),
            "tensor": ((12, 1, 8, 8), np.float32),
            "x-coordinate": ((8,), np.float32),
            "y-coordinate": ((8,), np.float32),
        }
        np.testing.assert_allclose(file["x-coordinate"], (np.arange(8) + 0.5) / 8)
        assert file.attrs["beta"] == 1.0
        assert file.attrs["family"] == "grf"
        for index in range(12):
            a, u = sample(SMALL, "train", index)
            np.testing.assert_array_equal(file["nu"][index], a)
            np.testing.assert_array_equal(file["tensor"][index, 0], u)


def test_flow_file_has_pdebenchs_layout(flow_file: Path) -> None:
    assert flow_file.name == "1D_CFD_Rand_Eta0.01_Zeta0.01_periodic_Train.hdf5"
    with h5py.File(flow_file) as file:
        assert set(file) == {"density", "pressure", "Vx", "x-coordinate", "t-coordinate"}
        expected = COARSE.make(range(12))
        for name, values in expected.items():
            assert (file[name].shape, file[name].dtype) == ((12, 101, 16), np.float32)
            np.testing.assert_array_equal(file[name], values)
        np.testing.assert_allclose(file["t-coordinate"], 0.01 * np.arange(102), rtol=1e-6)
        np.testing.assert_allclose(file["x-coordinate"], -1 + (np.arange(16) + 0.5) / 8)
        assert (file.attrs["eta"], file.attrs["zeta"]) == (0.01, 0.01)


def test_data_modules_find_and_read_the_files(darcy_file: Path, flow_file: Path) -> None:
    darcy = PDEBenchDarcy(darcy_file.parents[1], batch_size=2, val_every=2, num_workers=0)
    flow = PDEBenchFlow(
        flow_file.parents[1], dimensions=1, every_point=1, batch_size=2, val_every=2, num_workers=0
    )
    for data in (darcy, flow):
        data.prepare_data()
        data.setup("fit")
        inputs, targets = next(iter(data.train_dataloader()))
        assert len(inputs) == len(targets) == 2


def test_file_is_the_same_for_any_number_of_workers(darcy_file: Path, tmp_path: Path) -> None:
    assert make(SMALL, tmp_path / "one.hdf5", workers=1).read_bytes() == darcy_file.read_bytes()
    assert make(SMALL, tmp_path / "three.hdf5", workers=3).read_bytes() == darcy_file.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.hdf5", "three.hdf5"]


def test_killed_run_goes_on_to_the_same_file(tmp_path: Path) -> None:
    """Killed, a run takes its workers along, and the next one goes on to a file that is bitwise identical."""
    file, part = tmp_path / "killed.hdf5", tmp_path / "killed.hdf5.part"
    arguments = ("cfd1d", "points=64", "samples=24", "workers=2", f"file={file}")
    whole = make(CFD1DSpec(points=64), tmp_path / "whole.hdf5", samples=24)
    process = start(*arguments)
    wait_for(lambda: done(part, 24))
    workers = children(process.pid)
    process.kill()
    process.communicate()
    assert len(workers) >= 2
    wait_for(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in workers))
    assert not file.exists()
    assert 0 < done(part, 24) < 24
    run(*arguments)
    assert file.read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    process = start(
        "cfd1d", "points=64", "samples=400", "workers=1", f"file={tmp_path}/x.hdf5", start_new_session=True
    )
    wait_for(lambda: done(tmp_path / "x.hdf5.part", 400))
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from here" in output
    assert "Traceback" not in errors


def test_samples_on_record_are_not_made_again(tmp_path: Path) -> None:
    file = tmp_path / "x.hdf5"
    with PartFile(file, SMALL, 3, SETTINGS) as part:
        part.write(1, {"nu": np.full((1, 8, 8), 7.0), "tensor": np.full((1, 1, 8, 8), 8.0)})
        assert part.missing == [0, 2]
        with pytest.raises(ValueError, match="2 samples are missing"):
            part.finish()
    with PartFile(file, SMALL, 3, SETTINGS) as part:
        assert part.missing == [0, 2]
        for index in part.missing:
            part.write(index, SMALL.make(range(index, index + 1)))
        part.finish()
    with h5py.File(file) as finished:
        assert (finished["nu"][1] == 7).all()
        assert (finished["tensor"][1] == 8).all()
        np.testing.assert_array_equal(finished["nu"][2], sample(SMALL, "train", 2)[0])


def test_stopped_between_cutting_and_renaming(darcy_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.hdf5"
    (tmp_path / "x.hdf5.part").write_bytes(darcy_file.read_bytes())
    make(SMALL, file)
    assert file.read_bytes() == darcy_file.read_bytes()


def test_stopped_before_the_part_file_had_its_name(darcy_file: Path, tmp_path: Path) -> None:
    (tmp_path / "x.hdf5.part.new").write_bytes(darcy_file.read_bytes()[:1000])
    assert make(SMALL, tmp_path / "x.hdf5").read_bytes() == darcy_file.read_bytes()


@pytest.fixture
def file_size_limit() -> Iterator[Callable[[int], None]]:
    """Let no file of this process grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_refused_write_leaves_what_can_be_resumed(
    tmp_path: Path, darcy_file: Path, file_size_limit: Callable[[int], None]
) -> None:
    file = tmp_path / "x.hdf5"
    settings = recorded_settings(SMALL, 12)
    with PartFile(file, SMALL, 12, settings) as part:
        part.write(0, SMALL.make(range(5)))
        with h5py.File(part.path, locking=False) as data:
            middle = data["tensor"].id.get_offset() + 7 * 256 + 100  # inside sample 7
        file_size_limit(middle)
        with pytest.raises(RecipeError, match=r"failed \(.*File too large\). 5 of 12 samples are in it"):
            part.write(5, SMALL.make(range(5, 9)))
    file_size_limit(resource.RLIM_INFINITY)
    assert make(SMALL, file).read_bytes() == darcy_file.read_bytes()


def fill(file: Path) -> None:
    """Write until the disk is full."""
    with file.open("wb", buffering=0) as other, pytest.raises(OSError, match="No space left"):
        any(not other.write(bytes(4096)) for _ in range(10**6))


def test_disk_that_fills_in_the_middle(tmp_path: Path) -> None:
    """A disk of 4 MB, filled by something else while a file of 2 MB is made on it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk takes root")
    arguments = ("cfd1d", "points=64", "samples=24", "workers=1", f"file={disk}/x.hdf5")
    try:
        process = start(*arguments)
        wait_for(lambda: done(disk / "x.hdf5.part", 24))
        fill(disk / "other")
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == 2
        assert "No space left on device" in errors
        assert "run the same command again to go on" in errors
        assert 0 < done(disk / "x.hdf5.part", 24) < 24
        with pytest.raises(RecipeError, match=r"takes another 0\.00.* GB, and its disk has 0 GB left"):
            make(CFD1DSpec(points=64), disk / "x.hdf5", samples=24)
        (disk / "other").unlink()
        run(*arguments)
        with h5py.File(disk / "x.hdf5") as file:
            np.testing.assert_array_equal(file["Vx"][20:], CFD1DSpec(points=64).make(range(20, 24))["Vx"])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_too_large_a_file_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"takes another .* GB, and its disk has .* GB left"):
        make(DarcySpec(resolution=4096), tmp_path / "x.hdf5", samples=10**9)
    assert list(tmp_path.iterdir()) == []


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    file = tmp_path / "x.hdf5"
    with PartFile(file, SMALL, 3, SETTINGS):
        pass
    with pytest.raises(RecipeError, match=r"begun with other settings: beta=1.0, not beta=2.0\. Repeat those"):
        PartFile(file, SMALL, 3, {**SETTINGS, "beta": 2.0})
    with pytest.raises(RecipeError, match=r"family=None, not family=grf"):
        PartFile(file, SMALL, 3, {**SETTINGS, "family": "grf"})


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    with (
        PartFile(tmp_path / "x.hdf5", SMALL, 3, SETTINGS),
        pytest.raises(RecipeError, match=r"another run is writing .*x\.hdf5\.part"),
    ):
        PartFile(tmp_path / "x.hdf5", SMALL, 3, SETTINGS)


def test_samples_that_are_not_finite_are_not_kept(tmp_path: Path) -> None:
    with PartFile(tmp_path / "x.hdf5", SMALL, 3, SETTINGS) as part:
        arrays = {name: np.zeros((1, *shape), dtype=np.float32) for name, shape in SMALL.fields.items()}
        part.write(0, arrays)
        with pytest.raises(RecipeError, match="not finite"):
            part.write(1, {name: np.full_like(values, np.inf) for name, values in arrays.items()})
        assert part.missing == [1, 2]


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(RecipeError, match=r"file system that has no locks .*file="):
        PartFile(tmp_path / "x.hdf5", SMALL, 3, SETTINGS)


def test_two_runs_that_begin_at_once_do_not_write_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looks for the unfinished file just before the first has made it."""
    with PartFile(tmp_path / "x.hdf5", SMALL, 3, SETTINGS) as first:
        before = first.path.stat().st_ino
        monkeypatch.setattr(Path, "exists", lambda path: False)
        with pytest.raises(RecipeError, match="another run is writing"):
            PartFile(tmp_path / "x.hdf5", SMALL, 3, SETTINGS)
        monkeypatch.undo()
        assert first.path.stat().st_ino == before
        assert list(tmp_path.iterdir()) == [first.path]


@pytest.mark.parametrize(
    "damaged",
    [
        pytest.param(lambda data: data[:-1], id="cut in the magic word"),
        pytest.param(lambda data: data[:-9], id="cut in the record"),
        pytest.param(lambda data: data[:-11] + bytes(11), id="zeros, as after a power cut"),
        pytest.param(lambda data: data + b"more", id="bytes appended"),
    ],
)
def test_a_damaged_record_is_not_that_of_a_finished_file(
    tmp_path: Path, damaged: Callable[[bytes], bytes]
) -> None:
    with PartFile(tmp_path / "x.hdf5", SMALL, 3, SETTINGS) as part:
        part.write(1, SMALL.make(range(1, 2)))
    part.path.write_bytes(damaged(part.path.read_bytes()))
    with pytest.raises(RecipeError, match=r"is damaged: its record .* delete it"):
        PartFile(tmp_path / "x.hdf5", SMALL, 3, SETTINGS)


def test_foreign_part_file_is_left_alone(tmp_path: Path) -> None:
    part = tmp_path / "x.hdf5.part"
    part.write_bytes(b"the beginning of a download")
    with pytest.raises(RecipeError, match=r"is not an unfinished file of this generator .* delete it"):
        make(SMALL, tmp_path / "x.hdf5")
    assert part.read_bytes() == b"the beginning of a download"


def test_unfinished_download_is_left_alone(darcy_file: Path, tmp_path: Path) -> None:
    """Both go to one folder, under names of their own."""
    download = tmp_path / "x.hdf5.download"
    download.write_bytes(b"the beginning")
    assert make(SMALL, tmp_path / "x.hdf5").read_bytes() == darcy_file.read_bytes()
    assert download.read_bytes() == b"the beginning"


def test_file_that_came_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, write = tmp_path / "x.hdf5", PartFile.write

    def write_while_a_download_ends(part: PartFile, start: int, arrays: Arrays) -> None:
        write(part, start, arrays)
        file.write_bytes(b"downloaded")

    monkeypatch.setattr(PartFile, "write", write_while_a_download_ends)
    with pytest.raises(RecipeError, match=r"x\.hdf5 exists; .* overwrite=true"):
        make(SMALL, file)
    assert file.read_bytes() == b"downloaded"


def test_finished_file_is_replaced_on_request_alone(darcy_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.hdf5"
    file.write_bytes(b"downloaded")
    with pytest.raises(RecipeError, match=r"x\.hdf5 exists; .* overwrite=true"):
        make(SMALL, file)
    assert file.read_bytes() == b"downloaded"
    assert make(SMALL, file, overwrite=True).read_bytes() == darcy_file.read_bytes()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(RecipeError, match=r"x\.hdf5\.part can't be written .*; choose another place"):
        make(SMALL, tmp_path / "data" / "x.hdf5")


@pytest.mark.parametrize("name", ["darcy_file", "flow_file"])
def test_preview_shows_every_field(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    draw_preview(request.getfixturevalue(name), tmp_path / "x.png", count=3)
    picture = imread(tmp_path / "x.png")
    assert min(picture.shape[:2]) > 400
    assert len(np.unique(picture.reshape(-1, picture.shape[-1]), axis=0)) > 50


def settings(kind: str, *overrides: str) -> tuple[Spec, Job]:
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        return read_settings(kind, compose(f"generate_{kind}", overrides=list(overrides)))


def test_settings_as_the_command_line_reads_them() -> None:
    spec, job = settings("darcy", "paths.data_dir=/d", "beta=10", "workers=3")
    assert spec == DarcySpec(family="bumps", resolution=128, beta=10.0)
    assert job == Job(Path("/d/pdebench/2D_DarcyFlow_beta10.0_Train.hdf5"), 10_000, workers=3)
    assert settings("cfd1d", "file=x.hdf5", "overwrite=true") == (
        CFD1DSpec(),
        Job(Path("x.hdf5"), overwrite=True),
    )


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        ("darcy", "resolution=many", "resolution: Value 'many' of type 'str' could not be converted to Integer"),
        ("darcy", "resolution=0", "resolution must be at least 2, got 0"),
        ("darcy", "family=fog", "family must be one of grf, bumps, got 'fog'"),
        ("darcy", "samples=0", "samples must be at least 1, got 0"),
        ("darcy", "workers=0", "workers must be at least 1, or null for one a core, got 0"),
        ("cfd1d", "points=-4", "points must be at least 8"),
        ("cfd1d", "overwrite=perhaps", "overwrite: Value 'perhaps'"),
        ("cfd1d", "file=x.png", "choose x.hdf5"),
    ],
)
def test_bad_settings(kind: str, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        settings(kind, override)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fluid",), "python -m recipes.generate darcy|cfd1d [setting=value ...], got 'fluid'"),
        ((), "say what to make"),
        (("darcy", "resolution=1"), "resolution must be at least 2"),
        (("darcy", "resolutoin=64"), "resolutoin"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipes.generate", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors


def test_command_line_makes_file_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["darcy", "resolution=16", "samples=3", "workers=1", f"paths.data_dir={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["recipes.generate", *arguments])
    main()
    name = "2D_DarcyFlow_beta1.0_Train"
    assert sorted(path.name for path in (tmp_path / "pdebench").iterdir()) == [f"{name}.hdf5", f"{name}.png"]
    output = capsys.readouterr().out
    assert "3/3" in output
    assert f"{name}.png" in output
