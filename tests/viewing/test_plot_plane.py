"""Verdicts in pictures: the plane of effect against rank share, and marks of alpha by depth."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from torch import nn

from farms_tb import analyze
from farms_tb.viewing.plots import plot_alpha_by_depth, plot_effect_plane


def test_each_layer_is_drawn_at_its_effect(tmp_path: Path) -> None:
    report = analyze(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)), null=True)
    (axes,) = plot_effect_plane(report, tmp_path / "plane.png").axes
    (drawn,) = axes.containers
    expected = [[record.effect, record.rank_share] for record in report.layers.values()]
    assert drawn.lines[0].get_xydata().tolist() == expected
    assert drawn.get_label() == "random"
    assert (tmp_path / "plane.png").stat().st_size > 5000


def test_without_nulls_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="null=True"):
        plot_effect_plane(analyze(nn.Linear(64, 96)))


def test_alpha_by_depth_marks_layers_that_ask_for_a_look() -> None:
    report = analyze(nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)), null=True)
    (axes,) = plot_alpha_by_depth(report).axes
    (marks,) = axes.collections[-1:]
    assert marks.get_label() == "random"
    assert marks.get_offsets().tolist() == [[0, report.layers["0"].alpha], [1, report.layers["1"].alpha]]
