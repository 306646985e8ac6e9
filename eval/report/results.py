"""Finished cells, read from results folders for tables, plots, significance and reports."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev

from eval.run.records import BadRecord, read_lines, read_record

VANILLA = "vanilla"
SAME_QUESTIONS = ("model", "task", "limit", "seed")
COMPARED = ("task", "question_id", "doc_id", "picture", "score")
AVERAGED = (
    "mean_tokens", "mean_tokens_official", "flops_reduction", "cache_bytes", "vision_ms", "prefill_ms", "selector_ms",
    "decode_ms", "accuracy",
)  # fmt: skip

QUIET = 0.5
"""Most load beside the measured process itself on a machine that counts as quiet."""


@dataclass(frozen=True)
class Result:
    """One finished cell.

    Attributes
    ----------
    row : dict
        Its numbers, with ``share_of_vanilla``: the headline score divided by the untouched model's on the same
        questions with the same seed; None where that is missing; and ``commit``, of the code that made it.
    identity, provenance : dict
        What decided the numbers and where they were made.
    file : pathlib.Path
        The JSON file.
    """

    row: dict
    identity: dict
    provenance: dict
    file: Path

    @property
    def label(self) -> str:
        """Method and budget, as on the command line: ``vanilla``, ``mustdrop_64``."""
        return label(self.row["method"], self.row["retain"])

    @property
    def samples(self) -> Path:
        """The per-sample lines."""
        return self.file.with_suffix(".jsonl")

    def lines(self) -> Iterator[dict]:
        """The per-sample lines, one at a time: a large benchmark's do not fit into memory.

        Raises
        ------
        ValueError
            If there are none, at the first that is damaged, or at the end if there are fewer than questions.
        """
        if not self.samples.is_file():
            raise ValueError(f"results: {self.row['task']}, {self.label} has no per-sample lines beside {self.file}")
        count = 0
        for line in read_lines(self.samples):
            count += 1
            yield line
        if count < self.row["n"]:
            raise BadRecord(f"results: {str(self.samples)!r} holds {count} lines of {self.row['n']}")

    @cached_property
    def scored(self) -> list[dict]:
        """What comparing needs of the lines; ValueError if they are damaged or a question has no score."""
        found = [{name: line[name] for name in COMPARED if name in line} for line in self.lines()]
        if any("score" not in line for line in found):
            raise BadRecord(f"results: {str(self.samples)!r}: a line has no score, so its cell was never finished")
        return found

    @property
    def picture_folder(self) -> Path:
        """Where some of the task's pictures lie."""
        return self.file.parents[2] / "pictures" / self.row["task"]


def label(method: str, retain: int | float | None) -> str:
    """``mustdrop_64``, ``fastv_0.111`` for a share; the untouched model's measured number of tokens is no budget."""
    return method if method == VANILLA or retain is None else f"{method}_{retain}"


def collect(folders: Iterable[str | Path]) -> tuple[list[Result], list[str]]:
    """Read every finished cell below some folders.

    Parameters
    ----------
    folders : iterable of str or pathlib.Path
        Results folders, or folders that hold some at any depth.

    Returns
    -------
    results : list of Result
        One per model, task, method, budget and seed: the newest, and of several limits the largest.
    notes : list of str
        One line for everything that was left out.

    Raises
    ------
    ValueError
        If a folder is missing or has no finished cells.
    """
    newest: dict[tuple, Result] = {}
    copies: dict[tuple, int] = {}
    damaged: list[str] = []
    files = {os.path.realpath(file): file.absolute() for folder in folders for file in _files(Path(folder))}
    for file in files.values():
        try:
            result = _read(file)
        except BadRecord as error:
            damaged.append(f"{error}; it is left out")
            continue
        key = (*(result.row[name] for name in SAME_QUESTIONS), result.label)
        copies[key] = copies.get(key, 0) + 1
        newest[key] = max(newest.get(key, result), result, key=_age)
    if not newest:
        raise ValueError(damaged[0].removesuffix("; it is left out"))
    notes = [
        f"{newest[key].row['task']}, {newest[key].label}: the newest of {count} results with different settings or code"
        for key, count in copies.items()
        if count > 1
    ]
    whole, left_out = _most_questions(list(newest.values()))
    facts = [*_same_names(whole), *_quantised(whole), *_not_asked(whole), *uncounted(result.row for result in whole)]
    return _with_shares(whole), [*damaged, *notes, *left_out, *facts]


def prompt_ms(row: Mapping) -> float | None:
    """What a prompt took from picture to answer: vision, prefill and decoding; None if not measured."""
    parts = [row.get(f"{part}_ms") for part in ("vision", "prefill", "decode")]
    return None if None in parts else sum(parts)


def timing(results: Iterable[Result]) -> str:
    """Where times were taken and whether anything else was at work there, as far as results tell."""
    made = [result.provenance for result in results]
    where = ", ".join(sorted({str(one.get("device")) for one in made}))
    machines = [one["machine"] for one in made if _is_complete(one.get("machine"))]
    if len(machines) < len(made):
        return f"{where}; load not recorded"
    loads = [machine["load"] for machine in machines]
    others = max(machine["load"] - machine["threads"] for machine in machines)
    state = "quiet" if others < QUIET else "not quiet"
    cores = "/".join(str(number) for number in sorted({machine["cores"] for machine in machines}))
    return f"{where}; {state}, load {min(loads):.1f} to {max(loads):.1f} on {cores} cores"


def _is_complete(machine: Mapping | None) -> bool:
    return bool(machine) and all(machine.get(name) is not None for name in ("load", "threads", "cores"))


