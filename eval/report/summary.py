"""The finished cells of a run as tables: ``summary.json`` and ``summary.md``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isclose
from pathlib import Path

from tabulate import tabulate

from eval.report.results import uncounted
from eval.run.cell import Cell, write_json
from eval.run.records import read_record

CI95 = (
    "accuracy: Wilson score interval over questions (scipy.stats.binomtest) where every score is 0 or 1; else, and for "
    "other scores, percentile bootstrap over questions (scipy.stats.bootstrap)"
)
SELECTOR = (
    "selector: what choosing costs is counted by torch on one prompt of every row (of each process), the first with an "
    "image, see selector_prompt, and taken for all its prompts."
)


def write(out: Path, cells: Sequence[tuple[Cell, Path]]) -> str:
    """Write the summary of finished cells, given with their files; returns it as text for a terminal."""
    from eval.run.rows import FLOPS_CONVENTION, REPORTED_CONVENTIONS
    from mustdrop.cost import CONVENTIONS

    results = [read_record(file) for _, file in cells]
    rows = with_shares(
        [{**result["row"], "model": cell.model_name} for (cell, _), result in zip(cells, results, strict=True)]
    )
    last, cell = results[-1], cells[-1][0]
    facts = {
        **last["provenance"],
        "config": {**last["identity"], "tasks": sorted({row["task"] for row in rows})},
        "samples": rows[0]["n"],
        "flops_convention": FLOPS_CONVENTION,
        "flops_conventions": {name: CONVENTIONS[name].explanation for name in REPORTED_CONVENTIONS},
        "selector": SELECTOR,
        "ci95": CI95,
        "times": f"median over prompts, a batch's time shared by its {cell.batch_size} prompts, vision by its pictures",
    }
    write_json(out / "summary.json", {"rows": rows, "provenance": facts})
    (out / "summary.md").write_text(text(rows, facts, "github"), encoding="utf-8")
    return text(rows, facts, "simple")


def text(rows: Sequence[dict], facts: dict, style: str) -> str:
    """Tables per model and task, and what the columns mean; ``style`` is tabulate's."""
    parts = []
    for model, task in dict.fromkeys((row["model"], row["task"]) for row in rows):
        own = [row for row in rows if (row["model"], row["task"]) == (model, task)]
        synthetic = ", synthetic" if own[0]["synthetic"] else ""
        heading = f"{task}, {model}: {own[0]['n']} questions{synthetic}"
        parts += [f"# {heading}" if style == "github" else f"\n{heading}", table(own, style), table_by_type(own, style)]
        parts += [table_by_frame(own, style), *remarks(own)]
    parts.append(
        f"{facts['device']}, {facts['dtype']}, batch {facts['config']['batch_size']}, {facts['date'][:10]}, "
        f"commit {(facts['git_commit'] or 'none')[:12]}.\n"
        f"tokens: mean per decoder layer; official: the same by the authors' meter.\n"
        f"FLOPs saved: {facts['flops_conventions'][facts['flops_convention']]}.\n"
        f"{facts['selector']}\n"
        f"vision only: {facts['flops_conventions']['vision-only']}.\n"
        f"ms: {facts['times']}."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def remarks(rows: Sequence[Mapping]) -> list[str]:
    """What readers of scores must know: quantised weights, questions that were not asked, or not as a whole."""
    quantised = [f"{row['method']} {row['retain']} ({row['bits']} bit)" for row in rows if row.get("bits")]
    skipped = [f"{row['method']} {row['skipped']}" for row in rows if row.get("skipped")]
    beyond = [f"{row['method']} {row['beyond_context']}" for row in rows if row.get("beyond_context")]
    return [
        *([f"Language model quantised by bitsandbytes: {', '.join(quantised)}."] if quantised else []),
        *([f"Questions skipped, which count as wrong: {', '.join(skipped)}."] if skipped else []),
        *(f"{line}." for line in uncounted(rows)),
        *([f"Questions longer than the model's context: {', '.join(beyond)}."] if beyond else []),
    ]


def with_shares(rows: Sequence[dict]) -> list[dict]:
    """The rows with ``share_of_vanilla``, the score divided by the untouched model's; None without such a row."""

    def questions(row: dict) -> tuple:
        return row["model"], row["task"], row["seed"], row["limit"]

    vanilla = {questions(row): row["score"] for row in rows if row["method"] == "vanilla"}
    shares = [row["score"] / vanilla[questions(row)] if vanilla.get(questions(row)) else None for row in rows]
    return [{**row, "share_of_vanilla": share} for row, share in zip(rows, shares, strict=True)]


def table(rows: Sequence[dict], style: str) -> str:
    """The rows of one task: ``simple`` for a terminal, ``github`` for Markdown."""
    plain = all(isclose(row["score"], 100 * row["accuracy"]) for row in rows)
    score = [] if plain else [f"{rows[0]['metric']} (95 % CI)"]
    matches = list(rows[0].get("matches", {}))
    headers = [
        "method", "retain", *score, "accuracy % (95 % CI)", *(f"{name.replace('_', ' ')} %" for name in matches),
        "of vanilla", "tokens", "official", "FLOPs saved", "vision only", "cache MB", "vision ms", "prefill ms",
    ]  # fmt: skip
    lines = [
        [
            row["method"],
            row["retain"],
            *([] if plain else [_interval(row["score"], row["score_ci95"], 1)]),
            _interval(row["accuracy"], row["ci95"], 100),
            *(f"{100 * row['matches'][name]:.1f}" for name in matches),
            _percent(row["share_of_vanilla"]),
            f"{row['mean_tokens']:.1f}",
            f"{row['mean_tokens_official']:.1f}",
            _percent(row["flops_reduction"]),
            _percent(row["flops_reductions"].get("vision-only")),
            f"{row['cache_bytes'] / 1e6:.2f}",
            _number(row["vision_ms"]),
            _number(row["prefill_ms"]),
        ]
        for row in rows
    ]
    return tabulate(lines, headers, tablefmt=style, disable_numparse=True, stralign="right")


def table_by_type(rows: Sequence[dict], style: str) -> str:
    """Accuracy per question type, where there is more than one."""
    kinds = sorted({kind for row in rows for kind in row["accuracy_by_type"]})
    if len(kinds) < 2:
        return ""
    lines = [
        [row["method"], row["retain"], *(_type_cell(row["accuracy_by_type"].get(kind)) for kind in kinds)]
        for row in rows
    ]
    return tabulate(lines, ["method", "retain", *kinds], tablefmt=style, disable_numparse=True, stralign="right")


def frame_table(rows: Sequence[Mapping]) -> tuple[list[str], list[list[str]]] | None:
    """What each method keeps of each frame of a video: headers and lines; None for images."""
    shown = [row for row in rows if row.get("tokens_per_view")]
    if not shown:
        return None
    frames = max(len(row["tokens_per_view"]) for row in shown)
    headers = ["method", "retain", *(f"frame {number}" for number in range(1, frames + 1))]
    return headers, [
        [row["method"], str(row["retain"]), *(f"{tokens:.1f}" for tokens in row["tokens_per_view"])] for row in shown
    ]


def table_by_frame(rows: Sequence[Mapping], style: str) -> str:
    """Vision tokens per frame, the mean over decoder layers; empty for images."""
    found = frame_table(rows)
    return tabulate(found[1], found[0], tablefmt=style, disable_numparse=True, stralign="right") if found else ""


def _type_cell(cell: dict | None) -> str:
    return f"{100 * cell['accuracy']:.1f} (n={cell['n']})" if cell else "-"


def _interval(value: float, interval: Sequence[float], scale: float) -> str:
    low, high = (scale * bound for bound in interval)
    return f"{scale * value:.1f} ({low:.1f}-{high:.1f})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
