"""Tables: published figures, results read from folders, contents, comparison, formats, errors, significance."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fabricated import BUDGETS, results_folder, write_cell

from eval.report import published, significance, table
from eval.report.layout import Layout, read_layout, table_rows
from eval.report.results import load, over_seeds, records

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("gqa", "mme", "pope")
REAL = Layout("A table", "llava-1.5-7b", COLUMNS, (64,), ("fastv", "mustdrop"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return results_folder(tmp_path_factory.mktemp("some") / "results")


def real(folder: Path, task: str, method: str, retain: int, score: float, half: float, **more) -> None:
    """A cell of a real model, whose interval reaches ``half`` to both sides."""
    more = {"model": "llava-v1.5-7b", **more}
    write_cell(
        folder, task, method, retain, benchmark=task, synthetic=False, score=score,
        score_ci95=[score - half, score + half], n=1000, **more,
    )  # fmt: skip


@pytest.fixture
def real_folder(tmp_path) -> Path:
    """GQA agrees with the paper, MME does not, POPE has no result of mustdrop, fastv has none at all."""
    real(tmp_path, "gqa", "vanilla", 576, 62.0, 1.0)
    real(tmp_path, "mme", "vanilla", 576, 1800, 30)
    real(tmp_path, "pope", "vanilla", 576, 86.0, 1.0)
    real(tmp_path, "gqa", "mustdrop", 64, 54.04, 0.9)
    real(tmp_path, "mme", "mustdrop", 64, 1500, 40)
    return tmp_path


# Published figures


@pytest.mark.parametrize(
    ("column", "method", "retain", "figures"),
    [
        ("gqa", "vanilla", None, [61.9]),
        ("mme", "vanilla", 576, [1862]),
        ("gqa", "mustdrop", 64, [53.1]),
        ("mmbench_cn", "mustdrop", 128, [55.2]),
        ("vizwiz", "sparsevlm", 192, [50.5]),
        ("gqa", "fastv", 64, [46.1, 44.1]),
        ("mmbench_cn", "tome", 64, []),
        ("gqa", "mustdrop", 63, []),
    ],
)
def test_published_figures(column, method, retain, figures):
    found = [row for row in published.rows("llava-1.5-7b", method, retain) if column in row.values]
    assert [row.values[column] for row in found] == figures and all(row.source for row in found)


def test_published_names_and_other_models():
    assert published.canonical("llava-v1.5-7b") == published.canonical("llava-1.5-7b-hf") == "llava-1.5-7b"
    assert published.rows("llava-mini", "mustdrop", 64) == []
    (row,) = (row for row in published.rows("llava-next-7b", "mustdrop", 320) if "ocrbench" in row.values)
    assert row.values["ocrbench"] == 382
    assert published.rows("llava-next-7b-efficiency", "vanilla", None)[0].values["seconds"] == 2176


def test_every_method_of_the_papers_table_of_next_has_its_figures():
    layout = read_layout(ROOT / "configs" / "tables" / "next.yaml")
    found = {row.method: row for row in published.models()["llava-next-7b"].rows if row.retain == 320}
    assert set(found) <= set(layout.methods) and len(found) == 10
    assert found["hired"].values["gqa"] == 59.3 and found["globalcom2"].values["ocrbench"] == 375
    assert "ocrbench" not in found["holov"].values  # not printed there, so not invented
    text = table.render(layout, table_rows(layout, pd.DataFrame()), "terminal")
    assert rows_between(text, "160", "-:") == []
    shares = [line.strip() for line in text.splitlines() if " at 320" in line]
    assert (
        shares[0] == "tops: 100.0 at 640, 99.1 at 320, 96.4 at 160 (TOPS)" and "mustdrop: 90.4 at 320 (DART)" in shares
    )


@pytest.mark.parametrize(("name", "budget"), [("next", 320), ("video", 194)])
def test_docs_print_the_published_figures_as_they_are(name, budget):
    layout = read_layout(ROOT / "configs" / "tables" / f"{name}.yaml")
    layout = replace(layout, show=("published",), budgets=(budget,))
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    rendered = table.render(layout, table_rows(layout, pd.DataFrame()), "markdown")
    printed = [line for line in rendered.splitlines() if line[:1] == "|"]
    assert len(printed) > 3 and "\n".join(printed) in text
    for share in published.shares(layout.model):
        assert all(f"{value:.1f}" in text for value in share.values), share.method


def rows_between(text: str, first: str, end: str) -> list[str]:
    """Published rows of a terminal table from the first row of a budget to the line that begins with `end`."""
    body = text[text.index(f"\n{first:>8} ") : text.index(f"\n{end}")]
    return [line for line in body.splitlines() if "published" in line]


def test_results_of_the_flat_protocol_are_the_papers_model(tmp_path):
    """Papers' 2,880 tokens are what `protocol: flat` gives; it goes by a name of its own."""
    real(tmp_path, "gqa", "vanilla", 2880, 64.0, 1.0, model="llava-v1.6-vicuna-7b-flat")
    real(tmp_path, "gqa", "mustdrop", 320, 57.0, 1.0, model="llava-v1.6-vicuna-7b-flat")
    layout = Layout("Flat", "llava-next-7b", ("gqa",), (320,), ("mustdrop",))
    rows = rows_of(table.render(layout, table_rows(layout, load([tmp_path])[0]), "markdown"))
    assert rows["vanilla", "published a"][0] == "64.2" and rows["mustdrop", "difference a"][0] == "-0.3"


