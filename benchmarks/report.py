"""Tables for the README and pictures for the docs, made from the rows of results.

    python benchmarks/report.py                    README.md between its two markers, docs/methods.md between the same,
                                                   and docs/benchmarks-*.png
    python benchmarks/report.py --print            the tables alone, to standard output

Of the rows of one case the newest counts. The markers are the lines {begin} and {end}.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rows import RESULTS, ROOT, read_rows
from timing import Spread, readable

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
# Okabe and Ito's blue and grey, told apart by nearly all eyes.
_BLUE, _GREY = "#0072B2", "#999999"
_DPI = 130

Row = dict[str, Any]


def main(arguments: Sequence[str]) -> None:
    """Write the tables and draw the pictures."""
    about = (__doc__ or "").format(begin=BEGIN, end=END)
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the rows")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with the markers")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs", help="folder for them")
    parser.add_argument("--print", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    rows = read_rows(options.results)
    text = tables(rows, TABLES, "benchmarks/results")
    pages = {name: tables(rows, of, "../benchmarks/results") for name, of in PAGES.items()}
    if options.print:
        print("\n\n".join([text, *pages.values()]))
        return
    replace_between_markers(options.readme, text)
    for name, page in pages.items():
        if page:
            replace_between_markers(options.pictures / name, page)
    for path in draw(rows, options.pictures):
        print(f"drawn: {path}")
    for name in rows:
        if name not in TABLES and not any(name in of for of in PAGES.values()):
            print(f"no table is made of {name}.jsonl")


def replace_between_markers(path: Path, text: str) -> None:
    """Put text between a file's markers.

    Raises:
        ValueError: when it does not have one of each, in their order.
    """
    old = path.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{path} must have the line {BEGIN} and, after it, the line {END}, once each")
    before, rest = old.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def tables(rows: Mapping[str, Sequence[Row]], of: Mapping[str, Callable[[Sequence[Row]], str]], results: str) -> str:
    """All tables in Markdown, one a benchmark and device.

    Args:
        rows: of all benchmarks.
        of: the benchmarks, and what makes a table of one.
        results: the rows' folder as seen from the page.
    """
    parts = []
    for name, make in of.items():
        for device, group in by_device(rows.get(name, ())).items():
            commits = ", ".join(sorted({row["commit"] for row in group}))
            source = f"[rows]({results}/{name}.jsonl) of {commits}"
            parts.append(f"{device}; {source}:\n\n{make(group)}")
    return "\n\n".join(parts)


def by_device(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows in groups that may be compared, by a description of the machine."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        machine = f"{row['device']}, {row['threads']} threads, torch {row['versions']['torch']}"
        groups.setdefault(machine, []).append(row)
    return groups


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _times(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.2f}x ({spread['p20']:.2f} to {spread['p80']:.2f})"


def _memory(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} GB"


def peers_table(rows: Sequence[Row]) -> str:
    """Ours beside others."""
    lines = []
    for row in rows:
        ours, theirs = row["ours"], row["theirs"]
        lines.append(
            [
                row["case"],
                f"{readable(ours['tokens_per_second']['median'])} ({row['dtype']})",
                f"{readable(theirs['tokens_per_second']['median'])} ({row['mode']})",
                _times(row["ratio"]),
                f"{_memory(ours['peak_memory_gb'])}, {_memory(theirs['peak_memory_gb'])}",
            ]
        )
    return markdown(["beside others", "our tokens/s", "their tokens/s", "faster by", "memory: ours, theirs"], lines)


def step_table(rows: Sequence[Row]) -> str:
    """Our steps beside the machine's limit."""
    lines = []
    for row in rows:
        ratio = "" if row["ratio_to"] == row["variant"] else f"{_times(row['ratio'])} {row['ratio_to']}"
        limit = f"{row['gemm_share']['median']:.0%}" + (f", MFU {row['mfu']['median']:.0%}" if "mfu" in row else "")
        speed = readable(row["tokens_per_second"]["median"])
        lines.append([row["case"], speed, ratio, limit, _memory(row["peak_memory_gb"])])
    return markdown(["one step", "tokens/s", "time", "GEMMs alone / step", "peak memory"], lines)


def default_run_table(rows: Sequence[Row]) -> str:
    """The run without a config."""
    lines = [
        [
            " ".join(["python -m moe_peft.train", *row["overrides"]]),
            f"{row['seconds']:.0f} s",
            ", ".join(f"{name} {before} to {after}" for name, (before, after) in row["held_out_loss"].items()),
            _memory(row["peak_memory_gb"]),
        ]
        for row in rows
    ]
    return markdown(["a whole run", "time", "held-out losses", "peak memory"], lines)


def many_adapters_table(rows: Sequence[Row]) -> str:
    """Many adapters fused, beside one after another."""
    lines = []
    for row in rows:
        for number, figures in row["fused"].items():
            beside_peft = figures.get("ratio_to_peft")
            lines.append(
                [
                    f"{row['case']}: {number} fused",
                    readable(figures["tokens_per_second"]["median"]),
                    _times(figures["ratio"]),
                    _times(beside_peft) if beside_peft else "",
                    _memory(figures["peak_memory_gb"]),
                ]
            )
    header = ["many adapters", "tokens/s", "ours one by one", "peft one by one", "peak memory"]
    return markdown(header, lines)


