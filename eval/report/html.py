"""One HTML file about a results folder: tables, plots, significance, pictures with kept patches, settings.

    mustdrop report results/table1_mini --out report.html

The file needs nothing else, neither other files nor a network.
"""

from __future__ import annotations

import json
import os
import sys
from itertools import product
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.report import plots, published, significance, summary, table, viewer
from eval.report.layout import Layout, table_rows
from eval.report.results import VANILLA, load, ordered, over_seeds, records, shown
from eval.run.records import BadRecord, read_json
from eval.run.settings import check_out
from eval.statistics import LEVEL
from mustdrop.command import Parser, command, path

TEMPLATE = "report.html.j2"


def report(folder: Path) -> str:
    """The page about a results folder.

    Raises
    ------
    ValueError
        If the folder has no finished cells.
    """
    frame, notes = load([folder])
    sweep = _sweep(folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(TEMPLATE).render(
        title=folder.resolve().name,
        models=list(frame.model.unique()),
        synthetic=frame.synthetic.any(),
        notes=notes,
        cells=len(frame),
        questions=frame.n.sum(),
        scores=[score_table(rows) for _, rows in frame.groupby("model", sort=False)],
        tasks=task_tables(frame),
        plots=[inline_svg(figure) for figure in plots.figures(frame).values()],
        significance=significance_tables(frame),
        unfinished=unfinished(frame, sweep),
        methods=method_settings(frame),
        provenance=provenance(frame),
        sweep={name: _json(sweep[name]) for name in ("settings", "provenance") if sweep.get(name)},
        viewers=viewer.viewers(frame),
    )


def score_table(frame: pd.DataFrame) -> dict:
    """A model's scores, laid out like the paper's table, beside published figures where there are any."""
    model, reduced = frame.model.iloc[0], frame[frame.method != VANILLA]
    layout = Layout(
        title=model,
        model=model,
        columns=tuple(dict.fromkeys(_column(row) for row in records(frame))),
        budgets=tuple(sorted(set(reduced.retain), reverse=True)),
        methods=tuple(sorted(set(reduced.method))),
    )
    found = table_rows(layout, frame)
    body = [row for row in table.body_rows(layout, found) if row is not None]
    return {"title": model, "headers": table.header(layout), "rows": body, "notes": table.legend(layout, found)}


def task_tables(frame: pd.DataFrame) -> list[dict]:
    """Per model and task: scores with intervals and costs, then accuracy per question type if there are several,
    and tokens per frame of videos."""
    found = []
    for (model, task), group in over_seeds(frame).groupby(["model", "task"], sort=False):
        rows = ordered(group)
        kinds = summary.by_type(rows, [("accuracy % by type", lambda row: row["label"])])
        tables = [one for one in (_costs(rows), kinds, summary.by_frame(rows)) if one is not None]
        tables = [{"headers": headers, "rows": body} for headers, body in tables]
        found.append({"title": f"{task}, {model}", "tables": tables})
    return found


def significance_tables(frame: pd.DataFrame) -> dict:
    """All comparisons with the untouched model and between methods at one budget, corrected together."""
    readable, notes = significance.comparable(frame)
    try:
        rows = significance.table_rows(significance.default_pairs(readable))
    except ValueError as error:
        return {"note": f"not computed: {error}", "tables": []}
    if not rows and notes:
        return {"note": f"not computed: {'; '.join(notes)}", "tables": []}
    parts = {
        "Against the untouched model": [row for row in rows if row[2].startswith(VANILLA)],
        "Between methods at the same budget": [row for row in rows if not row[2].startswith(VANILLA)],
    }
    said = f"{len(rows)} comparisons; * marks p < {LEVEL} after Holm's correction"
    tables = [{"title": name, "headers": significance.HEADERS, "rows": part} for name, part in parts.items() if part]
    return {"note": "; ".join([said, *notes]), "tables": tables}


def unfinished(frame: pd.DataFrame, sweep: dict) -> list[list[str]]:
    """Rows of task, method, state and log: what a sweep did not finish, and what only other tasks have a result of."""
    found: dict[tuple, list[str]] = {}
    for cell in sweep.get("cells", []):
        if cell["state"] != "finished":
            reason = "\n".join(str(cell[name]) for name in ("reason", "log") if cell.get(name))
            key = (Path(cell["model"]).name, cell["task"], cell["label"])
            found[key] = [*key[1:], cell["state"], reason]
    for model, rows in frame.groupby("model", sort=False):
        there = set(zip(rows.task, rows.label, strict=True))
        for task, name in product(sorted(set(rows.task)), sorted(set(rows.label))):
            if (task, name) not in there:
                found.setdefault((model, task, name), [task, name, "missing", ""])
    return list(found.values())


def method_settings(frame: pd.DataFrame) -> list[list[str]]:
    """Rows of method with budget, and the settings it ran with; several if tasks differ."""
    settings = frame.identity.map(lambda identity: _json(identity.get("settings"), indent=None))
    groups = frame.assign(settings=settings).groupby(["label", "settings"], sort=False)
    return [[name, text, ", ".join(rows.task.unique())] for (name, text), rows in groups]


def provenance(frame: pd.DataFrame) -> list[list[str]]:
    """Rows of what was asked for and of how the results were made, each value once."""
    facts: dict[str, dict[str, None]] = {}
    for identity, made in zip(frame.identity, frame.provenance, strict=True):
        asked = {name: value for name, value in identity.items() if name not in ("settings", "task", "task_data")}
        for name, value in {**asked, **made}.items():
            values = [f"{key} {one}" for key, one in value.items()] if isinstance(value, dict) else [str(value)]
            facts.setdefault(name, {}).update(dict.fromkeys(values))
    dates = facts.pop("date", {})
    rows = [[name, "\n".join(values)] for name, values in facts.items()]
    return [["date", " to ".join(dict.fromkeys([min(dates), max(dates)]))], *rows] if dates else rows


def inline_svg(figure) -> Markup:
    """A plot as SVG for inside a page, in the page's colour of text."""
    text = plots.encode(figure, "svg").decode()
    return Markup(text[text.index("<svg") :].replace(plots.INK, "currentColor"))  # noqa: S704 - our own drawing


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument."""
    new = Parser("report", description=__doc__)
    new.add_argument("results", type=path, help="results folder")
    new.add_argument("--out", type=path, help="HTML file (default: report.html in the results folder)")
    args = new.parse_args(argv)
    out = args.out or args.results / "report.html"
    if out.is_dir():
        raise ValueError(f"--out: {str(out)!r} is a folder, expected a file such as report.html")
    folder = check_out(out.parent)
    page = report(args.results)
    folder.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    print(out)
    return 0


def _costs(frame: pd.DataFrame) -> summary.Table:
    known = [name for name in shown("report") if frame[name].notna().any()]
    columns = [
        ("method", lambda row: row["label"]),
        (f"{frame.metric.iloc[0]} (95 % CI)", lambda row: summary.interval(row["score"], row["score_ci95"])),
        ("n", lambda row: str(row["n"])),
        ("of vanilla", lambda row: summary.percent(row["share"])),
        *summary.cost_columns(known),
    ]
    if (frame.seeds > 1).any():
        columns.append(("seeds, spread", lambda row: f"{row['seeds']}, {row['seed_spread'] or 0:.1f}"))
    return summary.lines(records(frame), columns)


def _column(row: dict) -> str:
    """The benchmark, so that published figures stand beside it; a synthetic task goes by its own name."""
    return row["benchmark"] if not row["synthetic"] and row["benchmark"] in published.columns() else row["task"]


def _sweep(folder: Path) -> dict:
    """What the sweep runner wrote about all cells, if this was a sweep."""
    file = folder / "sweep.json"
    if not os.path.lexists(file):
        return {}
    try:
        content = read_json(file)
    except BadRecord as error:
        raise ValueError(f"results: {str(file)!r} is not valid JSON ({error}); remove it to do without") from None
    texts = ("task", "label", "model", "state")
    cells = content.get("cells", [])
    if not isinstance(cells, list) or not all(
        isinstance(cell, dict) and all(isinstance(cell.get(name), str) for name in texts) for cell in cells
    ):
        raise ValueError(f"results: {str(file)!r} has cells that are none; remove it to do without")
    return content


def _json(value: object, indent: int | None = 2) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
