"""Tiny InternVL2 checkpoints in the original format, and what the original computes, restated in plain torch."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

PATCH, SIDE = 14, 4
PIXELS = PATCH * SIDE
TOKENS = (SIDE // 2) ** 2  # per tile, after pixel shuffle
LLM = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
    "top_k": 50,
}
KINDS = {
    "internlm2": {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        "bias": False,
        "rope_theta": 1000000,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        **LLM,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "su", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]},
        "sliding_window": 262144,
        "pad_token_id": 2,
        **LLM,
        "num_key_value_heads": 8,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1000000.0, **LLM},
}
TOWERS = {
    "300m": {"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True, "num_attention_heads": 4},
    "6b": {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False, "num_attention_heads": 4},
}
TEMPLATES = {"internlm2": "internlm2-chat", "phi3": "phi3-chat", "qwen2": "Hermes-2"}


def config(kind: str = "internlm2", tower: str = "300m", rows: int = 200) -> dict:
    """A config.json with the fields of OpenGVLab's files."""
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "image_size": PIXELS,
        "patch_size": PATCH,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "drop_path_rate": 0.1,
        "use_flash_attn": True,
        **TOWERS[tower],
    }
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": PIXELS,
        "max_dynamic_patch": 12,
        "min_dynamic_patch": 1,
        "use_thumbnail": True,
        "ps_version": "v2",
        "select_layer": -1,
        "template": TEMPLATES[kind],
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "llm_config": {**KINDS[kind], "vocab_size": rows},
        "vision_config": vision,
    }


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, states: Tensor) -> Tensor:
        return self.weight * states * (states.square().mean(-1, keepdim=True) + self.eps).rsqrt()


class Block(nn.Module):
    """InternViT: a fused matrix of queries, keys and values, norms over their full width, layer scale."""

    def __init__(self, facts: dict):
        super().__init__()
        width, inner, self.heads = facts["hidden_size"], facts["intermediate_size"], facts["num_attention_heads"]
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv = nn.Linear(width, 3 * width, bias=facts["qkv_bias"])
        self.attn.proj = nn.Linear(width, width)
        if facts["qk_normalization"]:
            self.attn.q_norm, self.attn.k_norm = RMSNorm(width, 1e-6), RMSNorm(width, 1e-6)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)
        norm = RMSNorm if facts["norm_type"] == "rms_norm" else nn.LayerNorm
        self.norm1, self.norm2 = norm(width, eps=1e-6), norm(width, eps=1e-6)
        self.ls1, self.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = self.attn.qkv(self.norm1(states)).chunk(3, dim=-1)
        if hasattr(self.attn, "q_norm"):
            query, key = self.attn.q_norm(query), self.attn.k_norm(key)
        split = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value)]
        found = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        states = states + self.ls1 * self.attn.proj(found)
        return states + self.ls2 * self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(states))))


