"""The comparison of all methods: its table, its paired intervals, and the script that makes both."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricated import QUESTIONS, results_folder, write_cell
from scipy.stats import binomtest

from eval.report import significance, table
from eval.report.layout import Layout, complete, table_rows
from eval.report.results import load, timing
from eval.report.significance import RIVAL, against, leaders
from eval.statistics import Comparison, over_tasks

ROOT = Path(__file__).resolve().parents[1]
TASKS = ("mini_gqa", "mini_pope")


def scores(right: int) -> list[float]:
    return [1.0] * right + [0.0] * (QUESTIONS - right)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two tasks; beside fastv and mustdrop, a composition, a rival at one budget, and yopo at none."""
    results_folder(tmp_path)
    for task in TASKS:
        write_cell(tmp_path, task, "mustdrop-more", 9, scores(17))
        write_cell(tmp_path, task, "uniform", 9, scores(13))
        write_cell(tmp_path, task, "yopo", 30, scores(20))
    return tmp_path


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"][2:]


def test_an_open_table_shows_all_there_is_best_first(folder):
    results = load([folder])[0]
    layout = complete(Layout("All", budgets=(18, 9), show=("ours",), costs=("tokens", "flops", "time")), results)
    assert (layout.model, layout.columns) == ("llava-mini", TASKS)
    found = table_rows(layout, results)
    order = [(line.method, line.retain) for line in found]
    assert order == [
        ("vanilla", None), ("mustdrop", 18), ("fastv", 18), ("mustdrop-more", 18), ("uniform", 18),
        ("mustdrop-more", 9), ("mustdrop", 9), ("uniform", 9), ("fastv", 9), ("yopo", 30),
    ]  # fmt: skip
    bold = table.leading(layout, found, results)
    text = table.render(layout, found, "markdown", bold=bold)
    rows = {(row[1], row[0]): row[2:] for row in rows_of(text)}
    # 17 and 16 of 24 are not to be told apart, 13 is one question more than chance allows.
    assert bold == {("mustdrop", 18), ("mustdrop-more", 9), ("mustdrop", 9), ("yopo", 30)}
    assert rows["mustdrop", "9"][2:] == ["**66.7 (2/2)**", "11", "75", "24"]
    assert rows["uniform", "9"][2] == "54.2 (2/2)" and rows["uniform", "18"] == ["-"] * 6
    assert "bold: " in text and "**" not in table.render(layout, found, "terminal", bold=bold)


def test_leaders_are_those_that_pairs_do_not_tell_from_the_best(folder):
    results = load([folder])[0]
    ranked = [("mustdrop-more", 9), ("mustdrop", 9), ("uniform", 9)]
    assert leaders(results, TASKS, ranked) == {("mustdrop-more", 9), ("mustdrop", 9)}


def test_open_tables_need_results_of_one_model(folder):
    write_cell(folder, "mini_gqa", model="llava-mini-2", key="1" * 12)
    with pytest.raises(ValueError, match="of llava-mini and llava-mini-2"):
        complete(Layout("All"), load([folder])[0])
    with pytest.raises(ValueError, match="none"):
        complete(Layout("All"), pd.DataFrame())
    assert complete(Layout("All", model="llava-mini"), load([folder])[0]).budgets == (30, 18, 9)


def test_commits_are_told_apart_where_they_differ(folder, capsys):
    layout = folder / "all.yaml"
    layout.write_text("title: All\nbudgets: [9]\nshow: [ours]\n")
    assert table.main([str(layout), "--results", str(folder)]) == 0
    assert "commit c0ffeec:" not in capsys.readouterr().out
    file = next((folder / "cells" / "mini_gqa").glob("uniform_9-*.json"))
    file.write_text(file.read_text().replace("c0ffee" * 6, "beef" * 10 + "-dirty"))
    assert table.main([str(layout), "--results", str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "commit beefbee-dirty: uniform\n" in printed and "commit c0ffeec: fastv, mustdrop, " in printed


def test_times_say_whether_the_machine_was_quiet(folder):
    results = load([folder])[0]
    assert timing(results) == "a CPU; load not recorded"
    for one in results.provenance:
        one["machine"] = {"cores": 2, "threads": 1, "load": 1.2}
    assert timing(results) == "a CPU; quiet, load 1.2 to 1.2 on 2 cores"
    results.provenance[0]["machine"] = {"cores": 2, "threads": 1, "load": 3.0}
    assert timing(results) == "a CPU; not quiet, load 1.2 to 3.0 on 2 cores"


# Paired


def test_every_method_against_one(folder):
    found = {(row.method, row.retain): row for row in against(load([folder])[0], "mustdrop")}
    assert set(found) == {("fastv", 18), ("fastv", 9), ("mustdrop-more", 9), ("uniform", 9)}
    row = found["uniform", 9]
    assert [row.tasks[task].difference for task in TASKS] == [pytest.approx(-100 * 3 / 24)] * 2
    assert row.average.difference == pytest.approx(-12.5)
    # Two tasks know more than one: the average's interval is narrower, by about the root of two.
    width = np.ptp(row.tasks["mini_gqa"].interval) / np.ptp(row.average.interval)
    assert width == pytest.approx(2**0.5, rel=0.15)
    assert found["fastv", 9].average is None and set(found["fastv", 9].tasks) == {"mini_gqa"}


def test_the_best_rival_is_not_built_on_mustdrop(folder):
    found = against(load([folder])[0], RIVAL)
    assert {(row.retain, row.reference) for row in found} == {(18, "fastv"), (9, "uniform")}
    assert next(row for row in found if row.method == "mustdrop-more").average.difference == pytest.approx(100 * 4 / 24)


def test_several_tasks_are_one_comparison():
    rng = np.random.default_rng(0)
    one = Comparison(50, 53.0, 50.0, 9, 3, rng.normal(3.0, 1.0, 20000))
    both = over_tasks([one, one])
    # Tasks are independent though they drew the same numbers: the spread shrinks by the root of two.
    assert both.interval == pytest.approx((3 - 1.96 / 2**0.5, 3 + 1.96 / 2**0.5), abs=0.05)
    assert (both.n, both.difference, both.only_a, both.only_b) == (100, 3, 18, 6)
    assert both.p == pytest.approx(binomtest(18, 24).pvalue)


def test_against_command(folder, capsys):
    assert significance.main([str(folder), "--against", "mustdrop", "--format", "github"]) == 0
    rows = {(row[1], row[0]): row for row in rows_of(capsys.readouterr().out)}
    assert rows["fastv", "9"][2] == "mustdrop" and rows["fastv", "9"][-1] == "-"
    # 6 questions lost and none won: p = 2 / 2**6, which Holm's correction over three averages raises above 0.05.
    assert rows["uniform", "9"][-1].startswith("-12.5 (") and rows["uniform", "9"][-1].endswith(")")
    assert significance.main([str(folder), "--against", "uniform", "--format", "github"]) == 0
    rows = {row[1]: row for row in rows_of(capsys.readouterr().out)}
    assert rows["mustdrop-more"][-1].startswith("+16.7 (") and rows["mustdrop-more"][-1].endswith("*")
    assert significance.main([str(folder), "--against", "mustdorp"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--against: got 'mustdorp'" in error


def test_script_lists_the_comparison_without_running_it(tmp_path):
    environment = {**os.environ, "LIMIT": "12", "OUT": str(tmp_path / "out")}
    command = ["bash", str(ROOT / "scripts" / "compare.sh"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "left out: sparsevlm" in done.stdout and "mustdrop" in done.stdout and not (tmp_path / "out").exists()
