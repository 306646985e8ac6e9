"""The paper's tables: our results beside what papers print.

    mustdrop table configs/tables/table1.yaml --results results --format all --out tables

A cell without a result is shown as missing. Synthetic results have no published counterpart and are never compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import pandas as pd
from tabulate import LATEX_ESCAPE_RULES, SEPARATING_LINE, tabulate

from eval.report import published
from eval.report.layout import (
    SHOWN_COSTS,
    Layout,
    TableRow,
    average_difference,
    complete,
    printed_average,
    printed_shares,
    read_layout,
    table_rows,
)
from eval.report.published import AVERAGE
from eval.report.results import ONE, VANILLA, load, timing
from eval.report.significance import comparable, leaders
from eval.run.settings import check_out
from mustdrop.command import Parser, command, path

CSV_FIELDS = (
    "model", "task", "method", "retain", "ours", "ci_low", "ci_high", "n", "published", "source", "difference",
    "beyond_noise", "seeds", "seed_spread", "synthetic", "over", "mean_tokens", "flops_reduction",
    "prompt_ms", "commit",
)  # fmt: skip
NOTHING = "-"
BOLD = (
    "bold: the best average of a budget, and those that differ from it by no more than chance (paired 95 % interval of "
    "the mean score per question over these tasks, pictures drawn; not corrected)"
)
RESULTS = Path("results")


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument."""
    args = parser().parse_args(argv)
    if args.format == "all" and args.out is None:
        raise ValueError("--format: all writes files, so it needs --out FOLDER")
    out = None if args.out is None else check_out(args.out)
    frame, notes = _results(args.results)
    layout = complete(read_layout(args.table, set(frame.get("method", ()))), frame)
    found = table_rows(layout, frame)
    notes = [*layout.notes, *notes, *origins(found, frame)]
    styles = list(FORMATS) if args.format == "all" else [args.format]
    bold = set()
    if "markdown" in styles and layout.methods is None and not frame.empty:
        whole, unreadable = comparable(frame)
        bold = set() if unreadable else leading(layout, found, whole)
        notes += [f"{note}, so nothing is bold" for note in unreadable]
    if out is not None:
        write(out, args.table.stem, {style: render(layout, found, style, notes, bold) for style in styles})
    print(render(layout, found, styles[0], notes, bold), end="")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    new = Parser("table", description=__doc__)
    new.add_argument("table", type=path, help="YAML file, such as configs/tables/table1.yaml")
    new.add_argument(
        "--results",
        type=path,
        nargs="+",
        help="results folders, or folders that hold some (default: results; without any, published figures only)",
    )
    new.add_argument("--format", choices=[*FORMATS, "all"], default="terminal", help="(default: %(default)s)")
    new.add_argument("--out", type=path, help="folder that gets the table as a file named after the YAML")
    return new


def leading(layout: Layout, found: Sequence[TableRow], frame: pd.DataFrame) -> set[tuple[str, int]]:
    """Methods at their budgets that no other is known to surpass on average; what lacks a column is not ranked."""
    whole = [line for line in found if line.method != VANILLA and len(line.shares()) == len(layout.columns)]
    tasks = [row["task"] for row in found[0].ours.values()]
    models = {row["model"] for line in whole for row in line.ours.values()}
    mine = frame[frame.model.isin(models)]
    return leaders(mine, tasks, [(line.method, line.retain) for line in whole]) if whole else set()


