"""Questions about pictures, in batches, to a loaded LLaVA: what the lmms-eval plugin and the calibration share."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.mm_utils import get_model_name_from_path, load_image, process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.llava_arch import LlavaMetaForCausalLM
from mustdrop import Reducer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


Item, Prepared = TypeVar("Item"), TypeVar("Prepared")


class UnfitQuestion(ValueError):
    """A question that cannot be asked: an image that cannot be read, fewer image tokens than images, ..."""


def ahead(prepare: Callable[[Item], Prepared], items: Iterable[Item]) -> Iterator[Prepared]:
    """``prepare(item)`` of every item in order, the next one's in a thread while the caller works on this one's.

    What `prepare` raises is raised here, where its result was due.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="prepare") as worker:
        waiting: deque = deque()
        for item in items:
            waiting.append(worker.submit(prepare, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def resolve_device(device: str | None = None) -> str:
    """A usable device; ValueError if it cannot be used.

    By default ``cuda`` where there is one, else ``cpu``; every process of a distributed run takes the GPU of its own.
    """
    if not device:
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{os.environ['LOCAL_RANK']}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else "cuda"
    try:
        kind, index = torch.device(device).type, torch.device(device).index
    except RuntimeError:
        raise ValueError(f"device: got {device!r}, expected cpu, cuda, cuda:1, ...") from None
    if kind == "cuda" and (index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {device!r}, but there are {torch.cuda.device_count()} CUDA devices")
    return device


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """The dtype of a name in ``DTYPES``; ``auto`` is float16 on a GPU (as LLaVA was released) and float32 on a CPU."""
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.float16
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected auto or one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


@dataclass
class LoadedModel:
    """A model with what belongs to it.

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

    @classmethod
    def load(
        cls,
        pretrained: str,
        *,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        attn_implementation: str = "sdpa",
        conv_template: str = "vicuna_v1",
        model_base: str | None = None,
        load_4bit: bool = False,
        load_8bit: bool = False,
    ) -> LoadedModel:
        """Load a checkpoint in evaluation mode.

        Parameters
        ----------
        pretrained : str
            Folder or hub id of any form of checkpoint, see docs/checkpoints.md.
        device : str, optional
            By default ``cuda`` where there is one.
        device_map : str, optional
            ``auto`` spreads a model over several GPUs; by default it goes to ``device`` whole.
        dtype, attn_implementation, conv_template : str
            See ``resolve_dtype``, transformers and ``llava.conversation``.
        model_base : str, optional
            The model under a checkpoint that holds only a projector or an adapter; an adapter may name it itself.
        load_4bit, load_8bit : bool
            Quantise the language model with bitsandbytes.

        Raises
        ------
        ValueError
            If a name is unknown, or the checkpoint cannot be loaded; nothing has been loaded then.
        """
        if conv_template not in conv_templates:
            raise ValueError(
                f"conv_template: got {conv_template!r}, expected one of {', '.join(sorted(conv_templates))}"
            )
        if attn_implementation == "flash_attention_2" and not is_flash_attn_2_available():
            raise ValueError(
                "attn_implementation: flash_attention_2 is not installed here; pip install '.[flash]', or sdpa"
            )
        device = resolve_device(device)
        torch_dtype = resolve_dtype(dtype, device)
        tokenizer, model, image_processor, context_len = load_pretrained_model(
            pretrained,
            model_base,
            get_model_name_from_path(pretrained),
            device_map=device_map,
            device=None if device_map else device,
            torch_dtype=torch_dtype,
            attn_implementation=attn_implementation,
            load_4bit=load_4bit,
            load_8bit=load_8bit,
        )
        return model_kind(model)(tokenizer, model.eval(), image_processor, context_len, conv_template)

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

    def prompt(self, question: str, images: int, answer: str | None = None) -> str:
        """A one-turn conversation.

        Image tokens in the question say where the images go if there are as many as images. Otherwise the images come
        first, and what the question says of ``<image>`` is text, as it is where there is no image at all. A model that
        was trained with ``mm_use_im_start_end`` gets its marks around every image.

        Parameters
        ----------
        question : str
            The user's turn.
        images : int
            How many images belong to it.
        answer : str, optional
            The model's turn; None ends the prompt where the model is to speak.
        """
        marked = DEFAULT_IMAGE_TOKEN
        if self.model.config.mm_use_im_start_end:
            marked = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN
        if images and question.count(DEFAULT_IMAGE_TOKEN) == images:
            question = question.replace(DEFAULT_IMAGE_TOKEN, marked)
        elif images:
            question = " ".join([marked] * images) + "\n" + question
        conversation = conv_templates[self.conv_template].copy()
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], answer)
        return conversation.get_prompt()

    def encode(self, prompt: str, images: int | None = None) -> Tensor:
        """Ids of a prompt, int64 ``[length]``, ``IMAGE_TOKEN_INDEX`` for each of the first ``images`` image tokens."""
        return tokenizer_image_token(prompt, self.tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt", images=images)

    def inputs(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict:
        """Arguments for ``model.generate``: what ``prepare`` returns, on the model's device."""
        return self._on_device(self.prepare(prompts, images))

    def prepare(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict:
        """The host's part of a batch, padded on the left; it may be done in another thread.

        Parameters
        ----------
        prompts : sequence of str
            What ``prompt`` returns.
        images : sequence of sequences of PIL.Image.Image
            The images of every prompt, in the order of its image tokens; empty for text alone. Image tokens beyond
            them are text.

        Returns
        -------
        dict
            ``input_ids`` and ``attention_mask`` ``[batch, length]``, ``images`` (list of tensors or None),
            ``image_sizes``, ``pad_token_id``.

        Raises
        ------
        UnfitQuestion
            If a prompt has fewer image tokens than images, or an image cannot be read.
        """
        ids = [self._encode(prompt, len(own)) for prompt, own in zip(prompts, images, strict=True)]
        length = max(map(len, ids))
        input_ids = torch.full((len(ids), length), self.pad_token_id)
        attention_mask = torch.zeros((len(ids), length), dtype=torch.bool)
        for row, prompt_ids in enumerate(ids):
            input_ids[row, length - len(prompt_ids) :] = prompt_ids
            attention_mask[row, length - len(prompt_ids) :] = True
        pictures = [self._read(picture) for own in images for picture in own]
        return {
            "input_ids": self._staged(input_ids),
            "attention_mask": self._staged(attention_mask),
            "images": self._pixels(pictures),
            "image_sizes": [picture.size for picture in pictures] or None,
            "pad_token_id": self.pad_token_id,
        }

    def _encode(self, prompt: str, images: int) -> Tensor:
        if (tokens := prompt.count(DEFAULT_IMAGE_TOKEN)) < images:
            raise UnfitQuestion(f"question: got {tokens} image tokens for {images} images, expected as many")
        return self.encode(prompt, images)

    @staticmethod
    def _read(picture: Image.Image) -> Image.Image:
        try:
            return load_image(picture)
        except ValueError as error:
            raise UnfitQuestion(str(error)) from None

    def _pixels(self, pictures: list[Image.Image]) -> list[Tensor] | None:
        """One tensor per image; those that look the same are prepared once and are one tensor, encoded once."""
        if not pictures:
            return None
        pictures = [load_image(picture) for picture in pictures]  # what they look like is their RGB pixels alone
        keys = [(picture.size, hashlib.sha256(picture.tobytes()).digest()) for picture in pictures]
        different = dict(zip(keys, pictures, strict=True))
        pixels = process_images(list(different.values()), self.image_processor, self.model.config)
        ready = {key: self._staged(tiles.to(self.dtype)) for key, tiles in zip(different, pixels, strict=True)}
        return [ready[key] for key in keys]

    def _staged(self, tensor: Tensor) -> Tensor:
        """A tensor in memory from which a GPU copies while the host goes on."""
        return tensor.pin_memory() if self.device.type == "cuda" else tensor

    def _on_device(self, prepared: dict) -> dict:
        """A prepared batch where the model is; one tensor for several prompts stays one."""
        moved: dict[int, Tensor] = {}

        def move(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:
                moved[id(tensor)] = tensor.to(self.device, non_blocking=True)
            return moved[id(tensor)]

        images = prepared["images"]
        return {
            **prepared,
            "input_ids": move(prepared["input_ids"]),
            "attention_mask": move(prepared["attention_mask"]),
            "images": None if images is None else [move(tiles) for tiles in images],
        }

    @torch.inference_mode()
    def selector_cost(self, reducer: Reducer, prompt: str, images: Sequence[Image.Image]) -> dict:
        """What a reducer's own choosing costs, counted on one prompt.

        Parameters
        ----------
        reducer : Reducer
            Whose choosing.
        prompt : str
            What ``prompt`` returns.
        images : sequence of PIL.Image.Image
            The prompt's images.

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

    def seen(self, picture: Image.Image) -> Image.Image | None:
        """A picture as the vision tower sees it, padded or cropped and resized; None if it is cut into tiles."""
        pixels = process_images([picture], self.image_processor, self.model.config)[0]
        if pixels.dim() != 3:
            return None
        mean, std = (
            torch.tensor(values)[:, None, None]
            for values in (self.image_processor.image_mean, self.image_processor.image_std)
        )
        return Image.fromarray(((pixels * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy())

    def answer(self, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]], **generation) -> list[str]:
        """Generate for a batch; arguments as ``inputs`` takes them, ``generation`` as transformers does."""
        return self.answer_prepared(self.prepare(prompts, images), **generation)

    @torch.inference_mode()
    def answer_prepared(self, prepared: dict, **generation) -> list[str]:
        """Generate for what ``prepare`` returned."""
        ids = self.model.generate(**self._on_device(prepared), **generation)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def model_kind(model: torch.nn.Module) -> type[LoadedModel]:
    """How a loaded model is asked: our own LLaVA with LLaVA's templates, others with their processor."""
    if isinstance(model, LlavaMetaForCausalLM):
        return LoadedModel
    from eval.stock_model import StockModel

    return StockModel
