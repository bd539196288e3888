"""Reading a run folder: finished, half written, and none."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from farms_tb import FARMSTempBalance, Report, analyze
from farms_tb.viewing.page import write_page
from farms_tb.viewing.plots import save_all
from farms_tb.viewing.run_files import SeveralRunsError
from farms_tb.viewing.run_folder import RunFolder, read_run_folder
from tests.helpers import LIGHTNING_NOISE, Module
from tests.runs import train_run

pytestmark = LIGHTNING_NOISE
LAYERS = ("net.0", "net.2", "net.5", "net.7", "net.9")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Module]:
    folder = tmp_path_factory.mktemp("run")
    return folder, train_run(folder, xmin_pos=3.0)


@pytest.fixture
def run(trained: tuple[Path, Module], tmp_path: Path) -> Path:
    """A copy of the run to spoil."""
    return Path(shutil.copytree(trained[0], tmp_path / "run"))


def newer(path: Path) -> Path:
    """Make a file the newest by far."""
    os.utime(path, (2e9, 2e9))
    return path


def test_finished_run(trained: tuple[Path, Module]) -> None:
    folder, module = trained
    found = read_run_folder(folder)
    assert found.missing == ()
    assert found.layers == tuple(found.history.alpha) == LAYERS
    assert found.history.alpha["net.2"].epochs == (0, 1, 2, 3)
    assert found.options["xmin_pos"] == 3.0
    assert found.options["lr_max_ratio"] == 1.5
    assert found.weights in {
        f"version_0/checkpoints/{name}.ckpt (epoch 3, step 12)" for name in ("last", "epoch=2-step=12")
    }
    for esd, report in (("farms", found.farms), ("full", found.full)):
        assert report is not None
        # The options of the run, not the defaults.
        assert report.alphas == analyze(module, esd=esd, xmin_pos=3.0).alphas
        assert all(record.histogram for record in report.layers.values())
    assert found.farms is not None
    last = {name: curve.values[-1] for name, curve in found.history.alpha.items()}
    assert last == pytest.approx(found.farms.alphas)


def test_null_where_asked_for(run: Path) -> None:
    plain, asked = read_run_folder(run), read_run_folder(run, null=True)
    assert plain.farms is not None
    assert asked.farms is not None
    assert plain.farms.layers["net.5"].z_score is None
    assert asked.farms.layers["net.5"].z_score is not None


def test_null_of_a_noise_aware_run(tmp_path: Path) -> None:
    """It is the run's own, from the initial weights."""
    module = train_run(tmp_path, assign_func="noise_aware")
    (path,) = tmp_path.rglob("last.ckpt")
    state = torch.load(path, weights_only=True)["callbacks"][FARMSTempBalance().state_key]
    saved = state["balancer"]["report"]["net.5"]
    reports = {esd: analyze(module, esd=esd) for esd in ("farms", "full")}
    for arguments in ({}, {"null": True}, reports):
        found = read_run_folder(tmp_path, **arguments)
        assert found.farms is not None
        assert found.full is not None
        record = found.farms.layers["net.5"]
        assert record.null == (saved["null_mean"], saved["null_std"])
        assert record.alpha == pytest.approx(reports["farms"].alphas["net.5"])
        assert record.z_score == pytest.approx((record.alpha - saved["null_mean"]) / saved["null_std"])
        # The run measured no whole matrices, so it has no null of them.
        assert (found.full.layers["net.5"].null is None) == ("null" not in arguments)
        assert found.options["assign_func"] == "noise_aware"
    other = {esd: analyze(module, esd=esd, xmin_pos=3.0) for esd in ("farms", "full")}
    farms = read_run_folder(tmp_path, **other).farms
    assert farms is not None
    assert farms.layers["net.5"].null is None  # of other options, it would be the wrong one


def test_measured_already(run: Path) -> None:
    """Reports that are there are taken as they are, and checkpoints that cannot be read are no matter."""
    for path in run.rglob("*.ckpt"):
        path.write_bytes(b"")
    reports = {esd: analyze(Module(), esd=esd) for esd in ("farms", "full")}
    found = read_run_folder(run, **reports)
    assert found.farms is not None
    assert found.farms.alphas == reports["farms"].alphas
    assert found.missing == ()


def test_reports_that_would_be_dropped_are_refused(run: Path, tmp_path: Path) -> None:
    report = Report({}, {"esd": "farms"})
    for given, lacking in (("farms", "full"), ("full", "farms")):
        with pytest.raises(ValueError, match=f"{given}= without {lacking}="):
            read_run_folder(run, **{given: report})
    torch.save(Module().state_dict(), tmp_path / "model.pt")
    with pytest.raises(ValueError, match="for the folder of a run"):
        read_run_folder(tmp_path / "model.pt", farms=report, full=report)


