"""``mustdrop ask``: one question to the baseline and a method, and what the drawing shows."""

from __future__ import annotations

import json

import clips
import numpy as np
import pytest
import stock_folders
from PIL import Image

from eval import cli
from eval.ask import command, overlay
from eval.ask.compare import BASELINE, compare, table_rows
from eval.run.inference import LoadedModel
from llava.video import load_video
from mustdrop import Reducer, load_reducer

QUESTION = "describe the sign"


def picture(size: tuple[int, int] = (84, 84), seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(60, 200, (*size[::-1], 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=["plain", "tiles", "stock llava", "stock next", "video"])
def asked(request, tmp_path_factory, tokenizer_folder, checkpoint):
    """A loaded model of each kind, and what it is asked about."""
    folder, kind = tmp_path_factory.mktemp("asked"), request.param
    if kind == "tiles":
        return LoadedModel.load("checkpoints/llava-mini-next", device="cpu"), [picture((400, 150))]
    if kind.startswith("stock"):
        stock_folders.save(folder, kind.split()[1], "llama", tokenizer_folder)
        return LoadedModel.load(str(folder), device="cpu"), [picture((160, 70))]
    loaded = LoadedModel.load(str(checkpoint), device="cpu")
    if kind == "video":
        return loaded, [load_video(clips.write(folder / "clip.mkv", clips.frames()))]
    return loaded, [picture(), picture(seed=1)]


def test_the_drawing_dims_exactly_the_patches_that_are_gone(asked):
    loaded, visuals = asked
    reducers = {BASELINE: Reducer(), "divprune": load_reducer({"method": "divprune", "retain": 9})}
    baseline, method = compare(loaded, QUESTION, visuals, reducers, new_tokens=2, repeats=1)
    views = overlay.views_of(method.trace, baseline.trace)
    shown = np.concatenate([view.patches.flatten() for view in views])
    assert sorted(shown[shown >= 0]) == list(range(sum(image["patches"] for image in method.trace.images)))
    stage = next(stage for stage in overlay.stages_of(method.trace) if stage.title.startswith("entering"))
    assert len(stage.kept) == 9 * len(visuals) == sum(map(len, method.trace.tokens))
    for view in views:
        black = Image.new("RGB", (64, 64))
        drawn = np.asarray(overlay.panel(black, view, stage))
        rows, columns = view.patches.shape
        down = (2 * np.arange(rows) + 1) * drawn.shape[0] // (2 * rows)
        across = (2 * np.arange(columns) + 1) * drawn.shape[1] // (2 * columns)
        black_there = (drawn[down][:, across] == 0).all(-1)
        assert np.array_equal(black_there, np.isin(view.patches, list(stage.kept)))
    assert overlay.sheet(loaded, visuals, method.trace, baseline.trace, "heading").width > overlay.PANEL


def test_answers_and_numbers_are_those_of_the_model_alone(asked):
    loaded, visuals = asked
    reducers = {BASELINE: Reducer(), "method": load_reducer({"method": "fastv", "retain": 9})}
    outcomes = compare(loaded, QUESTION, visuals, reducers, new_tokens=3, repeats=1)
    prompt = loaded.prompt_about(QUESTION, visuals)
    for outcome, reducer in zip(outcomes, reducers.values(), strict=True):
        with reducer.on(loaded.model) as run:
            (answer,) = loaded.answer([prompt], [visuals], max_new_tokens=3, do_sample=False)
        assert outcome.answer == answer
        assert outcome.trace.vision_tokens == run.traces[0].vision_tokens
    rows = {name: values for name, *values in table_rows(outcomes)}
    full = outcomes[0].entering
    assert rows["vision tokens entering the decoder"][0] == str(full)
    assert float(rows["vision tokens per layer, mean"][1].split()[0]) < full


def test_merged_patches_are_outlined_together(loaded):
    reducers = {BASELINE: Reducer(), "pool": load_reducer({"method": "avgpool", "retain": 9})}
    baseline, method = compare(loaded, QUESTION, [picture()], reducers, new_tokens=1, repeats=1)
    (view,) = overlay.views_of(method.trace, baseline.trace)
    stage = overlay.stages_of(method.trace)[-1]
    assert len(stage.merged) == 9 and len(stage.kept) == 36
    drawn = np.asarray(overlay.panel(Image.new("RGB", (60, 60)), view, stage))
    red = (drawn == overlay.OUTLINE).all(-1)
    cell = overlay.PANEL // 6
    assert red[2 * cell].all() and not red[cell, 1 : 2 * cell - 1].any()  # between groups, not inside one


def test_a_smaller_image_has_a_grid_of_its_own(loaded):
    reducers = {BASELINE: Reducer(), "small": load_reducer({"method": "smallimage", "retain": 9})}
    baseline, method = compare(loaded, QUESTION, [picture()], reducers, new_tokens=1, repeats=1)
    (view,) = overlay.views_of(method.trace, baseline.trace)
    assert view.patches.shape == (3, 3)


def test_the_command_asks_draws_and_writes(tmp_path, monkeypatch, capsys, checkpoint):
    image, drawing, facts = tmp_path / "photo.png", tmp_path / "out.png", tmp_path / "facts.json"
    picture((90, 60)).save(image)
    options = f"--model {checkpoint} --method divprune --retain 9 --image {drawing} --json {facts} --max-new-tokens 2"
    assert cli.main(["ask", str(image), QUESTION, *options.split(), "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    outcomes = json.loads(facts.read_text())["outcomes"]
    assert [one["trace"]["vision_tokens"][0] for one in outcomes] == [36, 9]
    assert all(one["answer"] in printed for one in outcomes)
    assert Image.open(drawing).width > overlay.PANEL


WRONG = {
    "nothing": ([], "question: got nothing"),
    "no question": (["PHOTO"], "question: got only"),
    "a file for a question": (["PHOTO", "PHOTO"], "expected a question"),
    "no such image": (["none.png", QUESTION], "there is no such file"),
    "scene and image": (["--scene", "1", "PHOTO", QUESTION], "expected a seed and at most a question"),
    "no seed": (["--scene", "x", QUESTION], "scene: got 'x'"),
    "method": (["PHOTO", QUESTION, "--method", "mustdropp"], "did you mean mustdrop"),
    "retain": (["PHOTO", QUESTION, "--retain", "0"], "retain: got '0'"),
    "drawing": (["PHOTO", QUESTION, "--image", "none/out.png"], "expected a file in a folder that is there"),
    "file and budget": (["PHOTO", QUESTION, "--method", "m.yaml", "--retain", "9"], "expected one of them"),
    "model": (["PHOTO", QUESTION, "--model", "./none"], "MODEL: there is no folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_one_line_before_a_model_is_loaded(name, tmp_path, monkeypatch, capsys):
    arguments, line = WRONG[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LoadedModel, "load", lambda *_, **__: pytest.fail("loaded"))
    picture().save("photo.png")
    assert command.main(["photo.png" if one == "PHOTO" else one for one in arguments]) == 2
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1


def test_a_scene_brings_its_question_and_answer():
    (image,), question, answer = command.read_inputs([], "7")
    assert image.size == (336, 336) and question.endswith("?") and answer
    assert command.read_inputs(["What color is the star?"], "7")[1:] == ("What color is the star?", None)


def test_the_terminal_shows_two_pixels_in_a_character():
    lines = overlay.terminal(Image.new("RGB", (8, 8), (1, 2, 3)), 4).split("\n")
    assert len(lines) == 2 and all(line.count("\u2580") == 4 and "38;2;1;2;3" in line for line in lines)
