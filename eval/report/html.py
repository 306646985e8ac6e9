"""One HTML file about a results folder: tables, plots, significance, pictures with kept patches, settings.

    mustdrop report results/table1_mini --out report.html

The file needs nothing else, neither other files nor a network.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from eval.report import plots, published, significance, table
from eval.report import viewer as drawing
from eval.report.layout import Layout, lines
from eval.report.results import VANILLA, Result, collect, label, merge_seeds, ordered
from eval.report.summary import frame_table
from eval.run.records import BadRecord, read_json
from eval.run.settings import check_out
from mustdrop.command import Parser, command, path

TEMPLATE = "report.html.j2"
QUANTITIES = (
    ("tokens", "mean_tokens", "{:.1f}", 1), ("official", "mean_tokens_official", "{:.1f}", 1),
    ("FLOPs saved", "flops_reduction", "{:.1f} %", 100), ("cache MB", "cache_bytes", "{:.2f}", 1e-6),
    ("vision ms", "vision_ms", "{:.1f}", 1), ("prefill ms", "prefill_ms", "{:.1f}", 1),
    ("selector ms", "selector_ms", "{:.1f}", 1), ("decode ms", "decode_ms", "{:.1f}", 1),
)  # fmt: skip


def report(folder: Path) -> str:
    """The page about a results folder.

    Raises
    ------
    ValueError
        If the folder has no finished cells.
    """
    results, notes = collect([folder])
    models = list(dict.fromkeys(result.row["model"] for result in results))
    sweep = _sweep(folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template(TEMPLATE).render(
        title=folder.resolve().name,
        models=models,
        synthetic=any(result.row["synthetic"] for result in results),
        notes=notes,
        cells=len(results),
        questions=sum(result.row["n"] for result in results),
        scores=[score_table(results, model) for model in models],
        tasks=task_tables(results),
        plots=[inline_svg(figure) for figure in plots.figures(results).values()],
        significance=significance_tables(results),
        unfinished=unfinished(results, sweep),
        methods=method_settings(results),
        provenance=provenance(results),
        sweep={name: _json(sweep[name]) for name in ("settings", "provenance") if sweep.get(name)},
        viewers=drawing.viewers(results),
    )


def score_table(results: Sequence[Result], model: str) -> dict:
    """A model's scores, laid out like the paper's table, beside published figures where there are any."""
    rows = [result.row for result in results if result.row["model"] == model]
    reduced = [row for row in rows if row["method"] != VANILLA]
    layout = Layout(
        title=model,
        model=model,
        columns=tuple(dict.fromkeys(_column(row) for row in rows)),
        budgets=tuple(sorted({row["retain"] for row in reduced}, reverse=True)),
        methods=tuple(sorted({row["method"] for row in reduced})),
    )
    found = lines(layout, results)
    body = [row for row in table.body_rows(layout, found) if row is not None]
    return {"title": model, "headers": table.header(layout), "rows": body, "notes": table.legend(layout, found)}


def task_tables(results: Iterable[Result]) -> list[dict]:
    """Per model and task: scores with intervals and costs, then accuracy per question type if there are several,
    and tokens per frame of videos."""
    groups: dict[tuple, list[dict]] = {}
    for row in merge_seeds(results):
        groups.setdefault((row["model"], row["task"]), []).append(row)
    return [
        {"title": f"{task}, {model}", "tables": [_costs(rows), *_types(rows), *_frames(rows)]}
        for (model, task), rows in ((key, ordered(group)) for key, group in groups.items())
    ]


def significance_tables(results: Sequence[Result]) -> dict:
    """All comparisons with the untouched model and between methods at one budget, corrected together."""
    results, notes = significance.comparable(results)
    pairs = significance.default_pairs(results)
    try:
        rows = significance.table_rows(pairs)
    except ValueError as error:
        return {"note": f"not computed: {error}", "tables": []}
    if not rows and notes:
        return {"note": f"not computed: {'; '.join(notes)}", "tables": []}
    parts = {
        "Against the untouched model": [row for row in rows if row[2].startswith(VANILLA)],
        "Between methods at the same budget": [row for row in rows if not row[2].startswith(VANILLA)],
    }
    tables = [
        {"title": title, "headers": significance.HEADERS, "rows": part} for title, part in parts.items() if part
    ]  # fmt: skip
    return {
        "note": "; ".join(
            [f"{len(rows)} comparisons; * marks p < {significance.LEVEL} after Holm's correction", *notes]
        ),
        "tables": tables,
    }


def unfinished(results: Sequence[Result], sweep: dict) -> list[list[str]]:
    """Rows of task, method, state and log: what a sweep did not finish, and what only other tasks have a result of."""
    found: dict[tuple, list[str]] = {}
    for cell in sweep.get("cells", []):
        if cell["state"] != "finished":
            reason = "\n".join(str(cell[name]) for name in ("reason", "log") if cell.get(name))
            found[Path(cell["model"]).name, cell["task"], cell["label"]] = [
                cell["task"],
                cell["label"],
                cell["state"],
                reason,
            ]
    there = {(one.row["model"], one.row["task"], one.label) for one in results}
    for model in _unique(model for model, _, _ in there):
        tasks, labels = ({key[place] for key in there if key[0] == model} for place in (1, 2))
        for key in ((model, task, name) for task in sorted(tasks) for name in sorted(labels)):
            if key not in there:
                found.setdefault(key, [*key[1:], "missing", ""])
    return list(found.values())


def method_settings(results: Iterable[Result]) -> list[list[str]]:
    """Rows of method with budget, and the settings it ran with; several if tasks differ."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        settings = _json(result.identity.get("settings"), indent=None)
        found.setdefault((result.label, settings), []).append(result.row["task"])
    return [[name, settings, ", ".join(_unique(tasks))] for (name, settings), tasks in found.items()]


