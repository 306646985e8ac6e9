"""What an InternVL chat checkpoint does in code around its model: prompts, tokens, and tiles of an image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import InternVLConfig, PreTrainedTokenizerBase
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from llava.model.tokenizer import load_tokenizer

MARKS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
"""The tokens around an image, and its placeholder, by the names that transformers' processor asks for."""

VIDEO = "<video>"
"""Stands for a video in templates; in no vocabulary, for every frame gets the marks of an image."""

_NAMED_INTERNVL = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_NAMED_WANXIANG = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)

# Name -> what opens a turn, with the role to fill in; what closes it; the system message that models were trained with.
TEMPLATES = {
    "internlm2-chat": ("<|im_start|>{role}\n", "<|im_end|>", _NAMED_INTERNVL),
    "Hermes-2": ("<|im_start|>{role}\n", "<|im_end|>", _NAMED_INTERNVL),
    "phi3-chat": ("<|{role}|>\n", "<|end|>", _NAMED_INTERNVL),
    "internvl2_5": ("<|im_start|>{role}\n", "<|im_end|>\n", _NAMED_WANXIANG),
}
"""`template` of a configuration."""


def processor_parts(folder: Path, config: InternVLConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Tokenizer, chat template and image processor of a checkpoint, as `InternVLProcessor` takes them.

    Parameters
    ----------
    folder : Path
        Of the checkpoint.
    config : InternVLConfig
        Translated; its `image_token_id` is set to the tokenizer's.
    facts : mapping
        What config.json holds.

    Raises
    ------
    ValueError
        If the tokenizer, a mark of images or the template is not there.
    """
    template = chat_template(facts.get("template"))
    needed = [*MARKS.values(), closing(facts["template"])]
    check_tokens(load_tokenizer(folder), needed, config.text_config.vocab_size)
    # Naming a token adds it where it is missing, so looking comes first.
    tokenizer = load_tokenizer(folder, extra_special_tokens=MARKS, padding_side="left")
    tokenizer.video_token = VIDEO
    config.image_token_id = tokenizer.convert_tokens_to_ids(MARKS["context_image_token"])
    return {
        "image_processor": image_processor(config, facts),
        "tokenizer": tokenizer,
        "image_seq_length": config.image_seq_length,
        "chat_template": template,
    }


def check_tokens(tokenizer: PreTrainedTokenizerBase, tokens: list[str], rows: int) -> None:
    """Raise ValueError for a token that is not one piece, or has no embedding."""
    vocabulary = tokenizer.get_vocab()
    for token in tokens:
        if token not in vocabulary:
            raise ValueError(f"tokenizer: has no token {token}, which the prompts of InternVL need")
    largest = max(vocabulary.values())
    if largest >= rows:
        name = tokenizer.convert_ids_to_tokens(largest)
        raise ValueError(f"tokenizer: has tokens up to {largest} ({name!r}), but llm_config.vocab_size is {rows}")


def closing(template: str) -> str:
    """The token that ends an answer."""
    return TEMPLATES[template][1].strip()


def chat_template(name: Any) -> str:
    """A template of the `conversation.py` that comes with checkpoints, for `apply_chat_template`.

    An image is `<IMG_CONTEXT>` and a new line, a video `<video>` and one; the processor fills them up to their tokens.
    """
    if name not in TEMPLATES:
        raise ValueError(f"template is {name!r}: it must be {', '.join(TEMPLATES)}")
    opening, end, system = TEMPLATES[name]
    before, after = opening.split("{role}")
    first = opening.format(role="system") + system + end
    image, video = MARKS["context_image_token"] + "\n", VIDEO + "\n"
    return (
        f"{{% if messages[0]['role'] != 'system' %}}{{{{ {first!r} }}}}{{% endif %}}"
        f"{{% for message in messages %}}{{{{ {before!r} + message['role'] + {after!r} }}}}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{{{{ {image!r} }}}}{{% elif part['type'] == 'video' %}}{{{{ {video!r} }}}}"
        "{% else %}{{ part['text'] }}{% endif %}"
        f"{{% endfor %}}{{% endif %}}{{{{ {end!r} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {opening.format(role='assistant')!r} }}}}{{% endif %}}"
    )


def image_processor(config: InternVLConfig, facts: Mapping[str, Any]) -> GotOcr2ImageProcessorPil:
    """Tiles of the closest aspect ratio and a thumbnail, resized by PIL; one tile without `dynamic_image_size`."""
    height, width = config.vision_config.image_size
    dynamic = bool(facts.get("dynamic_image_size", False))
    least, most = facts.get("min_dynamic_patch", 1), facts.get("max_dynamic_patch", 6)
    if dynamic and not (isinstance(least, int) and isinstance(most, int) and 1 <= least <= most):
        raise ValueError(f"min_dynamic_patch is {least!r} and max_dynamic_patch {most!r}: 1 <= min <= max must hold")
    return GotOcr2ImageProcessorPil(
        size={"height": height, "width": width},
        crop_to_patches=dynamic,
        min_patches=least if dynamic else 1,
        max_patches=most if dynamic else 1,
        image_mean=list(IMAGENET_DEFAULT_MEAN),
        image_std=list(IMAGENET_DEFAULT_STD),
    )
