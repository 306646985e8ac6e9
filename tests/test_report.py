"""The report: one file that needs no other, with everything in it, and masks that are right."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiles
import torch
from fabricated import PATCHES, PICTURES, kept, results_folder, write_cell
from PIL import Image

from eval.report import html as report
from eval.report.results import load
from eval.report.viewer import viewers
from eval.run.samples import pack, patches
from eval.run.tiled import count, on_image, places, tiling
from llava.model.stitched import layout_of

VOID = {"meta", "br", "hr", "img", "link", "input"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = results_folder(tmp_path_factory.mktemp("sweep"))
    cell = {"task": "mini_pope", "model": "llava-mini", "label": "fastv_9", "state": "failed", "log": "logs/7.log"}
    sweep = {"cells": [cell, {**cell, "label": "vanilla", "state": "finished"}], "settings": {"retain": [18, 9]}}
    (folder / "sweep.json").write_text(json.dumps(sweep))
    return folder


@pytest.fixture(scope="module")
def page(folder) -> str:
    assert report.main([str(folder)]) == 0
    return (folder / "report.html").read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks that tags are closed in order; collects addresses, JSON blocks and the cells of tables."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.addresses, self.data, self.rows = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))
        self.addresses += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if attributes.get("type") == "application/json":
            self.data.append(json.loads(text))
        if tag == "td":
            self.rows[-1][-1] += text


def test_page_is_whole_and_needs_nothing_else(page):
    parsed = Page(page)
    assert parsed.addresses and all(address.startswith("#") for address in parsed.addresses)
    assert not re.search(r"url\((?!#|&quot;#)|@import", page)
    assert page.startswith("<!doctype html>") and len(page) < 2_000_000
    assert page.count("<svg ") == 9 and "<?xml" not in page
    # What people wrote stays text.
    assert "<b>is</b>" not in page


def test_page_has_scores_costs_types_and_significance(page):
    rows = Page(page).rows
    assert next(row for row in rows if row[:2] == ["18", "fastv"])[2:4] == ["ours", "75.0 ±19.9"]
    missing = next(row for row in rows if row[:2] == ["9", "fastv"])
    assert missing[4:] == ["-", "50.0 (1/2)"]
    costs = [row for row in rows if row and row[0] == "mustdrop_9" and len(row) > 8]
    assert costs[0][2:7] == ["24", "66.7 %", "11.0", "9.0", "75.0 %"]
    assert ["fastv_18", "75.0 (n=12)", "75.0 (n=12)"] in rows
    assert any(row[:4] == ["mini_gqa", "fastv_9", "vanilla", "24"] for row in rows)
    assert any(row[:4] == ["mini_gqa", "fastv_9", "mustdrop_9", "24"] for row in rows)


def test_page_has_failures_settings_and_provenance(page):
    rows = Page(page).rows
    assert ["mini_pope", "fastv_9", "failed", "logs/7.log"] in rows
    assert not any(row[1:3] == ["vanilla", "finished"] for row in rows)
    assert ["git_commit", "c0ffee" * 6] in rows and ["device", "a CPU"] in rows
    assert ["mustdrop_9", '{"method": "mustdrop"}', "mini_gqa, mini_pope"] in rows
    assert "synthetic" in page and "sweep: settings" in page


def test_masks_are_those_of_the_lines(page):
    drawn = Page(page).data
    assert [viewer["task"] for viewer in drawn] == ["mini_gqa", "mini_pope"]
    viewer = drawn[0]
    assert viewer["labels"] == ["vanilla", "fastv_18", "fastv_9", "mustdrop_18", "mustdrop_9"]
    assert len(viewer["samples"]) == PICTURES == len(viewer["pictures"])
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in viewer["pictures"])
    sample = viewer["samples"][1]
    assert (sample["side"], sample["target"], sample["type"]) == (6, "yes", "shape")
    assert sample["methods"]["vanilla"]["stages"] == []
    found = {title: np.flatnonzero(patches(mask, PATCHES)) for title, mask in sample["methods"]["mustdrop_9"]["stages"]}
    expected = kept("mustdrop", 9)
    assert {title: mask.tolist() for title, mask in found.items()} == {
        "vision encoder, after block 1, in the end merged into 20 tokens": expected["vision"]["1"],
        "prefill, after layer 1": expected["prefill"]["1"],
        "prefill, after layer 3": expected["prefill"]["3"],
        "cache for decoding, layers from 0": expected["decode"]["0"],
    }


def test_merging_is_shown_though_no_patch_is_dropped(tmp_path):
    file = write_cell(tmp_path, "mini_gqa", "mustdrop", 9).with_suffix(".jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    full = {"vision": {"0": pack(range(PATCHES), PATCHES)}, "decode": {"0": pack(range(PATCHES), PATCHES)}}
    file.write_text("".join(json.dumps({**line, "kept": full}) + "\n" for line in lines))
    (tmp_path / "pictures" / "mini_gqa").mkdir(parents=True)
    Image.new("RGB", (42, 42)).save(tmp_path / "pictures" / "mini_gqa" / "0.jpg")
    (sample,) = viewers(load([tmp_path])[0])[0]["samples"]
    ((title, _),) = sample["methods"]["mustdrop_9"]["stages"]
    assert title == "vision encoder, after block 0, in the end merged into 20 tokens"


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
@pytest.mark.parametrize("size", list(tiles.SIZES.values()), ids=list(tiles.SIZES))
def test_places_of_tiles_are_those_of_the_models_layout(merge, size):
    config = tiles.native(mm_patch_merge_type=merge).config
    cut, side = tiling(config, size, "model"), tiles.SIDE
    assert cut["order"] == merge
    rows, columns = cut["grid"]
    order = torch.arange(count(cut))  # tile after tile
    if merge != "flat":
        layout = layout_of(merge, size, (rows, columns), side)
        order = (layout.view * side**2 + layout.patch)[layout.shows]
        assert len(order) == count(cut)
    own = places(cut)
    view, patch = np.divmod(order.numpy()[own], side**2)
    y, x = (view - 1) // columns * side + patch // side, (view - 1) % columns * side + patch % side
    assert (np.diff(y, axis=0) == 1).all() and (np.diff(x, axis=1) == 1).all()  # neighbours on the canvas
    top, left = y[0, 0], x[0, 0]
    assert abs(2 * top + len(y) - rows * side) <= 1 and abs(2 * left + x.shape[1] - columns * side) <= 1  # its middle
    kept = np.zeros(count(cut), dtype=bool)
    kept[[0, own[-1, -1]]] = True
    drawn = on_image(kept, cut)
    corner = [-(-length // side) for length in own.shape]  # what the overview's first patch covers at most
    assert drawn[0, 0] and drawn[-1, -1] and drawn.sum() == drawn[: corner[0], : corner[1]].sum() + 1
    kept[:] = False
    assert not on_image(kept, cut).any()


def test_kept_patches_of_tiles_are_drawn_on_the_image(tmp_path):
    cut = tiling(tiles.native().config, tiles.SIZES["wide"], "model")
    number, (rows, columns) = count(cut), places(cut).shape
    file = write_cell(tmp_path, "mini_gqa", "mustdrop", 9).with_suffix(".jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    image = {**lines[0]["images"][0], "patches": number}
    tiled = {"images": [image], "tiles": cut, "kept": {"prefill": {"1": pack([0, number - 1], number)}}}
    file.write_text("".join(json.dumps({**line, **tiled}) + "\n" for line in lines))
    (tmp_path / "pictures" / "mini_gqa").mkdir(parents=True)
    Image.new("RGB", tiles.SIZES["wide"]).save(tmp_path / "pictures" / "mini_gqa" / "0.jpg")
    (sample,) = viewers(load([tmp_path])[0])[0]["samples"]
    assert (sample["side"], sample["rows"]) == (columns, rows) and columns > rows
    ((_, mask),) = sample["methods"]["mustdrop_9"]["stages"]
    drawn = patches(mask, rows * columns).reshape(rows, columns)
    assert drawn[0, 0] and drawn[-1, -1] and drawn.sum() < rows * columns / 2
    assert "a patch is kept if the overview" in report.report(tmp_path)


def test_equal_pictures_are_stored_once(tmp_path):
    copy = results_folder(tmp_path / "copy")
    pictures = copy / "pictures" / "mini_gqa"
    (pictures / "1.jpg").write_bytes((pictures / "0.jpg").read_bytes())
    viewer = viewers(load([copy])[0])[0]
    assert len(viewer["pictures"]) == PICTURES - 1
    assert [sample["picture"] for sample in viewer["samples"]] == [0, 0, 1, 2]


def test_a_bare_folder_has_a_report_too(tmp_path):
    write_cell(tmp_path, "mini_gqa").with_suffix(".jsonl").unlink()
    write_cell(tmp_path, "mini_gqa", "mustdrop", 9)
    text = report.report(tmp_path)
    parsed = Page(text)
    assert parsed.data == [] and "not computed: results: mini_gqa, vanilla has no per-sample lines" in text
    assert "Not finished" not in text


def test_real_results_stand_beside_published_figures(tmp_path):
    write_cell(tmp_path, "gqa", model="llava-v1.5-7b", retain=576, synthetic=False, score=61.0, score_ci95=[60, 62])
    rows = Page(report.report(tmp_path)).rows
    assert any(row[2:4] == ["published a", "61.9"] for row in rows)
    assert any(row[2:4] == ["difference a", "-0.9"] for row in rows)


def test_errors_are_one_line(tmp_path, capsys):
    (tmp_path / "sweep.json").write_text("{")
    for arguments, message in (
        ([str(tmp_path / "none")], "there is no folder"),
        ([str(tmp_path)], "no finished cells"),
    ):
        assert report.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    write_cell(tmp_path, "mini_gqa")
    assert report.main([str(tmp_path)]) == 2
    assert "sweep.json' is not valid JSON" in capsys.readouterr().err
    (tmp_path / "sweep.json").unlink()
    assert report.main([str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "is a folder, expected a file" in capsys.readouterr().err