def provenance(results: Sequence[Result]) -> list[list[str]]:
    """Rows of what was asked for and of how the results were made, each value once."""
    facts: dict[str, dict[str, None]] = {}
    for result in results:
        asked = {
            name: value for name, value in result.identity.items() if name not in ("settings", "task", "task_data")
        }
        for name, value in {**asked, **result.provenance}.items():
            values = (
                {f"{key} {one}": None for key, one in value.items()} if isinstance(value, dict) else {str(value): None}
            )
            facts.setdefault(name, {}).update(values)
    dates = list(facts.pop("date", {}))
    rows = [[name, "\n".join(values)] for name, values in facts.items()]
    return [["date", " to ".join(_unique([min(dates), max(dates)]))], *rows] if dates else rows


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


def _costs(rows: Sequence[dict]) -> dict:
    shown = [quantity for quantity in QUANTITIES if any(row.get(quantity[1]) is not None for row in rows)]
    seeds = any(row["seeds"] > 1 for row in rows)
    headers = ["method", f"{rows[0]['metric']} (95 % CI)", "n", "of vanilla", *(name for name, *_ in shown)]
    return {
        "headers": [*headers, *(["seeds, spread"] if seeds else [])],
        "rows": [_cost(row, shown, seeds) for row in rows],
    }


def _cost(row: dict, shown: Sequence[tuple], seeds: bool) -> list[str]:
    low, high = row["score_ci95"]
    share = row["share_of_vanilla"]
    spread = [f"{row['seeds']}, {row['seed_spread'] or 0:.1f}"] if seeds else []
    return [
        label(row["method"], row["retain"]), f"{row['score']:.1f} ({low:.1f}-{high:.1f})", str(row["n"]),
        table.NOTHING if share is None else f"{100 * share:.1f} %",
        *(_shown(row.get(name), text, scale) for _, name, text, scale in shown), *spread,
    ]  # fmt: skip


def _shown(value: float | None, text: str, scale: float) -> str:
    return table.NOTHING if value is None else text.format(scale * value)


def _types(rows: Sequence[dict]) -> list[dict]:
    kinds = sorted({kind for row in rows for kind in row.get("accuracy_by_type") or {}})
    if len(kinds) < 2:
        return []
    body = []
    for row in rows:
        cells = [row["accuracy_by_type"].get(kind) for kind in kinds]
        texts = [f"{100 * cell['accuracy']:.1f} (n={cell['n']})" if cell else table.NOTHING for cell in cells]
        body.append([label(row["method"], row["retain"]), *texts])
    return [{"headers": ["accuracy % by type", *kinds], "rows": body}]


def _frames(rows: Sequence[dict]) -> list[dict]:
    """Tokens that each method keeps of each frame."""
    found = frame_table(rows)
    return [{"headers": found[0], "rows": found[1]}] if found else []


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


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _json(value: object, indent: int | None = 2) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