def methods_table(rows: Sequence[Row]) -> str:
    """Every method beside plain LoRA."""
    lines = [
        [
            row["method"],
            f"{row['trainable'] / 1e6:.2f} M",
            readable(row["tokens_per_second"]["median"]),
            "" if row["method"] == row["ratio_to"] else _times(row["ratio"]),
            f"{row['first_loss']:.2f} to {row['last_loss']:.2f}",
            _memory(row["peak_memory_gb"]),
        ]
        for row in rows
    ]
    title = rows[0]["case"].rpartition(":")[0]
    header = [f"{rows[0]['steps']} steps of {title}", "trained", "tokens/s", "time / LoRA", "loss", "peak memory"]
    return markdown(header, lines)


def kernels_table(rows: Sequence[Row]) -> str:
    """Every operation beside its reference and the naive way."""

    def beside(figures: Mapping[str, Any], way: str) -> str:
        return _times(figures["over_ours"][way]) if way in figures["over_ours"] else ""

    lines = [
        [
            f"{row['op']}, {row['dtype']}, {row['shape']}: {what}",
            f"{row[what]['ms']['ours']['median']:.2f} ms",
            beside(row[what], "reference"),
            beside(row[what], "naive"),
        ]
        for row in rows
        for what in ("forward", "forward+backward")
    ]
    return markdown(["operation", "ours", "reference / ours", "naive / ours"], lines)


# What a page of docs/ shows between the same markers.
PAGES: dict[str, dict[str, Callable[[Sequence[Row]], str]]] = {
    "methods.md": {"methods": methods_table},
    "performance.md": {"kernels": kernels_table},
}
# What the README shows, in this order.
TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "peers": peers_table,
    "many_adapters": many_adapters_table,
    "step": step_table,
    "default_run": default_run_table,
}


def draw(rows: Mapping[str, Sequence[Row]], folder: Path) -> list[Path]:
    """Pictures of the peers' ratios, of our steps (a panel a machine each), and of many adapters.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, panel in (("peers", _ratio_panel), ("step", _step_panel)):
        groups = by_device(rows.get(name, ()))
        if groups:
            path = folder / f"benchmarks-{name}.png"
            _save_panels(groups, panel, path)
            drawn.append(path)
    if rows.get("many_adapters"):
        drawn.append(_draw_many_adapters(rows["many_adapters"], folder / "benchmarks-many-adapters.png"))
    return drawn


def _draw_many_adapters(rows: Sequence[Row], path: Path) -> Path:
    """Tokens per second over the number of fused adapters, a panel a row; peft as a line to pass."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(rows), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        numbers = [int(number) for number in row["fused"]]
        speeds = [figures["tokens_per_second"]["median"] for figures in row["fused"].values()]
        axes.plot(numbers, speeds, marker="o", color=_BLUE, label="fused")
        axes.axhline(speeds[0], color=_BLUE, linewidth=1, linestyle=":", label="one after another")
        if row["peft"] is not None:
            peft = row["peft"]["tokens_per_second"]["median"]
            axes.axhline(peft, color=_GREY, linewidth=1, label="peft, one after another")
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.set_ylim(bottom=0)
        axes.set_title(row["case"].replace(", ", "\n", 1), fontsize=8, loc="left")
        axes.set_xlabel("adapters that share a forward", fontsize=8)
        axes.set_ylabel("tokens per second", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=_DPI)
    return path


def _save_panels(groups: Mapping[str, list[Row]], panel: Callable[[Any, list[Row]], None], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [len(group) for group in groups.values()]
    figure = Figure(figsize=(9, 0.9 * len(groups) + 0.5 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (device, group) in zip(panels, groups.items(), strict=True):
        axes.set_title(device, fontsize=9, loc="left")
        axes.set_yticks(range(len(group)), [row["case"] for row in group], fontsize=7)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        panel(axes, group)
    figure.savefig(path, dpi=_DPI)


def _ratio_panel(axes: Any, rows: list[Row]) -> None:
    ratios = [Spread(**row["ratio"]) for row in rows]
    medians = [ratio.median for ratio in ratios]
    below = [ratio.median - ratio.p20 for ratio in ratios]
    above = [ratio.p80 - ratio.median for ratio in ratios]
    axes.barh(range(len(rows)), medians, xerr=[below, above], color=_BLUE, ecolor=_GREY, height=0.6)
    axes.axvline(1.0, color=_GREY, linewidth=1)
    axes.set_xlabel("times as fast as the other, median and 20% to 80%", fontsize=8)


def _step_panel(axes: Any, rows: list[Row]) -> None:
    speeds = [row["tokens_per_second"]["median"] for row in rows]
    limits = [speed / row["gemm_share"]["median"] for speed, row in zip(speeds, rows, strict=True)]
    axes.barh(range(len(rows)), limits, color=_GREY, height=0.6, alpha=0.4, label="necessary GEMMs alone")
    axes.barh(range(len(rows)), speeds, color=_BLUE, height=0.6, label="the step")
    axes.set_xlabel("tokens per second", fontsize=8)
    axes.legend(fontsize=7, frameon=False)


if __name__ == "__main__":
    main(sys.argv[1:])
