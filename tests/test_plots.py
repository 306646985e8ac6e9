"""Plots: what is drawn, both formats, the same bytes every time, errors."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from fabricated import PATCHES, QUESTIONS, results_folder, write_cell
from PIL import Image

from eval.report import plots
from eval.report.results import load, over_seeds


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return results_folder(tmp_path_factory.mktemp("results"))


def test_plots_are_written_in_both_formats_and_reproducible(folder, tmp_path, capsys):
    assert plots.main([str(folder), "--out", str(tmp_path)]) == 0
    names = {f"{task}-{what}" for task in ("mini_gqa", "mini_pope", "average") for what in ("tokens", "flops", "time")}
    files = list(tmp_path.iterdir())
    assert {file.name for file in files} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    assert len(capsys.readouterr().out.splitlines()) == len(files)
    again = plots.figures(load([folder])[0])["mini_gqa-tokens"]
    for kind in plots.FORMATS:
        assert plots.encode(again, kind) == (tmp_path / f"mini_gqa-tokens.{kind}").read_bytes()
    with Image.open(tmp_path / "mini_gqa-tokens.png") as picture:
        assert picture.width > 600
    text = (tmp_path / "mini_gqa-tokens.svg").read_text()
    ElementTree.fromstring(text)
    for word in ("mini_gqa, llava-mini (synthetic)", "vision tokens, mean over layers", "vanilla", "fastv", "mustdrop"):
        assert f">{word}</text>" in text
    assert "dc:date" not in text


def test_one_line_per_method_with_error_bars(folder):
    axes = plots.figures(load([folder])[0])["mini_gqa-tokens"].axes[0]
    drawn = {bars.get_label(): bars for bars in axes.containers}
    assert set(drawn) == {"vanilla", "fastv", "mustdrop"}
    line, _, (bars,) = drawn["fastv"]
    assert line.get_xydata().tolist() == [[11.0, 50.0], [20.0, 75.0]]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    rows = over_seeds(load([folder])[0])
    expected = rows[(rows.task == "mini_gqa") & (rows.method == "fastv")].sort_values("score").score_ci95
    assert ends == [pytest.approx(interval) for interval in expected]


def test_quantities(folder):
    rows = over_seeds(load([folder])[0])
    row = rows[(rows.label == "mustdrop_9") & (rows.task == "mini_gqa")]
    value = {name: plots.task_points(row, name).x[0] for name in plots.QUANTITIES}
    assert value == {"tokens": 11.0, "flops": pytest.approx(100 * 9 / PATCHES), "time": 10 + 9 + 5}


def test_average_leaves_out_what_lacks_a_task_and_adds_up_intervals(folder):
    rows = over_seeds(load([folder])[0])
    points = {(point.method, point.x): point for point in plots.average_points(rows, "tokens").itertuples()}
    assert set(points) == {("vanilla", PATCHES + 2), ("fastv", 20), ("mustdrop", 20), ("mustdrop", 11)}
    point = points["mustdrop", 11]
    (low, high) = rows[rows.score == point.y].score_ci95.iloc[0]
    # Two tasks with the same interval: half the sum of squares' root of each.
    assert point.y == pytest.approx(100 * 16 / QUESTIONS)
    ends = (point.y - (point.y - low) / 2**0.5, point.y + (high - point.y) / 2**0.5)
    assert (point.below, point.above) == pytest.approx(ends)


def test_what_was_not_measured_has_no_plot(tmp_path):
    write_cell(tmp_path, "mini_gqa", prefill_ms=None, score=0.0)
    write_cell(tmp_path, "mini_gqa", "mustdrop", 9, prefill_ms=None, flops_reductions={})
    figures = plots.figures(load([tmp_path])[0])
    assert set(figures) == {"mini_gqa-tokens", "mini_gqa-flops"}


def test_several_models_have_their_own_plots(tmp_path):
    write_cell(tmp_path, "mini_gqa")
    write_cell(tmp_path, "mini_gqa", model="llava-mini-2", key="1" * 12)
    assert {"llava-mini-mini_gqa-tokens", "llava-mini-2-mini_gqa-tokens"} <= set(plots.figures(load([tmp_path])[0]))


def test_wrong_folder_is_one_line(tmp_path, capsys):
    assert plots.main([str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "there is no folder" in error


def test_many_methods_have_their_legend_beside_the_axes(tmp_path):
    for number in range(plots.CROWDED + 2):
        for retain in (18, 9):
            write_cell(tmp_path, "mini_gqa", f"m{number}", retain, [1.0] * (QUESTIONS - number) + [0.0] * number)
    write_cell(tmp_path, "mini_gqa")
    figure = plots.figures(load([tmp_path])[0])["mini_gqa-tokens"]
    (axes,) = figure.axes
    assert axes.get_legend() is None and axes.get_xscale() == "log"
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["vanilla", *(f"m{number}" for number in range(plots.CROWDED + 2))]  # from high scores to low
    looks = {(bars[0].get_color(), bars[0].get_marker()) for bars in axes.containers}
    assert len(looks) == len(names)


def test_time_says_where_it_was_taken(folder):
    assert "a CPU; load not recorded" in plots.figures(load([folder])[0])["mini_gqa-time"].axes[0].get_xlabel()
