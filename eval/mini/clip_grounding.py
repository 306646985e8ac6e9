"""What the embedded video model is told on the way while it learns: read-outs and losses, dropped afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from eval.mini.clip_scenes import BEHAVIOURS, CLIP_GRID, MOMENTS, Clip
from eval.mini.data import PlacedMention
from eval.mini.grounding import Grounding

# Of ways in rows and columns, moment, first seen, gone: unscaled, the moment's error would hide the others'.
TRAIL_VARIANCES = (0.04, 0.02, 0.08, 0.03, 0.004)


@dataclass
class ClipBatch:
    """Clips and some of their patches.

    ``features`` is ``[batch, moments * patches, width]`` of the tower, ``places`` ``[batch, moments * patches]`` tells
    which patches of the whole clip they are, in ascending order; ``trails`` ``[batch, moments * patches, 5]`` and
    ``owners`` ``[batch, moments * patches]`` are what :mod:`clip_scenes` says of them.
    """

    clips: list[Clip]
    features: torch.Tensor
    places: torch.Tensor
    trails: torch.Tensor
    owners: torch.Tensor


def _at(hidden: torch.Tensor, mentions: list[PlacedMention]) -> torch.Tensor:
    """Hidden states at the ends of noun phrases, ``[mentions, hidden]``."""
    return hidden[[item.row for item in mentions], [item.token for item in mentions]]


def first_head(layer: nn.Module, hidden: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Logarithms of the attention of a decoder layer's first head on its input, ``[batch, tokens, tokens]``, causal."""
    attention, hidden = layer.self_attn, layer.input_layernorm(hidden)
    weights = (part.weight[: attention.head_dim] for part in (attention.q_proj, attention.k_proj))
    query, key = apply_rotary_pos_emb(*(F.linear(hidden, weight)[:, None] for weight in weights), *rotary)
    scores = (query @ key.mT)[:, 0].float() * attention.scaling
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).log_softmax(-1)


