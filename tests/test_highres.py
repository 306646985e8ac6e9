"""High-resolution scenes, the task made of them, and the embedded model that reads them in tiles."""

import os
import re
import subprocess
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from lmms_eval.api.instance import Instance
from PIL import Image
from safetensors import safe_open
from test_scenes import named, solve

from eval import checkpoints, tasks
from eval.mini import highres, scenes, tiles, tiles_evaluate
from eval.mini.export import export_tiles
from eval.run import command as run
from eval.run.cell import Cell
from eval.run.lmms import LlavaMustDrop
from eval.sweep import command as sweep
from eval.tasks import LOCAL, SUITE, mini_highres
from llava.anyres import get_anyres_image_grid_shape, process_anyres_image
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model

ROOT = Path(__file__).resolve().parents[1]
NEXT = ROOT / "checkpoints" / "llava-mini-next"
MINI = ROOT / "checkpoints" / "llava-mini"
SEEDS = range(30)


def beside(scene, thing, others):
    """What shares an edge with a thing, found by looking at the patches around its box."""
    shown = np.full((scenes.FULL_GRID + 2, scenes.FULL_GRID + 2), -1)
    for number, other in enumerate(others):
        row0, col0, row1, col1 = (edge + 1 for edge in other.box)
        shown[row0:row1, col0:col1] = number
    row0, col0, row1, col1 = (edge + 1 for edge in thing.box)
    edges = shown[row0 - 1, col0:col1], shown[row1, col0:col1], shown[row0:row1, col0 - 1], shown[row0:row1, col1]
    (found,) = set(np.concatenate(edges).tolist()) - {-1}
    return others[found]


def solved(scene, text):
    """Answer a question from its words and the scene's description alone."""
    if match := re.fullmatch(r"What (\w+) is the object by the (\w+) sign\?", text):
        (sign,) = (sign for sign in scene.signs if sign.color == match[2])
        return getattr(beside(scene, sign, scene.objects), match[1])
    if match := re.fullmatch(r"What (does|color is) the sign by the (.+?)( say)?\?", text):
        sign = beside(scene, named(scene, match[2]), scene.signs)
        return sign.word if match[1] == "does" else sign.color
    return solve(scene, text)


def test_same_seed_same_scene():
    for seed in SEEDS:
        first, second = highres.generate(seed), highres.generate(seed)
        assert first == second and np.array_equal(highres.draw(first), highres.draw(second))
    assert len({highres.generate(seed).entities for seed in SEEDS}) == len(SEEDS)


@pytest.mark.parametrize("layout", highres.LAYOUTS)
def test_no_canvas_changes_the_scale_of_a_scene(layout):
    """Each is as large as its canvas along one side at least, and cut into the tiles that its layout says."""
    down, across = map(int, layout.split("x"))
    for rows, cols in highres.SIZES[layout]:
        size = (scenes.PATCH * cols, scenes.PATCH * rows)
        assert get_anyres_image_grid_shape(size, highres.PINPOINTS, highres.TILE) == (across, down)
        assert rows == highres.TILE_GRID * down or cols == highres.TILE_GRID * across
    for seed in SEEDS:
        scene = highres.generate(seed, layout)
        assert (scene.rows, scene.cols) in highres.SIZES[layout] and highres.draw(scene).size == scene.size
        taken = np.zeros((scene.rows, scene.cols), int)
        for row0, col0, row1, col1 in (item.box for item in scene.entities):
            assert min(row0, col0) >= 0
            taken[row0:row1, col0:col1] += 1
        assert taken.max() == 1 and taken.sum() == sum(item.height * item.width for item in scene.entities)
    with pytest.raises(ValueError, match="layout: got '3x3', expected one of 2x2, 1x2, 2x1"):
        highres.generate(0, "3x3")


def test_answers_follow_from_the_scene():
    kinds = Counter()
    for scene, _, asked in highres.split_questions("train", 60, 12):
        for question in asked:
            assert solved(scene, question.text) == question.answer, question.text
            kinds[question.type] += 1
    assert set(kinds) == set(highres.TYPES) and min(kinds.values()) >= 8


def test_the_task_shows_unseen_scenes_of_two_by_two_tiles():
    rows = list(islice(mini_highres.documents(), 60))
    assert {scenes.split_of(row["scene"]) for row in rows} == {"test"}
    assert {scenes.split_of(row["scene"]) for row in mini_highres.documents(3, "train")} == {"train"}
    for row in rows:
        grid = get_anyres_image_grid_shape(row["image"].size, highres.PINPOINTS, highres.TILE)
        assert grid == (2, 2) and solved(highres.generate(row["scene"], "2x2"), row["question"]) == row["answer"]
    assert len({row["question_id"] for row in rows}) == len(rows)


