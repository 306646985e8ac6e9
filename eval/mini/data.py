"""Tokenizer, prompts and packed batches for the embedded model.

One picture costs 576 tokens, a question about a dozen; so many questions share one picture. They are packed into one
sequence, ``system prompt + picture`` once, then the questions: each attends to that prefix and to itself, and its
positions continue right after the prefix, exactly as if it had been asked alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from eval.mini import questions, scenes
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX
from llava.conversation import conv_templates

SPECIAL_TOKENS = ("<unk>", "<s>", "</s>", "<pad>", DEFAULT_IMAGE_TOKEN)
_QUESTION_WORDS = (
    "What How Is size pattern color shape is the there a an many are left or right of above below does sign say "
    "object objects yes no"
)
_MARK = "\x00"


def build_tokenizer(more_words: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """Word-level vocabulary with a fall-back to single printable ASCII characters; other characters are ``<unk>``.

    ``more_words`` come last, so that all other ids stay what they are.
    """
    words = [*SPECIAL_TOKENS, "\n", *" ".join(prompt_parts("")).split(), *_QUESTION_WORDS.split()]
    for names in questions.VALUES.values():
        words += names
    words += [questions.plural(name) for name in scenes.SHAPES]
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = dict.fromkeys([*words, *characters, *("##" + character for character in characters), *more_words])
    model = models.WordPiece(
        {word: index for index, word in enumerate(vocabulary)}, unk_token="<unk>", max_input_chars_per_word=100_000
    )
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(Regex(r"[ \t\r]+"), "removed")]
    )
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", list(vocabulary).index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=[DEFAULT_IMAGE_TOKEN],
        extra_special_tokens={"image_token": DEFAULT_IMAGE_TOKEN},
        model_max_length=4096,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def prompt_parts(question: str) -> tuple[str, str]:
    """LLaVA's ``vicuna_v1`` prompt for one question, split at the image."""
    conversation = conv_templates["v1"].copy()
    conversation.append_message(conversation.roles[0], f"{DEFAULT_IMAGE_TOKEN}\n{question or _MARK}")
    conversation.append_message(conversation.roles[1], None)
    before, after = conversation.get_prompt().replace(_MARK, "").split(DEFAULT_IMAGE_TOKEN)
    return before, after


@dataclass(frozen=True)
class PlacedMention:
    """Where a noun phrase ends, as picture of the batch and token of its text, and what it means.

    ``earlier`` is the phrase that its question compares it with, if it came before.
    """

    row: int
    token: int
    meaning: questions.Mention
    earlier: questions.Mention | None = None


@dataclass(frozen=True)
class PlacedChoice:
    """A multiple-choice question's places in the text of a picture.

    ``token`` is its prompt's last token, ``options`` are the first tokens of its options, ``right`` that of the right
    one; an option's letter comes two tokens before it.
    """

    row: int
    token: int
    options: tuple[int, ...]
    right: int


