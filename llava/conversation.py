"""Prompt templates: how the turns of a conversation become the text a model was tuned on."""

import base64
import dataclasses
from collections.abc import Sequence
from enum import Enum, auto
from io import BytesIO
from typing import TYPE_CHECKING

from llava.constants import DEFAULT_IMAGE_TOKEN

if TYPE_CHECKING:
    from PIL import Image

Message = str | tuple | None
"""What one turn says: a text, a triple (text, image, mode), or None where the model is to answer."""


class SeparatorStyle(Enum):
    """How turns are told apart in a prompt."""

    SINGLE = auto()
    """``role: text`` and one separator after every turn."""
    TWO = auto()
    """``role: text`` and one separator after a question, another after an answer."""
    MPT = auto()
    """ChatML: the role is a header line of its own."""
    PLAIN = auto()
    """Only the texts, as in projector pre-training."""
    LLAMA_2 = auto()
    """``[INST] question [/INST] answer``, the system text inside the first question."""


@dataclasses.dataclass
class Conversation:
    """A system text, two roles, the turns so far, and the style in which they are written down.

    Parameters
    ----------
    system : str
        The text in front of the first turn.
    roles : tuple of str
        The names of the user and of the assistant.
    messages : sequence of (role, message)
        The turns so far. A message is a text, a triple (text, image, mode), or None where the model is to answer.
    offset : int
        How many of the first messages are examples that belong to the template.
    sep_style : SeparatorStyle
        How turns are told apart.
    sep, sep2 : str
        Separators; which of them are used, and where, depends on the style.
    version : str
        The family a template belongs to. ``mmtag`` in it wraps the image in ``<Image></Image>``.
    skip_next : bool
        For user interfaces: the next answer is not to be generated.
    """

    system: str
    roles: tuple[str, str]
    messages: Sequence[Sequence]
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def get_prompt(self) -> str:
        """Write the conversation down as a prompt.

        Returns
        -------
        str
            The prompt. It ends with the header of the assistant's turn if the last message is None.

        Raises
        ------
        ValueError
            If a ``LLAMA_2`` conversation does not begin with a message of the user.
        TypeError
            If a ``PLAIN`` conversation has more messages than separators.
        """
        turns = [(role, _text_of(message)) for role, message in self._with_image_first()]
        return _WRITERS[self.sep_style](self, turns)

    def append_message(self, role: str, message: Message) -> None:
        """Add a turn.

        Parameters
        ----------
        role : str
            One of :attr:`roles`.
        message : str, tuple or None
            A text, a triple (text, image, mode), or None where the model is to answer.
        """
        self.messages.append([role, message])

    def get_images(self, return_pil: bool = False) -> list["Image.Image"] | list[str]:
        """Collect the images of the user's turns, in order, the template's own examples left out.

        The mode that stands beside an image says how it is made square: ``Pad`` adds a border, ``Resize`` scales to
        336 x 336 pixels, and ``Crop`` or ``Default`` leaves it to the image processor.

        Parameters
        ----------
        return_pil : bool
            Whether to return images rather than base64 texts.

        Returns
        -------
        list of PIL.Image.Image or list of str
            One RGB image, or one PNG file as base64 text, per image.

        Raises
        ------
        ValueError
            If a mode is none of the four.
        """
        messages = [message for _, message in self.messages[self.offset :: 2]]
        images = [_apply_mode(image, mode) for _, image, mode in filter(_has_image, messages)]
        return images if return_pil else [_to_base64(image) for image in images]

    def copy(self) -> "Conversation":
        """Make an independent conversation with the same turns.

        Returns
        -------
        Conversation
            A conversation that can be extended without touching this one.
        """
        return dataclasses.replace(self, messages=[[role, message] for role, message in self.messages])

    def _with_image_first(self) -> list[Sequence]:
        """Move the image of a first turn (text, image, mode) in front of its text."""
        messages = list(self.messages)
        if not messages or not isinstance(messages[0][1], tuple):
            return messages
        role, message = messages[0]
        text = message[0].replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" not in self.version:
            return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{text}"), *messages[1:]]
        received = [(self.roles[0], f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"), (self.roles[1], "Received.")]
        return [*received, (role, text), *messages[1:]]


def _text_of(message: Message) -> str | None:
    return message[0] if isinstance(message, tuple) else message


def _has_image(message: Message) -> bool:
    return isinstance(message, tuple) and message[1] is not None


def _apply_mode(image: "Image.Image", mode: str) -> "Image.Image":
    from llava.mm_utils import expand2square  # imports torch, which prompts alone do not need

    image = image.convert("RGB")
    if mode == "Pad":
        return expand2square(image, (122, 116, 104))
    if mode == "Resize":
        return image.resize((336, 336))
    if mode in ("Crop", "Default"):
        return image
    raise ValueError(f"image mode: got {mode!r}, expected Pad, Resize, Crop or Default")


def _to_base64(image: "Image.Image") -> str:
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _write_single(conversation: Conversation, turns: list[tuple[str, str | None]]) -> str:
    prompt = conversation.system + conversation.sep
    return prompt + "".join(f"{role}: {text}{conversation.sep}" if text else f"{role}:" for role, text in turns)


def _write_two(conversation: Conversation, turns: list[tuple[str, str | None]]) -> str:
    separators = (conversation.sep, conversation.sep2)
    prompt = conversation.system + conversation.sep
    for index, (role, text) in enumerate(turns):
        prompt += f"{role}: {text}{separators[index % 2]}" if text else f"{role}:"
    return prompt


def _write_mpt(conversation: Conversation, turns: list[tuple[str, str | None]]) -> str:
    prompt = conversation.system + conversation.sep
    return prompt + "".join(f"{role}{text}{conversation.sep}" if text else role for role, text in turns)


def _write_plain(conversation: Conversation, turns: list[tuple[str, str | None]]) -> str:
    separators = (conversation.sep, conversation.sep2)
    prompt = conversation.system
    for index, (_, text) in enumerate(turns):
        if not text:
            continue
        if separators[index % 2] is None:
            raise TypeError(f"sep2: None, but message {index} of a plain conversation ends with it; expected a text")
        prompt += text + separators[index % 2]
    return prompt


def _write_llama_2(conversation: Conversation, turns: list[tuple[str, str | None]]) -> str:
    if not turns or turns[0][0] != conversation.roles[0] or not turns[0][1]:
        raise ValueError(f"messages: got {turns[:1]}, expected a text from {conversation.roles[0]} to begin with")
    system = f"<<SYS>>\n{conversation.system}\n<</SYS>>\n\n" if conversation.system else ""
    prompt = ""
    for index, (_, text) in enumerate(turns):
        if not text:
            continue
        if index % 2:
            prompt += f" {text} {conversation.sep2}"
        else:
            prompt += f"{conversation.sep}[INST] {system if index == 0 else ''}{text} [/INST]"
    # The tokenizer puts the first beginning-of-sequence token in front itself.
    return prompt.removeprefix(conversation.sep)


_WRITERS = {
    SeparatorStyle.SINGLE: _write_single,
    SeparatorStyle.TWO: _write_two,
    SeparatorStyle.MPT: _write_mpt,
    SeparatorStyle.PLAIN: _write_plain,
    SeparatorStyle.LLAMA_2: _write_llama_2,
}

_HELPFUL_TO_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_HELPFUL_TO_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_IMAGE_BETWEEN_TAGS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2_CHAT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, "
    "explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)
_LANGUAGE_AND_VISION = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_MPT_CHAT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_RENEWABLE_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_RENEWABLE_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of time, "
    "such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other hand, are finite "
    "and will eventually be depleted, such as coal, oil, and natural gas. "
    "Here are some key differences between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, "
    "while non-renewable energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
    "and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, "
    "but they typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable "
    "and can be used in more remote locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible "
    "and can be adapted to different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, "
    "while non-renewable sources are not, and their depletion can lead to economic and social instability.\n"
)
_HUMAN = ("Human", "Assistant")
_USER = ("USER", "ASSISTANT")
_CHATML = ("<|im_start|>user\n", "<|im_start|>assistant\n")


def _template(
    system: str,
    roles: tuple[str, str],
    sep_style: SeparatorStyle,
    sep: str,
    sep2: str | None = None,
    version: str = "Unknown",
    messages: tuple[tuple[str, str], ...] = (),
) -> Conversation:
    return Conversation(system, roles, messages, len(messages), sep_style, sep, sep2, version)


_vicuna_v0 = _template(
    _HELPFUL_TO_HUMAN,
    _HUMAN,
    SeparatorStyle.SINGLE,
    "###",
    messages=((_HUMAN[0], _RENEWABLE_QUESTION), (_HUMAN[1], _RENEWABLE_ANSWER)),
)
_vicuna_v1 = _template(_HELPFUL_TO_USER, _USER, SeparatorStyle.TWO, " ", "</s>", "v1")
_plain = _template("", ("", ""), SeparatorStyle.PLAIN, "\n")
_mistral_instruct = _template("", _USER, SeparatorStyle.LLAMA_2, "", "</s>", "llama_v2")
_chatml_direct = _template(
    "<|im_start|>system\nAnswer the questions.", _CHATML, SeparatorStyle.MPT, "<|im_end|>", version="mpt"
)

conv_templates = {
    "default": _vicuna_v0,
    "v0": _vicuna_v0,
    "v1": _vicuna_v1,
    "vicuna_v1": _vicuna_v1,
    "llama_2": _template(_LLAMA_2_CHAT, _USER, SeparatorStyle.LLAMA_2, "<s>", "</s>", "llama_v2"),
    "mistral": _mistral_instruct,
    "mistral_instruct": _mistral_instruct,
    "mistral_direct": _chatml_direct,
    "chatml_direct": _chatml_direct,
    "plain": _plain,
    "v0_plain": _plain,
    "llava_v0": _template(_HELPFUL_TO_HUMAN, _HUMAN, SeparatorStyle.SINGLE, "###"),
    "v0_mmtag": _template(_IMAGE_BETWEEN_TAGS, _HUMAN, SeparatorStyle.SINGLE, "###", version="v0_mmtag"),
    "llava_v1": _template(_HELPFUL_TO_HUMAN, _USER, SeparatorStyle.TWO, " ", "</s>", "v1"),
    "v1_mmtag": _template(_IMAGE_BETWEEN_TAGS, _USER, SeparatorStyle.TWO, " ", "</s>", "v1_mmtag"),
    "llava_llama_2": _template(_LANGUAGE_AND_VISION, _USER, SeparatorStyle.LLAMA_2, "<s>", "</s>", "llama_v2"),
    "mpt": _template(_MPT_CHAT, _CHATML, SeparatorStyle.MPT, "<|im_end|>", version="mpt"),
}
"""Templates by name. They are shared: extend a :meth:`Conversation.copy`, never a template."""

default_conversation = conv_templates["vicuna_v1"]
