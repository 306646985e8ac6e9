"""The tables of the documents, rendered from the result rows that docs/data keeps.

    mustdrop docs                              write the tables of README.md and docs/ anew
    mustdrop docs --check                      only say which of them differ from their rows; status 1 if any does
    mustdrop docs --results results/compare    first take the comparison's rows from a results folder

A table is one of these if the line above it is the comment <!-- figures: NAME -->. Its rows are docs/data/NAME.csv, and
docs/data/sources.json says which command made them, at which commit, where and with which versions.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from eval.checkpoints import ROOT
from eval.report import published
from eval.report.layout import TableRow, complete, read_layout, table_rows
from eval.report.results import VANILLA, load
from eval.report.significance import against, comparable
from eval.report.table import NOTHING, leading, write_cost
from eval.statistics import LEVEL, holm
from eval.tasks.registry import mirrored
from mustdrop.command import Parser, command, path
from mustdrop.read import read_json

DATA = ROOT / "docs" / "data"
SOURCES = DATA / "sources.json"
LAYOUT = ROOT / "configs" / "tables" / "compare.yaml"
REFERENCE = "mustdrop_plus"
"""What README shows, and what every method is compared with."""

FACTS = ("command", "commit", "date", "machine", "versions")
TABLE = re.compile(r"(<!-- figures: (\S+) -->\n)((?:\|.*\n)*)")
SCORE, HALF = "score of ", "half of "
"""Beginnings of columns: a task's score, and the farther end of its 95 % interval from it."""


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 a table differs from its rows, 2 a wrong argument."""
    new = Parser("docs", description=__doc__)
    new.add_argument("--check", action="store_true", help="write nothing, name what differs")
    new.add_argument("--results", type=path, nargs="+", help="results folders of the comparison (scripts/compare.sh)")
    args = new.parse_args(argv)
    if not DATA.is_dir():
        raise ValueError(f"docs: there is no folder {str(DATA)!r}; the documents are in the repository, not installed")
    if args.results and not args.check:
        take(args.results)
    stale = [file for file in documents() if rendered(file) != file.read_text(encoding="utf-8")]
    for file in stale:
        print(f"{file.relative_to(ROOT)}: {'differs from docs/data' if args.check else 'written'}")
        if not args.check:
            file.write_text(rendered(file), encoding="utf-8")
    return int(args.check and bool(stale))


def documents() -> list[Path]:
    """The files that may hold tables of figures."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rendered(file: Path) -> str:
    """A document with its tables as their rows give them; ValueError if a table has no rows."""
    text = file.read_text(encoding="utf-8")
    return TABLE.sub(lambda found: found[1] + markdown(*table_of(found[2])), text)


def table_of(name: str) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of a table of figures."""
    return RENDERERS[name]() if name in RENDERERS else plain(rows(name))


def rows(name: str) -> pd.DataFrame:
    """The rows of ``docs/data/NAME.csv``, every cell as text, empty where there is none."""
    file = DATA / f"{name}.csv"
    if not file.is_file():
        known = ", ".join(sorted([*RENDERERS, *(one.stem for one in DATA.glob("*.csv"))]))
        raise ValueError(f"figures: got {name!r}, expected one of {known}")
    return pd.read_csv(file, dtype=str, keep_default_na=False)


def plain(frame: pd.DataFrame) -> tuple[list[str], list[list[str]]]:
    """Rows as they are; the name of a column stands for no title if it begins with a dot."""
    return ["" if name.startswith(".") else name for name in frame.columns], frame.to_numpy().tolist()


def markdown(headers: list[str], body: list[list[str]]) -> str:
    """A table in Markdown, its columns as wide as they come."""
    lines = [headers, ["---"] * len(headers), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comparison() -> tuple[list[str], list[list[str]]]:
    """Scores and costs of every method at every budget."""
    frame = rows("comparison")
    tasks = [name.removeprefix(SCORE) for name in frame if name.startswith(SCORE)]
    headers = ["tokens", "method", *tasks, published.AVERAGE, "tokens computed on", "FLOPs saved %"]
    return headers, [
        [
            row["tokens"], row["method"], *(_score(task, row[SCORE + task], row[HALF + task]) for task in tasks),
            _average(row, len(tasks)), *(write_cost(_number(row[name])) for name in ("computed on", "saved")),
        ]
        for row in frame.to_dict("records")
    ]  # fmt: skip


def differences() -> tuple[list[str], list[list[str]]]:
    """Every method minus the reference, by task and on average."""
    frame = rows("against")
    tasks = list(dict.fromkeys(frame.task))
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in frame.to_dict("records"):
        value, low, high = (f"{float(row[name]):+.1f}" for name in ("difference", "low", "high"))
        mark = "*" if row["differs"] == "yes" else ""
        lines.setdefault((row["tokens"], row["method"]), {})[row["task"]] = f"{value} ({low} to {high}){mark}"
    body = [[*key, *(cells.get(task, NOTHING) for task in tasks)] for key, cells in lines.items()]
    return ["tokens", "method", *tasks], body


def first_page() -> tuple[list[str], list[list[str]]]:
    """README's table: what our method keeps and spares at each budget, beside the best of the others."""
    found = rows("comparison")
    scores = found.assign(average=pd.to_numeric(found.average))
    ours = scores[scores.method == REFERENCE].set_index("tokens").average
    others = scores[~scores.method.str.contains("mustdrop") & scores.tokens.isin(ours.index)]
    rival = others.groupby("method").average.mean()[others.groupby("method").size() == len(ours)].idxmax()
    theirs = others[others.method == rival].set_index("tokens").average
    speed = rows("speed")
    speed = speed[speed.batch == "1"].set_index(".")
    names = [f"{REFERENCE} {tokens}" for tokens in ours.index]
    untouched = speed.loc["nothing reduced"]
    faster = [f"{float(speed.loc[name, 'first token speed-up']):.1f}" for name in names]
    return [f"`{REFERENCE}` (ours), embedded model", *ours.index, f"all {untouched['tokens per layer']}"], [
        ["score kept, five **synthetic** tasks, %", *(f"{value:.1f}" for value in ours), "100"],
        [f"best rival: `{rival}`, %", *(f"{theirs[tokens]:.1f}" for tokens in ours.index), ""],
        ["time to first token, speed-up", *faster, "1"],
        ["key-value cache, MB", *(speed.loc[name, "cache MB"] for name in names), untouched["cache MB"]],
    ]


