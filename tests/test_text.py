"""Tokenisation, prompt templates and stopping texts."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, StoppingCriteriaList

from llava import constants
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import SeparatorStyle, conv_templates, default_conversation
from llava.mm_utils import KeywordsStoppingCriteria, get_model_name_from_path, tokenizer_image_token
from llava.model.tokenizer import LlamaTokenizer, load_tokenizer

USER_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def golden_text(golden: Path) -> dict:
    return json.loads((golden / "tokenizer_conversation.json").read_text())


@pytest.fixture(scope="module")
def golden_tokenizer(golden: Path) -> LlamaTokenizer:
    return load_tokenizer(golden / "model_llava")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder: Path) -> LlamaTokenizer:
    return load_tokenizer(tokenizer_folder)


def converse(template: str, *texts: str | tuple | None) -> str:
    conversation = conv_templates[template].copy()
    for index, text in enumerate(texts):
        conversation.append_message(conversation.roles[index % 2], text)
    return conversation.get_prompt()


def test_package_is_light_to_import():
    code = "import sys, llava.conversation; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_constants_are_those_of_llava():
    assert (constants.IGNORE_INDEX, constants.IMAGE_TOKEN_INDEX) == (-100, -200)
    assert constants.DEFAULT_IMAGE_TOKEN == "<image>"
    assert constants.DEFAULT_IMAGE_PATCH_TOKEN == "<im_patch>"
    assert (constants.DEFAULT_IM_START_TOKEN, constants.DEFAULT_IM_END_TOKEN) == ("<im_start>", "<im_end>")
    assert constants.IMAGE_PLACEHOLDER == "<image-placeholder>"


class TestTokenizer:
    def test_golden_prompts(self, golden_text, golden_tokenizer):
        for name, case in golden_text["tokenizer_image_token"].items():
            assert tokenizer_image_token(case.get("prompt", name), golden_tokenizer) == case["ids"], name

    def test_golden_text_between_images(self, golden_text, golden_tokenizer):
        for prompt, case in golden_text["tokenizer_image_token"].items():
            if "plain_ids_of_chunks" in case:
                chunks = [golden_tokenizer(text).input_ids for text in prompt.split("<image>")]
                assert chunks == case["plain_ids_of_chunks"], prompt

    def test_golden_without_beginning_of_sequence(self, golden, golden_text):
        tokenizer = load_tokenizer(golden / "model_llava", add_bos_token=False)
        for prompt, ids in golden_text["tokenizer_image_token_without_bos"].items():
            assert tokenizer_image_token(prompt, tokenizer) == ids, prompt

    def test_golden_special_tokens(self, golden_text, golden_tokenizer):
        names = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "pad_token_id", "vocab": "vocab_size"}
        assert {name: getattr(golden_tokenizer, names[name]) for name in names} == {k: golden_text[k] for k in names}

    def test_golden_ids_from_tokenizer_model_alone(self, golden, golden_text, tmp_path):
        (tmp_path / "tokenizer.model").write_bytes((golden / "model_llava" / "tokenizer.model").read_bytes())
        case = golden_text["tokenizer_image_token"]["__vicuna_v1_two_turn__"]
        assert tokenizer_image_token(case["prompt"], load_tokenizer(tmp_path)) == case["ids"]

    def test_leading_space_is_added_to_a_leading_space(self, tokenizer):
        assert tokenizer.tokenize(" the") == ["▁", *tokenizer.tokenize("the")]
        assert tokenizer.tokenize(" ") == ["▁", "▁"]
        assert tokenizer.tokenize("") == []

    def test_special_tokens_in_the_text(self, tokenizer):
        assert tokenizer("</s>").input_ids == [1, 2]
        after_special = tokenizer("a</s>the").input_ids
        assert after_special[:3] == [1, tokenizer.convert_tokens_to_ids("▁a"), 2]
        assert tokenizer.convert_ids_to_tokens(after_special[3])[0] != "▁"

    def test_legacy_adds_a_space_after_special_tokens(self, tokenizer_folder):
        tokenizer = load_tokenizer(tokenizer_folder, legacy=True)
        assert tokenizer.tokenize("a</s>the") == ["▁a", "</s>", *tokenizer.tokenize("the")]

    @pytest.mark.parametrize(("config", "legacy"), [({"legacy": False}, False), ({"legacy": True}, True), ({}, True)])
    def test_legacy_follows_the_configuration(self, tokenizer_folder, tmp_path, config, legacy):
        (tmp_path / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **config}))
        assert load_tokenizer(tmp_path).legacy is legacy

    @pytest.mark.parametrize("text", ["the dog", " two  spaces ", "é 你好 😀\n\tx", "a</s>the <s> dog", "<unk>"])
    def test_decoding_gives_the_text_back(self, tokenizer, text):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text

    def test_decoding_can_skip_special_tokens(self, tokenizer):
        assert tokenizer.decode(tokenizer("the dog</s>").input_ids, skip_special_tokens=True) == "the dog"
        assert tokenizer.decode([]) == ""

    def test_survives_saving_copying_and_added_tokens(self, tokenizer_folder, tmp_path):
        tokenizer = load_tokenizer(tokenizer_folder, padding_side="left")
        tokenizer.add_tokens(["<im_patch>"], special_tokens=True)
        ids = tokenizer(" a<im_patch> the</s>x").input_ids
        assert ids.count(320) == 1
        tokenizer.save_pretrained(tmp_path)
        for twin in (load_tokenizer(tmp_path), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
            assert twin(" a<im_patch> the</s>x").input_ids == ids
            assert twin.padding_side == "left"

    def test_pads_with_the_unknown_token(self, tokenizer):
        batch = tokenizer(["the", "the dog and the cat"], padding=True, return_tensors="pt")
        assert batch.input_ids[0, -1] == tokenizer.pad_token_id == tokenizer.unk_token_id == 0
        assert batch.attention_mask[0].tolist()[-1] == 0

    def test_tokenizers_of_other_kinds(self, tmp_path):
        words = Tokenizer(WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "the": 3, "dog": 4}, unk_token="<unk>"))
        words.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>").save_pretrained(tmp_path)
        tokenizer = load_tokenizer(tmp_path)
        assert not isinstance(tokenizer, LlamaTokenizer)
        assert tokenizer_image_token("the <image> dog", tokenizer) == [3, IMAGE_TOKEN_INDEX, 4]

    @pytest.mark.parametrize("content", [None, b"not a sentencepiece model"])
    def test_folder_without_tokenizer(self, tmp_path, content):
        if content is not None:
            (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=f"{tmp_path}.*tokenizer.model"):
            load_tokenizer(tmp_path)


class TestPromptsWithImages:
    @pytest.mark.parametrize(
        ("prompt", "images"), [("", 0), ("<image>", 1), ("<image><image>", 2), ("a <image> b<image>", 2)]
    )
    def test_one_id_per_image_and_one_beginning(self, tokenizer, prompt, images):
        ids = tokenizer_image_token(prompt, tokenizer)
        assert ids[0] == 1
        assert ids.count(1) == 1
        assert ids.count(IMAGE_TOKEN_INDEX) == images

    def test_text_between_images_is_tokenized_alone(self, tokenizer):
        ids = tokenizer_image_token("the <image> dog", tokenizer, image_token_index=-7)
        assert ids == [*tokenizer("the ").input_ids, -7, *tokenizer(" dog").input_ids[1:]]

    def test_beginning_spelled_out_in_the_text_is_kept(self, tokenizer):
        ids = tokenizer_image_token("a<image><s>b", tokenizer)
        assert ids[ids.index(IMAGE_TOKEN_INDEX) + 1] == 1

    def test_tensor(self, tokenizer):
        ids = tokenizer_image_token("<image>\nthe", tokenizer, return_tensors="pt")
        assert ids.dtype == torch.long
        assert ids.tolist() == tokenizer_image_token("<image>\nthe", tokenizer)

    def test_unknown_tensor_type(self, tokenizer):
        with pytest.raises(ValueError, match="return_tensors: got 'np'"):
            tokenizer_image_token("a", tokenizer, return_tensors="np")


class TestConversations:
    def test_golden(self, golden_text):
        question, answer = "<image>\nWhat is the sign?", "A stop sign."
        for name, case in golden_text["conversation"].items():
            template = conv_templates[name]
            assert str(template.sep_style) == case["sep_style"], name
            assert (template.sep, template.sep2, template.system) == (case["sep"], case["sep2"], case["system"]), name
            assert list(template.roles) == case["roles"], name
            assert len(template.messages) == case["n_template_messages"], name
            assert converse(name, question, None) == case["one_turn"], name
            if not case["two_turn"].startswith("RAISES"):
                assert converse(name, question, answer, "What color?", None) == case["two_turn"], name

    @pytest.mark.parametrize(
        ("template", "prompt"),
        [
            ("vicuna_v1", f"{USER_SYSTEM} USER: Hi ASSISTANT: Yes.</s>USER: Why? ASSISTANT:"),
            ("mistral_instruct", "[INST] Hi [/INST] Yes. </s>[INST] Why? [/INST]"),
            (
                "chatml_direct",
                "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nHi<|im_end|>"
                "<|im_start|>assistant\nYes.<|im_end|><|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n",
            ),
        ],
    )
    def test_two_turns(self, template, prompt):
        assert converse(template, "Hi", "Yes.", "Why?", None) == prompt

    def test_names(self):
        names = "default v0 v1 vicuna_v1 llama_2 mistral mistral_instruct mistral_direct chatml_direct plain v0_plain"
        names += " llava_v0 v0_mmtag llava_v1 v1_mmtag llava_llama_2 mpt"
        assert set(conv_templates) == set(names.split())
        assert default_conversation is conv_templates["vicuna_v1"] is conv_templates["v1"]
        assert conv_templates["default"] is conv_templates["v0"]
        assert {template.sep_style for template in conv_templates.values()} == set(SeparatorStyle)

    def test_copies_are_independent(self):
        conversation = conv_templates["v0"].copy()
        conversation.append_message("Human", "Hi")
        conversation.messages[0][1] = "changed"
        assert len(conv_templates["v0"].messages) == 2
        assert conv_templates["v0"].messages[0][1] != "changed"

    def test_answer_can_be_filled_in_later(self):
        conversation = conv_templates["vicuna_v1"].copy()
        conversation.append_message(conversation.roles[0], "Hi")
        conversation.append_message(conversation.roles[1], None)
        conversation.messages[1][1] = "Yes."
        assert conversation.get_prompt().endswith("USER: Hi ASSISTANT: Yes.</s>")

    @pytest.mark.parametrize("text", ["What? <image>", "<image>\nWhat?"])
    def test_image_of_the_first_turn_moves_to_the_front(self, text):
        message = (text, Image.new("RGB", (2, 2)), "Default")
        assert converse("vicuna_v1", message, None).endswith("USER: <image>\nWhat? ASSISTANT:")

    def test_image_between_tags(self):
        message = ("What? <image>", Image.new("RGB", (2, 2)), "Default")
        prompt = converse("v1_mmtag", message, None)
        assert prompt.endswith("USER: <Image><image></Image> ASSISTANT: Received.</s>USER: What? ASSISTANT:")

    def test_image_of_a_later_turn_stays_in_its_text(self):
        message = ("<image> And?", Image.new("RGB", (2, 2)), "Default")
        assert converse("vicuna_v1", "Hi", "Yes.", message, None).endswith("</s>USER: <image> And? ASSISTANT:")

    def test_images(self):
        conversation = conv_templates["vicuna_v1"].copy()
        for mode in ("Pad", "Resize", "Crop"):
            conversation.append_message("USER", ("What? <image>", Image.new("L", (4, 2)), mode))
            conversation.append_message("ASSISTANT", "Nothing.")
        images = conversation.get_images(return_pil=True)
        assert [image.size for image in images] == [(4, 4), (336, 336), (4, 2)]
        assert {image.mode for image in images} == {"RGB"}
        assert all(text.startswith("iVBOR") for text in conversation.get_images())  # a PNG file in base64

    def test_unknown_image_mode(self):
        conversation = conv_templates["vicuna_v1"].copy()
        conversation.append_message("USER", ("", Image.new("L", (4, 2)), "Stretch"))
        with pytest.raises(ValueError, match="image mode: got 'Stretch'"):
            conversation.get_images()

    def test_plain_has_one_separator(self):
        assert converse("plain", "<image>", None) == "<image>\n"
        with pytest.raises(TypeError, match="sep2"):
            converse("plain", "<image>", "a caption")

    @pytest.mark.parametrize("texts", [(), (None,)])
    def test_llama_2_begins_with_a_question(self, texts):
        with pytest.raises(ValueError, match="USER"):
            converse("llama_2", *texts)


class TestStopping:
    def test_stops_each_sample_on_its_own(self, tokenizer):
        prompt = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5]] * 2)
        stop = KeywordsStoppingCriteria(["###"], tokenizer, prompt)
        answers = torch.tensor([tokenizer("the ###").input_ids[1:], tokenizer("the dog").input_ids[1:2] * 5])
        assert stop(torch.cat([prompt, answers], dim=1), None).tolist() == [True, False]
        assert StoppingCriteriaList([stop])(torch.cat([prompt, answers], dim=1), None).tolist() == [True, False]

    @pytest.mark.parametrize("begin", [[], [1]])
    def test_output_without_prompt(self, tokenizer, begin):
        prompt = torch.tensor([tokenizer_image_token("the <image> dog ###", tokenizer)])
        stop = KeywordsStoppingCriteria(["###"], tokenizer, prompt)
        assert stop(torch.zeros(1, 0, dtype=torch.long)).tolist() == [False]
        assert stop(torch.tensor([[*begin, 5]])).tolist() == [False]
        answer = tokenizer("the dog and the cat look at the picture ###").input_ids[1:]
        assert stop(torch.tensor([begin + answer])).tolist() == [True]
        assert stop(torch.tensor([begin + answer[:-1]])).tolist() == [False]

    def test_prompt_is_not_searched(self, tokenizer):
        prompt = torch.tensor([tokenizer("the ###").input_ids])
        stop = KeywordsStoppingCriteria(["###"], tokenizer, prompt)
        assert stop(prompt).tolist() == [False]
        assert stop(torch.cat([prompt, torch.tensor([tokenizer("a").input_ids[1:]])], dim=1)).tolist() == [False]

    def test_beams_repeat_prompts(self, tokenizer):
        prompt = torch.tensor([[1, 70, 71], [1, 80, 81]])
        beams = torch.cat([prompt.repeat_interleave(2, 0), torch.tensor([[2], [90], [90], [2]])], dim=1)
        assert KeywordsStoppingCriteria(["</s>"], tokenizer, prompt)(beams).tolist() == [True, False, False, True]

    @pytest.mark.parametrize("keyword", ["</s>", " dog", "é", "你好", "<s>"])
    def test_keywords_of_every_kind(self, tokenizer, keyword):
        stop = KeywordsStoppingCriteria(keyword, tokenizer, torch.tensor([[1, 70]]))
        assert stop(torch.tensor([tokenizer(f"the{keyword}").input_ids])).tolist() == [True]
        assert stop(torch.tensor([tokenizer("the").input_ids])).tolist() == [False]

    def test_empty_keyword(self, tokenizer):
        with pytest.raises(ValueError, match="keywords"):
            KeywordsStoppingCriteria(["###", ""], tokenizer, torch.tensor([[1]]))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("liuhaotian/llava-v1.5-7b", "llava-v1.5-7b"),
        ("/models/llava-v1.5-7b/", "llava-v1.5-7b"),
        ("/out/llava-lora/checkpoint-100", "llava-lora_checkpoint-100"),
        ("checkpoint-100", "checkpoint-100"),
    ],
)
def test_model_name(path, name):
    assert get_model_name_from_path(path) == name
