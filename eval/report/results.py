"""Results read back into one frame, a row per finished evaluation, of which tables, plots and statistics are views."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd

from eval.run.records import BadRecord, read_lines, read_record

VANILLA = "vanilla"
ONE = ["model", "task", "label"]
"""What tells evaluations apart but for their seeds."""

QUIET = 0.5
"""Most load beside the measured process itself on a machine that counts as quiet."""


@dataclass(frozen=True)
class Cost:
    """What an evaluation cost: a column of the frame, and where it is shown.

    Attributes
    ----------
    title, text : str
        Heading, and how a value is written.
    shown : tuple of str
        Whether the tables of a ``summary`` and of a ``report`` have it.
    table : tuple of str, optional
        What the ``costs`` of a table's YAML file call it, and its heading there.
    axis : tuple of str, optional
        What names of plots call it, and the title of the axis that scores are drawn against.
    """

    title: str
    text: str = "{:.1f}"
    shown: tuple[str, ...] = ("summary", "report")
    table: tuple[str, str] | None = None
    axis: tuple[str, str] | None = None

    def write(self, value: float | None) -> str:
        """A value as text."""
        return "-" if value is None else self.text.format(value)


LEFT = "FLOPs up to the first new token, % of vanilla"
COSTS = {
    "mean_tokens": Cost(
        "tokens", table=("tokens", "tokens computed on"), axis=("tokens", "vision tokens, mean over layers")
    ),
    "mean_tokens_official": Cost("official"),
    "flops_saved": Cost("FLOPs saved", "{:.1f} %", table=("flops", "FLOPs saved %")),
    "flops_left": Cost("FLOPs left", "{:.1f} %", shown=(), axis=("flops", LEFT)),
    "vision_flops_saved": Cost("vision only", "{:.1f} %", shown=("summary",)),
    "cache_mb": Cost("cache MB", "{:.2f}"),
    "vision_ms": Cost("vision ms"),
    "prefill_ms": Cost("prefill ms"),
    "selector_ms": Cost("selector ms", shown=("report",)),
    "decode_ms": Cost("decode ms", shown=("report",)),
    "prompt_ms": Cost(
        "prompt ms", shown=(), table=("time", "ms"), axis=("time", "vision + prefill + decode, ms per prompt")
    ),
}
"""A new column of costs is an entry here and, unless rows have it, its value in `costs`."""

AVERAGED = [*COSTS, "score", "share", "accuracy"]


def costs(row: Mapping) -> dict[str, float | None]:
    """What a row's costs are made of that it does not hold as they are shown."""
    parts = [row.get(f"{part}_ms") for part in ("vision", "prefill", "decode")]
    saved = _times(100, row.get("flops_reduction"))
    return {
        "flops_saved": saved,
        "flops_left": None if saved is None else 100 - saved,
        "vision_flops_saved": _times(100, (row.get("flops_reductions") or {}).get("vision-only")),
        "cache_mb": _times(1e-6, row.get("cache_bytes")),
        "prompt_ms": None if None in parts else sum(parts),
    }


@dataclass(frozen=True)
class Samples:
    """The per-sample lines beside a result, read when they are asked for."""

    file: Path
    task: str
    label: str
    count: int

    def lines(self) -> Iterator[dict]:
        """One line at a time: a large benchmark's do not fit into memory.

        Raises
        ------
        ValueError
            If there are none, at the first that is damaged, or at the end if there are fewer than questions.
        """
        file = self.file.with_suffix(".jsonl")
        if not file.is_file():
            raise ValueError(f"results: {self.task}, {self.label} has no per-sample lines beside {self.file}")
        count = 0
        for line in read_lines(file):
            count += 1
            yield line
        if count < self.count:
            raise BadRecord(f"results: {str(file)!r} holds {count} lines of {self.count}")

    @cached_property
    def scores(self) -> pd.DataFrame:
        """What comparing needs of the lines; ValueError if they are damaged or a question has no score."""
        names = ("task", "question_id", "doc_id", "picture", "score")
        found = [{name: line[name] for name in names if name in line} for line in self.lines()]
        if any("score" not in line for line in found):
            file = self.file.with_suffix(".jsonl")
            raise BadRecord(f"results: {str(file)!r}: a line has no score, so its cell was never finished")
        return pd.DataFrame(found)

    @property
    def picture_folder(self) -> Path:
        """Where some of the task's images lie."""
        return self.file.parents[2] / "pictures" / self.task