class ClipGrounding(nn.Module):
    """Read-outs of hidden states, dropped after training.

    At five sixteenths of the depth a vision token that shows an object knows what that object has done so far; at five
    eighths the end of a phrase knows what is meant, and what it does in the whole clip; three layers later the end of
    the second of two phrases knows which of the two appears first.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.meaning = Grounding(config)
        self.trail_depth = config.num_hidden_layers * 5 // 16
        self.matching_layers = (self.trail_depth - 3, self.trail_depth - 2)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.place_head = nn.Linear(config.hidden_size, 2)
        self.trail_head = nn.Linear(config.hidden_size, 5)
        self.doing_norm = nn.LayerNorm(config.hidden_size)
        self.doing_head = nn.Linear(config.hidden_size, len(BEHAVIOURS) + 4)
        self.order_head = nn.Linear(config.hidden_size, 1)

    def trail_loss(self, states: Sequence[torch.Tensor], told: torch.Tensor, start: int) -> torch.Tensor:
        """Error at patches with an object; ``told`` as :func:`clip_scenes.trails`, the first token at ``start``."""
        hidden = states[self.trail_depth][:, start : start + told.shape[1]]
        there = ~told[..., 0].isnan()
        error = (self.trail_head(self.norm(hidden[there])).float() - told[there]).square()
        return (error / torch.tensor(TRAIL_VARIANCES)).mean()

    def place_loss(self, states: Sequence[torch.Tensor], batch: ClipBatch) -> torch.Tensor:
        """Error of rows and columns as shares of their variance, in the first layer's input and in what is matched.

        The tower's features tell them (1.5 % of the variance is left), what llava-mini's projector makes of them less
        (14 % and 5 %): too little for a way of one patch.
        """
        place = batch.places % CLIP_GRID**2
        told = torch.stack((place // CLIP_GRID, place % CLIP_GRID), -1) / CLIP_GRID - 0.5
        read = [self.place_head(self.norm(states[depth][:, -place.shape[1] :])) for depth in (0, *self.matching_layers)]
        return torch.stack([12.0 * (own.float() - told).square().mean() for own in read]).sum()

    def matching_loss(self, decoder: LlamaModel, states: Sequence[torch.Tensor], batch: ClipBatch) -> torch.Tensor:
        """How little the first heads of two layers attend from an object's patches to its patches in earlier moments.

        Answers and trails alone do not bring a head to find an object again (tried: after 400 steps ways were at the
        error of their mean). ``states`` are the layers' inputs, ``[batch, tokens, hidden]``, the clip's tokens last.
        """
        moment = batch.places // CLIP_GRID**2
        same = (batch.owners[:, :, None] == batch.owners[:, None]) & (moment[:, :, None] > moment[:, None])
        wanted = same & (batch.owners >= 0)[:, :, None]
        start = states[0].shape[1] - batch.places.shape[1]
        positions = torch.cat((torch.arange(start).expand(len(moment), -1), start + batch.places), 1)
        rotary, losses = decoder.rotary_emb(states[0], positions), []
        for number in self.matching_layers:
            share = first_head(decoder.layers[number], states[number], rotary)[:, start:, start:]
            found = share.masked_fill(~wanted, -torch.inf).logsumexp(-1)
            losses.append(-found[wanted.any(-1)].mean())
        return torch.stack(losses).mean()

    def doing_loss(self, hidden: torch.Tensor, mentions: list[PlacedMention], clips: list[Clip]) -> torch.Tensor:
        """What one object does: behaviour, way in rows and columns, when it is first seen, how often it blinks."""
        actors = [clips[item.row].actor(item.meaning.entities[0]) for item in mentions]
        told = self.doing_head(self.doing_norm(_at(hidden, mentions))).float()
        behaviour = torch.tensor([BEHAVIOURS.index(actor.behaviour) for actor in actors])
        ways = [np.subtract(actor.place(MOMENTS - 1), actor.place(0)) / MOMENTS for actor in actors]
        facts = [(*way, actor.first_seen / MOMENTS, actor.blinks / 3) for way, actor in zip(ways, actors, strict=True)]
        error = told[:, len(BEHAVIOURS) :] - torch.tensor(np.array(facts, np.float32))
        return F.cross_entropy(told[:, : len(BEHAVIOURS)], behaviour) + 4.0 * error.square().mean()

    def order_loss(self, hidden: torch.Tensor, mentions: list[PlacedMention], clips: list[Clip]) -> torch.Tensor:
        """Whether the object named first appears first."""
        pairs = [
            [clips[item.row].actor(meant.entities[0]).first_seen for meant in (item.earlier, item.meaning)]
            for item in mentions
        ]
        target = torch.tensor([float(first < second) for first, second in pairs])
        logits = self.order_head(self.doing_norm(_at(hidden, mentions)))[:, 0].float()
        return F.binary_cross_entropy_with_logits(logits, target)


@dataclass
class OnClips:
    """The read-outs' losses for one batch, as ``language.answer_loss`` asks for them."""

    decoder: LlamaModel
    heads: ClipGrounding
    batch: ClipBatch

    def loss(self, states: Sequence[torch.Tensor], mentions: list[PlacedMention], length: int) -> torch.Tensor:
        told, meaning, clips = self.batch.trails, self.heads.meaning, self.batch.clips
        loss = self.heads.trail_loss(states, told, states[0].shape[1] - length - told.shape[1])
        early = [state[:, : state.shape[1] - length] for state in states[: self.heads.trail_depth]]
        loss = loss + self.heads.matching_loss(self.decoder, early, self.batch)
        loss = loss + self.heads.place_loss(early, self.batch)
        hidden = states[meaning.depth][:, -length:]
        if mentions:
            loss = loss + meaning.meaning_loss(hidden, mentions)
        if single := [item for item in mentions if len(item.meaning.entities) == 1]:
            loss = loss + self.heads.doing_loss(hidden, single, clips)
        if compared := [item for item in mentions if item.earlier is not None]:
            loss = loss + self.heads.order_loss(states[meaning.compare_depth][:, -length:], compared, clips)
        return loss
