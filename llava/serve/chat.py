"""A conversation about images: several turns, images in any of them, answers as they are generated."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, conv_templates
from llava.mm_utils import load_image, process_images, tokenizer_image_token
from llava.model.language_model.cache import CACHE_NAME, VisionCache
from mustdrop.hooks import Reducer, TraceRecorder


@dataclass
class Chat:
    """A conversation with a model of our own class, under a reducer.

    By default every turn prefills the whole conversation again, so that the reducer chooses by the newest question.
    With `keeps_cache` a turn goes on from the cache of the one before: faster, but what was dropped for an earlier
    question is gone. A turn that brings an image prefills again in any case.

    Attributes
    ----------
    model, tokenizer, image_processor
        As `llava.model.builder.load_pretrained_model` returns them.
    template : str
        Name of the conversation template, a key of `llava.conversation.conv_templates`.
    reducer : Reducer
        What is dropped.
    keeps_cache : bool
        Whether a turn goes on from the cache of the one before.
    prefilled : int
        Tokens of text and images that the last turn ran through the decoder before its first new one.
    recorder : TraceRecorder or None
        Its trace, if the last turn prefilled.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    template: str = "vicuna_v1"
    reducer: Reducer = field(default_factory=Reducer)
    keeps_cache: bool = False
    prefilled: int = field(default=0, init=False)
    recorder: TraceRecorder | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.template not in conv_templates:
            known = ", ".join(sorted(conv_templates))
            raise ValueError(f"conv_mode: got {self.template!r}, expected one of {known}")
        self.clear()

    def clear(self) -> None:
        """Forget everything that was said."""
        self.conversation: Conversation = conv_templates[self.template].copy()
        self.images: list[Image.Image] = []
        self._pending: list[Image.Image] = []
        self._forget_cache()

    def show(self, image: str | Image.Image) -> None:
        """Add an image to the next question; ValueError if it cannot be read."""
        self._pending.append(load_image(image))

    @property
    def goes_on(self) -> bool:
        """Whether the next turn would go on from the cache."""
        return self.keeps_cache and self._cache is not None and not self._pending

    def ask(
        self, question: str, *, max_new_tokens: int = 512, temperature: float = 0.0, top_p: float | None = None
    ) -> Iterator[str]:
        """The answer in pieces, as they are generated; what was generated of one that is broken off is kept.

        Parameters
        ----------
        question : str
            The user's turn, about all images that were shown until now.
        max_new_tokens : int
            Longest answer.
        temperature : float
            0 for the likeliest token; else tokens are drawn.
        top_p : float, optional
            Drawn only from the likeliest tokens that together have this probability.
        """
        goes_on, before = self.goes_on, self._text()
        shown, self._pending = self._pending, []
        self.images += shown
        marks = [self._mark()] * len(shown)
        user, assistant = self.conversation.roles
        self.conversation.append_message(user, "\n".join([*marks, question]))
        self.conversation.append_message(assistant, None)
        said: list[int] = []
        try:
            logits = self._more(before) if goes_on else self._prefill()
            yield from self._generate(logits, said, max_new_tokens, _chooser(temperature, top_p))
        finally:
            self.conversation.messages[-1][1] = self.tokenizer.decode(said, skip_special_tokens=True).strip()
            self._unread = said[-1:]

    def _text(self) -> str:
        return self.conversation.get_prompt()

    def _mark(self) -> str:
        if getattr(self.model.config, "mm_use_im_start_end", False):
            return DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        return DEFAULT_IMAGE_TOKEN

    def _forget_cache(self) -> None:
        self._cache: VisionCache | None = None
        self._unread: list[int] = []  # the last token of an answer, which no pass has read yet

    @torch.inference_mode()
    def _prefill(self) -> Tensor:
        """Logits of the whole conversation's next token."""
        self._forget_cache()
        device = self.model.device
        ids = tokenizer_image_token(self._text(), self.tokenizer, return_tensors="pt", images=len(self.images))
        pixels = None
        if self.images:
            pixels = process_images(self.images, self.image_processor, self.model.config)
            pixels = [one.to(device, self.model.dtype) for one in pixels]
        sizes = [image.size for image in self.images] or None
        with self.reducer.on(self.model, keep=1) as self.recorder:
            output = self.model(
                ids[None].to(device), images=pixels, image_sizes=sizes, use_cache=True, logits_to_keep=1
            )
        self._cache = output[CACHE_NAME]
        self.prefilled = self._cache.records[0].image.shape[1]
        return output.logits[:, -1]

    @torch.inference_mode()
    def _more(self, before: str) -> Tensor:
        """Logits after what the conversation says beyond `before`, read against the cache."""
        new, end = self._text()[len(before) :], self.tokenizer.eos_token
        if not before.endswith(end):  # the template separates turns otherwise
            return self._read([*self._unread, *self.tokenizer(new, add_special_tokens=False).input_ids])
        first, *ids = self.tokenizer(end + new, add_special_tokens=False).input_ids
        return self._read([*self._unread, *ids] if first in self._unread else [*self._unread, first, *ids])

    def _read(self, ids: list[int]) -> Tensor:
        """Logits after some more ids."""
        self.prefilled = len(ids)
        given = {CACHE_NAME: self._cache}
        output = self.model(torch.tensor([ids], device=self.model.device), logits_to_keep=1, **given)
        return output.logits[:, -1]

    def _generate(self, logits: Tensor, said: list[int], most: int, choose) -> Iterator[str]:
        """Pieces of text while tokens are chosen; `said` gets their ids."""
        shown, prefilled = "", self.prefilled
        for number in range(most):
            said.append(choose(logits))
            if said[-1] == self.tokenizer.eos_token_id:
                break
            text = self.tokenizer.decode(said, skip_special_tokens=True)
            if number + 1 == most:
                yield text[len(shown) :]
                return
            if not text.endswith("\ufffd"):  # the bytes of a letter that is not whole yet
                yield text[len(shown) :]
                shown = text
            with torch.inference_mode():
                logits = self._read(said[-1:])
            self.prefilled = prefilled


def _chooser(temperature: float, top_p: float | None):
    """From logits `[1, vocabulary]` to an id."""
    if temperature <= 0:
        return lambda logits: int(logits.argmax(-1))
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    return lambda logits: int(torch.multinomial(warpers(None, logits.float()).softmax(-1), 1))
