"""Score against vision tokens, FLOPs and measured time, one line per method, from any results folder.

    mustdrop plots results --out plots

One picture per task and quantity, and per quantity one for the average share of vanilla over all tasks; PNG and SVG.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import hypot
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from eval.report import published
from eval.report.published import AVERAGE
from eval.report.results import VANILLA, Result, collect, label, merge_seeds, prompt_ms, timing
from eval.run.records import file_name
from eval.run.settings import check_out
from mustdrop.command import Parser, command, path

OURS = "mustdrop"
"""Methods whose names begin so have a stronger line."""

INK = "#1b2028"
"""Text and axes. A report replaces it by its own colour of text."""

# Okabe and Ito's colours, told apart with any kind of colour vision; one marker more, so that pairs repeat late.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#6A3D9A")
MARKERS = "osD^vP*X<"
STYLE = {
    "svg.hashsalt": "mustdrop", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.25,
    "grid.linewidth": 0.6, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.titlecolor": INK, "legend.frameon": False, "figure.dpi": 100, "savefig.dpi": 200,
}  # fmt: skip
SIZE = (4.8, 3.6)
CROWDED = 6
"""With more methods than this, the legend stands beside the axes."""

FORMATS = ("png", "svg")


def _flops(row: dict) -> float | None:
    saved = (row.get("flops_reductions") or {}).get("with-text-tower")
    return None if saved is None else 100 * (1 - saved)


QUANTITIES: dict[str, tuple[str, Callable[[dict], float | None]]] = {
    "tokens": ("vision tokens, mean over layers", lambda row: row["mean_tokens"]),
    "flops": ("FLOPs up to the first new token, % of vanilla", _flops),
    "time": ("vision + prefill + decode, ms per prompt", prompt_ms),
}
"""What scores are drawn against: title of the axis, and the row's value, None where it is not known."""

LOGARITHMIC = ("tokens", "time")
"""Drawn so that every doubling takes the same room, as budgets halve from one to the next."""


@dataclass(frozen=True)
class Point:
    """One method at one budget: where it stands and its 95 % interval, None where that is not known."""

    method: str
    x: float
    y: float
    interval: tuple[float, float]


def task_points(rows: Iterable[dict], quantity: str) -> list[Point]:
    """The points of one task; ``rows`` as `merge_seeds` gives them. Rows without the quantity are left out."""
    value = QUANTITIES[quantity][1]
    return [
        Point(row["method"], value(row), row["score"], tuple(row["score_ci95"]))
        for row in rows
        if value(row) is not None
    ]


def average_points(rows: Sequence[dict], quantity: str) -> list[Point]:
    """Mean share of vanilla in percent over all tasks; a method that lacks a task at a budget is left out there.

    The interval adds up the tasks' own, taken as independent, and takes the untouched model's score as exact.
    """
    value = QUANTITIES[quantity][1]
    tasks = {row["task"] for row in rows}
    base = {row["task"]: row["score"] for row in rows if row["method"] == VANILLA}
    groups: dict[str, list[dict]] = {}
    for row in rows:
        if base.get(row["task"]) and value(row) is not None:
            groups.setdefault(label(row["method"], row["retain"]), []).append(row)
    points = []
    for group in groups.values():
        if len(group) < len(tasks):
            continue
        share = 100 * fmean(row["score"] / base[row["task"]] for row in group)
        below, above = (
            100 * hypot(*((row["score_ci95"][end] - row["score"]) / base[row["task"]] for row in group)) / len(group)
            for end in (0, 1)
        )
        points.append(Point(group[0]["method"], fmean(map(value, group)), share, (share - below, share + above)))
    return points


