"""YOPO's table of LLaVA at equal FLOPs and its figure for other models, published beside ours."""

from pathlib import Path

import pytest
from fabricated import write_cell

from eval import checkpoints
from eval.report import published, table
from eval.sweep import plan
from mustdrop import load_reducer
from mustdrop.families import read_shape
from mustdrop.macs import formula_macs

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("Qwen2-VL-7B-Instruct", "InternVL2-4B", "InternVL2-8B", "InternVL2-26B")
MODELS = ("qwen2-vl-7b", "internvl2-4b", "internvl2-8b", "internvl2-26b")


def real(folder, model: str, task: str, method: str, retain: int, score: float, half: float = 1.0, n: int = 1000):
    ends = [score - half, score + half]
    facts = {"benchmark": task, "synthetic": False, "score": score, "score_ci95": ends, "n": n}
    write_cell(folder, task, method, retain, model=model, **facts)


def shown(capsys, name: str, folder=None) -> dict[tuple[str, str], list[str]]:
    """Rows of a shipped table by method and what they hold."""
    results = [] if folder is None else ["--results", str(folder)]
    assert table.main([str(ROOT / "configs" / "tables" / f"{name}.yaml"), "--format", "markdown", *results]) == 0
    found, method = {}, ""
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("|"):
            _, name, what, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            method = name or method
            found[method, what] = cells
    return found


@pytest.mark.parametrize(("size", "full", "quarter"), [("7b", 7.63, 1.91), ("13b", 14.89, 3.72)])
def test_every_rival_has_its_published_row_at_equal_flops(size, full, quarter, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rows = shown(capsys, f"yopo_{size}")
    rivals = {"fastv", "sparsevlm", "pyramiddrop", "prumerge-plus"}
    assert {method for method, _ in rows} >= {*rivals, "vanilla", "yopo_25", "yopo_12"}
    for method in (*rivals, "yopo_25"):
        (source,) = {row.source for row in published.models()[f"yopo-llava-1.5-{size}"].rows if row.method == method}
        assert source.startswith(f"YOPO, {quarter} TFLOPs")
        assert sum(name == method and what.startswith("published") for name, what in rows) == 1
    shape = read_shape(f"llava-1.5-{size}")
    of_all, of_fewer = (2e-12 * formula_macs(shape, [tokens] * shape.layers) for tokens in (576, 146))
    assert round(of_all, 2) == full and of_fewer == pytest.approx(quarter, rel=0.01)


def test_a_method_without_a_budget_has_our_result_whatever_it_kept(tmp_path, capsys):
    for method, retain, score in (("vanilla", 576, 62.0), ("fastv", 146, 55.0), ("yopo_25", 288, 60.0)):
        real(tmp_path, "llava-v1.5-7b", "gqa", method, retain, score)
    rows = shown(capsys, "yopo_7b", tmp_path)
    assert rows["yopo_25", "ours"][0] == "60.0 ±1.0" and rows["yopo_25", "difference d"][0] == "-1.6*"
    assert rows["fastv", "difference b"][0] == "-1.5*" and rows["yopo_12", "ours"][0] == "-"
    rows = shown(capsys, "table1", tmp_path)  # the same checkpoint under the papers' other figures
    assert rows["vanilla", "published a"][0] == "61.9"


def test_our_mean_is_set_beside_the_printed_mean(tmp_path, capsys):
    for task, whole, cut in (("gqa", 62.0, 61.0), ("pope", 88.0, 87.0)):
        real(tmp_path, "Qwen2-VL-7B-Instruct", task, "vanilla", 900, whole, half=0.6)
        real(tmp_path, "Qwen2-VL-7B-Instruct", task, "yopo", 771, cut, half=0.6)
    rows = shown(capsys, "yopo_qwen2-vl-7b", tmp_path)
    assert rows["vanilla", "ours"][:3] == ["62.0 ±0.6", "88.0 ±0.6", "75.000 ±0.424"]  # as of independent ones
    assert rows["vanilla", "published a"][:3] == ["-", "-", "75.320"]
    assert rows["yopo", "ours"][2] == "74.000 ±0.424" and rows["yopo", "difference b"][2] == "-0.865*"
    assert rows["yopo", "ours"][3] == f"{(61 / 62 + 87 / 88 + 74 / 75) / 3 * 100:.1f} (3/3)".replace("\n", "")
    for file in (tmp_path / "cells" / "pope").glob("*"):
        file.unlink()
    assert shown(capsys, "yopo_qwen2-vl-7b", tmp_path)["vanilla", "ours"][2] == "-"  # one of them is missing


@pytest.mark.parametrize(("model", "folder"), zip(MODELS, FOLDERS, strict=True))
def test_the_other_models_have_a_table_and_settings_that_fit_them(model, folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    rows = shown(capsys, f"yopo_{model}")
    assert rows["vanilla", "published a"][2] > rows["yopo", "published b"][2] > "70"
    shape = read_shape(model)
    yopo = load_reducer(ROOT / "configs" / "methods" / folder / "yopo.yaml")
    yopo.check(shape.layers, shape.vision_layers)
    assert published.is_of(folder, model)


def test_the_sweeps_name_what_the_tables_show(monkeypatch):
    monkeypatch.setattr(checkpoints, "_check_hub", lambda *_: None)
    cells = plan.read(ROOT / "configs" / "sweeps" / "yopo.yaml").cells
    named = {(cell.method, cell.retain) for cell in cells}
    rivals = {(method, 146) for method in ("fastv", "sparsevlm", "pyramiddrop", "prumerge-plus")}
    assert named == {*rivals, ("yopo_25", None), ("vanilla", None)}
    cells = plan.read(ROOT / "configs" / "sweeps" / "yopo_models.yaml").cells
    assert {cell.settings["layer_cut"] for cell in cells if cell.method == "yopo"} == {24} and len(cells) == 16
