"""The sections of a report that are pictures: curves of all adapters, of each, and maps of the experts' load."""

from collections.abc import Callable, Sequence

import numpy as np

from moe_peft.training.display.expert_load import dead_experts, imbalance
from moe_peft.training.display.plots import SMOOTH_ABOVE_STEPS
from moe_peft.training.folder.metrics import ExpertMetrics
from moe_peft.training.report.charts import NUM_COLOURS, legend, line_chart, short
from moe_peft.training.report.contents import LATEST_SHARE, AdapterRows, Contents
from moe_peft.training.report.heatmap import heat_map, load_table, scale
from moe_peft.training.report.markup import Markup, folded, table, tag
from moe_peft.training.report.sections import section
from moe_peft.training.report.series import Series, series_of, smoothing_span, table_rows

MOST_IN_SMALL_LEGEND = 8


def _data_table(lines: Sequence[Series], names: Sequence[str], caption: str) -> Markup:
    rows = [[f"{step:,}", *(short(value) for value in values)] for step, values in table_rows(lines)]
    return folded("the numbers", table(["step", *names], rows, caption=caption, class_="numbers"))


def _figure(
    title: str,
    y_label: str,
    lines: Sequence[Series],
    *,
    class_: str = "",
    note: str = "",
    has_dots: bool = False,
    height: float = 260,
    width: float = 600,
) -> Markup | None:
    """One chart of every adapter that has the numbers for it."""
    lines = [line for line in lines if np.isfinite(line.y).any()]
    if not lines:
        return None
    chart = line_chart(
        title,
        y_label,
        lines,
        dots=lines if has_dots and len(lines) <= NUM_COLOURS else (),
        width=width,
        height=height,
    )
    names = [line.name for line in lines]
    # Under a small chart a long legend would be larger than the chart; the colours are those of the large ones.
    has_legend = len(lines) > 1 and (class_ == "wide" or len(lines) <= MOST_IN_SMALL_LEGEND)
    return tag(
        "figure",
        tag("h3", title),
        tag("figcaption", note) if note else None,
        chart,
        legend([(line.name, line.place) for line in lines]) if has_legend else None,
        _data_table(lines, names, title),
        class_=f"card {class_}",
    )


def curves_section(contents: Contents) -> Markup:
    """Losses, rates and speeds of all adapters, in one chart each."""
    adapters = contents.adapters
    longest = max((len(adapter.steps) for adapter in adapters), default=0)
    note = "moving averages; each step by itself is under “Each adapter”" if longest > SMOOTH_ABOVE_STEPS else ""
    figures = [
        _figure(
            "Training loss",
            "nats a supervised token",
            [adapter.loss.smoothed() for adapter in adapters],
            class_="wide",
            note=note,
            width=1160,
            height=340,
        ),
        _figure(
            "Held-out loss",
            "nats a supervised token",
            [adapter.eval_loss for adapter in adapters],
            class_="wide",
            has_dots=True,
            width=1160,
        ),
        _figure(
            "Learning rate", "learning rate", [adapter.line(lambda row: row.lr) for adapter in adapters], class_=""
        ),
        _figure(
            "Speed",
            "supervised tokens/s",
            [adapter.line(lambda row: row.tokens_per_second).smoothed() for adapter in adapters],
            note=note and "moving averages",
        ),
        _figure(
            "Router losses",
            "times their coefficients",
            [
                adapter.line(lambda row: row.aux_loss).smoothed()
                for adapter in adapters
                if any(row.aux_loss for row in adapter.steps)
            ],
        ),
        _figure(
            "Gradient norm",
            "before clipping",
            [adapter.line(lambda row: row.grad_norm).smoothed() for adapter in adapters],
        ),
    ]
    drawn = [figure for figure in figures if figure is not None]
    body = tag("div", *drawn, class_="cards") if drawn else tag("p", "No step was taken yet.", class_="card")
    return section("curves", "Curves", body)


def adapters_section(contents: Contents) -> Markup | None:
    """Each adapter's losses: every step, their average, the held-out ones, the skipped steps."""
    figures = [_adapter_figure(adapter) for adapter in contents.adapters if adapter.steps]
    return section("adapters", "Each adapter", tag("div", *figures, class_="cards")) if figures else None


