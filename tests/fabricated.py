"""A results folder made up for tests: the files that finished cells leave, with numbers that are easy to follow."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from eval.run.rows import answered
from eval.run.samples import pack, write_lines

PATCHES = 36
QUESTIONS = 24
PICTURES = 4
MERGED = 20
"""Tokens that enter the language model after mustdrop's merging."""

TASKS = {"mini_gqa": "gqa", "mini_pope": "pope"}
METHODS = ("fastv", "mustdrop")
BUDGETS = (18, 9)
CONVENTIONS = ("with-text-tower", "with-text", "vision-only")


def results_folder(folder: Path) -> Path:
    """Two tasks with the untouched model and two methods at two budgets each, and pictures.

    Every method loses the last questions: fastv a quarter and a half of them, mustdrop 1/6 and 1/3. ``fastv_9`` has no
    result on mini_pope.
    """
    lost = {("fastv", 18): 6, ("fastv", 9): 12, ("mustdrop", 18): 4, ("mustdrop", 9): 8}
    for task, benchmark in TASKS.items():
        write_cell(folder, task, benchmark=benchmark)
        for (method, retain), count in lost.items():
            if (task, method, retain) != ("mini_pope", "fastv", 9):
                scores = [1.0] * (QUESTIONS - count) + [0.0] * count
                write_cell(folder, task, method, retain, scores, benchmark=benchmark)
        pictures = folder / "pictures" / task
        pictures.mkdir(parents=True)
        for number in range(PICTURES):
            noise = np.random.default_rng(number).integers(0, 255, (84, 84, 3), dtype=np.uint8)
            Image.fromarray(noise).save(pictures / f"{number}.jpg")
    return folder


def write_cell(
    folder: Path,
    task: str,
    method: str = "vanilla",
    retain: int = PATCHES,
    scores: Sequence[float] = (1.0,) * QUESTIONS,
    *,
    benchmark: str = "gqa",
    model: str = "llava-mini",
    synthetic: bool = True,
    seed: int = 0,
    limit: int | None = None,
    key: str = "0" * 12,
    date: str = "2026-01-01T00:00:00+00:00",
    **row,
) -> Path:
    """Write one finished cell and its lines; ``row`` overrides what the scores give. Returns the JSON file."""
    facts = answered(scores, ["shape" if number % 2 else "color" for number in range(len(scores))])
    saved = 0.0 if method == "vanilla" else 1 - retain / PATCHES
    whole = {
        "model": model, "task": task, "benchmark": benchmark, "synthetic": synthetic, "method": method,
        "retain": retain, "seed": seed, "limit": limit, "metric": "exact_match", "score": 100 * facts["accuracy"],
        "score_ci95": [100 * end for end in facts["ci95"]], **facts, "mean_tokens": retain + 2.0,
        "mean_tokens_official": float(retain), "flops_reduction": saved,
        "flops_reductions": dict.fromkeys(CONVENTIONS, saved), "cache_bytes": 1000.0 * retain, "vision_ms": 10.0,
        "prefill_ms": 1.0 * retain, "selector_ms": 0.5, "decode_ms": 5.0, "selector_macs": 10 * retain,
        "selector_prompt": {"images": 1, "text_tokens": 9, "vision_tokens": retain}, **row,
    }  # fmt: skip
    name = method if method == "vanilla" else f"{method}_{retain}"
    file = folder / "cells" / task / f"{name}{f'-seed{seed}' if seed else ''}-{key}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    provenance = {"command": "mustdrop run", "git_commit": "c0ffee" * 6, "date": date, "device": "a CPU"}
    provenance |= {"dtype": "float32", "versions": {"torch": "2.13.0"}}
    identity = {"settings": {"method": method}, "task": task, "seed": seed, "limit": limit}
    file.write_text(json.dumps({"row": whole, "identity": identity, "provenance": provenance, "seconds": 1.5}))
    lines = [_line(task, method, retain, number, score) for number, score in enumerate(scores)]
    write_lines(file.with_suffix(".jsonl"), lines)
    return file


def kept(method: str, retain: int) -> dict[str, dict[str, list[int]]]:
    """Which patches a made-up method keeps: the first ones; mustdrop loses some in every stage."""
    if method == "vanilla":
        return {"vision": {}, "prefill": {}, "decode": {"0": _first(PATCHES)}}
    early = {"vision": {"1": _first(PATCHES - 6)}, "prefill": {"1": _first(retain + 3), "3": _first(retain)}}
    late = {"vision": {}, "prefill": {"2": _first(retain)}}
    return {**(early if method == "mustdrop" else late), "decode": {"0": _first(retain)}}


def _first(count: int) -> list[int]:
    return list(range(min(count, PATCHES)))


def _line(task: str, method: str, retain: int, number: int, score: float) -> dict:
    stages = kept(method, retain)
    return {
        "task": task, "split": "test", "doc_id": number, "question_id": f"q{number}",
        "type": "shape" if number % 2 else "color", "question": f"What <b>is</b> number {number}?",
        "answer": "yes" if score else "no", "target": "yes", "score": score,
        "images": [{"patches": PATCHES, "tokens": MERGED if method == "mustdrop" else PATCHES}],
        "mean_tokens": retain + 2.0,
        "kept": {
            stage: {layer: pack(some, PATCHES) for layer, some in layers.items()} for stage, layers in stages.items()
        },
    }  # fmt: skip
