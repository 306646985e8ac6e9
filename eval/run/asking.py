"""What every model that can be asked has in common: where it is, and what is done with a batch of questions."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from eval.run.visuals import Visual, kinds_of, read
from mustdrop import Reducer


class UnfitQuestion(ValueError):
    """A question that cannot be asked: an image that cannot be read, fewer image tokens than images, ..."""


@dataclass
class AskedModel:
    """A model with what belongs to it; subclasses say how a prompt is made for it, and what it is given.

    Attributes
    ----------
    tokenizer, model, image_processor, context_len
        As ``llava.model.builder.load_pretrained_model`` returns them.
    conv_template : str
        Name of the conversation template, a key of ``llava.conversation.conv_templates``.
    """

    tokenizer: object
    model: torch.nn.Module
    image_processor: object
    context_len: int
    conv_template: str = "vicuna_v1"

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the model's first parameter that is on one."""
        return next(one.device for one in self.model.parameters() if one.device.type != "meta")

    @property
    def dtype(self) -> torch.dtype:
        """What images are cast to: the type of the first parameter that is not quantised."""
        return next(one.dtype for one in self.model.parameters() if one.is_floating_point() and one.dtype.itemsize > 1)

    @property
    def bits(self) -> int | None:
        """4 or 8 if the language model is quantised, as it was stored or on the way in."""
        return next((bits for bits in (4, 8) if getattr(self.model, f"is_loaded_in_{bits}bit", False)), None)

    @property
    def pad_token_id(self) -> int:
        """Id that fills short prompts on the left."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def prompt(self, question: str, images: int, answer: str | None = None, videos: Collection[int] = ()) -> str:
        """A one-turn conversation about so many images, those of the numbers `videos` being videos.

        With an answer, its end included.
        """
        raise NotImplementedError

    def prompt_about(self, question: str, visuals: Sequence[Visual], answer: str | None = None) -> str:
        """`prompt` for the images and videos themselves."""
        videos = [number for number, kind in enumerate(kinds_of(visuals)) if kind == "video"]
        return self.prompt(question, len(visuals), answer, videos)

    def for_method(self, reducer: Reducer) -> AskedModel:
        """The same model, given images as a method wants them; ValueError if that cannot be."""
        return self

    def encode(self, prompt: str, images: int | None = None) -> Tensor:
        """Ids of a prompt, int64 ``[length]``."""
        raise NotImplementedError

    def prepare(self, prompts: Sequence[str], images: Sequence[Sequence[Visual]]) -> dict:
        """The host's part of a batch, padded on the left; it may be done in another thread."""
        raise NotImplementedError

    def seen(self, picture: Visual) -> Image.Image | None:
        """An image as the vision tower sees it, None if that is not one image."""
        raise NotImplementedError

    def answer_prepared(self, prepared: dict, **generation) -> list[str]:
        """Generate for what ``prepare`` returned."""
        raise NotImplementedError

    def _on_device(self, prepared: dict) -> dict:
        """A prepared batch where the model is."""
        raise NotImplementedError

    def inputs(self, prompts: Sequence[str], images: Sequence[Sequence[Visual]]) -> dict:
        """Arguments for ``model.generate``: what ``prepare`` returns, on the model's device."""
        return self._on_device(self.prepare(prompts, images))

    @staticmethod
    def _read(picture: Visual) -> Visual:
        try:
            return read(picture)
        except ValueError as error:
            raise UnfitQuestion(str(error)) from None

    def _staged(self, tensor: Tensor) -> Tensor:
        """A tensor in memory from which a GPU copies while the host goes on."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    @torch.inference_mode()
    def selector_cost(self, reducer: Reducer, prompt: str, images: Sequence[Visual]) -> dict:
        """What a reducer's own choosing costs, counted on one prompt.

        Parameters
        ----------
        reducer : Reducer
            Whose choosing.
        prompt : str
            What ``prompt`` returns.
        images : sequence of PIL.Image.Image or Video
            The prompt's images and videos.

        Returns
        -------
        dict
            ``selector_macs``, multiply-adds up to the first new token, and ``selector_prompt``, on what they were
            counted: ``images``, ``text_tokens`` and ``vision_tokens`` (those that enter the first decoder layer).
        """
        with reducer.on(self.model, count=True) as run:
            self.model.generate(**self.inputs([prompt], [images]), max_new_tokens=1, do_sample=False)
        trace = run.traces[0]
        prompt_facts = {"text_tokens": trace.text_tokens, "vision_tokens": trace.vision_tokens[0]}
        return {"selector_macs": trace.selector_macs, "selector_prompt": {"images": len(images), **prompt_facts}}

    def answer(self, prompts: Sequence[str], images: Sequence[Sequence[Visual]], **generation) -> list[str]:
        """Generate for a batch; arguments as ``inputs`` takes them, ``generation`` as transformers does."""
        return self.answer_prepared(self.prepare(prompts, images), **generation)