def write(out: Path, stem: str, texts: Mapping[str, str]) -> None:
    """Write a table in several styles into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    for style, text in texts.items():
        (out / f"{stem}.{FORMATS[style][0]}").write_text(text, encoding="utf-8")


def _results(folders: list[Path] | None) -> tuple[pd.DataFrame, list[str]]:
    if folders is None and not any(RESULTS.rglob("cells/*/*.json")):
        return pd.DataFrame(), ["no results here: published figures only"]
    return load(folders or [RESULTS])


def origins(found: Sequence[TableRow], frame: pd.DataFrame) -> list[str]:
    """Where the shown results were made: commits, devices, dates; which methods if several commits made them."""
    if frame.empty:
        return []
    shown = {tuple(row[name] for name in ONE) for line in found for row in line.ours.values()}
    made = frame[[key in shown for key in zip(*(frame[name] for name in ONE), strict=True)]]
    if made.empty:
        others = ", ".join(sorted(set(frame.model + " on " + frame.task)))
        return [f"none of the {len(frame)} results belongs here, they are of {others}"]
    facts = {
        "commit": set(made.commit),
        "device": {f"{one.get('device')} {one.get('dtype')}" for one in made.provenance},
        "date": {one.get("date", "unknown")[:10] for one in made.provenance},
    }
    line = "; ".join(f"{name} {', '.join(sorted(value))}" for name, value in facts.items())
    several = [f"commit {commit}: {', '.join(sorted(set(rows.method)))}" for commit, rows in made.groupby("commit")]
    return [f"{len(made)} results; {line}", *(several if len(several) > 1 else []), f"times: {timing(made)}"]


def render(
    layout: Layout,
    found: Sequence[TableRow],
    style: str,
    notes: Sequence[str] = (),
    bold: Collection[tuple[str, int]] = (),
) -> str:
    """The table as text.

    Parameters
    ----------
    layout : Layout
        What to show.
    found : sequence of TableRow
        What there is.
    style : str
        One of `FORMATS`.
    notes : sequence of str
        Stand below the legend.
    bold : collection of (method, budget)
        Whose average is bold in Markdown.
    """
    return FORMATS[style][1](layout, found, [*legend(layout, found), *notes], bold)


def header(layout: Layout) -> list[str]:
    """Titles of the columns of `body_rows`."""
    return [
        *("tokens", "method", ""),
        *(_title(column) for column in layout.columns),
        AVERAGE,
        *(SHOWN_COSTS[cost][0] for cost in layout.costs),
    ]


def body_rows(
    layout: Layout, found: Sequence[TableRow], bold: Collection[tuple[str, int]] = ()
) -> list[list[str] | None]:
    """The table's rows as text, None between budgets."""
    letters = _letters(layout, found)
    body: list[list[str] | None] = []
    for number, line in enumerate(found):
        if number and line.retain != found[number - 1].retain:
            body.append(None)
        block = []
        if "ours" in layout.show:
            block.extend(_our_rows(layout, line, found[0]))
            if (line.method, line.retain) in bold:
                block[0][-1] = f"**{block[0][-1]}**"
        for row in line.printed:
            if "published" in layout.show:
                block.append(_published_row(layout, row, letters[row.source]))
            if "difference" in layout.show and any(
                line.difference(column, row) is not None for column in layout.columns
            ):
                block.append(_difference_row(layout, line, row, letters[row.source]))
        tokens = "all" if line.method == VANILLA else str(line.retain or "")
        costs = [write_cost(line.cost(cost)) for cost in layout.costs]
        for place, row in enumerate(block):
            body.append(["", "", *row, *[""] * len(costs)] if place else [tokens, line.method, *row, *costs])
    return body


def legend(layout: Layout, found: Sequence[TableRow]) -> list[str]:
    """What the marks mean, as far as they occur."""
    ours = [row for line in found for row in line.ours.values()]
    remarks = []
    if "ours" in layout.show:
        remarks.append(f"{NOTHING}: no result")
    if ours:
        counts = {column: row["n"] for column, row in found[0].ours.items()}
        said = ", ".join(f"{column} {n}" for column, n in counts.items()) if layout.costs else "as many as above"
        remarks.append(f"ours: score ± the farther end of its 95 % interval; n: questions, {said} unless said")
    if any(row["seeds"] > 1 for row in ours):
        remarks.append("several seeds: mean score, intervals joined; spread: standard deviation over (number of) seeds")
    if any(row["synthetic"] for row in ours):
        remarks.append("synthetic benchmark: no published figures exist, and none are comparable")
    limits = {f"{row['task']} {row['limit']}" for row in ours if row["limit"]}
    if limits:
        remarks.append(f"only the first questions were asked: {', '.join(sorted(limits))}")
    remarks.append("average: mean share of vanilla in %, over (columns with a result / all columns)")
    remarks.extend(f"{letter}: {source}" for source, letter in _letters(layout, found).items())
    remarks.extend(_printed_shares(layout))
    if any(row.judged for line in found for row in line.printed) and {"published", "difference"} & set(layout.show):
        remarks.append("published: scored by a language model, ours by the words of the answers: not to be compared")
    if any(line.beyond_noise(column, row) for line in found for row in line.printed for column in layout.columns):
        remarks.append("*: the published figure lies outside our 95 % interval, widened by the printed rounding")
    return remarks


