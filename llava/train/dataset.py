"""Conversations with images as training examples, with LLaVA's prompts and labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from llava.constants import (
    DEFAULT_IM_END_TOKEN,
    DEFAULT_IM_START_TOKEN,
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import Conversation, SeparatorStyle, conv_templates
from llava.mm_utils import load_image, process_images, tokenizer_image_token
from llava.train.records import answered_turns, count_marks, images_of, look_over, name_record, read_records

log = logging.getLogger(__name__)

NAMED_CUT_RECORDS = 20
MARKS = (DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, DEFAULT_IM_END_TOKEN)


def conversation_text(
    turns: Sequence[dict[str, str]], version: str, images: int | None = None, start_end: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The prompt of a conversation, and the character ranges of what the assistant says in it.

    Parameters
    ----------
    turns : sequence of dict
        LLaVA's: ``{"from": "human" | "gpt", "value": text}``; a first turn of the assistant is left out, and so is a
        last question without an answer.
    version : str
        Name of the prompt template; for ``plain`` only the image and the caption stay.
    images : int, optional
        How many images the conversation has; without any, ``<image>`` is a word like others. By default as many as the
        turns mention. A single image in a turn is moved to its front, on a line of its own.
    start_end : bool
        Put ``<im_start>`` and ``<im_end>`` around every image.
    """
    template = conv_templates[version].copy()
    template.messages = []
    used = answered_turns(turns)
    if not used or any(turn["from"] != ("human", "gpt")[place % 2] for place, turn in enumerate(used)):
        raise ValueError(f"conversations: roles {[turn['from'] for turn in turns]} should alternate human, gpt, ...")
    if template.sep_style is SeparatorStyle.PLAIN:
        front = "" if images == 0 else DEFAULT_IMAGE_TOKEN
        text = front + used[1]["value"].strip() + template.sep
        return text, [(len(front), len(text))]
    images = count_marks(used, 2) if images is None else images
    texts = [_place_images(turn["value"], images, template, start_end) for turn in used]
    answers = []
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        template.append_message(template.roles[0], question)
        template.append_message(template.roles[1], None)
        start = len(template.get_prompt())
        template.messages.pop()
        template.append_message(template.roles[1], answer)
        answers.append((start, len(template.get_prompt())))
    return template.get_prompt(), answers


def _place_images(text: str, images: int, template: Conversation, start_end: bool) -> str:
    """Where a turn mentions one image it comes first; several stay where they are; marks around them as in LLaVA."""
    if not images or DEFAULT_IMAGE_TOKEN not in text:
        return text
    if images == 1 or text.count(DEFAULT_IMAGE_TOKEN) == 1:
        text = f"{DEFAULT_IMAGE_TOKEN}\n{text.replace(DEFAULT_IMAGE_TOKEN, '').strip()}".strip()
    marked = "".join(MARKS) if start_end else DEFAULT_IMAGE_TOKEN
    if "mmtag" in template.version:
        marked = f"<Image>{marked}</Image>"
    return text.replace(DEFAULT_IMAGE_TOKEN, marked)


def encode_conversation(
    turns: Sequence[dict[str, str]],
    version: str,
    tokenizer: PreTrainedTokenizerBase,
    images: int | None = None,
    start_end: bool = False,
) -> tuple[list[int], list[int]]:
    """Ids with -200 for an image, and labels that are ``IGNORE_INDEX`` outside the assistant's words.

    The parameters are those of :func:`conversation_text`.
    """
    text, answers = conversation_text(turns, version, images, start_end)

    def encode(part: str) -> list[int]:
        return list(tokenizer(part).input_ids) if images == 0 else tokenizer_image_token(part, tokenizer)

    ids = encode(text)
    labels = [IGNORE_INDEX] * len(ids)
    for start, stop in answers:
        first, last = (_common_prefix(ids, encode(text[:end])) for end in (start, stop))
        labels[first:last] = ids[first:last]
    return ids, [IGNORE_INDEX if label == IMAGE_TOKEN_INDEX else label for label in labels]


def _common_prefix(first: list[int], second: list[int]) -> int:
    """Length of what two lists share from the start: a cut text may end in another token than the whole one."""
    for place, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return place
    return min(len(first), len(second))


