"""Records, rows and the printed table."""

import builtins
from dataclasses import FrozenInstanceError, fields

import pytest
import torch
from torch import nn

from farms_tb import EsdHistogram, LayerRecord, Report, analyze, lr_ratios
from farms_tb.report import DERIVED

REPORT = Report(
    {
        "conv1": LayerRecord(
            alpha=2.123456,
            ks_distance=0.17,
            alpha_hat=-1.25,
            spectral_norm=1234567.0,
            norm=30.5,
            pooled_stable_rank=17.3491,
            norm_stable_rank=1.15,
            entropy=0.9,
            rank_99=480,
            num_eigenvalues=567,
            kind="real",
            shape=(9, 64, 3),
            histogram=EsdHistogram((1, 2), -1.0, 1.0),
        ),
        "blocks.0.spectral": LayerRecord(
            spectral_norm=0.5, num_eigenvalues=8, status="low rank", kind="spectral", shape=(4, 20, 20)
        ),
        "head": LayerRecord(status="one row or one column", shape=(1, 64, 1), kind="real"),
        "rnn": LayerRecord(status="no rule for LSTM"),
    },
    {"esd": "farms"},
)

TABLE = """\
layer                K x R x C  alpha    KS  alpha_hat  spec. norm  rank 99 %    N  status
---------------------------------------------------------------------------------------------------------
conv1               9 x 64 x 3  2.123  0.17      -1.25   1.235e+06        85%  567  ok
blocks.0.spectral  4 x 20 x 20      -     -          -         0.5          -    8  low rank
head                1 x 64 x 1      -     -          -           -          -    -  one row or one column
rnn                          -      -     -          -           -          -    -  no rule for LSTM"""


def test_prints_as_a_table():
    assert str(REPORT).splitlines() == TABLE.splitlines()


def test_names_and_reasons_send_no_command_to_the_terminal():
    record = LayerRecord(status="no rule for \x1b[31mthis")
    text = str(Report({"conv\x1b[2J\nfc": record}))
    assert "\x1b" not in text
    assert len(text.splitlines()) == 3
    assert "conv\\x1b[2J\\nfc" in text


def test_an_empty_report_prints_its_header():
    header, line = str(Report({})).splitlines()
    assert header.startswith("layer  K x R x C  alpha")
    assert set(line) == {"-"}


def test_rows_are_flat_and_plain():
    first, *_, last = REPORT.rows()
    assert first["layer"] == "conv1"
    assert first["shape"] == "9x64x3"
    assert last["shape"] == ""
    assert last["alpha"] is None
    names = {field.name for field in fields(LayerRecord)} - {"histogram", "outliers"}
    for row in REPORT.rows():
        assert set(row) == names | {"layer", "verdict", *DERIVED}
        assert all(value is None or isinstance(value, (int, float, str)) for value in row.values())


def test_dataframe():
    frame = REPORT.to_dataframe()
    assert list(frame.index) == list(REPORT.layers)
    assert frame.index.name == "layer"
    assert frame.loc["conv1", "alpha"] == 2.123456
    assert frame["alpha"].isna().tolist() == [False, True, True, True]
    assert frame.loc["head", "status"] == "one row or one column"


def test_dataframe_without_pandas(monkeypatch):
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "pandas":
            raise ModuleNotFoundError("No module named 'pandas'", name="pandas")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"to_dataframe\(\) needs pandas: pip install pandas"):
        REPORT.to_dataframe()


def test_alphas_feed_the_maps():
    report = analyze(nn.Sequential(nn.Linear(30, 30), nn.Linear(30, 1), nn.Linear(20, 20)))
    assert list(report.alphas) == ["0", "1", "2"]
    assert report.alphas["1"] is None
    assert sorted(lr_ratios(report.alphas).values()) == [0.5, 1.0, 1.5]


def test_metric_is_none_where_there_is_no_alpha():
    conv, low_rank, *_ = REPORT.layers.values()
    assert conv.metric("spectral_norm") == 1234567.0
    assert low_rank.spectral_norm == 0.5
    assert low_rank.metric("spectral_norm") is None


def test_options_of_the_measurement_travel_with_it():
    report = analyze(nn.Linear(9, 9), esd="full", window=50, xmin_pos=3)
    assert {name: report.options[name] for name in ("esd", "window", "xmin_pos")} == {
        "esd": "full",
        "window": 50,
        "xmin_pos": 3,
    }


def test_holds_plain_numbers_only():
    report = analyze(nn.Sequential(nn.Linear(30, 30), nn.Conv2d(9, 9, 3)))
    for record in report.layers.values():
        for field in fields(record):
            value = getattr(record, field.name)
            assert value is None or type(value) in (int, float, str, tuple), field.name


def test_records_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        REPORT.layers["conv1"].alpha = 1.0


def test_rows_survive_a_checkpoint(tmp_path):
    torch.save(REPORT.rows(), tmp_path / "rows.pt")
    assert torch.load(tmp_path / "rows.pt", weights_only=True) == REPORT.rows()
