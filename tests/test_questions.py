"""Questions that do not fit: image tokens and images in any numbers, images that cannot be read, prompts too long."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from lmms_eval.api.instance import Instance
from PIL import Image

from eval.calibrate import thresholds as calibrate
from eval.report import summary
from eval.run import command as run
from eval.run import runner
from eval.run.inference import UnfitQuestion
from eval.run.lmms import LlavaMustDrop
from eval.tasks import mini_gqa
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import tokenizer_image_token

RED, BLUE = (Image.new("RGB", (30, 20), color) for color in ("red", "blue"))


def image_tokens(loaded, question: str, images: int) -> int:
    return int((loaded.encode(loaded.prompt(question, images), images) == IMAGE_TOKEN_INDEX).sum())


@pytest.mark.parametrize("images", [0, 1, 2, 3])
@pytest.mark.parametrize("question", ["What?", "<image>\nWhat?", "Is <image> like <image>?", "<image><image><image>"])
def test_there_are_as_many_image_tokens_as_images(loaded, question, images):
    assert image_tokens(loaded, question, images) == images
    prepared = loaded.prepare([loaded.prompt(question, images)], [[RED] * images])
    assert int((prepared["input_ids"] == IMAGE_TOKEN_INDEX).sum()) == images


def test_tokens_stay_where_they_are_if_they_are_as_many_as_images(loaded):
    question = "Is <image> like <image>?"
    assert question in loaded.prompt(question, 2)
    assert "<image>\nIs <image> like <image>?" in loaded.prompt(question, 1)
    assert "<image> <image> <image>\nIs" in loaded.prompt(question, 3)


def test_a_model_trained_with_marks_around_images_gets_them(loaded, monkeypatch):
    monkeypatch.setattr(loaded.model.config, "mm_use_im_start_end", True)
    marked = "<im_start><image><im_end>"
    assert f"{marked}\nWhat?" in loaded.prompt("What?", 1)
    assert f"Is {marked} like {marked}?" in loaded.prompt("Is <image> like <image>?", 2)
    assert "im_start" not in loaded.prompt("What does <image> mean?", 0)


def test_without_an_image_the_token_is_text(loaded):
    prompt = loaded.prompt("What does <image> mean in HTML?", 0)
    assert loaded.encode(prompt, 0).tolist() == loaded.tokenizer(prompt).input_ids
    assert "<image>" in loaded.tokenizer.decode(loaded.encode(prompt, 0))


def test_tokens_beyond_the_images_are_text():
    def tokenizer(text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1, *map(ord, text)])

    tokenizer.bos_token_id = 1
    prompt = "a<image>b<image>c"
    assert tokenizer_image_token(prompt, tokenizer, images=1) == [1, ord("a"), -200, *map(ord, "b<image>c")]
    assert tokenizer_image_token(prompt, tokenizer).count(-200) == 2
    assert tokenizer_image_token(prompt, tokenizer, images=0).count(-200) == 0


def test_a_prompt_with_fewer_tokens_than_images_is_one_line(loaded):
    with pytest.raises(UnfitQuestion, match="got 1 image tokens for 2 images") as error:
        loaded.prepare(["<image> only"], [[RED, BLUE]])
    assert "\n" not in str(error.value)


# In lmms-eval


class Documents(list):
    """Documents, of which one cannot be decoded."""

    def __getitem__(self, number: int) -> dict:
        document = super().__getitem__(number)
        if isinstance(document, Exception):
            raise document
        return document


DAMAGED = Image.new("RGB", (0, 0))
DOCUMENTS = Documents(
    [
        {"images": [RED], "text": "What is <image> here, <image>?"},
        {"images": [RED, BLUE], "text": "<image>\nCompare."},
        {"images": [], "text": "What is <image>?"},
        {"images": [DAMAGED], "text": "What is this?"},
        OSError("cannot identify image file"),
        {"images": ["a.mp4"], "text": "What happens?"},
    ]
)


def asked(*numbers: int) -> list[Instance]:
    settings = {"max_new_tokens": 2}
    return [
        Instance(
            request_type="generate_until",
            arguments=(
                "" if isinstance(list.__getitem__(DOCUMENTS, number), Exception) else DOCUMENTS[number]["text"],
                settings, lambda document: document["images"], number, "a_task", "test",
            ),
            idx=0,
            metadata={"task": "a_task", "doc_id": number, "repeats": 1},
        )
        for number in numbers
    ]  # fmt: skip


def plugin(loaded, **settings) -> LlavaMustDrop:
    model = LlavaMustDrop(loaded=loaded, **settings)
    model.task_dict["a_task"] = {"test": DOCUMENTS}
    return model


@pytest.mark.parametrize("method", ["vanilla", "mustdrop"])
def test_any_number_of_tokens_is_answered(loaded, method):
    model = plugin(loaded, method=method, batch_size=3)
    assert len(model.generate_until(asked(0, 1, 2))) == 3
    assert {one["doc_id"]: len(one["images"]) for one in model.records} == {0: 1, 1: 2, 2: 0}


@pytest.mark.parametrize(("number", "words"), [(3, "none at all"), (4, "cannot identify"), (5, "no such file")])
def test_an_unfit_document_is_named(loaded, number, words):
    with pytest.raises(ValueError, match=f"^a_task, document {number}: .*{words}") as error:
        plugin(loaded, batch_size=2).generate_until(asked(0, number))
    assert "\n" not in str(error.value)


def test_unfit_documents_are_skipped_and_tried_again_later(loaded, tmp_path):
    samples = tmp_path / "s.jsonl"
    model = plugin(loaded, batch_size=2, samples=str(samples), skip_unfit=True)
    answers = model.generate_until(asked(3, 0, 4, 5, 2))
    assert [bool(answer == "") for answer in answers].count(True) >= 3
    skipped = {
        one["doc_id"]: one["skipped"] for one in map(json.loads, samples.read_text().splitlines()) if "skipped" in one
    }
    assert set(skipped) == {3, 4, 5} and all(reason.startswith("a_task, document") for reason in skipped.values())
    again = plugin(loaded, batch_size=2, samples=str(samples), skip_unfit=True, resume=True)
    assert sorted(doc_id for doc_id, *_ in again.answers.known) == ["0", "2"]


def test_a_failing_method_names_its_documents(loaded, monkeypatch):
    model = plugin(loaded, batch_size=2)

    def fail(*arguments):
        raise ValueError("retain: out of\nreach")

    monkeypatch.setattr(model, "_generate", fail)
    with pytest.raises(ValueError, match=r"^a_task, documents 1, 0: retain: out of reach$|documents 0, 1"):
        model.generate_until(asked(0, 1))


def test_loglikelihood_with_a_token_that_is_text(loaded):
    one = asked(0)[0]
    request = Instance(
        request_type="loglikelihood",
        arguments=(one.args[0], "a <image> sign", *one.args[2:]),
        idx=0,
        metadata=one.metadata,
    )
    ((loss, _),) = plugin(loaded).loglikelihood([request])
    assert loss > 0


# End to end


@pytest.fixture
def small_run(checkpoint, tmp_path, monkeypatch) -> list[str]:
    """A run of four questions, the third of which has an image that cannot be read."""
    from eval.run.lmms import LlavaMustDrop

    monkeypatch.setenv("MUSTDROP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mini_gqa, "SCENES", 2)
    visuals = LlavaMustDrop._visuals

    def damaged(self, doc_to_visual, document, where):
        return visuals(self, (lambda document: [DAMAGED]) if where[0] == 2 else doc_to_visual, document, where)

    monkeypatch.setattr(LlavaMustDrop, "_visuals", damaged)
    arguments = ["--model", str(checkpoint), "--task", "mini_gqa", "--method", "fastv", "--retain", "18"]
    return [*arguments, "--limit", "4", "--batch-size", "2", "--out", str(tmp_path / "out")]


def test_a_run_ends_with_the_documents_name_or_counts_it(small_run, tmp_path, capsys):
    assert run.main(small_run) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: mini_gqa, document 2: ")
    assert run.main([*small_run, "--skip-unfit"]) == 0
    printed = capsys.readouterr().out
    rows_written = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert [(row["n"], row["skipped"], row["beyond_context"]) for row in rows_written] == [(4, 1, 0)] * 2
    assert "Questions skipped, which count as wrong: vanilla 1, fastv 1." in printed


def test_prompts_beyond_the_context_are_counted():
    line = {"text_tokens": 100, "vision_tokens": [36, 9]}
    assert runner._prompt_tokens(line) == 136
    known = {"label": "", "bits": None, "selector_macs": 0}
    rows = [
        {**known, "method": "fastv", "beyond_context": 3, "skipped": 0},
        {**known, "method": "old", "beyond_context": None, "skipped": None},
    ]
    remarks = summary.remarks(pd.DataFrame(rows, dtype=object))
    assert remarks == ["Questions longer than the model's context: fastv 3."]


def test_calibration_blames_the_question(checkpoint, loaded, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate, "read_samples", lambda *_: [(DAMAGED, "What?")])
    monkeypatch.setattr("eval.run.inference.LoadedModel.load", lambda *_, **__: loaded)
    arguments = [
        "--model",
        str(checkpoint),
        "--method",
        "fastv",
        "--retain",
        "18",
        "--out",
        str(tmp_path),
    ]
    assert calibrate.main(arguments) == 2
    error = capsys.readouterr().err
    assert "out of reach" not in error and "none at all" in error


def test_calibration_takes_a_token_that_is_text(loaded):
    counts = calibrate.measure_tokens(
        loaded, {"method": "fastv", "retain": 18}, [(RED, "Is <image> a <image>?")], 1, ""
    )
    assert counts[1] == pytest.approx(18, abs=1)


# Types of what is loaded


@pytest.mark.parametrize("quantised", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_images_never_get_the_type_of_quantised_weights(loaded, quantised):
    packed = torch.nn.Parameter(torch.zeros(2, dtype=quantised), requires_grad=False)
    model = torch.nn.ModuleList([torch.nn.ParameterList([packed]), torch.nn.Linear(2, 2, dtype=torch.bfloat16)])
    other = type(loaded)(loaded.tokenizer, model, None, 0)
    assert other.dtype is torch.bfloat16


def test_the_device_is_never_meta(loaded):
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2, device="meta"), torch.nn.Linear(2, 2)])
    assert type(loaded)(None, model, None, 0).device.type == "cpu"
