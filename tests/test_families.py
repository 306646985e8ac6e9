"""What docs/families.md says of families and methods is true, and names what there is."""

import re
from pathlib import Path

import pytest
import stock
import tiny
import torch
from hosted import METHODS
from stock import inputs

from llava.model.hosted import HOSTS
from mustdrop import available_methods, load_reducer
from mustdrop.config import fields_of
from mustdrop.ops import layer_index
from mustdrop.registry import METHODS as KINDS

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "families.md").read_text(encoding="utf-8")
MODELS = {
    "our own LLaVA": None,
    "LLaVA-1.5": ("llava", "llama"),
    "LLaVA-NeXT": ("next", "llama"),
    "LLaVA-OneVision": ("onevision", "qwen2"),
    "Video-LLaVA": ("video", "llama"),
    "Qwen2-VL": ("qwen2", "qwen2"),
    "Qwen2.5-VL": ("qwen2.5", "qwen2"),
    "Qwen3-VL": ("qwen3", "qwen3"),
    "InternVL": ("internvl", "qwen2"),
}


def table(first: str) -> list[dict[str, str]]:
    """The rows of the table whose header begins so."""
    lines = TEXT[TEXT.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


CELLS = {row["method"].strip("`"): row for row in table("method | our own LLaVA")}


def model_of(family: str):
    return tiny.ours(side=stock.SIDE) if MODELS[family] is None else stock.stock(*MODELS[family])


def settings_of(method: str) -> dict:
    return {"method": method, **({} if method == "evs" else METHODS.get(method, {"retain": 12}))}


@pytest.mark.parametrize("family", MODELS)
def test_the_table_of_families_and_methods_is_true(family):
    model = model_of(family)
    assert CELLS.keys() | {"vanilla"} == set(available_methods())
    for method, row in CELLS.items():
        cell, settings = row[family], settings_of(method)
        if cell == "no":
            with pytest.raises(ValueError) as error, load_reducer(settings).on(model):
                pass
            assert "\n" not in str(error.value)
            continue
        reducer = load_reducer(settings)
        with reducer.on(model):
            pass
        assert (cell == "processor") == (reducer.pixel_budget(1) is not None and family != "our own LLaVA"), method
        assert (cell in ("videos", "whole")) == (method == "evs")


@pytest.mark.parametrize("family", [family for family, cell in CELLS["evs"].items() if cell == "whole"])
def test_what_chooses_among_frames_leaves_images_whole(family):
    model = model_of(family)
    with torch.no_grad(), load_reducer({"method": "evs"}).on(model) as run:
        model.generate(**inputs(MODELS[family][0], model), max_new_tokens=1, do_sample=False)
    assert all(image["tokens"] == image["patches"] for trace in run.traces for image in trace.images)


def test_families_are_those_that_are_hosted():
    rows = table("family")
    kinds = {kind for row in rows for kind in re.findall(r"`(\w+)`", row["`model_type`"])}
    assert kinds == {*HOSTS, "internvl_chat"} and [row["family"] for row in rows] == list(MODELS)[1:]


def test_settings_of_the_docs_are_fields_of_their_methods():
    for row in table("method | setting"):
        method, field = row["method"].strip("`"), row["setting"].strip("`")
        assert field in fields_of(KINDS[method]), (method, field)


def test_tests_that_the_docs_name_exist():
    named = re.findall(r"`(test_\w+)`", TEXT)
    there = {name for path in TESTS.glob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert len(named) > 20 and not set(named) - there


def test_the_default_block_of_hiprune_on_qwen_is_the_one_that_the_docs_say():
    assert layer_index(load_reducer({"method": "hiprune", "retain": 12}).object_block, 32) == 10
