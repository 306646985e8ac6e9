"""Grounding loss: in the middle of the language model, the end of a noun phrase should know what the phrase means.

Answers alone teach slowly how to look things up in a picture. So while the embedded model is trained, a linear read-out
of a middle layer at the last token of each noun phrase tells how many things are meant and, if it is one, its place and
its attributes or word. The read-out is dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig

from eval.mini import scenes
from eval.mini.data import PlacedMention

_MOST = 5
#: Read-out classes: number of things meant, then shape, colour, size, pattern and the letters of one thing.
CLASSES = (
    _MOST + 1,
    *(len(names) + 1 for names in (scenes.SHAPES, scenes.COLOR_NAMES, scenes.SIZES, scenes.PATTERNS)),
    *[len(scenes.ALPHABET) + 1] * scenes.MAX_WORD,
)
_IGNORE = -100


def facts_of(mention: PlacedMention) -> list[int]:
    """Class of each read-out; those about one thing are ignored where none or several are meant."""
    entities = mention.meaning.entities
    if len(entities) != 1:
        return [min(len(entities), _MOST)] + [_IGNORE] * (len(CLASSES) - 1)
    (item,) = entities
    facts = [1]
    for names, value in (
        (scenes.SHAPES, item.shape),
        (scenes.COLOR_NAMES, item.color),
        (scenes.SIZES, item.size),
        (scenes.PATTERNS, item.pattern),
    ):
        facts.append(names.index(value) + 1 if value else 0)
    letters = [scenes.ALPHABET.index(letter) + 1 for letter in item.word]
    return facts + letters + [0] * (scenes.MAX_WORD - len(letters))


def places_of(mentions: list[PlacedMention]) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the ends of phrases into ``[batch, text]``."""
    return torch.tensor([item.row for item in mentions]), torch.tensor([item.token for item in mentions])


class Grounding(nn.Module):
    """Linear read-outs of hidden states at the ends of noun phrases.

    At five eighths of the model's depth they tell what is meant; three layers later, at the second of two compared
    things, how they lie to each other.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.depth = config.num_hidden_layers * 5 // 8
        self.compare_depth = min(self.depth + 3, config.num_hidden_layers - 1)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.compare_head = nn.Linear(config.hidden_size, 2)
        self.grounding_head = nn.Linear(config.hidden_size, sum(CLASSES) + 2)

    def loss(self, states: Sequence[torch.Tensor], mentions: list[PlacedMention], length: int) -> torch.Tensor:
        """Sum of the read-outs' losses; ``states`` are ``[batch, tokens, hidden]``, the last ``length`` tokens text."""
        hidden = states[self.depth][:, -length:]
        later = states[self.compare_depth][:, -length:]
        return self.meaning_loss(hidden, mentions) + self._comparison_loss(
            later, [item for item in mentions if item.earlier is not None]
        )

    def _comparison_loss(self, hidden: torch.Tensor, mentions: list[PlacedMention]) -> torch.Tensor:
        """Is the thing named first above, is it left of, the one named second?"""
        if not mentions:
            return hidden.new_zeros((), dtype=torch.float32)
        logits = self.compare_head(self.norm(hidden[places_of(mentions)])).float()
        pairs = torch.tensor(
            [(item.earlier.places[0], item.meaning.places[0]) for item in mentions], device=hidden.device
        )
        gap = pairs[:, 0] - pairs[:, 1]
        each = F.binary_cross_entropy_with_logits(logits, (gap < 0).float(), reduction="none")
        return (each * (gap != 0)).mean()

    def meaning_loss(self, hidden: torch.Tensor, mentions: list[PlacedMention]) -> torch.Tensor:
        *groups, place = self.grounding_head(self.norm(hidden[places_of(mentions)])).float().split([*CLASSES, 2], -1)
        facts = torch.tensor([facts_of(item) for item in mentions], device=hidden.device)
        single = facts[:, 0] == 1
        loss = F.cross_entropy(groups[0], facts[:, 0])
        if not single.any():
            return loss
        targets = [item.meaning.places[0] for item in mentions if len(item.meaning.places) == 1]
        error = place[single] - (torch.tensor(targets, device=hidden.device) / (scenes.FULL_GRID - 1) * 2 - 1)
        loss = loss + 4.0 * error.square().mean()
        for logits, fact in zip(groups[1:], facts.T[1:], strict=True):
            loss = loss + 0.3 * F.cross_entropy(logits[single], fact[single])
        return loss
