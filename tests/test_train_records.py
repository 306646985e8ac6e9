"""Records are looked over before the first step: the first bad one is named, what LLaVA accepts is accepted."""

import json
import logging

import pytest
import torch
from training import sample_records, turns, write_records

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.tokenizer import load_tokenizer
from llava.train.dataset import Collator, ConversationDataset, conversation_text, encode_conversation
from llava.train.records import look_over, read_records


@pytest.fixture
def tokenizer(tokenizer_folder):
    return load_tokenizer(tokenizer_folder)


def dataset(records, folder, tokenizer, loaded, **settings) -> ConversationDataset:
    return ConversationDataset(records, tokenizer, loaded.image_processor, image_folder=folder, **settings)


GOOD = turns("<image>\nWhat is it?", "a sign")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("text", "got a str, expected a dict"),
        ({"id": 7}, "conversations: got nothing"),
        ({"conversations": []}, r"conversations: got \[\]"),
        ({"conversations": "hello"}, "conversations: got 'hello'"),
        ({"conversations": ["hello"]}, r"conversations\[0\]: got a str"),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\].value: got None"),
        ({"conversations": turns("what?") + [{"from": "gpt", "value": 3}]}, r"conversations\[1\].value: got 3"),
        ({"conversations": [{"from": "user", "value": "hi"}]}, r"conversations\[0\].from: got 'user'"),
        ({"conversations": turns("what?", "\ud800")}, "half a surrogate pair"),
        ({"conversations": turns("what?")}, "hold an answer"),
        ({"conversations": turns("hello", first="gpt")}, "hold an answer"),
        ({"conversations": turns("a", "b") + turns("c", "d", first="gpt")}, "should alternate"),
        ({"video": "a.mp4", "conversations": turns("what?", "this")}, "video: got 'a.mp4'"),
        ({"image": 3, "conversations": GOOD}, "image: got 3"),
        ({"image": "", "conversations": GOOD}, "image: got ''"),
        ({"image": "nowhere.png", "conversations": GOOD}, "nowhere.png' does not exist"),
        ({"image": "../x\0.png", "conversations": GOOD}, "does not exist"),
        ({"image": ".", "conversations": GOOD}, "is a folder"),
        ({"image": ["red.png", "red.png"], "conversations": GOOD}, "2 images and 1 <image> marks"),
        ({"image": "red.png", "conversations": GOOD + GOOD}, "1 images and 2 <image> marks"),
    ],
)
def test_first_bad_record_is_named(bad, message, tmp_path):
    records = sample_records(tmp_path)
    records[2:2] = [bad, {"id": "later"}]
    identity = f", id {bad['id']}" if isinstance(bad, dict) and "id" in bad else ""
    with pytest.raises(ValueError, match=message) as raised:
        look_over(records, "v1", tmp_path)
    assert f"record 3 of 6 (index 2{identity})" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "empty list"),
        (b'{"conversations": []}', "holds a dict"),
        (b"[{]", "no valid JSON"),
        (b"[" * 100_000, "no valid JSON"),
        (b"", "no valid JSON"),
        (b'["\xff"]', "not UTF-8"),
    ],
)
def test_files_that_hold_no_records(content, message, tmp_path):
    (tmp_path / "data.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        read_records(tmp_path / "data.json")
    assert "data.json" in str(raised.value) and "\n" not in str(raised.value)


def test_json_lines_and_a_byte_order_mark(tmp_path):
    records = sample_records(tmp_path)
    (tmp_path / "data.jsonl").write_text("\n\n".join(json.dumps(record) for record in records))
    (tmp_path / "marked.json").write_text(json.dumps(records), encoding="utf-8-sig")
    assert read_records(tmp_path / "data.jsonl") == read_records(tmp_path / "marked.json") == records
    (tmp_path / "data.jsonl").write_text("{}\n{")
    with pytest.raises(ValueError, match="line 2"):
        read_records(tmp_path / "data.jsonl")


@pytest.mark.parametrize(
    "accepted",
    [
        turns("welcome", "what?", "this", first="gpt"),
        turns("what?", "this", "and that?"),
        turns("welcome", "what?", "this", "and that?", first="gpt"),
    ],
)
def test_conversations_llava_accepts(accepted, tokenizer):
    look_over([{"conversations": accepted}], "v1", ".")
    assert encode_conversation(accepted, "v1", tokenizer, 0) == encode_conversation(
        turns("what?", "this"), "v1", tokenizer, 0
    )


def test_text_without_an_image_is_text(tmp_path, tokenizer, loaded):
    """`<image>` in a text-only record is a word, as in LLaVA: no -200, no blank image, all of it in the prompt."""
    examples = dataset(sample_records(tmp_path), tmp_path, tokenizer, loaded)
    example = examples[3]
    assert IMAGE_TOKEN_INDEX not in example["input_ids"] and example["images"] == []
    assert "<image> mean in HTML" in tokenizer.decode(example["input_ids"])
    assert [length > 0 for length in examples.modality_lengths] == [True, True, True, False]


def test_an_image_nobody_asks_for_is_said_and_not_used(tmp_path, tokenizer, loaded, caplog):
    records = [*sample_records(tmp_path), {"image": "red.png", "conversations": turns("Which color?", "red")}]
    look_over(records, "v1", tmp_path)
    assert "1 of 5 records have an image but no <image>" in caplog.text
    assert dataset(records, tmp_path, tokenizer, loaded)[4]["images"] == []


def test_several_images(tmp_path, tokenizer, loaded):
    sample_records(tmp_path)
    both = {"image": ["red.png", "blue.png"], "conversations": turns("First <image>, then <image>: same?", "no")}
    apart = {"image": ["red.png", "blue.png"], "conversations": turns("One <image>", "red", "<image>", "blue")}
    once = {"image": "red.png", "conversations": turns("<image> <image> which?", "red")}
    look_over([both, apart, once], "v1", tmp_path)
    examples = [dataset([both, apart, once], tmp_path, tokenizer, loaded)[index] for index in range(3)]
    assert [len(example["images"]) for example in examples] == [2, 2, 1]
    for example in examples:
        assert (example["input_ids"] == IMAGE_TOKEN_INDEX).sum() == len(example["images"])
    assert not torch.equal(*examples[0]["images"])
    assert "First <image>, then <image>: same?" in conversation_text(both["conversations"], "v1", 2)[0]
    assert "<image>\nOne" in conversation_text(apart["conversations"], "v1", 2)[0]
    batch = Collator(0, 84)(examples + [{"input_ids": torch.tensor([1]), "labels": torch.tensor([1]), "images": []}])
    assert batch["images"].shape == (6, 3, 84, 84)


def test_marks_around_images():
    text, _ = conversation_text(GOOD, "v1", 1, start_end=True)
    assert "<im_start><image><im_end>\nWhat is it?" in text
    assert "<Image><image></Image>" in conversation_text(GOOD, "v1_mmtag", 1)[0]
    assert "<im_start>" not in conversation_text(turns("<image>?", "x"), "v1", 0, start_end=True)[0]


def test_captions_take_one_image(tmp_path, tokenizer):
    sample_records(tmp_path)
    look_over([{"image": "red.png", "conversations": GOOD}], "plain", tmp_path)
    with pytest.raises(ValueError, match="'plain' takes one image and two turns, got 1 images and 4 turns"):
        look_over([{"image": "red.png", "conversations": GOOD + turns("and?", "no")}], "plain", tmp_path)
    ids, labels = encode_conversation(turns("what?", "a dog"), "plain", tokenizer, 0)
    assert IMAGE_TOKEN_INDEX not in ids and labels[1:] == ids[1:]


def test_unreadable_image_names_its_record(tmp_path, tokenizer, loaded):
    records = sample_records(tmp_path)
    (tmp_path / "green.png").write_bytes(b"no image")
    look_over(records, "v1", tmp_path)
    with pytest.raises(ValueError, match=r"record 2 of 4 \(index 1, id 'color-1'\): image '.*green.png'"):
        dataset(records, tmp_path, tokenizer, loaded)[1]


def test_limit_counts_image_tokens(tmp_path, tokenizer, loaded, caplog):
    """The limit holds after images are in place, and labels beyond it are gone for the loss, too."""
    records = [{"id": 5, "image": "red.png", "conversations": turns("<image>\n" + "dog " * 30, "cat " * 30)}]
    sample_records(tmp_path)
    whole = dataset(records, tmp_path, tokenizer, loaded)[0]
    place = int((whole["input_ids"] == IMAGE_TOKEN_INDEX).nonzero())
    cut = dataset(records, tmp_path, tokenizer, loaded, limit=len(whole["input_ids"]) + 25, tile_tokens=36)[0]
    assert len(cut["input_ids"]) == len(whole["input_ids"]) - 10 and len(cut["images"]) == 1
    assert torch.equal(cut["labels"], whole["labels"][:-10])
    caplog.set_level(logging.WARNING)
    short = dataset(records, tmp_path, tokenizer, loaded, limit=place + 50, tile_tokens=36)[0]
    assert len(short["input_ids"]) == place + 15 and (short["labels"] == IGNORE_INDEX).all()
    assert "record 1 of 1 (index 0, id 5): no answer left" in caplog.text
    assert dataset(records, tmp_path, tokenizer, loaded, limit=place, tile_tokens=36)[0]["images"] == []


def test_reading_a_file_looks_it_over(tmp_path, tokenizer, loaded):
    file = write_records(tmp_path, [{"conversations": turns("what?")}])
    with pytest.raises(ValueError, match="record 1 of 1"):
        ConversationDataset.from_json(file, tokenizer, loaded.image_processor)
