"""Every file under configs/ is read by what it is for, and says nothing that the program would say by itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from eval.methods import file_budgets, read_method
from eval.report.layout import read_layout
from eval.sweep import plan
from eval.tasks import video_qa
from mustdrop import load_reducer
from mustdrop.command import share_of
from mustdrop.config import at_budget, budgets_of, read_settings

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
METHODS = sorted(CONFIGS.glob("methods/**/*.yaml"))


@pytest.fixture
def without_downloads(monkeypatch):
    """The video benchmarks need not lie on this machine."""
    monkeypatch.setattr(video_qa, "check", lambda task, limit, *skips: None)


def test_every_file_is_one_that_something_reads():
    folders = {"methods": {".yaml", ".npy", ".json"}, "sweeps": {".yaml"}, "tables": {".yaml"}, "deepspeed": {".json"}}
    for path in CONFIGS.rglob("*"):
        if path.is_file():
            assert path.suffix in folders[path.relative_to(CONFIGS).parts[0]], path
    assert len(METHODS) <= 12, "only what cannot be derived"


@pytest.mark.parametrize("file", METHODS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_methods(file, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    settings, budgets = read_settings(file), file_budgets(file)
    assert settings.keys() > {"method"} and settings.keys() != {"method", "retain"}
    for budget, fields in budgets_of(settings).items():
        assert fields and fields.keys() != {"retain"}, f"{budget} is what the method derives by itself"
        retain = share_of(budget) or int(budget)
        load_reducer(file, retain=retain)
        once = read_method(str(file), {"retain": retain})
        assert load_reducer(once) and once == at_budget({**settings, "retain": retain})
        assert once == read_settings(file.with_name(f"{file.stem}_{budget}.yaml")), "as it was called before"
    if budgets:
        with pytest.raises(ValueError, match=f"{file.name}: retain is None: it must be one of {', '.join(budgets)}"):
            load_reducer(file)
    else:
        load_reducer(file)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("sweeps/*")), ids=lambda path: path.stem)
def test_sweeps(file, monkeypatch, without_downloads):
    monkeypatch.chdir(CONFIGS.parent)
    read = plan.read(file, online=False)
    assert {cell.method for cell in read.cells} > {"vanilla"}
    for cell in read.cells:
        load_reducer(cell.settings)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("tables/*")), ids=lambda path: path.stem)
def test_tables(file, without_downloads):
    named = re.findall(r"--results results/(\w+)", file.read_text(encoding="utf-8"))
    sweep = plan.read(CONFIGS / "sweeps" / f"{(named or [file.stem])[0]}.yaml", online=False)
    budgets = read_layout(file).budgets or ()
    assert set(budgets) <= {cell.retain for cell in sweep.cells}, "as the sweep whose results it shows"


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("deepspeed/*")), ids=lambda path: path.stem)
def test_deepspeed(file):
    config = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    given = json.loads(file.read_text(encoding="utf-8"))["zero_optimization"]
    known = {name for name, field in config.model_fields.items() for name in (name, field.alias)}
    assert given.keys() <= known and file.stem == f"zero{given['stage']}"