def test_half_a_line_of_metrics(run: Path) -> None:
    path = run / "version_0" / "metrics.csv"
    whole = read_run_folder(run).history
    text = path.read_bytes()
    rows = text.split(b"\r\n")
    last = max(index for index, row in enumerate(rows) if b"," in row)
    path.write_bytes(b"\r\n".join(rows[:last]) + b"\r\n" + rows[last][: len(rows[last]) // 2])
    found = read_run_folder(run)
    assert found.missing == (
        "metrics.csv ends in half a line, which is left out: the run seems to be writing it.",
    )
    assert (
        found.history.alpha["net.2"].values
        == whole.alpha["net.2"].values[: len(found.history.alpha["net.2"].values)]
    )


def test_header_alone(run: Path) -> None:
    path = run / "version_0" / "metrics.csv"
    path.write_bytes(path.read_bytes()[:40])
    found = read_run_folder(run)
    assert found.history.layers == ()
    assert found.farms is not None
    assert found.missing == ("No metrics.csv with farms/ columns, so no curves: log with Lightning's CSVLogger.",)


@pytest.mark.parametrize("size", [0, 1000, -100])
def test_checkpoint_being_written(run: Path, size: int) -> None:
    """The one before is measured, and a sentence says so."""
    last = newer(run / "version_0" / "checkpoints" / "last.ckpt")
    content = last.read_bytes()
    last.write_bytes(content[:size])
    newer(last)
    found = read_run_folder(run)
    assert found.weights.startswith("version_0/checkpoints/epoch=2-step=12.ckpt")
    (sentence,) = found.missing
    assert sentence.startswith(
        "The checkpoint version_0/checkpoints/last.ckpt can't be measured, so it is passed over"
    )
    assert "cut short or damaged" in sentence
    assert "\n" not in sentence


def test_curves_alone(run: Path) -> None:
    shutil.rmtree(run / "version_0" / "checkpoints")
    found = read_run_folder(run)
    assert found.layers == LAYERS  # by name here: nothing else tells the depth
    assert found.farms is found.full is None
    assert found.missing == ("No checkpoint (*.ckpt) yet, so no spectra and no full-matrix alphas.",)


def test_checkpoint_alone(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    shutil.copy(run / "version_0" / "checkpoints" / "last.ckpt", folder)
    found = read_run_folder(folder)
    assert found.layers == LAYERS
    assert found.farms is not None
    assert found.weights == "last.ckpt (epoch 3, step 12)"


def test_checkpoint_without_the_callback(run: Path) -> None:
    for path in run.rglob("*.ckpt"):
        loaded = torch.load(path, weights_only=True)
        loaded["callbacks"].pop(FARMSTempBalance().state_key)
        torch.save(loaded, path)
    found = read_run_folder(run)
    assert found.farms is not None
    assert found.farms.options["xmin_pos"] == 2.0
    assert found.missing == ()


def test_several_runs_are_listed_and_none_is_chosen(run: Path) -> None:
    shutil.copytree(run / "version_0", run / "version_1")
    with pytest.raises(SeveralRunsError, match="several runs") as error:
        read_run_folder(run)
    assert str(run / "version_0") in str(error.value)
    assert str(run / "version_1") in str(error.value)
    for path in run.rglob("metrics.csv"):
        path.unlink()
    with pytest.raises(SeveralRunsError, match="version_1"):  # runs of checkpoints alone, too
        read_run_folder(run)


def test_a_version_without_measurements_is_no_run(run: Path) -> None:
    """Its checkpoints are not mixed with the curves of the other one."""
    shutil.copytree(run / "version_0", run / "version_1")
    (run / "version_1" / "metrics.csv").write_text("epoch,loss\n0,1\n")
    newer(run / "version_1" / "checkpoints" / "last.ckpt")
    assert read_run_folder(run).weights.startswith("version_0/")
    shutil.rmtree(run / "version_0" / "checkpoints")
    assert read_run_folder(run).farms is None


def test_a_run_with_other_runs_below(run: Path) -> None:
    folder = run / "version_0"
    shutil.copytree(folder, folder / "below")
    newer(folder / "below" / "checkpoints" / "last.ckpt")
    assert read_run_folder(folder).weights.startswith("checkpoints/")


def test_checkpoints_apart_from_the_metrics(run: Path) -> None:
    shutil.move(run / "version_0" / "checkpoints", run / "project" / "id" / "checkpoints")
    assert read_run_folder(run).weights.startswith("project/id/checkpoints/")


def test_settings_and_scores(run: Path) -> None:
    (run / "config.yaml").write_text("seed: 1\n")
    (run / "summary.json").write_text('{"test": {"test/acc": 0.5}}')
    found = read_run_folder(run)
    assert found.settings == "seed: 1\n"
    assert found.summary == {"test": {"test/acc": 0.5}}
    (run / "summary.json").write_text('{"test": {"te')
    assert read_run_folder(run).missing == ("summary.json is no JSON, or half written: it is left out.",)


def test_links_bring_nothing_into_the_page_and_overwrite_nothing(run: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"test": {"password": 42}}')
    for name in ("config.yaml", "summary.json", "report.html", "report.html.part"):
        (run / name).symlink_to(secret)
    found = read_run_folder(run)
    assert (found.settings, found.summary) == ("", {})
    assert [sentence.partition(" ")[0] for sentence in found.missing] == ["config.yaml", "summary.json"]
    assert write_page(found) == run / "report.html"
    assert "password" not in (run / "report.html").read_text()
    assert secret.read_text() == '{"test": {"password": 42}}'
    (run / "figures").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is a link"):
        save_all(found, pictures=["alpha"])
    assert not (tmp_path / "alpha.png").exists()


def test_links_inside_the_folder_are_followed(run: Path) -> None:
    """As Lightning's `last.ckpt` is one, on request."""
    (run / "settings").mkdir()
    (run / "settings" / "first.yaml").write_text("seed: 1\n")
    (run / "config.yaml").symlink_to(run / "settings" / "first.yaml")
    last = run / "version_0" / "checkpoints" / "last.ckpt"
    last.unlink()
    last.symlink_to("epoch=2-step=12.ckpt")
    found = read_run_folder(run)
    assert found.settings == "seed: 1\n"
    assert found.missing == ()


def test_dangling_links_and_folders_are_no_files(run: Path) -> None:
    checkpoints = run / "version_0" / "checkpoints"
    (checkpoints / "gone.ckpt").symlink_to("nowhere.ckpt")
    (checkpoints / "sharded.ckpt").mkdir()
    assert read_run_folder(run).missing == ()


@pytest.mark.parametrize("content", ["[" * 100_000, "1" * 5000, "{", "\udc80"])
def test_summaries_that_are_no_json(run: Path, content: str) -> None:
    (run / "summary.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    found = read_run_folder(run)
    assert found.summary == {}
    assert "summary.json" in found.missing[0]


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder: "):
        read_run_folder(tmp_path / "none")
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "metrics.csv").write_text("epoch,loss\n1,0.5\n")
    (tmp_path / "a.ckpt").write_bytes(b"half")
    with pytest.raises(
        ValueError, match=r"is no run folder: it holds neither a metrics.csv with farms/ columns"
    ) as e:
        read_run_folder(tmp_path)
    assert "The checkpoint a.ckpt can't be measured" in str(e.value)


def test_a_file_of_weights(tmp_path: Path) -> None:
    """Of a model that nobody saw train there are spectra all the same."""
    module = Module()
    torch.save(module.state_dict(), tmp_path / "model.pt")
    found = read_run_folder(tmp_path / "model.pt", null=True)
    assert found.farms is not None
    assert found.full is not None
    assert found.farms.alphas == analyze(module).alphas
    assert found.full.alphas == analyze(module, esd="full").alphas
    assert found.farms.layers["net.5"].histogram
    assert found.farms.layers["net.5"].null
    assert (found.path, found.weights, found.title, found.missing) == (tmp_path, "model.pt", "model.pt", ())
    with pytest.raises(ValueError, match="no checkpoint, or one that is empty"):
        read_run_folder(Path(__file__))


def test_key_names_the_weights(run: Path, tmp_path: Path) -> None:
    """In a file of weights, and in the checkpoints of a run."""
    averaged = Module()
    torch.save({"step": 3, "raw": Module().state_dict(), "ema": averaged.state_dict()}, tmp_path / "model.pt")
    found = read_run_folder(tmp_path / "model.pt", key="ema")
    assert found.farms is not None
    assert found.farms.alphas == analyze(averaged).alphas
    newest = newer(run / "version_0" / "checkpoints" / "last.ckpt")
    content = torch.load(newest, weights_only=True)
    torch.save({**content, "ema": averaged.state_dict()}, newest)
    newer(newest)
    of_run, without = read_run_folder(run, key="ema").farms, read_run_folder(run).farms
    assert of_run is not None
    assert without is not None
    assert of_run.alphas == analyze(averaged, xmin_pos=3.0).alphas != without.alphas


def test_layers_of_nothing() -> None:
    assert RunFolder(Path()).layers == ()