def draw(
    points: Sequence[Point],
    title: str,
    x_title: str,
    y_title: str,
    colours: dict[str, int],
    logarithmic: bool = False,
) -> Figure:
    """One picture: a line per method with error bars, the untouched model as a point and a dashed level.

    The legend names methods from high scores to low.

    Parameters
    ----------
    points : sequence of Point
        What to draw.
    title, x_title, y_title : str
        Texts.
    colours : dict
        Number of every method, so that it looks alike in all pictures.
    logarithmic : bool
        Whether each doubling of x takes the same room.
    """
    with matplotlib.rc_context(STYLE):
        scores: dict[str, list[float]] = {}
        for point in points:
            scores.setdefault(point.method, []).append(point.y)
        crowded = len(scores) > CROWDED
        figure = Figure(figsize=(1.6 * SIZE[0], 1.3 * SIZE[1]) if crowded else SIZE, layout="constrained")
        axes = figure.add_subplot()
        for method in sorted(scores, key=lambda name: (name != VANILLA, -fmean(scores[name]))):
            mine = sorted((point for point in points if point.method == method), key=lambda point: point.x)
            plain = method == VANILLA
            colour = INK if plain else COLOURS[colours[method] % len(COLOURS)]
            if plain:
                axes.axhline(mine[0].y, color=INK, linestyle="--", linewidth=0.9, alpha=0.6, zorder=1)
            axes.errorbar(
                [point.x for point in mine],
                [point.y for point in mine],
                yerr=[[abs(point.y - point.interval[end]) for point in mine] for end in (0, 1)],
                label=method,
                color=colour,
                marker="h" if plain else MARKERS[colours[method] % len(MARKERS)],
                linestyle="none" if plain else "-",
                linewidth=2.2 if method.startswith(OURS) else 1.3,
                markersize=5.5,
                elinewidth=0.7,
                capsize=2,
            )
        axes.set(title=title, xlabel=x_title, ylabel=y_title)
        if logarithmic:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(ScalarFormatter())
        else:
            axes.set_xlim(left=0)
        if crowded:
            figure.legend(loc="outside right upper", fontsize=9)
        else:
            axes.legend(loc="best", fontsize=9)
    return figure


def figures(results: Iterable[Result]) -> dict[str, Figure]:
    """All pictures by name, ``mini_gqa-tokens`` and so on; with the model's name in front if there are several.

    A quantity that no row has, as times may be, has no picture.
    """
    results = list(results)
    rows = merge_seeds(results)
    models = list(dict.fromkeys(row["model"] for row in rows))
    methods = sorted({row["method"] for row in rows} - {VANILLA})
    colours = {method: number for number, method in enumerate(methods)}
    found = {}
    for model in models:
        mine = [row for row in rows if row["model"] == model]
        tasks = list(dict.fromkeys(row["task"] for row in mine))
        prefix = f"{file_name(model)}-" if len(models) > 1 else ""
        for quantity, (x_title, _) in QUANTITIES.items():
            if quantity == "time":
                x_title += f"\n{timing(result for result in results if result.row['model'] == model)}"
            points = average_points(mine, quantity) if len(tasks) > 1 else []
            if points:
                title = _title(model, f"average of {len(tasks)} tasks", mine)
                found[f"{prefix}{AVERAGE}-{quantity}"] = draw(
                    points, title, x_title, "score, % of vanilla", colours, quantity in LOGARITHMIC
                )
            for task in tasks:
                group = [row for row in mine if row["task"] == task]
                points = task_points(group, quantity)
                if points:
                    titles = (_title(model, task, group), x_title, _y_title(group[0]))
                    found[f"{prefix}{task}-{quantity}"] = draw(points, *titles, colours, quantity in LOGARITHMIC)
    return found


def encode(figure: Figure, kind: str) -> bytes:
    """A picture as PNG or SVG; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    dated = {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else {"Software": None}
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format=kind, metadata=dated, transparent=kind == "svg")
    return buffer.getvalue()


@command
def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 2 a wrong argument."""
    new = Parser("plots", description=__doc__)
    new.add_argument("results", type=path, nargs="+", help="results folders")
    new.add_argument("--out", type=path, help="folder for the pictures (default: plots in the first results folder)")
    args = new.parse_args(argv)
    results, notes = collect(args.results)
    out = check_out(args.out or args.results[0] / "plots")
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(results).items():
        for kind in FORMATS:
            (out / f"{name}.{kind}").write_bytes(encode(figure, kind))
            print(out / f"{name}.{kind}")
    return 0


def _title(model: str, task: str, rows: Sequence[dict]) -> str:
    """What is drawn; whoever sees only the picture must see that it is synthetic, or only a part."""
    remarks = ["synthetic"] if any(row["synthetic"] for row in rows) else []
    remarks += ["limited"] if any(row["limit"] for row in rows) else []
    return f"{task}, {model}" + (f" ({', '.join(remarks)})" if remarks else "")


def _y_title(row: dict) -> str:
    column = published.columns().get(row["benchmark"])
    return f"{row['metric']}, {column.unit if column else '%'}"


if __name__ == "__main__":
    sys.exit(main())