RENDERERS: dict[str, Callable[[], tuple[list[str], list[list[str]]]]] = {
    "readme": first_page,
    "comparison": comparison,
    "against": differences,
}
"""Tables that are more than their rows."""


def take(folders: list[Path]) -> None:
    """Write the comparison's rows, and those of every method against the reference, from results."""
    frame, _ = load(folders)
    layout = complete(read_layout(LAYOUT, set(frame.method)), frame)
    found = table_rows(layout, frame)
    readable, _ = comparable(frame)
    best = leading(layout, found, readable)
    pd.DataFrame([_kept(row, layout.columns, (row.method, row.retain) in best) for row in found]).to_csv(
        DATA / "comparison.csv", index=False
    )
    compared = against(readable[readable.model == layout.model], REFERENCE)
    corrected = iter(holm([row.average.p for row in compared if row.average]))
    lines = []
    for row in compared:
        whole = {published.AVERAGE: row.average} if row.average else {}
        differs = next(corrected) < LEVEL if row.average else False
        for task, one in {**row.tasks, **whole}.items():
            low, high = one.interval
            values = {"difference": one.difference, "low": low, "high": high}
            mark = "yes" if differs and task == published.AVERAGE else ""
            key = {"tokens": row.retain, "method": row.method, "task": task}
            lines.append({**key, **_rounded(values), "differs": mark})
    pd.DataFrame(lines).to_csv(DATA / "against.csv", index=False)
    made = frame.provenance
    facts = {
        "command": made[0]["command"],
        "commit": sorted(set(frame.commit)),
        "date": max(frame.date)[:10],
        "machine": sorted({f"{one.get('device')} {one.get('dtype')}" for one in made}),
        "versions": made[0].get("versions", {}),
    }
    sources = {**read_json(SOURCES), "comparison": facts, "against": facts}
    SOURCES.write_text(json.dumps(sources, indent=2) + "\n", encoding="utf-8")


def _kept(row: TableRow, tasks: tuple[str, ...], best: bool) -> dict:
    """What is kept of one method at one budget."""
    scores = {}
    for task in tasks:
        ours = row.ours.get(task)
        score = ours and ours["score"]
        scores |= {SCORE + task: score, HALF + task: ours and max(abs(end - score) for end in ours["score_ci95"])}
    shares = row.shares().values()
    return {
        "tokens": "all" if row.method == VANILLA else row.retain, "method": row.method, **_rounded(scores),
        "average": round(sum(shares) / len(shares), 4) if shares else None, "tasks": len(shares),
        **_rounded({"computed on": row.cost("tokens"), "saved": row.cost("flops")}), "best": "yes" if best else "",
        "commit": ", ".join(sorted({ours["commit"] for ours in row.ours.values()})),
    }  # fmt: skip


def _rounded(values: dict) -> dict:
    return {name: None if value is None else round(value, 4) for name, value in values.items()}


def _number(text: str) -> float | None:
    return float(text) if text else None


def _score(task: str, score: str, half: str) -> str:
    """A score with its interval, to the decimals that papers print for the benchmark."""
    column = published.columns().get(mirrored(task))
    places = column.decimals if column else 1
    return f"{float(score):.{places}f} ±{float(half):.{places}f}" if score else NOTHING


def _average(row: dict, tasks: int) -> str:
    if not row["average"]:
        return NOTHING
    text = f"{float(row['average']):.1f} ({row['tasks']}/{tasks})"
    return f"**{text}**" if row["best"] else text


if __name__ == "__main__":
    sys.exit(main())