def _adapter_figure(adapter: AdapterRows) -> Markup:
    raw, held_out = adapter.loss, adapter.eval_loss
    smooth = raw.smoothed()
    is_smooth = smooth is not raw
    parts = ["training loss"]
    if is_smooth:
        parts = [f"faint: every step; strong: moving average over {smoothing_span(len(raw.y))} steps"]
    if len(held_out.x):
        parts.append("dots: held-out loss")
    if adapter.skipped:
        parts.append("crosses: skipped steps")
    lines, names = [raw], ["training loss"]
    if is_smooth:
        lines, names = [*lines, smooth], [*names, "average"]
    if len(held_out.x):
        lines, names = [*lines, held_out], [*names, "held-out loss"]
    title = f"Losses of {adapter.name}"
    return tag(
        "figure",
        tag("h3", adapter.name),
        tag("figcaption", "; ".join(parts)),
        line_chart(
            title,
            "nats a supervised token",
            [smooth],
            faint=[raw] if is_smooth else [],
            dots=[held_out] if len(held_out.x) else [],
            marks=[row.step for row in adapter.skipped],
            width=600,
            height=260,
        ),
        _data_table(lines, names, title),
        class_="card",
    )


def experts_section(contents: Contents) -> Markup | None:
    """Of every routed adapter, who got how many tokens."""
    routed = [adapter for adapter in contents.adapters if adapter.counts is not None]
    if not routed:
        return None
    cards = [_expert_card(adapter) for adapter in routed]
    return section("experts", "Experts", tag("div", *cards, class_="cards"))


def _expert_card(adapter: AdapterRows) -> Markup:
    counts, latest = adapter.counts, adapter.latest_counts
    assert counts is not None and latest is not None, "the section takes routed adapters only"
    num_dead = len(dead_experts(latest))
    whole, last = (
        f"{adapter.name}: all {adapter.experts[-1].step:,} steps",
        f"{adapter.name}: the last {LATEST_SHARE:.0%}",
    )
    words = (
        f"{counts.shape[0]} layers of {counts.shape[1]} experts; lately the fullest expert of a layer gets "
        f"{short(float(np.nanmax(imbalance(latest))))} times the mean at most, and "
        + ("every expert gets some." if num_dead == 0 else f"{num_dead} {'gets' if num_dead == 1 else 'get'} nothing.")
    )
    maps = tag("div", _map(counts, whole), _map(latest, last), class_="maps")
    return tag(
        "div",
        tag("h3", adapter.name),
        tag("p", words),
        maps,
        scale(counts.shape[1]),
        _imbalance_chart(adapter),
        class_="card wide",
    )


def _map(counts: np.ndarray, title: str) -> Markup:
    return tag(
        "figure",
        tag("figcaption", title),
        heat_map(counts, f"Expert load of {title}"),
        folded("the numbers", load_table(counts, f"Expert load of {title}")),
    )


def _imbalance_chart(adapter: AdapterRows) -> Markup:
    def over_layers(fold: Callable[[np.ndarray], float], place: int) -> Series:
        def value(row: ExpertMetrics) -> float:
            per_layer = imbalance(np.array(row.counts, dtype=np.int64))
            return fold(per_layer[np.isfinite(per_layer)]) if np.isfinite(per_layer).any() else float("nan")

        return series_of(adapter.experts, adapter.name, place, value)

    worst = over_layers(lambda values: float(values.max()), adapter.place % NUM_COLOURS)
    mean = over_layers(lambda values: float(values.mean()), adapter.place % NUM_COLOURS + NUM_COLOURS)
    title = f"Balance of {adapter.name}"
    return tag(
        "figure",
        tag(
            "figcaption", "Largest load over the mean, 1 being balance: solid, the worst layer; dashed, the mean of all"
        ),
        line_chart(title, "largest / mean", [worst, mean], width=1160, height=200),
        _data_table([worst, mean], ["worst layer", "mean of layers"], title),
    )