def test_shares_stand_below_a_table_and_only_at_its_budgets(folder):
    layout = Layout("Shares", "video-llava-7b", ("tgif",), (136,), ("fastv",))
    text = table.render(layout, table_rows(layout, pd.DataFrame()), "markdown")
    assert "trevs: 99.0 at 136 (TReVS)" in text and "over its own benchmarks" in text
    assert rows_of(text)["fastv", "ours"] == ["-", "-"]
    for other in (replace(layout, budgets=(194,)), replace(layout, show=("ours",))):
        assert "over its own benchmarks" not in table.render(other, table_rows(other, pd.DataFrame()), "markdown")


@pytest.mark.parametrize(
    ("change", "line"),
    [({"retain": [136, 64]}, "retain is"), ({"retain": ["136"]}, "retain is"), ({"source": ""}, "source is ''")],
)
def test_a_wrong_share_is_named(change, line):
    share = published.Share(**{"method": "trevs", "source": "TReVS", "retain": [136], "values": [99.0], **change})
    with pytest.raises(ValueError, match=f"^shares: {line}"):
        published._check_share(share, "shares")


@pytest.mark.parametrize("retain", [192, 128, 64])
def test_published_averages_follow_from_the_published_figures(retain):
    (row,) = published.rows("llava-1.5-7b", "mustdrop", retain)
    (base,) = published.rows("llava-1.5-7b", "vanilla", None)
    shares = [100 * row.values[column] / value for column, value in base.values.items()]
    assert np.mean(shares) == pytest.approx(row.values["average"], abs=0.1)


# Collecting


def test_collect_finds_cells_at_any_depth_and_computes_shares(folder):
    for start in (folder, folder.parent, folder / "cells"):
        results, notes = load([start])
        assert len(results) == 9 and notes == []
    shares = {(one["task"], one["label"]): one["share"] for one in records(results)}
    assert shares["mini_gqa", "vanilla"] == 100 and shares["mini_gqa", "fastv_9"] == 50
    assert len(results.samples[0].scores) == 24 and results.samples[0].picture_folder.is_dir()
    assert len(load([folder, folder])[0]) == 9


def test_results_in_which_nobody_counted_what_choosing_costs_say_so(tmp_path):
    for method, retain in (("vanilla", 36), ("mustdrop", 18), ("fastv", 9)):
        file = write_cell(tmp_path, "mini_gqa", method, retain)
        content = json.loads(file.read_text())
        if method != "fastv":
            del content["row"]["selector_macs"], content["row"]["selector_prompt"]
        file.write_text(json.dumps(content))
    results, notes = load([tmp_path])
    assert len(results) == 3 and len(notes) == 1
    assert notes[0].startswith("what choosing costs is not known") and notes[0].endswith(": mustdrop_18")


def test_collect_keeps_the_newest_and_the_largest(tmp_path):
    write_cell(tmp_path, "mini_gqa", date="2026-01-02", key="a" * 12)
    write_cell(tmp_path, "mini_gqa", date="2026-01-03", key="b" * 12, score=50.0)
    write_cell(tmp_path, "mini_gqa", date="2026-01-04", key="c" * 12, limit=10)
    results, notes = load([tmp_path])
    assert list(results.score) == [50.0]
    assert "mini_gqa, vanilla: the newest of 2 results" in notes[0] and "LIMIT=10 are left out" in notes[1]


