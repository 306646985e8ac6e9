"""The finished evaluations of a run as tables: ``summary.json`` and ``summary.md``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isclose
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from eval.report.results import COSTS, frame_of, records, shown, uncounted
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
NAMES: tuple[tuple[str, Callable[[Mapping], object]], ...] = (
    ("method", lambda row: row["method"]),
    ("retain", lambda row: row["retain"]),
)
"""Columns that name a row: title and value."""

Table = tuple[list[str], list[list]]
"""Headers and lines."""


def write(out: Path, cells: Sequence[tuple[Cell, Path]]) -> str:
    """Write the summary of finished evaluations, given with their files; returns it as text for a terminal."""
    from eval.run.rows import FLOPS_CONVENTION, REPORTED_CONVENTIONS
    from mustdrop.cost import CONVENTIONS

    results = [read_record(file) for _, file in cells]
    for (cell, _), result in zip(cells, results, strict=True):
        result["row"]["model"] = cell.model_name
    frame = frame_of(zip(results, (file for _, file in cells), strict=True))
    last, cell = results[-1], cells[-1][0]
    facts = {
        **last["provenance"],
        "config": {**last["identity"], "tasks": sorted(set(frame.task))},
        "samples": int(frame.n[0]),
        "flops_convention": FLOPS_CONVENTION,
        "flops_conventions": {name: CONVENTIONS[name].explanation for name in REPORTED_CONVENTIONS},
        "selector": SELECTOR,
        "ci95": CI95,
        "times": f"median over prompts, a batch's time shared by its {cell.batch_size} prompts, vision by its pictures",
    }
    shares = [None if share is None else share / 100 for share in frame.share]
    rows = [{**one["row"], "share_of_vanilla": share} for one, share in zip(results, shares, strict=True)]
    write_json(out / "summary.json", {"rows": rows, "provenance": facts})
    (out / "summary.md").write_text(text(frame, facts, "github"), encoding="utf-8")
    return text(frame, facts, "simple")


def text(frame: pd.DataFrame, facts: Mapping, style: str) -> str:
    """Tables per model and task, and what the columns mean; ``style`` is tabulate's."""
    parts = []
    for (model, task), own in frame.groupby(["model", "task"], sort=False):
        first = own.iloc[0]
        heading = f"{task}, {model}: {first.n} questions{', synthetic' if first.synthetic else ''}"
        parts.append(f"# {heading}" if style == "github" else f"\n{heading}")
        tables = (table(own), by_type(own), by_frame(own))
        parts += [render(*one, style) for one in tables if one is not None] + remarks(own)
    parts.append(
        f"{facts['device']}, {facts['dtype']}, batch {facts['config']['batch_size']}, {facts['date'][:10]}, "
        f"commit {(facts['git_commit'] or 'none')[:12]}.\n"
        f"tokens: mean per decoder layer; official: the same by the authors' meter.\n"
        f"FLOPs saved: {facts['flops_conventions'][facts['flops_convention']]}.\n"
        f"{facts['selector']}\n"
        f"vision only: {facts['flops_conventions']['vision-only']}.\n"
        f"ms: {facts['times']}."
    )
    return "\n\n".join(parts) + "\n"


def render(headers: Sequence[str], lines: Sequence[Sequence], style: str) -> str:
    """A table as text: ``simple`` for a terminal, ``github`` for Markdown."""
    return tabulate(lines, headers, tablefmt=style, disable_numparse=True, stralign="right")


def remarks(frame: pd.DataFrame) -> list[str]:
    """What readers of scores must know: quantised weights, questions that were not asked, or not as a whole."""

    def named(column: str, form: str) -> str:
        return ", ".join(form.format(**row) for row in records(frame[frame[column].astype(float) > 0]))

    found = {
        "Language model quantised by bitsandbytes": named("bits", "{method} {retain} ({bits} bit)"),
        "Questions skipped, which count as wrong": named("skipped", "{method} {skipped}"),
        "Questions longer than the model's context": named("beyond_context", "{method} {beyond_context}"),
    }
    told = [f"{what}: {names}" for what, names in found.items() if names]
    return [f"{line}." for line in (*told, *uncounted(frame))]


def table(frame: pd.DataFrame) -> Table:
    """Scores and costs of one task."""
    rows = records(frame)
    plain = all(isclose(row["score"], 100 * row["accuracy"]) for row in rows)
    columns = [
        *NAMES,
        *([] if plain else [(f"{rows[0]['metric']} (95 % CI)", lambda row: interval(row["score"], row["score_ci95"]))]),
        ("accuracy % (95 % CI)", lambda row: interval(row["accuracy"], row["ci95"], 100)),
        *(
            (f"{name.replace('_', ' ')} %", lambda row, name=name: f"{100 * row['matches'][name]:.1f}")
            for name in rows[0].get("matches") or ()
        ),
        ("of vanilla", lambda row: percent(row["share"])),
        *cost_columns(shown("summary")),
    ]
    return lines(rows, columns)


def by_type(frame: pd.DataFrame, names: Sequence[tuple] = NAMES) -> Table | None:
    """Accuracy per question type, where there is more than one."""
    rows = records(frame)
    kinds = sorted({kind for row in rows for kind in row["accuracy_by_type"]})

    def column(kind: str) -> tuple[str, Callable]:
        return kind, lambda row: _of_type(row["accuracy_by_type"].get(kind))

    return lines(rows, [*names, *map(column, kinds)]) if len(kinds) > 1 else None


def by_frame(frame: pd.DataFrame) -> Table | None:
    """Vision tokens that each method keeps of each frame of a video, the mean over decoder layers; None for images."""
    rows = [row for row in records(frame) if row["tokens_per_view"]]
    frames = max((len(row["tokens_per_view"]) for row in rows), default=0)
    headers = [*(title for title, _ in NAMES), *(f"frame {number}" for number in range(1, frames + 1))]
    body = [[row["method"], str(row["retain"]), *map("{:.1f}".format, row["tokens_per_view"])] for row in rows]
    return (headers, body) if rows else None


def cost_columns(names: Sequence[str]) -> list[tuple[str, Callable[[Mapping], str]]]:
    """Some of `COSTS` as columns of a table."""
    return [(COSTS[name].title, lambda row, name=name: COSTS[name].write(row[name])) for name in names]


def lines(rows: Sequence[Mapping], columns: Sequence[tuple[str, Callable]]) -> Table:
    """A table of columns: their titles, and their values for every row."""
    return [title for title, _ in columns], [[value(row) for _, value in columns] for row in rows]


def interval(value: float, ends: Sequence[float], scale: float = 1) -> str:
    """A score with its interval: ``50.0 (15.0-85.0)``."""
    return "{:.1f} ({:.1f}-{:.1f})".format(*(scale * one for one in (value, *ends)))


def percent(share: float | None) -> str:
    """A share in percent, or that there is none."""
    return "-" if share is None else f"{share:.1f} %"


def _of_type(found: Mapping | None) -> str:
    return f"{100 * found['accuracy']:.1f} (n={found['n']})" if found else "-"
