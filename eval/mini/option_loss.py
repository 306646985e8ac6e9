"""Guidance for multiple-choice questions: know the answer, look at the option that says so, tell its letter.

Letters alone teach none of these steps: after 130 steps of tuning the model still guessed. So while it learns, the end
of a prompt with options names, at four fifths of the depth, the first token of the right option; one head of the next
layer looks at that token; there each option's first token knows its letter; and the letter that is told counts as much
as each of these. The lenses are the model's own output layer and attention, so nothing of this is left but the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from eval.mini.data import PackedText

#: The head that is taught to look at the right option.
HEAD = 0


def choosing_loss(
    model: LlamaForCausalLM,
    states: Sequence[torch.Tensor],
    text: PackedText,
    mask: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Sum of the four losses over the multiple-choice questions of a batch, of which there is at least one.

    ``states`` are ``[batch, tokens, hidden]`` before each layer and after the final norm, the text their last tokens;
    ``mask`` ``[batch, 1, tokens, tokens]`` and ``positions`` ``[batch, tokens]`` are what the model was given.
    """
    depth = (model.config.num_hidden_layers - 1) * 4 // 5
    device, first = states[0].device, states[0].shape[1] - text.ids.shape[1]
    rows = torch.tensor([item.row for item in text.choices], device=device)
    ends = torch.tensor([item.token for item in text.choices], device=device)
    right = torch.tensor([item.right for item in text.choices], device=device)
    each = torch.tensor([(item.row, option) for item in text.choices for option in item.options], device=device).T
    named = _lens(model, states[depth][rows, first + ends])
    lettered = _lens(model, states[depth + 1][each[0], first + each[1]])
    told = model.lm_head(states[-1][rows, first + ends]).float()
    looked = attention_scores(model, depth + 1, states[depth + 1], positions, rows, first + ends)
    return (
        F.cross_entropy(named, text.ids[rows, right])
        + F.cross_entropy(lettered, text.ids[each[0], each[1] - 2])
        + F.cross_entropy(told, text.ids[rows, ends + 1])
        + F.cross_entropy(looked + mask[rows, 0, first + ends], first + right)
    )


def _lens(model: LlamaForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
    """What hidden states ``[n, hidden]`` would say if they were the last ones: logits ``float32 [n, vocabulary]``."""
    return model.lm_head(model.model.norm(hidden)).float()


def attention_scores(
    model: LlamaForCausalLM,
    index: int,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """Scores, before mask and softmax, that ``HEAD`` of layer ``index`` gives all tokens, ``float32 [n, tokens]``.

    ``hidden`` ``[batch, tokens, hidden]`` is the layer's input; queries are ``tokens[i]`` of picture ``rows[i]``.
    """
    layer = model.model.layers[index]
    attention, normed = layer.self_attn, layer.input_layernorm(hidden)
    heads = (*normed.shape[:2], -1, attention.head_dim)
    query, key = (part(normed).view(heads)[:, :, HEAD, None] for part in (attention.q_proj, attention.k_proj))
    rotary = model.model.rotary_emb(normed, positions)
    query, key = apply_rotary_pos_emb(query, key, *rotary, unsqueeze_dim=2)
    query, key = query[:, :, 0].float(), key[:, :, 0].float()
    return (key[rows] @ query[rows, tokens][:, :, None]).squeeze(-1) * attention.scaling
