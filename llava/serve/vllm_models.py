"""vLLM's LLaVA-1.5 and LLaVA-NeXT with our vision tower and reducers; imported by vLLM alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from vllm.model_executor.models import llava, llava_next
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageProcessorItems

from llava.serve.exact import ImageEncoder, Room
from llava.serve.positions import COLUMNS, as_columns, as_told, behind, in_full
from llava.serve.vllm_plugin import counter_of

_STORED = ("model.vision_tower.vision_model.", "vision_tower.vision_model.", "model.vision_tower.", "vision_tower.")


class Counted:
    """How many tokens an image takes; with `BaseLlavaProcessingInfo`."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """As vLLM asks for every image, before it is encoded."""
        counter = counter_of(self.get_hf_config())
        if counter is None:
            return super().get_num_image_tokens(image_width=image_width, image_height=image_height)
        return counter.of((image_width, image_height)).tokens


class Checked:
    """Refuses prompts whose dropped tokens take more positions than the model's table has; with a processor."""

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence:
        config = self.info.get_hf_config()
        counter, spare = counter_of(config), getattr(config, "spare_positions", None)
        if counter is not None and spare is not None and "image" in mm_items:
            images = mm_items["image"]
            sizes = [images.get_image_size(i) for i in range(len(images))] if _are_images(images) else []
            rooms = [counter.of((size.width, size.height)) for size in sizes]
            gone = sum(room.span - room.tokens for room in rooms)
            if gone > spare:
                raise ValueError(
                    f"images: {len(rooms)} in one prompt, the tokens dropped from them take {gone} positions, at most "
                    f"{spare} are there; send fewer, or start the engine with positions: renumber"
                )
        return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)


def _are_images(items: object) -> bool:
    return isinstance(items, ImageProcessorItems)


class Reduced:
    """What both models have in common."""

    supports_mrope: ClassVar[Literal[True]] = True
    supports_multimodal_pruning: ClassVar[Literal[True]] = True

    def __init__(self, *, vllm_config: Any, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.counter = counter_of(self.config)
        if self.counter is None:
            return
        width = self.config.text_config.hidden_size
        self.vision_tower = self.counter.sizes.new_tower()
        parts = self.vision_tower, self.multi_modal_projector, width, getattr(self, "image_newline", None)
        self.encoder = ImageEncoder(self.counter.sizes, self.counter.settings, *parts)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Of towers stored with and without `vision_model.` in their names; old ones number their positions."""
        own = "vision_tower.vision_model." if self.counter is None else "vision_tower.vision_tower."
        kept = ((name, weight) for name, weight in weights if not name.endswith("embeddings.position_ids"))
        return super().load_weights((_renamed(name, own), weight) for name, weight in kept)

    def _process_image_input(self, image_input: Any) -> Any:
        """The tokens of every image `[tokens, width]`; with two more columns that tell their positions."""
        if self.counter is None:
            return super()._process_image_input(image_input)
        if image_input["type"] != "pixel_values":
            return [self._told(states, torch.arange(len(states))) for states in image_input["data"]]
        return [self._told(*image) for image in self.encoder.images(*self._stacks(image_input))]

    def _told(self, states: Tensor, position: Tensor) -> Tensor:
        """An image's tokens, and where they stand if the runner will ask."""
        if self.counter.settings.positions != "original":
            return states
        return torch.cat([states, as_columns(position).to(states)], dim=-1)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list) -> tuple[Tensor, int]:
        """Positions as if nothing had been dropped, image tokens evenly over their image's place; see `in_full`."""
        places = [(one.mm_position.offset, one.mm_position.length, self._room(one)) for one in mm_features]
        return in_full(len(input_tokens), sorted(places, key=lambda place: place[0]))

    def _room(self, feature: Any) -> Room:
        """The room of one image of a prompt."""
        return self.counter.of()

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[list[Tensor], Tensor, int]:
        """The positions of the patches that were kept, which travelled with their embeddings.

        Arguments and result as `SupportsMultiModalPruning` says: embeddings `[tokens, width + 2]` of the images of
        which some tokens are computed now, and positions int64 `[3, prompt]`.
        """
        if not multimodal_embeddings:  # as in every step of decoding
            return [], mrope_positions, behind(mrope_positions)
        told = torch.cat([one[:, -COLUMNS:] for one in multimodal_embeddings])
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        shown = ids == self.config.image_token_index
        positions, delta = as_told(mrope_positions, shown, num_computed_tokens, told)
        return [one[:, :-COLUMNS] for one in multimodal_embeddings], positions, delta

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        """The language model, whose positions are the first row."""
        positions = positions[0] if positions.ndim == 2 else positions
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)


def _renamed(name: str, own: str) -> str:
    """A weight's name, the tower's with the prefix it has here."""
    prefix = next((prefix for prefix in _STORED if name.startswith(prefix)), None)
    return name if prefix is None else own + name.removeprefix(prefix)


class LlavaInfo(Counted, llava.LlavaProcessingInfo):
    """What vLLM asks about images of LLaVA-1.5."""


class LlavaProcessor(Checked, llava.LlavaMultiModalProcessor):
    """vLLM's processor of LLaVA-1.5, which refuses what has no room."""


class LlavaNextInfo(Counted, llava_next.LlavaNextProcessingInfo):
    """What vLLM asks about images of LLaVA-NeXT."""


class LlavaNextProcessor(Checked, llava_next.LlavaNextMultiModalProcessor):
    """vLLM's processor of LLaVA-NeXT, which refuses what has no room."""


def _llava_info(context: Any) -> Any:
    """Of LLaVA-1.5; vLLM's own for the Pixtral models that share its class."""
    info = llava._build_llava_or_pixtral_hf_info(context)
    return LlavaInfo(context) if type(info) is llava.LlavaProcessingInfo else info


def _llava_processor(info: Any, dummy_inputs: Any) -> Any:
    own = isinstance(info, LlavaInfo)
    return (LlavaProcessor if own else llava._build_llava_or_pixtral_hf_processor)(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(_llava_processor, info=_llava_info, dummy_inputs=llava.LlavaDummyInputsBuilder)
class Llava(Reduced, llava.LlavaForConditionalGeneration):
    """LLaVA-1.5 with reduced images."""

    def _stacks(self, image_input: Any) -> tuple[list[Tensor], None]:
        return [image[None] for image in image_input["pixel_values"]], None


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor, info=LlavaNextInfo, dummy_inputs=llava.LlavaDummyInputsBuilder
)
class LlavaNext(Reduced, llava_next.LlavaNextForConditionalGeneration):
    """LLaVA-NeXT with reduced images."""

    def _stacks(self, image_input: Any) -> tuple[list[Tensor], list[tuple[int, int]]]:
        sizes = [(width, height) for height, width in torch.as_tensor(image_input["image_sizes"]).tolist()]
        views = [self.counter.views(size) for size in sizes]
        return [tiles[:count] for tiles, count in zip(image_input["pixel_values"], views, strict=True)], sizes

    def _room(self, feature: Any) -> Room:
        height, width = feature.data["image_sizes"].data.flatten().tolist()
        return self.counter.of((width, height))
