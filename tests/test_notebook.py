"""The notebook: all its cells run, one after the other, and the curves are what the methods do."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "accuracy_against_tokens.ipynb"
SMALL = 'MODEL, SCENES, QUESTIONS = "checkpoints/llava-mini", 1, 1\nMETHODS, BUDGETS = ("divprune",), (64, 32)'


def cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.skipif(not (ROOT / "checkpoints/llava-mini/config.json").is_file(), reason="no embedded model")
def test_its_cells_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    matplotlib.use("agg")
    parameters, *rest = cells()
    assert parameters["metadata"]["tags"] == ["parameters"]
    space: dict = {}
    for source in (SMALL, *("".join(cell["source"]) for cell in rest)):
        exec(compile(source, str(NOTEBOOK), "exec"), space)
    assert space["baseline"][0] == 576 and space["baseline"][1] in (0, 1)
    assert [tokens for tokens, _ in space["curves"]["divprune"]] == [64, 32]
    assert {line.get_label() for line in space["plt"].gca().get_lines()} == {"divprune", "baseline, 576 tokens"}
    space["plt"].close()


def test_it_is_as_short_as_it_says_and_brings_no_outputs():
    lines = [line for cell in cells() for line in cell["source"] if line.strip()]
    assert len(lines) <= 32 and not any(cell["outputs"] for cell in cells())