def test_a_task_that_stands_in_for_no_benchmark_is_no_part_of_the_suite():
    assert "mini_highres" in LOCAL and "mini_highres" not in SUITE
    assert tasks.is_local("mini_highres") and tasks.mirrored("mini_highres") == "mini_highres"


def test_data_change_with_the_generator_of_their_own_scenes_alone(tmp_path, monkeypatch):
    before = {task: tasks.fingerprint(task) for task in LOCAL}
    for file in tasks.GENERATOR.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with open(tmp_path / "highres.py", "a") as file:
        file.write("\n")
    monkeypatch.setattr(tasks, "GENERATOR", tmp_path)
    assert [task for task in LOCAL if tasks.fingerprint(task) != before[task]] == ["mini_highres"]


# The model


@pytest.fixture(scope="module")
def loaded():
    return load_pretrained_model(str(NEXT), device="cpu", torch_dtype=torch.float32)


def test_the_folder_keeps_what_differs_from_the_embedded_model(loaded):
    model = loaded[1]
    names = {name for name, _ in model.named_parameters()}
    with safe_open(NEXT / "model.safetensors", "pt") as file:
        held = set(file.keys())
    (table,) = (name for name in held if "vision_tower" in name)
    assert held < names and "model.image_newline" in held and table.endswith("position_embedding.weight")
    assert sum(file.stat().st_size for file in NEXT.iterdir()) < 10e6


@pytest.mark.parametrize("layout", highres.LAYOUTS)
@torch.inference_mode()
def test_training_shows_tiles_as_the_model_does(loaded, layout):
    tokenizer, model, processor, _ = loaded
    scene = highres.generate(scenes.scene_seed("test", 5), layout)
    views = process_anyres_image(highres.draw(scene), processor, model.config.image_grid_pinpoints)
    assert torch.equal(views, process_anyres_image(highres.draw(scene), tiles.image_processor(), highres.PINPOINTS))
    ids = tokenizer_image_token("<image>", tokenizer, return_tensors="pt")[None]
    for shown in (views, views[:1]):
        spliced = model.splice(ids, images=[shown], image_sizes=[scene.size]).embeds
        projected = model.model.mm_projector(model.get_vision_tower()(shown))
        laid_out = tiles.lay_out(projected[None], scene.size, model.model.image_newline)
        assert torch.equal(spliced[:, -laid_out.shape[1] :], laid_out)


def test_small_text_needs_the_tiles(loaded):
    """Far above chance with tiles, far below that with the overview alone."""
    asked = [
        (scene, image, [question for question in questions if question.type == "reading"])
        for scene, image, questions in highres.split_questions("test", 6, 10, layout="2x2")
    ]
    right = {
        shown: np.mean([item.right for item in tiles_evaluate.answer_all(loaded, iter(asked), shown)])
        for shown in ("tiles", "overview")
    }
    assert right["tiles"] >= 0.6 and right["overview"] <= right["tiles"] - 0.4


def test_training_goes_on_where_it_stopped_and_its_export_loads(tmp_path, loaded):
    begin, checkpoint = ROOT / "checkpoints" / "llava-mini", tmp_path / "work" / "tiles.pt"
    tiles.tune_tiles(begin, checkpoint, "strips:1", tokens=1, save_every=1)
    first = torch.load(checkpoint, weights_only=True)
    assert first["step"] == 1
    tiles.tune_tiles(begin, checkpoint, "strips:1,squares:1", tokens=1)
    second = torch.load(checkpoint, weights_only=True)
    changed = [name for name, value in first["tiled"].items() if not torch.equal(value, second["tiled"][name])]
    assert second["step"] == 2 and set(changed) == set(first["tiled"])
    folder = export_tiles(checkpoint, tmp_path / "model", begin)
    model = load_pretrained_model(str(folder), device="cpu", torch_dtype=torch.float32)[1]
    assert torch.equal(model.model.image_newline.half(), second["tiled"]["image_newline"].half())
    theirs, ours = (one.get_vision_tower().state_dict() for one in (loaded[1], model))
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())


@pytest.mark.parametrize("phases", ["strips", "strips:x", "rows:3", ""])
def test_phases_that_are_none(phases):
    with pytest.raises(ValueError, match="phases: .* should look like NAME:STEPS, with one of strips, mixed, squares"):
        tiles.phase_of_steps(phases)


