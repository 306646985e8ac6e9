"""The figures of the documents are those of docs/data, and docs/data says where they come from."""

from __future__ import annotations

import re
import shutil

import pandas as pd
import pytest
from fabricated import results_folder, write_cell

from eval.report import docs
from mustdrop.read import read_json

PROSE = {"column (key in `rows`)"}
"""First headers of tables that hold no figures."""


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The documents and their rows in a folder of their own."""
    for part in ("docs", "README.md"):
        source = docs.ROOT / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / part)
    for name, place in (("ROOT", "."), ("DATA", "docs/data"), ("SOURCES", "docs/data/sources.json")):
        monkeypatch.setattr(docs, name, (tmp_path / place).resolve())
    return tmp_path


@pytest.mark.parametrize("file", docs.documents(), ids=lambda file: file.name)
def test_tables_are_those_of_their_rows(file):
    assert docs.rendered(file) == file.read_text(encoding="utf-8"), "mustdrop docs writes them anew"


@pytest.mark.parametrize("name", ["comparison.md", "performance.md"])
def test_every_table_of_figures_has_rows(name):
    lines = (docs.ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
    starts = [place for place, line in enumerate(lines) if line[:1] == "|" and lines[place - 1][:1] != "|"]
    loose = [lines[place] for place in starts if not lines[place - 1].startswith("<!-- figures: ")]
    assert {line.strip("| ").split(" | ")[0] for line in loose} <= PROSE


def test_rows_say_where_they_come_from():
    sources = read_json(docs.SOURCES)
    assert set(sources) == {file.stem for file in docs.DATA.glob("*.csv")}
    assert all(set(docs.FACTS) == set(facts) and all(facts.values()) for facts in sources.values())


def test_what_differs_is_named_and_written_anew(copied, capsys):
    assert docs.main(["--check"]) == 0 and capsys.readouterr().out == ""
    file = copied / "docs" / "data" / "comparison.csv"
    rows = pd.read_csv(file, dtype=str, keep_default_na=False)
    rows.loc[(rows.method == "mustdrop_plus") & (rows.tokens == "64"), "average"] = "12.3"
    rows.to_csv(file, index=False)
    assert docs.main(["--check"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "README.md: differs from docs/data", "docs/comparison.md: differs from docs/data",
    ]  # fmt: skip
    assert docs.main([]) == 0 and docs.main(["--check"]) == 0
    page, table = ((copied / name).read_text() for name in ("README.md", "docs/comparison.md"))
    assert "| 12.3 |" in page and "12.3 (5/5)" in table


def test_rows_are_taken_from_results(copied, tmp_path, capsys):
    folder = results_folder(tmp_path / "results")
    for task in ("mini_gqa", "mini_pope"):
        for retain, right in ((18, 22), (9, 20)):
            write_cell(folder, task, "mustdrop_plus", retain, [1.0] * right + [0.0] * (24 - right))
    docs.take([folder])
    scores = docs.markdown(*docs.comparison())
    ours = next(line for line in scores.splitlines() if line.startswith("| 18 | mustdrop_plus |"))
    assert re.fullmatch(r".* 91.7 ±[\d.]+ \| 91.7 ±[\d.]+ \| \*\*91.7 \(2/2\)\*\* \| 20 \| 50 \|", ours)
    lines = {line.split(" | ")[1]: line for line in docs.markdown(*docs.differences()).splitlines() if "| 9 |" in line}
    assert "-16.7 (" in lines["mustdrop"] and lines["fastv"].endswith(" - |")
    assert read_json(docs.SOURCES)["comparison"]["commit"] == ["c0ffeec"]


def test_an_unknown_table_is_one_line(copied, capsys):
    (copied / "docs" / "video.md").write_text("<!-- figures: sped -->\n| a |\n")
    assert docs.main([]) == 2
    assert "figures: got 'sped', expected one of " in capsys.readouterr().err