class ConversationDataset(Dataset):
    """LLaVA's records as examples, their images opened when asked for.

    Parameters
    ----------
    records : sequence of dict
        See :mod:`llava.train.records`; an image may also be a function that returns one.
    tokenizer, image_processor
        Of the model.
    version : str
        Name of the prompt template.
    image_folder : path
        What image names are relative to.
    image_aspect_ratio, image_grid_pinpoints
        As in LLaVA: ``pad``, ``square`` or ``anyres``; the resolutions for the last.
    start_end : bool
        Put ``<im_start>`` and ``<im_end>`` around every image.
    limit : int, optional
        Positions after which an example is cut, image tokens counted.
    tile_tokens : int
        Tokens of one image, or of one tile of it.
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
        start_end: bool = False,
        limit: int | None = None,
        tile_tokens: int = 0,
    ):
        self.records = records
        self.tokenizer, self.image_processor, self.version = tokenizer, image_processor, version
        self.image_folder = Path(image_folder)
        self.pixels_config = SimpleNamespace(
            image_aspect_ratio=image_aspect_ratio, image_grid_pinpoints=image_grid_pinpoints
        )
        self.start_end, self.limit, self.tile_tokens = start_end, limit, tile_tokens
        self._cut: set[int] = set()

    @classmethod
    def from_json(
        cls,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Any,
        version: str = "v1",
        image_folder: str | Path = ".",
        **settings,
    ) -> ConversationDataset:
        """Read a LLaVA JSON or JSON Lines file; ``ValueError`` names the first record that cannot be learned from."""
        records = read_records(path)
        look_over(records, version, image_folder)
        return cls(records, tokenizer, image_processor, version, image_folder, **settings)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids` and `labels` `[tokens]`, cut to the limit, and `images`, a list of pixels."""
        record = self.records[index]
        try:
            images = [self._pixels(image) for image in images_of(record)]
        except ValueError as error:
            raise ValueError(f"{name_record(self.records, index)}: {error}") from None
        turns = record["conversations"]
        ids, labels = encode_conversation(turns, self.version, self.tokenizer, len(images), self.start_end)
        example = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "images": images}
        if self.limit is not None:
            example = cut_example(example, self.limit, self.tile_tokens)
        if (example["labels"] == IGNORE_INDEX).all():
            self._name_unlearned(index)
        return example

    def _pixels(self, image: str | Callable) -> Tensor:
        opened = image() if isinstance(image, Callable) else load_image(self.image_folder / image)
        return process_images([opened], self.image_processor, self.pixels_config)[0]

    def _name_unlearned(self, index: int) -> None:
        if index in self._cut or len(self._cut) >= NAMED_CUT_RECORDS:
            return
        self._cut.add(index)
        last = "; further ones are not named" if len(self._cut) == NAMED_CUT_RECORDS else ""
        named = name_record(self.records, index)
        log.warning("%s: no answer left within model_max_length %s, nothing is learned%s", named, self.limit, last)

    @property
    def modality_lengths(self) -> list[int]:
        """Number of words of each example (at least one), negative for those without an image."""
        lengths = []
        for record in self.records:
            words = max(1, sum(len(turn["value"].split()) for turn in record["conversations"]))
            lengths.append(words if images_of(record) else -words)
        return lengths


def cut_example(example: dict[str, Any], limit: int, tile_tokens: int) -> dict[str, Any]:
    """An example of at most `limit` positions once its images are in place.

    An image that begins within the limit stays whole here; the model cuts its features.
    """
    ids, images = example["input_ids"], example["images"]
    lengths = torch.ones_like(ids)
    tiles = [len(image) if image.dim() == 4 else 1 for image in images]
    lengths[ids == IMAGE_TOKEN_INDEX] = torch.tensor([count * tile_tokens for count in tiles], dtype=lengths.dtype)
    kept = int((lengths.cumsum(0) - lengths < limit).sum())
    ids = ids[:kept]
    images = images[: int((ids == IMAGE_TOKEN_INDEX).sum())]
    return {"input_ids": ids, "labels": example["labels"][:kept], "images": images}


@dataclass
class Collator:
    """Pads examples on the right to one length; text-only examples bring an empty image.

    So every process of a distributed run uses the same modules in every step, as in LLaVA.
    """

    pad_token_id: int
    image_size: int

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `labels`, `attention_mask` `[batch, length]`, and `images`: a tensor if all are of one size."""
        mask = [torch.ones_like(example["input_ids"], dtype=torch.bool) for example in examples]
        empty = torch.zeros(3, self.image_size, self.image_size)
        images = [image for example in examples for image in example["images"] or [empty]]
        uniform = all(image.shape == images[0].shape for image in images)
        return {
            "input_ids": _pad([example["input_ids"] for example in examples], self.pad_token_id),
            "labels": _pad([example["labels"] for example in examples], IGNORE_INDEX),
            "attention_mask": _pad(mask, False),
            "images": torch.stack(images) if uniform else images,
        }


def _pad(rows: list[Tensor], value: int | bool) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