class InternViT(nn.Module):
    def __init__(self, facts: dict):
        super().__init__()
        width, patch = facts["hidden_size"], facts["patch_size"]
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.embeddings.patch_embedding = nn.Conv2d(3, width, patch, patch)
        patches = (facts["image_size"] // patch) ** 2
        self.embeddings.position_embedding = nn.Parameter(torch.randn(1, patches + 1, width))
        self.encoder.layers = nn.ModuleList(Block(facts) for _ in range(facts["num_hidden_layers"]))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        states = torch.cat([self.embeddings.class_embedding.expand(len(pixels), -1, -1), patches], dim=1)
        states = states + self.embeddings.position_embedding
        for block in self.encoder.layers:
            states = block(states)
        return states[:, 1:]


class Layer(nn.Module):
    """InternLM2: for each key head its query heads, its keys, its values in one matrix."""

    def __init__(self, facts: dict):
        super().__init__()
        width, inner, self.facts = facts["hidden_size"], facts["intermediate_size"], facts
        heads, self.kv = facts["num_attention_heads"], facts["num_key_value_heads"]
        self.size = width // heads
        self.attention, self.feed_forward = nn.Module(), nn.Module()
        self.attention.wqkv = nn.Linear(width, (heads + 2 * self.kv) * self.size, bias=facts["bias"])
        self.attention.wo = nn.Linear(width, width, bias=facts["bias"])
        self.feed_forward.w1 = nn.Linear(width, inner, bias=False)
        self.feed_forward.w3 = nn.Linear(width, inner, bias=False)
        self.feed_forward.w2 = nn.Linear(inner, width, bias=False)
        self.attention_norm = RMSNorm(width, facts["rms_norm_eps"])
        self.ffn_norm = RMSNorm(width, facts["rms_norm_eps"])

    def rotated(self, states: Tensor) -> Tensor:
        length, base = states.shape[2], self.facts["rope_theta"]
        scaling, trained = self.facts.get("rope_scaling"), self.facts["max_position_embeddings"]
        if scaling and length > trained:
            factor = scaling["factor"]
            base *= (factor * length / trained - (factor - 1)) ** (self.size / (self.size - 2))
        angles = torch.outer(torch.arange(length), base ** -(torch.arange(0, self.size, 2) / self.size)).repeat(1, 2)
        first, second = states.chunk(2, dim=-1)
        return states * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    def forward(self, states: Tensor) -> Tensor:
        fused = self.attention.wqkv(self.attention_norm(states)).unflatten(-1, (self.kv, -1, self.size))
        query = fused[..., :-2, :].flatten(2, 3).transpose(1, 2)
        key, value = (fused[..., place, :].transpose(1, 2) for place in (-2, -1))
        group = query.shape[1] // self.kv
        key, value = (part.repeat_interleave(group, dim=1) for part in (self.rotated(key), value))
        found = F.scaled_dot_product_attention(self.rotated(query), key, value, is_causal=True)
        states = states + self.attention.wo(found.transpose(1, 2).flatten(2))
        normed, part = self.ffn_norm(states), self.feed_forward
        return states + part.w2(F.silu(part.w1(normed)) * part.w3(normed))


class InternLM2(nn.Module):
    def __init__(self, facts: dict):
        super().__init__()
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(facts["vocab_size"], facts["hidden_size"])
        self.model.layers = nn.ModuleList(Layer(facts) for _ in range(facts["num_hidden_layers"]))
        self.model.norm = RMSNorm(facts["hidden_size"], facts["rms_norm_eps"])
        self.output = nn.Linear(facts["hidden_size"], facts["vocab_size"], bias=False)

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.tok_embeddings(ids)

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.model.layers:
            states = layer(states)
        return self.output(self.model.norm(states))


class Stock(nn.Module):
    """A language model that keeps transformers' names in the checkpoint: Phi-3, Qwen2."""

    def __init__(self, facts: dict):
        super().__init__()
        known = {name: facts[name] for name in (*LLM, "vocab_size") if name not in ("torch_dtype", "top_k")}
        known.pop("attn_implementation")
        if facts["model_type"] == "phi3":
            scaling = {**facts["rope_scaling"], "original_max_position_embeddings": 64, "rope_theta": 10000.0}
            scaling |= {"rope_type": "longrope"}
            theirs = hf.Phi3Config(
                **known, rope_parameters=scaling, original_max_position_embeddings=64, pad_token_id=2
            )
            stock = hf.Phi3ForCausalLM(theirs)
        else:
            rope = {"rope_type": "default", "rope_theta": facts["rope_theta"]}
            stock = hf.Qwen2ForCausalLM(hf.Qwen2Config(**known, rope_parameters=rope))
        self.model, self.lm_head = stock.model, stock.lm_head

    def embed(self, ids: Tensor) -> Tensor:
        return self.model.embed_tokens(ids)

    def forward(self, states: Tensor) -> Tensor:
        return self.lm_head(self.model(inputs_embeds=states).last_hidden_state)


class InternVLChat(nn.Module):
    """The whole, with the original names of weights."""

    def __init__(self, facts: dict):
        super().__init__()
        text, vision = facts["llm_config"], facts["vision_config"]
        self.vision_model = InternViT(vision)
        self.language_model = (InternLM2 if text["model_type"] == "internlm2" else Stock)(text)
        four = 4 * vision["hidden_size"]
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(four),
            nn.Linear(four, text["hidden_size"]),
            nn.GELU(),
            nn.Linear(text["hidden_size"], text["hidden_size"]),
        )

    def features(self, pixels: Tensor) -> Tensor:
        """`[tiles, 3, height, width]` -> `[tiles, tokens, width]`: two by two patches side by side."""
        patches = self.vision_model(pixels)
        half = int(patches.shape[1] ** 0.5) // 2
        units = patches.unflatten(1, (half, 2, half, 2)).permute(0, 1, 3, 2, 4, 5)
        return self.mlp1(units.flatten(3).flatten(1, 2))

    def forward(self, ids: Tensor, pixels: Tensor | None = None, placeholder: int = -1) -> Tensor:
        states = self.language_model.embed(ids)
        if pixels is not None:
            states = states.masked_scatter((ids == placeholder)[..., None], self.features(pixels))
        return self.language_model(states)


def original(facts: dict) -> InternVLChat:
    """A random one whose attention is far from uniform."""
    torch.manual_seed(0)
    model = InternVLChat(facts).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() >= 2:
            weight.normal_(std=0.15 if "qkv" in name or "q_proj" in name else 0.06)
        else:
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def tokenizer_files(folder: Path, kind: str) -> int:
    """A small sentencepiece tokenizer as the checkpoints have it; returns the rows that it needs."""
    unused = [f"[UNUSED_TOKEN_{index}]" for index in range(3)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the dog and the cat look at the picture", "describe the sign"] * 8),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        user_defined_symbols=unused,
        num_threads=1,
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    named = {"<unk>": 0, "<s>": 1, "</s>": 2}
    if kind == "internlm2":  # names for pieces that the model left unused
        named |= {"<|im_end|>": pieces.piece_to_id(unused[0]), "<|im_start|>": pieces.piece_to_id(unused[1])}
        new = []
    else:
        new = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    new += ["<img>", "</img>", "<IMG_CONTEXT>"]
    named |= {token: pieces.get_piece_size() + index for index, token in enumerate(new)}
    settings = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    facts = {
        "added_tokens_decoder": {str(index): {"content": token, **settings} for token, index in named.items()},
        "additional_special_tokens": list(named)[3:],
        "tokenizer_class": "InternLM2Tokenizer" if kind == "internlm2" else "LlamaTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "model_max_length": 8192,
    }
    if kind != "internlm2":
        del facts["auto_map"]
        facts["legacy"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")
    return max(named.values()) + 1


def save(folder: Path, kind: str = "internlm2", tower: str = "300m", **changes) -> tuple[Path, InternVLChat]:
    """A whole checkpoint in two shards, and the model that it is of."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {**config(kind, tower, tokenizer_files(folder, kind)), **changes}
    model = original(facts)
    (folder / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    names = sorted(weights)
    shards = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    for file, shard in zip(files, shards, strict=True):
        save_file({name: weights[name] for name in shard}, folder / file, {"format": "pt"})
    placed = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return folder, model