def label(method: str, retain: int | float | None) -> str:
    """``mustdrop_64``, ``fastv_0.111`` for a share; vanilla's measured number of tokens is no budget."""
    return method if method == VANILLA or retain is None else f"{method}_{retain}"


def load(folders: Iterable[str | Path]) -> tuple[pd.DataFrame, list[str]]:
    """Read every finished evaluation below some folders.

    Parameters
    ----------
    folders : iterable of str or pathlib.Path
        Results folders, or folders that hold some at any depth.

    Returns
    -------
    frame : pandas.DataFrame
        One row per model, task, method, budget and seed, as `frame_of` makes it: the newest, and of several limits the
        largest.
    notes : list of str
        One line for everything that was left out.

    Raises
    ------
    ValueError
        If a folder is missing or has no finished evaluations.
    """
    found, damaged = [], []
    files = {os.path.realpath(file): file.absolute() for folder in folders for file in _files(Path(folder))}
    for file in files.values():
        try:
            found.append((_read(file), file))
        except BadRecord as error:
            damaged.append(f"{error}; it is left out")
    if not found:
        raise ValueError(damaged[0].removesuffix("; it is left out"))
    every = frame_of(found)
    key = pd.Series(list(zip(*(every[name] for name in (*ONE, "limit", "seed")), strict=True)), dtype=object)
    counts, written = key.value_counts(), [file.stat().st_mtime for file in every.file]
    by_age = every.assign(key=key, written=written).sort_values(["date", "written"])
    newest = by_age.drop_duplicates("key", keep="last").sort_index()
    copies = [
        f"{row.task}, {row.label}: the newest of {counts[row.key]} results with different settings or code"
        for row in newest.itertuples()
        if counts[row.key] > 1
    ]
    whole, left_out = _most_questions(newest)
    notes = [*damaged, *copies, *left_out, *_same_names(whole), *_quantised(whole), *_not_asked(whole)]
    return whole.reset_index(drop=True), notes + uncounted(whole)


def frame_of(found: Iterable[tuple[Mapping, Path]]) -> pd.DataFrame:
    """Results and their files as a frame.

    Its columns are those of a result's ``row``, and ``label``; ``questions``, what evaluations share that may be
    compared: checkpoint by its contents, task, limit and seed; ``share``, percent of vanilla's score on the same
    questions; the names of `COSTS`; ``commit``, ``date``, ``provenance``, ``identity``, ``file`` and ``samples``. What
    is not known is None.
    """
    rows = []
    for record, file in found:
        row, made, identity = record["row"], record["provenance"], record["identity"]
        name = label(row["method"], row["retain"])
        commit, dirty, _ = (made.get("git_commit") or "none").partition("-dirty")
        contents = str(identity.get("model_files"))
        rows.append({
            **dict.fromkeys([*COSTS, "bits", "skipped", "beyond_context", "tokens_per_view", "selector_macs"]), **row,
            **costs(row), "label": name, "model_files": contents, "commit": commit[:7] + dirty,
            "questions": (*(row[one] for one in ("model", "task", "limit", "seed")), contents),
            "date": made.get("date", ""), "provenance": made, "identity": identity, "file": file,
            "samples": Samples(file, row["task"], name, row["n"]),
        })  # fmt: skip
    frame = _object_frame(rows)
    plain = frame[frame.method == VANILLA]
    base = dict(zip(plain.questions, plain.score, strict=True))
    both = zip(frame.score, map(base.get, frame.questions), strict=True)
    shares = [100 * score / vanilla if vanilla else None for score, vanilla in both]
    return frame.assign(share=pd.Series(shares, dtype=object))


