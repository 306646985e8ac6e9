"""The chat: turns are what the model says of the whole conversation, and a kept cache is what it claims to be."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from llava.serve import cli
from llava.serve.chat import Chat
from mustdrop import Reducer, load_reducer

REDUCERS = {"vanilla": {"method": "vanilla"}, "divprune": {"method": "divprune", "retain": 9},
            "fastv": {"method": "fastv", "retain": 9}}  # fmt: skip


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def chat_with(loaded, name: str = "vanilla", **options) -> Chat:
    return Chat(
        loaded.model, loaded.tokenizer, loaded.image_processor, "vicuna_v1", load_reducer(REDUCERS[name]), **options
    )


def generated(loaded, reducer: Reducer, conversation, images: list, new_tokens: int) -> str:
    """The answer of `generate` to a whole conversation."""
    ids = tokenizer_image_token(conversation.get_prompt(), loaded.tokenizer, return_tensors="pt")[None]
    pixels = list(process_images(images, loaded.image_processor, loaded.model.config)) if images else None
    with torch.inference_mode(), reducer.on(loaded.model):
        out = loaded.model.generate(ids, images=pixels, max_new_tokens=new_tokens, do_sample=False)
    return loaded.tokenizer.batch_decode(out, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize("name", REDUCERS)
def test_every_turn_is_what_generate_says_of_the_whole_conversation(loaded, name):
    chat, written, images = chat_with(loaded, name), conv_templates["vicuna_v1"].copy(), []
    for turn, (question, shown) in enumerate([("describe the sign", [0]), ("and the dog", []), ("and this", [1, 2])]):
        for seed in shown:
            chat.show(picture(seed))
            images.append(picture(seed))
        written.append_message(written.roles[0], "\n".join([*[DEFAULT_IMAGE_TOKEN] * len(shown), question]))
        written.append_message(written.roles[1], None)
        pieces = list(chat.ask(question, max_new_tokens=4))
        said = generated(loaded, chat.reducer, written, images, 4)
        assert "".join(pieces).strip() == said and chat.conversation.messages[-1][1] == said
        written.messages[-1][1] = said
        assert len(chat.recorder.traces[-1].images) == len(images) and turn < 3


def test_a_kept_cache_without_a_reducer_is_the_same_conversation(loaded):
    chat, read = chat_with(loaded, keeps_cache=True), []
    chat.show(picture())
    own = chat._read
    chat._read = lambda ids: read.extend(ids) or own(ids)
    list(chat.ask("describe the sign", max_new_tokens=4))
    first = conv_templates["vicuna_v1"].copy()
    first.append_message(first.roles[0], f"{DEFAULT_IMAGE_TOKEN}\ndescribe the sign")
    first.append_message(first.roles[1], None)
    assert chat.goes_on
    (said,) = chat.ask("and the dog", max_new_tokens=1)
    assert chat.prefilled < 20
    end = loaded.tokenizer("</s>USER: and the dog ASSISTANT:", add_special_tokens=False).input_ids
    assert read[-len(end) :] == end
    ids = [*tokenizer_image_token(first.get_prompt(), loaded.tokenizer), *read]
    pixels = process_images([picture()], loaded.image_processor, loaded.model.config)
    with torch.inference_mode():
        logits = loaded.model(torch.tensor([ids]), images=pixels).logits[0, -1]
    assert loaded.tokenizer.decode([int(logits.argmax())]) == said


def test_a_kept_cache_has_lost_what_was_dropped_and_an_image_brings_it_back(loaded):
    chat = chat_with(loaded, "fastv", keeps_cache=True)
    chat.show(picture())
    list(chat.ask("describe the sign", max_new_tokens=2))
    before = chat._cache
    list(chat.ask("and the dog", max_new_tokens=2))
    assert chat._cache is before
    chat.show(picture(1))
    assert not chat.goes_on
    list(chat.ask("and this", max_new_tokens=2))
    assert chat._cache is not before and len(chat.recorder.traces[-1].images) == 2


def test_an_answer_that_is_broken_off_stays_in_the_conversation(loaded):
    chat = chat_with(loaded, keeps_cache=True)
    chat.show(picture())
    answer = chat.ask("describe the sign", max_new_tokens=6)
    first = next(answer)
    answer.close()
    assert chat.conversation.messages[-1][1] == first.strip()
    assert isinstance("".join(chat.ask("go on", max_new_tokens=2)), str)
    chat.clear()
    assert not chat.images and not chat.conversation.messages


def test_tokens_are_drawn_where_a_temperature_is_given(loaded):
    answers = set()
    for seed in range(4):
        torch.manual_seed(seed)
        chat = chat_with(loaded)
        answers.add("".join(chat.ask("describe", max_new_tokens=6, temperature=5.0, top_p=0.99)))
    assert len(answers) > 1


def test_the_command_chats(checkpoint, tmp_path, monkeypatch, capsys):
    picture().save(tmp_path / "photo.png")
    photo, none = tmp_path / "photo.png", tmp_path / "none.png"
    lines = f"describe the sign\n/image {none}\n/image {photo}\nand this\n/clear\nwhat\n\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    told = ["--model-path", str(checkpoint), "--image-file", str(tmp_path / "photo.png"), "--method", "fastv"]
    options = [
        "--retain",
        "9",
        "--keep-cache",
        "--max-new-tokens",
        "2",
        "--temperature",
        "0",
        "--debug",
        "--device",
        "cpu",
    ]
    assert cli.main([*told, *options]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("ASSISTANT: ") == 3 and printed.out.endswith("exit...\n")
    assert "there is no such file" in printed.err and printed.err.count("tokens before the first") == 3


WRONG = {
    "image": (["--image-file", "none.png"], "there is no such file"),
    "method": (["--method", "mustdropp"], "did you mean mustdrop"),
    "field": (["--method", "yopo", "--retain", "9"], "retain is no field of yopo"),
    "template": (["--conv-mode", "vicuna"], "conv_mode: got 'vicuna'"),
    "temperature": (["--temperature", "-1"], "temperature: got '-1'"),
    "tokens": (["--max-new-tokens", "0"], "max_new_tokens: got '0'"),
    "bits": (["--load-4bit", "--load-8bit"], "not allowed with"),
    "model": (["--model-path", "./none"], "none"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_one_line(name, tmp_path, monkeypatch, capsys):
    arguments, line = WRONG[name]
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    printed = capsys.readouterr().err
    assert line in printed and printed.count("\n") == 1


def test_a_model_of_transformers_own_is_sent_elsewhere(monkeypatch, tmp_path, tokenizer_folder, capsys):
    import stock_folders

    folder = stock_folders.save(tmp_path / "next", "next", "llama", tokenizer_folder)
    assert cli.main(["--model-path", str(folder), "--device", "cpu"]) == 2
    assert "mustdrop ask takes it" in capsys.readouterr().err