def test_the_script_lists_vanilla_and_every_method_at_the_budgets_in_reach(tmp_path):
    variables = {**os.environ, "OUT": str(tmp_path / "out")}
    variables.pop("MODEL", None)
    script = str(ROOT / "scripts" / "eval_next.sh")
    done = subprocess.run(["bash", script, "--dry-run"], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = [line.split() for line in done.stdout.splitlines() if line.startswith("llava-mini-next")]
    cells = {(method, retain) for _, task, method, retain, *_ in listed if task == "mini_highres"}
    methods, budgets = ("mustdrop", "mustdrop_plus", "fastv", "visionzip"), ("160", "80", "40")
    wanted = {("vanilla", "-"), *((method, budget) for method in methods for budget in budgets)}
    assert cells == wanted - {("mustdrop", "40")} and "left out: no settings of mustdrop for 40 tokens" in done.stdout


def test_protocol_flat_by_command_and_environment(monkeypatch):
    folder = str(NEXT)
    given = run.parser().parse_args(["--model", folder, "--protocol", "flat"])
    assert checkpoints.loading(given)["protocol"] == "flat"
    monkeypatch.setenv("PROTOCOL", "flat")
    assert checkpoints.loading(run.parser().parse_args(["--model", folder]))["protocol"] == "flat"
    plain = Cell(folder, "mini_highres", "mini_highres")
    flat = replace(plain, protocol="flat")
    assert flat.key != plain.key and "protocol" not in plain.identity()
    with pytest.raises(ValueError, match="^protocol: got 'flatter'"):
        checkpoints.check_checkpoint(folder, protocol="flatter")


def plugin(words: str) -> LlavaMustDrop:
    """The model as `lmms_eval --model llava_mustdrop --model_args WORDS` makes it."""
    return LlavaMustDrop.create_from_arg_string(words, {"batch_size": "1"})


def asked(model: LlavaMustDrop, image: Image.Image) -> list[float]:
    """Vision tokens of one question at every layer, as the plugin records them."""
    model.task_dict["task"] = {"test": [{"image": image}]}
    settings = {"max_new_tokens": 2, "temperature": 0, "until": ["\n\n"]}
    arguments = "What is this?", settings, lambda document: [document["image"]], 0, "task", "test"
    metadata = {"task": "task", "doc_id": 0, "repeats": 1}
    model.generate_until([Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata)])
    return model.records[0]["vision_tokens"]


@pytest.mark.parametrize("method", ["vanilla", "fastv,layer=2,drop_ratio=0.5"])
def test_protocol_of_the_lmms_plugin_reaches_the_model(method):
    """A wide image is an overview and two tiles to the model, and in papers' protocol five views like every other."""
    image = Image.new("RGB", (400, 150), "teal")
    words = f"pretrained={NEXT},device=cpu,dtype=float32,method={method}"
    found = {protocol: asked(plugin(words + protocol), image) for protocol in ("", ",protocol=model", ",protocol=flat")}
    assert found[""] == found[",protocol=model"] and found[",protocol=flat"][0] == 5 * 144 > found[""][0]
    assert found[",protocol=flat"][-1] == (5 * 72 if "fastv" in method else 5 * 144)


@pytest.mark.parametrize(
    ("pretrained", "protocol", "line"),
    [
        ("nowhere/nothing", "flatter", "protocol is 'flatter': it must be one of model, flat"),
        (NEXT, "FLAT", "protocol is 'FLAT'"),
        (NEXT, "1", "protocol is '?1"),
        (
            ROOT / "checkpoints" / "llava-mini",
            "flat",
            "protocol is 'flat': it is for models that cut images into tiles",
        ),
    ],
)
def test_a_wrong_protocol_of_the_lmms_plugin_is_one_line_before_anything_loads(pretrained, protocol, line, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("something was loaded")

    monkeypatch.setattr("llava.model.builder.load_weights", refuse)
    monkeypatch.setattr("llava.model.builder.load_tokenizer", refuse)
    with pytest.raises(ValueError, match=line) as error:
        plugin(f"pretrained={pretrained},device=cpu,protocol={protocol}")
    assert "\n" not in str(error.value)


def test_protocol_flat_in_a_sweep(tmp_path, capsys):
    lines = f"models: [{{model: {NEXT}, protocol: flat}}]\ntasks: [mini_highres]\n"
    (tmp_path / "flat.yaml").write_text(lines + "methods: [fastv]\nretain: [160]\n")
    assert sweep.main([str(tmp_path / "flat.yaml"), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "llava-mini-next-flat" in capsys.readouterr().out
