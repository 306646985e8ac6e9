"""Calibration: the search, the files it writes, the samples it reads."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from eval.calibrate import thresholds as calibrate
from eval.calibrate.files import MethodFile
from eval.methods import read_method
from mustdrop import load_reducer


def staircase(scale: float) -> calibrate.Point:
    """Falls from 100 to 10 in steps of one."""
    tokens = max(10.0, 100.0 - max(0.0, 15 * math.log10(scale / 1e-4)))
    return calibrate.Point(scale, tokens + 5, float(round(tokens)))


def test_search_finds_targets_and_reuses_points():
    known: dict[float, calibrate.Point] = {}
    for target in (90, 50, 30):
        found = calibrate.search(staircase, target, known, 0.02)
        assert abs(found.tokens_official - target) <= 0.02 * target
    before = len(known)
    calibrate.search(staircase, 50, known, 0.02)
    assert len(known) == before < 30


@pytest.mark.parametrize(("target", "word"), [(5, "floor of 10.0"), (120, "above the 100.0")])
def test_search_says_what_is_out_of_reach(target, word):
    with pytest.raises(calibrate.OutOfReach, match=word):
        calibrate.search(staircase, target, {}, 0.02)


def test_calibration_writes_a_method_that_keeps_what_it_says(checkpoint, loaded, tmp_path, capsys):
    argv = ["--model", str(checkpoint), "--retain", "12", "1", "--samples", "16", "--out", str(tmp_path)]
    assert calibrate.main(argv) == 1
    assert "1: out of reach" in capsys.readouterr().err
    file = tmp_path / "mustdrop.yaml"
    text = file.read_text()
    settings = read_method(str(file), {"retain": 12})
    assert settings["global_threshold"] / settings["individual_threshold"] == pytest.approx(1.1, rel=1e-3)
    pairs = calibrate.read_samples("mini", None, ".", 16)
    tokens, official = calibrate.measure_tokens(loaded, settings, pairs, 8, "again")
    assert official == pytest.approx(12, rel=0.02)
    assert f"Reached: {official:.1f}, or {tokens:.1f} if every layer" in text and "mustdrop calibrate --model" in text


def test_calibration_adds_to_a_file_what_it_finds_and_leaves_the_rest(tmp_path):
    path = tmp_path / "model" / "mustdrop.yaml"
    file = MethodFile.read(path, "mustdrop", "model")
    file.add(64, {"global_threshold": 0.01, "filter_layers": [1, 2]}, ["first", "a note\nof two lines"])
    file.write()
    path.write_text("# mine\n" + path.read_text())
    again = MethodFile.read(path, "mustdrop", "model")
    again.add(0.25, {"global_threshold": 0.02}, [])
    again.add(128, {"global_threshold": 0.001}, ["second"])
    again.write()
    assert path.read_text().splitlines()[0] == "# mine" and path.read_text().splitlines()[3:] == [
        "at:",
        "  # second",
        "  128: {global_threshold: 0.001}",
        "  # first",
        "  # a note of two lines",
        "  64: {global_threshold: 0.01, filter_layers: [1, 2]}",
        "  0.25: {global_threshold: 0.02}",
    ]
    assert load_reducer(path, retain=64).filter_layers == [1, 2]
    assert load_reducer(path, retain=0.25).global_threshold == 0.02
    replaced = MethodFile.read(path, "mustdrop", "model")
    replaced.add(128, {"global_threshold": 0.5}, ["third"])
    replaced.write()
    assert "second" not in path.read_text() and load_reducer(path, retain=128).global_threshold == 0.5


@pytest.mark.parametrize(
    "text",
    [
        "method: fastv\nat:\n  64: {retain: 60}\n",
        "method: mustdrop\nglobal_threshold: 0.1\n",
        "method: mustdrop\nat:\n  64:\n    global_threshold: 0.1\n",
        "method: mustdrop\nwindow: 2\nat:\n  64: {global_threshold: 0.1}\n",
        "at:\n  64: {global_threshold: 0.1}\nmethod: mustdrop\n",
    ],
)
def test_calibration_refuses_a_file_that_it_would_spoil(tmp_path, checkpoint, text, capsys):
    path = tmp_path / "mustdrop.yaml"
    path.write_text(text)
    assert calibrate.main(["--model", str(checkpoint), "--retain", "12", "--out", str(tmp_path)]) == 2
    assert "cannot be added to" in capsys.readouterr().err and path.read_text() == text


def test_calibration_reads_a_users_samples(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"image": "a.png", "question": "what?"}] * 3))
    pairs = calibrate.read_samples(None, str(data), str(tmp_path), 2)
    assert len(pairs) == 2 and pairs[0][0].size == (20, 10) and pairs[0][1] == "what?"


def test_a_method_that_works_to_a_number_is_checked(checkpoint, tmp_path, capsys):
    argv = ["--model", str(checkpoint), "--method", "fastv", "--samples", "4", "--out", str(tmp_path)]
    assert calibrate.main([*argv, "--retain", "18"]) == 0
    assert read_method(str(tmp_path / "fastv.yaml"), {"retain": 18}) == {"method": "fastv", "retain": 18}
    assert calibrate.main([*argv[:3], "yopo", "--retain", "18"]) == 2
    assert "yopo has nothing to turn" in capsys.readouterr().err
