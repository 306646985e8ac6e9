"""Conversations with images as training examples, with LLaVA's prompts and labels."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import SeparatorStyle, conv_templates
from llava.mm_utils import load_image, process_images, tokenizer_image_token
from llava.train.mini import questions, scenes
from llava.train.mini.data import ask_scene

_ROLES = {"human": 0, "gpt": 1}


def conversation_text(turns: Sequence[dict[str, str]], version: str) -> tuple[str, list[tuple[int, int]]]:
    """The prompt of a conversation, and the character ranges of what the assistant says in it.

    ``turns`` are LLaVA's: ``{"from": "human" | "gpt", "value": text}``, beginning with the human. An image in a
    human turn is moved to its front, on a line of its own; for the ``plain`` template only the image stays.
    """
    template = conv_templates[version].copy()
    template.messages = []
    if not turns or len(turns) % 2 or any(_ROLES.get(turn["from"]) != place % 2 for place, turn in enumerate(turns)):
        raise ValueError(f"conversations: roles {[turn['from'] for turn in turns]} should alternate human, gpt, ...")
    if template.sep_style is SeparatorStyle.PLAIN:
        caption = turns[1]["value"].strip() + template.sep
        return DEFAULT_IMAGE_TOKEN + caption, [(len(DEFAULT_IMAGE_TOKEN), len(DEFAULT_IMAGE_TOKEN) + len(caption))]
    answers = []
    for question, answer in zip(turns[::2], turns[1::2], strict=True):
        template.append_message(template.roles[0], _image_first(question["value"]))
        template.append_message(template.roles[1], None)
        start = len(template.get_prompt())
        template.messages.pop()
        template.append_message(template.roles[1], answer["value"])
        answers.append((start, len(template.get_prompt())))
    return template.get_prompt(), answers


def _image_first(text: str) -> str:
    if DEFAULT_IMAGE_TOKEN not in text:
        return text
    return f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}"


def encode_conversation(
    turns: Sequence[dict[str, str]], version: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Ids with -200 for the image, and labels that are ``IGNORE_INDEX`` outside the assistant's words."""
    text, answers = conversation_text(turns, version)
    ids = tokenizer_image_token(text, tokenizer)
    labels = [IGNORE_INDEX] * len(ids)
    for start, stop in answers:
        first, last = (_common_prefix(ids, tokenizer_image_token(text[:end], tokenizer)) for end in (start, stop))
        labels[first:last] = ids[first:last]
    return ids, labels


def _common_prefix(first: list[int], second: list[int]) -> int:
    """Length of what two lists share from the start: a cut text may end in another token than the whole one."""
    for place, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return place
    return min(len(first), len(second))


class ConversationDataset(Dataset):
    """LLaVA's JSON format, read lazily: ``{"conversations": [...], "image": name}``, the image optional.

    Parameters
    ----------
    records : sequence of dict
        The examples; ``image`` may also be a function that returns a picture.
    tokenizer, image_processor
        Of the model.
    version : str
        Name of the prompt template.
    image_folder : path
        What image names are relative to.
    image_aspect_ratio : str
        As in LLaVA: ``pad``, ``square`` or ``anyres``.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Any,
        version: str = "v1",
        image_folder: str | Path = ".",
        image_aspect_ratio: str = "pad",
        image_grid_pinpoints: list | None = None,
    ):
        self.records = records
        self.tokenizer, self.image_processor, self.version = tokenizer, image_processor, version
        self.image_folder = Path(image_folder)
        self.picture = SimpleNamespace(image_aspect_ratio=image_aspect_ratio, image_grid_pinpoints=image_grid_pinpoints)

    @classmethod
    def from_json(cls, path: str | Path, *args, **kwargs) -> ConversationDataset:
        """Read a LLaVA JSON file."""
        records = json.loads(Path(path).read_text())
        if not isinstance(records, list) or not records or "conversations" not in records[0]:
            raise ValueError(f"data_path: {path} is no list of examples with 'conversations'")
        return cls(records, *args, **kwargs)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        ids, labels = encode_conversation(record["conversations"], self.version, self.tokenizer)
        example = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        image = record.get("image")
        if image is not None:
            picture = image() if isinstance(image, Callable) else load_image(self.image_folder / image)
            example["image"] = process_images([picture], self.image_processor, self.picture)[0]
        return example

    @property
    def modality_lengths(self) -> list[int]:
        """Number of words of each example, negative for those without an image."""
        lengths = []
        for record in self.records:
            words = sum(len(turn["value"].split()) for turn in record["conversations"])
            lengths.append(words if "image" in record else -words)
        return lengths


class SceneRecords(Sequence):
    """Questions about synthetic scenes in LLaVA's format, one scene and one question each, drawn when asked for."""

    def __init__(self, count: int, seed: int = 0):
        self.count, self.first = count, 900_000_000 + 1_000_000 * (seed % 90)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene = scenes.generate_scene(scenes.scene_seed("train", self.first + index))
        question: questions.Question = ask_scene(scene, 1)[0]
        turns = [
            {"from": "human", "value": f"{DEFAULT_IMAGE_TOKEN}\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ]
        return {"image": lambda: scenes.render(scene), "conversations": turns}


@dataclass
class Collator:
    """Pads examples on the right to one length; text-only examples of a mixed batch bring an empty picture."""

    pad_token_id: int
    max_length: int
    image_size: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        ids = [example["input_ids"][: self.max_length] for example in examples]
        labels = [example["labels"][: self.max_length] for example in examples]
        mask = [torch.ones_like(row, dtype=torch.bool) for row in ids]
        batch = {
            "input_ids": _pad(ids, self.pad_token_id),
            "labels": _pad(labels, IGNORE_INDEX),
            "attention_mask": _pad(mask, False),
        }
        if any("image" in example for example in examples):
            empty = torch.zeros(3, self.image_size, self.image_size)
            images = [example.get("image", empty) for example in examples]
            alike = all(image.shape == images[0].shape for image in images)
            batch["images"] = torch.stack(images) if alike else images
        return batch


def _pad(rows: list[Tensor], value: int | bool) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