def test_seeds_are_averaged(tmp_path):
    for seed, score in enumerate((60.0, 64.0)):
        write_cell(tmp_path, "mini_gqa", score=score, score_ci95=[score - 1, score + 2], seed=seed)
        write_cell(tmp_path, "mini_gqa", "mustdrop", 9, score=score / 2, score_ci95=[25, 35], seed=seed)
    vanilla, cut = sorted(records(over_seeds(load([tmp_path])[0])), key=lambda row: row["method"] != "vanilla")
    assert (vanilla["score"], vanilla["score_ci95"], vanilla["seeds"]) == (62.0, [59.0, 66.0], 2)
    assert vanilla["seed_spread"] == pytest.approx(8**0.5) and cut["share"] == 50


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no folder"), ({}, "no finished cells"), ({"a.json": "{"}, "no cell's result")]
    + [({"a.json": '{"row": {"model": "m"}}'}, "lacks row.task")],
)
def test_wrong_results_are_one_line(tmp_path, content, message):
    results = tmp_path / "results"
    if content is not None:
        (results / "cells" / "mini_gqa").mkdir(parents=True)
        for name, text in content.items():
            (results / "cells" / "mini_gqa" / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load([results])
    assert "\n" not in str(error.value)


# Contents


def rows_of(text: str) -> dict[tuple[str, str], list[str]]:
    """``{(method, what): cells}`` of a Markdown table."""
    found, method = {}, ""
    for line in text.splitlines():
        if line.startswith("|"):
            _, name, what, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            method = name or method
            found[method, what] = cells
    return found


def test_table_compares_marks_and_shows_what_is_missing(real_folder):
    found = table_rows(REAL, load([real_folder])[0])
    text = table.render(REAL, found, "markdown")
    rows = rows_of(text)
    assert rows["vanilla", "ours"][:2] == ["62.0 ±1.0", "1800 ±30"]
    assert rows["vanilla", "published a"] == ["61.9", "1862", "85.9", "100.0 (3/3)"]
    assert rows["mustdrop", "ours"] == ["54.0 ±0.9", "1500 ±40", "-", "85.2 (2/3)"]
    assert rows["vanilla", "n"][:3] == ["1000"] * 3 and ("mustdrop", "n") not in rows
    # 53.1 lies below 54.04 - 0.9, but not by more than it may have been rounded; 1612 is far from 1500.
    assert rows["mustdrop", "difference a"][:3] == ["+0.9", "-112*", "-"]
    assert rows["fastv", "ours"] == ["-", "-", "-", "-"]
    assert rows["fastv", "published b"][0] == "44.1" and ("fastv", "difference a") not in rows
    assert "- a: MustDrop-family tables" in text and "- b: later papers, run again" in text
    assert "outside our 95 % interval" in text
    expected = 100 * np.mean([54.04 / 62 - 53.1 / 61.9, 1500 / 1800 - 1612 / 1862])
    assert rows["mustdrop", "difference a"][3] == f"{expected:+.1f} (2/3)"


def test_vanilla_is_needed_for_an_average(real_folder):
    next((real_folder / "cells" / "mme").glob("vanilla*.json")).unlink()
    rows = rows_of(table.render(REAL, table_rows(REAL, load([real_folder])[0]), "markdown"))
    assert rows["mustdrop", "ours"][-1] == "87.2 (1/3)" and rows["vanilla", "ours"][1] == "-"


def test_synthetic_results_are_never_compared(folder, tmp_path):
    mini = Layout("Mini", "llava-mini", ("mini_gqa", "mini_pope"), BUDGETS, ("fastv", "mustdrop"))
    text = table.render(mini, table_rows(mini, load([folder])[0]), "markdown")
    rows = rows_of(text)
    assert "synthetic" in text and "published a" not in text and not any("difference" in what for _, what in rows)
    assert rows["fastv", "ours"][1:] == ["-", "50.0 (1/2)"]  # at 9 tokens, the last block
    # Nor does a synthetic result of the real model end up in a real benchmark's column.
    write_cell(tmp_path, "mini_gqa", benchmark="gqa", model="llava-v1.5-7b")
    assert not table_rows(REAL, load([tmp_path])[0])[0].ours


def test_two_checkpoints_of_one_model_are_not_mixed(real_folder):
    write_cell(real_folder, "gqa", model="llava-1.5-7b-hf", synthetic=False, key="d" * 12)
    with pytest.raises(ValueError, match="llava-1.5-7b-hf and llava-v1.5-7b"):
        table_rows(REAL, load([real_folder])[0])
    one = Layout("A table", "llava-1.5-7b-hf", COLUMNS, (64,), ("mustdrop",))
    (row,) = table_rows(one, load([real_folder])[0])[0].ours.values()
    assert row["model"] == "llava-1.5-7b-hf"


def test_figures_that_a_language_model_judged_are_not_subtracted(tmp_path, capsys):
    for method, retain, score in (("vanilla", 2048, 50.0), ("fastv", 194, 40.0)):
        write_cell(
            tmp_path, "msvd_qa", method, retain, benchmark="msvd", model="Video-LLaVA-7B-hf", synthetic=False,
            score=score, score_ci95=[score - 1, score + 1], n=1000, metric="containment",
        )  # fmt: skip
    shown = Layout("A table", "video-llava-7b", ("msvd",), (194,), ("fastv",))
    for line in table_rows(shown, load([tmp_path])[0]):
        (printed,) = line.printed
        assert line.ours["msvd"]["score"] and printed.judged
        assert line.difference("msvd", printed) is None and line.beyond_noise("msvd", printed) is None
    layout = write_layout(tmp_path / "video.yaml", model="video-llava-7b", columns=["msvd"], budgets=[194])
    assert table.main([str(layout), "--results", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "58.3" in text and "difference" not in text and "not to be compared" in text


# The command line


def test_published_figures_alone_make_a_table_in_every_format(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # no results here
    layout = write_layout(tmp_path / "t.yaml", methods=None)
    assert table.main([str(layout), "--format", "all", "--out", str(tmp_path / "out")]) == 0
    assert "published figures only" in capsys.readouterr().out
    assert len(list((tmp_path / "out").iterdir())) == len(table.FORMATS)


def write_layout(path: Path, **changes) -> Path:
    content = {"title": "T & U_1", "model": "llava-1.5-7b", "columns": list(COLUMNS), "budgets": [64]}
    content |= {"methods": ["fastv", "mustdrop"]} | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def test_all_formats_are_written(real_folder, tmp_path, capsys):
    layout = write_layout(tmp_path / "small.yaml")
    out = tmp_path / "tables"
    assert table.main([str(layout), "--results", str(real_folder), "--format", "all", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert (out / "small.txt").read_text() == printed and "commit c0ffeec;" in printed
    assert (out / "small.md").read_text().startswith("## T & U_1")
    latex = (out / "small.tex").read_text()
    assert r"\begin{tabular}" in latex and r"T \& U\_1" in latex and r"54.0 $\pm$0.9" in latex and r"\toprule" in latex
    assert latex.count("{") == latex.count("}")
    rows = list(csv.DictReader((out / "small.csv").open()))
    (mme,) = (row for row in rows if (row["task"], row["method"]) == ("mme", "mustdrop"))
    assert [float(mme[name]) for name in ("ours", "ci_low", "ci_high", "n")] == [1500, 1460, 1540, 1000]
    assert (mme["published"], float(mme["difference"]), mme["beyond_noise"]) == ("1612", -112, "True")
    (pope,) = (row for row in rows if (row["task"], row["method"]) == ("pope", "mustdrop"))
    assert pope["ours"] == pope["difference"] == "" and pope["published"] == "68.0"
    assert [row["source"] for row in rows if (row["task"], row["method"]) == ("gqa", "fastv")] == [
        "MustDrop-family tables",
        "later papers, run again",
    ]


def test_terminal_table_of_the_paper_is_readable(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert table.main([str(ROOT / "configs" / "tables" / "table1.yaml")]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 160 and "published figures only" in printed
    assert "53.1   60.0      53.1   1612" in printed


def test_results_of_something_else_are_named(folder, tmp_path, capsys):
    assert table.main([str(write_layout(tmp_path / "t.yaml")), "--results", str(folder)]) == 0
    assert "none of the 9 results belongs here, they are of llava-mini on mini_gqa" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "tables").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_tables_are_valid(file):
    usual = {
        "next": (640, 320, 160), "next_mini": (160, 80, 40), "video": (256, 194, 136), "video_mini": (194, 136),
        "yopo_7b": (146,), "yopo_13b": (146,),
    }.get(file.stem, None if file.stem.startswith("yopo") else (192, 128, 64))  # fmt: skip
    budgets = read_layout(file).budgets
    assert (budgets and budgets[:3]) == usual


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"collumns": ["gqa"]}, "collumns is no key of a table (did you mean columns?)"),
        ({"columns": ["gqqa"]}, "columns has 'gqqa' (did you mean gqa?)"),
        ({"methods": ["mustdorp"]}, "methods has 'mustdorp' (did you mean mustdrop?)"),
        ({"show": ["theirs"]}, "show has 'theirs'"),
        ({"budgets": [0]}, "budgets is [0], expected a list of whole numbers above 0"),
        ({"budgets": [64, 64]}, "budgets has 64 twice"),
        ({"columns": "gqa"}, "columns is 'gqa', expected a list of names"),
        ({"title": None}, "title is missing"),
        ({"model": 7}, "model is 7, expected text"),
    ],
)
def test_wrong_layout_is_one_line(tmp_path, capsys, changes, message):
    assert table.main([str(write_layout(tmp_path / "t.yaml", **changes))]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    layout = str(write_layout(tmp_path / "t.yaml"))
    for arguments, message in (
        ([str(tmp_path / "no.yaml")], "no such file"),
        ([layout, "--results", str(tmp_path / "none")], "there is no folder"),
        ([layout, "--format", "all"], "needs --out"),
    ):
        assert table.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error


# Significance


def answers(scores: list[float], **more) -> list[dict]:
    return [
        {"task": "t", "question_id": f"q{number}", "doc_id": number, "score": score, **more}
        for number, score in enumerate(scores)
    ]


def test_mcnemar_is_exact():
    # 12 questions: 7 only a, 1 only b. Two-sided binomial tail: 2 * (1 + 8) / 2**8.
    found = significance.compare(answers([1] * 7 + [0] + [1] * 4), answers([0] * 7 + [1] + [1] * 4))
    assert (found.n, found.only_a, found.only_b) == (12, 7, 1)
    assert found.p == pytest.approx(18 / 256)
    assert found.difference == pytest.approx(50) and found.interval[0] < 50 < found.interval[1] <= 100


def test_lines_are_paired_by_question_and_equal_ones_do_not_differ():
    a, b = answers([1, 0, 1, 0]), answers([1, 0, 1])[::-1]
    found = significance.compare(a, b)
    assert (found.n, found.difference, found.interval, found.p) == (3, 0, (0, 0), 1)
    with pytest.raises(ValueError, match="no question"):
        significance.compare(a, [{**line, "task": "other"} for line in b])
    with pytest.raises(ValueError, match="no score"):
        significance.compare(a, [{name: line[name] for name in ("task", "question_id", "doc_id")} for line in b])


def test_partial_scores_count_which_side_was_better():
    first, second = [0.3, 0.6, 1.0, 0.9, 0.0, 0.3], [0.0, 0.6, 0.3, 0.3, 0.0, 0.6]
    found = significance.compare(answers(first), answers(second))
    assert (found.only_a, found.only_b, found.p) == (3, 1, pytest.approx(10 / 16))
    assert found.difference == pytest.approx(100 * np.subtract(first, second).mean())


def test_questions_about_one_picture_are_drawn_together():
    first, second = [1] * 30 + [0] * 30, [0] * 30 + [0] * 30
    apart = significance.compare(answers(first), answers(second))
    scenes = [{**line, "picture": str(number // 10)} for number, line in enumerate(answers(first))]
    together = significance.compare(scenes, answers(second))
    assert together.difference == apart.difference
    assert np.ptp(together.interval) > 1.5 * np.ptp(apart.interval)


def test_holm():
    assert significance.holm([0.01, 0.04, 0.03, 0.5]).tolist() == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert significance.holm([0.9, 0.8]).tolist() == [1, 1]


def test_significance_command(folder, capsys):
    assert significance.main([str(folder), "--a", "fastv_9", "--b", "vanilla"]) == 0
    (row,) = (line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("mini_"))
    # 12 of 24 lost and none won: p = 2 / 2**12.
    assert row[:7] == ["mini_gqa", "fastv_9", "vanilla", "24", "50.0", "100.0", "-50.0"]
    assert row[-3:] == ["0.00049", "0.00049", "*"] and row[-5:-3] == ["0", "12"]
    assert significance.main([str(folder)]) == 0
    printed = capsys.readouterr().out
    assert "over 10 comparisons" in printed and "fastv_18     mustdrop_18" in printed
    for wrong, message in ((["--a", "fastv_8"], "--a: got 'fastv_8'"), (["--task", "gqa"], "--task: got 'gqa'")):
        assert significance.main([str(folder), *wrong]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and message in error