def over_seeds(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per model, task, method and budget; several seeds become their mean.

    ``seeds`` counts them and ``seed_spread`` is their standard deviation (None for one seed). ``score_ci95`` then
    reaches from the lowest to the highest end of the seeds' intervals.
    """
    merged = []
    for _, group in frame.groupby(ONE, sort=False):
        ends = list(zip(*group.score_ci95, strict=True))
        merged.append({
            **group.iloc[0].to_dict(), **group[AVERAGED].astype(float).mean(skipna=False).to_dict(),
            "score_ci95": [min(ends[0]), max(ends[1])], "commit": ", ".join(sorted(set(group.commit))),
            "seeds": len(group), "seed_spread": group.score.astype(float).std(),
        })  # fmt: skip
    return _object_frame(merged)


def shown(view: str) -> list[str]:
    """The costs that a ``summary`` or a ``report`` shows."""
    return [name for name, cost in COSTS.items() if view in cost.shown]


def records(frame: pd.DataFrame) -> list[dict]:
    """The rows of a frame as dictionaries."""
    return frame.to_dict("records")


def ordered(frame: pd.DataFrame) -> pd.DataFrame:
    """Vanilla first, then by method, from many tokens to few."""
    return frame.iloc[
        sorted(range(len(frame)), key=lambda place: _order(*frame[["method", "retain"]].iloc[place]))
    ]  # fmt: skip


def timing(frame: pd.DataFrame) -> str:
    """Where times were taken and whether anything else was at work there, as far as results tell."""
    where = ", ".join(sorted({str(one.get("device")) for one in frame.provenance}))
    machines = [one["machine"] for one in frame.provenance if _is_complete(one.get("machine"))]
    if len(machines) < len(frame):
        return f"{where}; load not recorded"
    loads = [machine["load"] for machine in machines]
    others = max(machine["load"] - machine["threads"] for machine in machines)
    state = "quiet" if others < QUIET else "not quiet"
    cores = "/".join(str(number) for number in sorted({machine["cores"] for machine in machines}))
    return f"{where}; {state}, load {min(loads):.1f} to {max(loads):.1f} on {cores} cores"


def uncounted(frame: pd.DataFrame) -> list[str]:
    """One line about rows in which nobody counted what choosing costs; older results hold an estimate of it."""
    names = dict.fromkeys(frame.label[frame.selector_macs.isna() & (frame.method != VANILLA)])
    about = "what choosing costs is not known, nobody counted it (FLOPs saved hold an estimate, or are left out)"
    return [f"{about}: {', '.join(names)}"] if names else []


def _order(method: str, retain: float | None) -> tuple:
    return method != VANILLA, method, -(retain or 0)


def _times(factor: float, value: float | None) -> float | None:
    return None if value is None else factor * value


def _object_frame(rows: Iterable[Mapping]) -> pd.DataFrame:
    """A frame of Python's own values, None where there is none."""
    frame = pd.DataFrame(list(rows), dtype=object)
    return frame.where(frame.notna(), None)


def _is_complete(machine: Mapping | None) -> bool:
    return bool(machine) and all(machine.get(name) is not None for name in ("load", "threads", "cores"))


def _most_questions(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """Per model and task the results with the largest limit; others answer other questions."""
    asked = frame.limit.astype(float).fillna(math.inf)
    most = asked.groupby([frame.model, frame.task]).transform("max")
    fewer = frame[asked < most][["task", "limit"]].drop_duplicates()
    about = "are left out, there are some with more"
    notes = [f"{task}: results with LIMIT={limit} {about}" for task, limit in fewer.values]
    return frame[asked == most], notes


def _quantised(frame: pd.DataFrame) -> list[str]:
    """One line for every model whose weights were packed."""
    packed = frame[frame.bits.notna()][["model", "bits"]].drop_duplicates()
    return [f"{model}: language model in {bits} bit, quantised by bitsandbytes" for model, bits in packed.values]


def _not_asked(frame: pd.DataFrame) -> list[str]:
    """One line for every result whose score counts questions that were not asked, or not as a whole."""
    meanings = {"skipped": "skipped, which count as wrong", "beyond_context": "longer than the model's context"}
    return [
        f"{row['task']}, {row['label']}: {row[name]} of {row['n']} questions {meaning}"
        for row in records(frame)
        for name, meaning in meanings.items()
        if row[name]
    ]


def _same_names(frame: pd.DataFrame) -> list[str]:
    """One line for every model name that several checkpoints go by."""
    counts = frame.groupby("model", sort=False).model_files.nunique()
    return [
        f"{model}: {count} checkpoints with different contents go by this name; none is compared with another"
        for model, count in counts.items()
        if count > 1
    ]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"results: there is no folder {str(folder)!r}")
    files = sorted(folder.glob("*/*.json") if folder.name == "cells" else folder.rglob("cells/*/*.json"))
    if not files:
        raise ValueError(f"results: {str(folder)!r} holds no finished cells (cells/TASK/*.json)")
    return files


def _read(file: Path) -> dict:
    content = read_record(file)
    if content["row"]["retain"] is None and content["row"]["method"] != VANILLA:
        raise BadRecord(f"results: {str(file)!r} has row.retain None, expected a whole number")
    return content