def _printed_shares(layout: Layout) -> list[str]:
    """Shares of vanilla that papers print over their own benchmarks: beside a table, never within one."""
    if not {"published", "difference"} & set(layout.show):
        return []
    listed = []
    for share in published.shares(layout.model):
        if values := share.at(layout.budgets):
            said = ", ".join(f"{value:.1f} at {budget}" for budget, value in values.items())
            listed.append(f"  {share.method}: {said} ({share.source})")
    about = "shares of vanilla in % that papers print, each over its own benchmarks, comparable with nothing here:"
    return [about, *listed] if listed else []


def _our_rows(layout: Layout, line: TableRow, vanilla: TableRow) -> list[list[str]]:
    """Scores; the numbers of questions where vanilla's line does not say them; the spread over seeds, if any."""
    cells = [line.ours.get(column) for column in layout.columns]
    shares = line.shares()
    block = [["ours", *map(_score, layout.columns, cells), _average(shares.values(), layout)]]
    said = {column: row["n"] for column, row in vanilla.ours.items()}
    if line is vanilla and not layout.costs:  # where costs are shown, lines are many: the legend says it
        said = {}
    if any(row["n"] != said.get(column) for column, row in line.ours.items()):
        block.append(["n", *(str(row["n"]) if row else "" for row in cells), ""])
    if any(row["seeds"] > 1 for row in line.ours.values()):
        block.append(["spread", *map(_spread, layout.columns, cells), ""])
    return block


def _published_row(layout: Layout, row: published.Row, letter: str) -> list[str]:
    shares = printed_shares(row, layout.model, layout.columns)
    average = f"{printed_average(row, layout.model, layout.columns):.1f} ({len(shares)}/{len(layout.columns)})"
    figures = [_number(column, row.values.get(column)) for column in layout.columns]
    return [f"published {letter}", *figures, average]


def _difference_row(layout: Layout, line: TableRow, row: published.Row, letter: str) -> list[str]:
    figures = []
    for column in layout.columns:
        mark = "*" if line.beyond_noise(column, row) else ""
        figures.append(_number(column, line.difference(column, row), sign="+") + mark)
    difference, over = average_difference(layout, line, row)
    average = NOTHING if difference is None else f"{difference:+.1f} ({over}/{len(layout.columns)})"
    return [f"difference {letter}", *figures, average]


def write_cost(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3g}" if value < 10 else f"{value:.0f}"


def _score(column: str, row: Mapping | None) -> str:
    if row is None:
        return NOTHING
    half = max(row["score"] - row["score_ci95"][0], row["score_ci95"][1] - row["score"])
    return f"{_number(row['benchmark'], row['score'])} ±{_number(row['benchmark'], half)}"


def _spread(column: str, row: Mapping | None) -> str:
    if row is None or row["seeds"] == 1:
        return ""
    return f"{_number(row['benchmark'], row['seed_spread'])} ({row['seeds']})"


def _number(column: str, value: float | None, sign: str = "") -> str:
    known = published.columns().get(column)
    return NOTHING if value is None else f"{value:{sign}.{known.decimals if known else 1}f}"


def _average(shares: Iterable[float], layout: Layout) -> str:
    shares = list(shares)
    return f"{fmean(shares):.1f} ({len(shares)}/{len(layout.columns)})" if shares else NOTHING


def _title(column: str) -> str:
    known = published.columns().get(column)
    return known.title if known else column


def _letters(layout: Layout, found: Sequence[TableRow]) -> dict[str, str]:
    """A letter for every source that is shown."""
    if not {"published", "difference"} & set(layout.show):
        return {}
    return dict(zip(dict.fromkeys(row.source for line in found for row in line.printed), "abcdefghij", strict=False))


def _tabulate(layout: Layout, body: list, style: str) -> str:
    """Rows of `body_rows` in one of tabulate's styles; None becomes a rule."""
    align = ["right", "left", "left", *["right"] * (len(layout.columns) + 1 + len(layout.costs))]
    rows = [header(layout), *(SEPARATING_LINE if row is None else row for row in body)]
    if all(row is SEPARATING_LINE or row[2] in ("", "ours") for row in rows):  # nothing that needs telling apart
        rows = [row if row is SEPARATING_LINE else row[:2] + row[3:] for row in rows]
        del align[2]
    return tabulate(rows[1:], rows[0], tablefmt=style, disable_numparse=True, colalign=align)