@dataclass
class PackedText:
    """The text of a packed batch; ``prefix`` is shared, the rest is ``[batch, text]``, padded on the right.

    ``blocks`` numbers the questions from 1 (padding: -1); ``offsets`` is a token's place within its question.
    """

    prefix: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    blocks: torch.Tensor
    offsets: torch.Tensor
    mentions: list[PlacedMention]
    choices: list[PlacedChoice]

    def to(self, device: torch.device) -> PackedText:
        """The tensors on a device."""
        tensors = (self.prefix, self.ids, self.labels, self.blocks, self.offsets)
        return PackedText(*(tensor.to(device) for tensor in tensors), self.mentions, self.choices)

    def positions(self, n_vision: int) -> torch.Tensor:
        """Position ids ``[batch, prefix + vision + text]``."""
        start = len(self.prefix) + n_vision
        return torch.cat(
            (torch.arange(start, device=self.ids.device).expand(len(self.ids), -1), start + self.offsets), 1
        )

    def attention_mask(self, n_vision: int, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask ``[batch, 1, tokens, tokens]``: causal, and no question sees another."""
        shared = self.blocks.new_zeros(len(self.ids), len(self.prefix) + n_vision)
        block = torch.cat((shared, self.blocks), 1)
        length = block.shape[1]
        allowed = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
        allowed &= torch.ones(length, length, dtype=torch.bool, device=block.device).tril()
        zeros = torch.zeros(allowed.shape, dtype=dtype, device=block.device)
        return zeros.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


class Packer:
    """Turns questions about pictures into :class:`PackedText`."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.prefix = torch.tensor(tokenizer(prompt_parts("")[0]).input_ids)

    def encode(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids of everything after the image, and labels that keep only the answer and ``</s>``."""
        prompt = self.tokenizer(prompt_parts(question)[1], add_special_tokens=False).input_ids
        reply = self.tokenizer(answer, add_special_tokens=False).input_ids + [self.tokenizer.eos_token_id]
        return prompt + reply, [IGNORE_INDEX] * len(prompt) + reply

    def last_token(self, text: str) -> int:
        """Place, among the ids of :meth:`encode`, of the last token of a question's beginning."""
        return len(self.tokenizer("\n" + text, add_special_tokens=False).input_ids) - 1

    def place_mentions(self, question: questions.Question, row: int, start: int) -> Iterator[PlacedMention]:
        """Ends of a question's noun phrases, its first token being token ``start`` of a row."""
        earlier = None
        for meaning in question.mentions:
            find = question.text.find if earlier is None else question.text.rfind  # the later of two alike
            end = find(meaning.phrase) + len(meaning.phrase)
            yield PlacedMention(row, start + self.last_token(question.text[:end]), meaning, earlier)
            earlier = meaning

    def place_choice(self, question: questions.Question, ids: list[int], row: int, start: int) -> PlacedChoice:
        """Places of a multiple-choice question whose ids (see :meth:`encode`) begin at token ``start`` of a row."""
        text, *lines = question.text.split("\n")
        options = {}
        for line in lines:
            options[line[0]] = start + self.last_token(f"{text}\n{line[0]}.") + 1
            text += f"\n{line}"
        return PlacedChoice(row, start + len(ids) - 3, tuple(options.values()), options[question.answer])

    def __call__(self, batch: list[list[questions.Question]]) -> PackedText:
        """Pack the questions of each picture of a batch."""
        rows, mentions, choices = [], [], []
        for row, asked in enumerate(batch):
            ids, labels, blocks, offsets = [], [], [], []
            for number, question in enumerate(asked, 1):
                mentions += self.place_mentions(question, row, len(ids))
                question_ids, question_labels = self.encode(question.text, question.answer)
                if "\n" in question.text:
                    choices.append(self.place_choice(question, question_ids, row, len(ids)))
                ids += question_ids
                labels += question_labels
                blocks += [number] * len(question_ids)
                offsets += range(len(question_ids))
            rows.append((ids, labels, blocks, offsets))
        fill = (self.tokenizer.pad_token_id, IGNORE_INDEX, -1, 0)
        length = max(1, *(len(ids) for ids, *_ in rows))
        columns = [
            torch.tensor([row[index] + [value] * (length - len(row[index])) for row in rows])
            for index, value in enumerate(fill)
        ]
        return PackedText(self.prefix, *columns, mentions, choices)


#: Shares of the question types in language pre-training, in tuning and in tuning with options: more of what is still
#: learned, or easily lost.
TRAINING_MIX = {"attribute": 0.16, "existence": 0.22, "counting": 0.2, "relation": 0.27, "reading": 0.15}
TUNING_MIX = {"attribute": 0.12, "existence": 0.17, "counting": 0.38, "relation": 0.25, "reading": 0.08}
CHOICE_MIX = {"attribute": 0.16, "existence": 0.12, "counting": 0.4, "relation": 0.16, "reading": 0.16}


def ask_scene(
    scene: scenes.Scene, count: int, salt: int = 0, mix: dict[str, float] | None = None, choices: float = 0.0
) -> list[questions.Question]:
    """Training questions about a scene, determined by its seed and ``salt``; ``TRAINING_MIX`` unless told otherwise.

    A share of ``choices`` of them comes with options; their type is then ``choice`` and the type of the plain question.
    """
    rng = np.random.default_rng((scene.seed, salt, 3))
    asked = questions.ask(rng, scene, count, mix or TRAINING_MIX)
    return [with_options(rng, scene, question) if rng.random() < choices else question for question in asked]


def with_options(rng: np.random.Generator, scene: scenes.Scene, question: questions.Question) -> questions.Question:
    """A question turned into a multiple-choice one, the options part of its text."""
    choice = questions.multiple_choice(rng, scene, question)
    text = questions.choice_text(choice.question, choice.options)
    return replace(question, text=text, answer=choice.answer, type=f"choice {choice.type}")