def merge_seeds(results: Iterable[Result]) -> list[dict]:
    """One row per model, task, method and budget; several seeds become their mean.

    ``seeds`` counts them and ``seed_spread`` is their standard deviation (None for one seed). ``score_ci95`` then
    reaches from the lowest to the highest end of the seeds' intervals.
    """
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault((result.row["model"], result.row["task"], result.label), []).append(result.row)
    return [_merge(rows) for rows in groups.values()]


def ordered(rows: Iterable[dict]) -> list[dict]:
    """Rows with the untouched model first, then by method, from many tokens to few."""
    return sorted(rows, key=lambda row: (row["method"] != VANILLA, row["method"], -(row["retain"] or 0)))


def _merge(rows: Sequence[dict]) -> dict:
    scores = [row["score"] for row in rows]
    means = {name: _mean([row.get(name) for row in rows]) for name in AVERAGED}
    conventions = rows[0].get("flops_reductions") or {}
    return {
        **rows[0],
        **means,
        "flops_reductions": {
            name: _mean([(row.get("flops_reductions") or {}).get(name) for row in rows]) for name in conventions
        },
        "score": fmean(scores),
        "score_ci95": [min(row["score_ci95"][0] for row in rows), max(row["score_ci95"][1] for row in rows)],
        "share_of_vanilla": _mean([row["share_of_vanilla"] for row in rows]),
        "commit": ", ".join(sorted({row["commit"] for row in rows})),
        "seeds": len(rows),
        "seed_spread": stdev(scores) if len(rows) > 1 else None,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, None as soon as one is missing."""
    return None if None in values else fmean(values)


def _age(result: Result) -> tuple[str, float]:
    return result.provenance.get("date", ""), result.file.stat().st_mtime


def _most_questions(results: list[Result]) -> tuple[list[Result], list[str]]:
    """Per model and task the results with the largest limit; others answer other questions."""
    limits: dict[tuple, float] = {}
    for row in (result.row for result in results):
        key = (row["model"], row["task"])
        limits[key] = max(limits.get(key, 0), row["limit"] or math.inf)
    kept, notes = [], {}
    for result in results:
        row = result.row
        if (row["limit"] or math.inf) == limits[row["model"], row["task"]]:
            kept.append(result)
        else:
            notes[f"{row['task']}: results with LIMIT={row['limit']} are left out, there are some with more"] = None
    return kept, list(notes)


def _with_shares(results: list[Result]) -> list[Result]:
    """The results with their shares of vanilla, of the same checkpoint by its contents."""
    vanilla = {same_questions(result): result.row["score"] for result in results if result.row["method"] == VANILLA}
    for result in results:
        base = vanilla.get(same_questions(result))
        result.row["share_of_vanilla"] = result.row["score"] / base if base else None
    return results


def same_questions(result: Result) -> tuple:
    """What results have in common that may be compared: the checkpoint, the task, how many questions, and the seed."""
    return (*(result.row[name] for name in SAME_QUESTIONS), str(result.identity.get("model_files")))


def _quantised(results: Iterable[Result]) -> list[str]:
    """One line for every model whose weights were packed."""
    found = {(result.row["model"], result.row["bits"]): None for result in results if result.row.get("bits")}
    return [f"{model}: language model in {bits} bit, quantised by bitsandbytes" for model, bits in found]


def uncounted(rows: Iterable[Mapping]) -> list[str]:
    """One line about rows in which nobody counted what choosing costs; older results hold an estimate of it."""
    unknown = [row for row in rows if "flops_reduction" in row and row.get("selector_macs") is None]
    names = dict.fromkeys(label(row["method"], row["retain"]) for row in unknown if row["method"] != VANILLA)
    about = "what choosing costs is not known, nobody counted it (FLOPs saved hold an estimate, or are left out)"
    return [f"{about}: {', '.join(names)}"] if names else []


def _not_asked(results: Iterable[Result]) -> list[str]:
    """One line for every result whose score counts questions that were not asked, or not as a whole."""
    meanings = {"skipped": "skipped, which count as wrong", "beyond_context": "longer than the model's context"}
    return [
        f"{result.row['task']}, {result.label}: {result.row[name]} of {result.row['n']} questions {meaning}"
        for result in results
        for name, meaning in meanings.items()
        if result.row.get(name)
    ]


def _same_names(results: Iterable[Result]) -> list[str]:
    """One line for every model name that several checkpoints go by."""
    contents: dict[str, set[str]] = {}
    for result in results:
        contents.setdefault(result.row["model"], set()).add(str(result.identity.get("model_files")))
    return [
        f"{model}: {len(found)} checkpoints with different contents go by this name; none is compared with another"
        for model, found in contents.items()
        if len(found) > 1
    ]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"results: there is no folder {str(folder)!r}")
    files = sorted(folder.glob("*/*.json") if folder.name == "cells" else folder.rglob("cells/*/*.json"))
    if not files:
        raise ValueError(f"results: {str(folder)!r} holds no finished cells (cells/TASK/*.json)")
    return files


def _read(file: Path) -> Result:
    content = read_record(file)
    row, made = content["row"], content["provenance"]
    if row["retain"] is None and row["method"] != VANILLA:
        raise BadRecord(f"results: {str(file)!r} has row.retain None, expected a whole number")
    commit, dirty, _ = (made.get("git_commit") or "none").partition("-dirty")
    row["commit"] = commit[:7] + dirty
    return Result(row, content["identity"], made, file)