def _terminal(layout: Layout, found: Sequence[TableRow], remarks: Sequence[str], bold: Collection) -> str:
    text = _tabulate(layout, body_rows(layout, found), "simple")
    return f"{layout.title}\n\n{text}\n\n" + "".join(f"{remark}\n" for remark in remarks)


def _markdown(layout: Layout, found: Sequence[TableRow], remarks: Sequence[str], bold: Collection) -> str:
    body = [row for row in body_rows(layout, found, bold) if row is not None]  # a rule between rows is not Markdown's
    remarks = [*remarks, *([BOLD] if bold else [])]
    text = _tabulate(layout, body, "github")
    return f"## {layout.title}\n\n{text}\n\n" + "".join(f"- {remark}\n" for remark in remarks)


def _latex(layout: Layout, found: Sequence[TableRow], remarks: Sequence[str], bold: Collection) -> str:
    """A table as wide as the page; needs the packages booktabs and graphicx."""
    caption = " ".join(f"{remark}." for remark in (layout.title, *remarks))
    escaped = "".join(LATEX_ESCAPE_RULES.get(letter, letter) for letter in caption)
    parts = [
        r"\begin{table*}", r"\centering", rf"\caption{{{escaped}}}", r"\resizebox{\linewidth}{!}{%",
        _tabulate(layout, body_rows(layout, found), "latex_booktabs") + "}", r"\end{table*}",
    ]  # fmt: skip
    return "\n".join(parts).replace("±", r"$\pm$") + "\n"


def _csv(layout: Layout, found: Sequence[TableRow], remarks: Sequence[str], bold: Collection) -> str:
    """One line per figure and source, without remarks; empty where there is none."""
    rows = [
        {"model": layout.model, "method": line.method, "retain": line.retain, **cells}
        for line in found
        for printed in line.printed or [None]
        for cells in (*(_csv_row(line, printed, one) for one in layout.columns), _csv_average(layout, line, printed))
    ]
    plain = [[_rounded(row.get(name)) for name in CSV_FIELDS] for row in rows]
    return pd.DataFrame(plain, columns=CSV_FIELDS, dtype=object).to_csv(index=False)


def _rounded(value: object) -> object:
    """Without the digits that binary fractions add."""
    return round(value, 4) if isinstance(value, float) else value


def _csv_row(line: TableRow, printed: published.Row | None, column: str) -> dict:
    row = {"task": column}
    ours = line.ours.get(column)
    if ours is not None:
        low, high = ours["score_ci95"]
        saved = ours["flops_saved"]
        row |= {"ours": ours["score"], "ci_low": low, "ci_high": high}
        names = ("n", "seeds", "seed_spread", "synthetic", "commit", "mean_tokens", "prompt_ms")
        row |= {name: ours[name] for name in names}
        row["flops_reduction"] = None if saved is None else saved / 100
    if printed is not None and column in printed.values:
        row |= {"published": printed.values[column], "source": printed.source}
        row |= {"difference": line.difference(column, printed), "beyond_noise": line.beyond_noise(column, printed)}
    return row


def _csv_average(layout: Layout, line: TableRow, printed: published.Row | None) -> dict:
    shares = line.shares().values()
    row = {"task": AVERAGE, "ours": fmean(shares) if shares else None, "over": f"{len(shares)}/{len(layout.columns)}"}
    if printed is not None:
        average = printed_average(printed, layout.model, layout.columns)
        row |= {"published": average, "source": printed.source}
        row |= {"difference": average_difference(layout, line, printed)[0]}
    return row


FORMATS: dict[str, tuple[str, Callable[..., str]]] = {
    "terminal": ("txt", _terminal),
    "markdown": ("md", _markdown),
    "latex": ("tex", _latex),
    "csv": ("csv", _csv),
}
"""A new output format is an entry here: a file's suffix, and what writes layout, rows, remarks and bold averages."""


if __name__ == "__main__":
    sys.exit(main())
