"""Line charts and sparklines as inline SVG, coloured by the page's style alone."""

import math
from collections.abc import Sequence

import numpy as np

from moe_peft.training.report.markup import Markup, tag
from moe_peft.training.report.series import Series

# Places with a colour of their own in the style; behind them the same come again, dashed.
NUM_COLOURS = 10
DASHES = (None, "6 3", "2 3")
MOST_POINTS = 320
LEFT, RIGHT, TOP, BOTTOM = 56.0, 14.0, 12.0, 40.0
# A line that leaps this far above the others' usual height is cut, or nothing else could be seen.
LEAP = 4.0


def short(value: float) -> str:
    """A number for an axis or a cell: ``0.00032``, ``1.25``, ``12,400``; a dash for none."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}"


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within ``low..high``, at most ``most`` of them, in steps of 1, 2 or 5 times a power of ten."""
    if high <= low:
        return [low]
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(size * factor for factor in (1, 2, 5, 10, 20, 50) if (high - low) / (size * factor) <= most - 1)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def colour(place: int) -> str:
    """The class that gives a line its adapter's colour."""
    return f"c{place % NUM_COLOURS}"


class _Scale:
    """From a chart's numbers to its pixels."""

    def __init__(self, lines: Sequence[Series], width: float, height: float, *, from_zero: bool) -> None:
        xs = np.concatenate([line.x for line in lines]) if lines else np.array([])
        ys = np.concatenate([line.y for line in lines]) if lines else np.array([])
        ys = ys[np.isfinite(ys)]
        self.left, self.right, self.top, self.bottom = LEFT, width - RIGHT, TOP, height - BOTTOM
        self.x_low, self.x_high = (float(xs.min()), float(xs.max())) if len(xs) else (0.0, 1.0)
        low, high = (float(ys.min()), float(ys.max())) if len(ys) else (0.0, 1.0)
        usual = float(np.quantile(ys, 0.98)) if len(ys) else 1.0
        self.is_cut = usual > 0 and high > LEAP * usual and len(ys) > 10
        high = 1.5 * usual if self.is_cut else high
        if from_zero and low >= 0:
            low = 0.0
        room = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
        self.y_low, self.y_high = (low if low == 0.0 else low - room), high + room
        if self.x_high == self.x_low:
            self.x_low, self.x_high = self.x_low - 1.0, self.x_high + 1.0

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y_low) / (self.y_high - self.y_low) * (self.bottom - self.top)

    def path(self, line: Series) -> str:
        """The line as an SVG path, broken where it has no number."""
        parts, pen = [], "M"
        for x, y in zip(line.x, line.y, strict=True):
            if math.isfinite(y):
                parts.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
                pen = "L"
            else:
                pen = "M"
        return "".join(parts)


def line_chart(
    title: str,
    y_label: str,
    lines: Sequence[Series],
    *,
    faint: Sequence[Series] = (),
    dots: Sequence[Series] = (),
    marks: Sequence[float] = (),
    from_zero: bool = True,
    width: float = 760,
    height: float = 300,
) -> Markup:
    """A chart over optimizer steps.

    Args:
        title: what it shows, for those who cannot see it.
        lines: drawn strong.
        faint: drawn thin and pale behind them, such as what ``lines`` are averages of.
        dots: drawn as points, joined by a dotted line unless they are among ``lines``, such as evaluations.
        marks: steps marked with a cross at the foot, such as skipped ones.
        from_zero: whether an axis of positive numbers begins at 0.
    """
    scale = _Scale([*lines, *faint, *dots], width, height, from_zero=from_zero)
    # As wide as the plot and a point's radius on each side.
    plot = (scale.left - 5, scale.top - 5, scale.right - scale.left + 10, scale.bottom - scale.top + 6)
    drawn = [_line(scale, line, "faint") for line in faint]
    drawn += [_line(scale, line, "line") for line in lines]
    # Points of a line that is drawn already need no line of their own.
    drawn += [_dots(scale, line, is_joined=all(line is not other for other in lines)) for line in dots]
    drawn += [_cross(scale.x(step), scale.bottom - 6) for step in marks]
    note = tag("text", "higher values are cut", x=scale.right, y=scale.top + 8, text_anchor="end", class_="note")
    return tag(
        "svg",
        tag("title", title),
        _axes(scale, y_label),
        # An inner svg cuts off what leaves it.
        tag("svg", *drawn, x=plot[0], y=plot[1], width=plot[2], height=plot[3], viewBox=" ".join(map(str, plot))),
        note if scale.is_cut else None,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=title,
        class_="chart",
    )


def _line(scale: _Scale, line: Series, kind: str) -> Markup:
    dash = DASHES[line.place // NUM_COLOURS % len(DASHES)] if kind == "line" else None
    thin = line.thinned(MOST_POINTS)
    path = tag("path", d=scale.path(thin), class_=kind, stroke_dasharray=dash)
    lone = (
        tag("circle", cx=f"{scale.x(line.x[0]):.1f}", cy=f"{scale.y(line.y[0]):.1f}", r=2.5)
        if len(line.x) == 1 and math.isfinite(line.y[0])
        else None
    )
    return tag("g", tag("title", line.name), path, lone, class_=f"series s{line.place} {colour(line.place)}")


def _dots(scale: _Scale, line: Series, *, is_joined: bool) -> Markup:
    thin = line.thinned(80)
    circles = [
        tag(
            "circle",
            tag("title", f"{line.name}, step {x:g}: {short(y)}"),
            cx=f"{scale.x(x):.1f}",
            cy=f"{scale.y(y):.1f}",
            r=3.4,
        )
        for x, y in zip(thin.x, thin.y, strict=True)
        if math.isfinite(y)
    ]
    path = tag("path", d=scale.path(thin), class_="dotted") if is_joined else None
    return tag("g", path, *circles, class_=f"series s{line.place} {colour(line.place)}")


def _cross(x: float, y: float) -> Markup:
    return tag("path", d=f"M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6", class_="cross")


def _axes(scale: _Scale, y_label: str) -> Markup:
    parts = []
    for value in nice_ticks(scale.y_low, scale.y_high):
        y = f"{scale.y(value):.1f}"
        parts.append(tag("line", x1=scale.left, x2=scale.right, y1=y, y2=y, class_="grid"))
        parts.append(tag("text", short(value), x=scale.left - 8, y=y, dy="0.32em", text_anchor="end"))
    for value in nice_ticks(scale.x_low, scale.x_high, 9):
        if value == round(value):
            x = f"{scale.x(value):.1f}"
            parts.append(tag("text", f"{value:,.0f}", x=x, y=scale.bottom + 16, text_anchor="middle"))
    parts.append(tag("line", x1=scale.left, x2=scale.right, y1=scale.bottom, y2=scale.bottom, class_="axis"))
    middle = (scale.top + scale.bottom) / 2
    parts.append(
        tag("text", y_label, transform=f"translate(13 {middle:.1f}) rotate(-90)", text_anchor="middle", class_="label")
    )
    parts.append(
        tag(
            "text",
            "optimizer step",
            x=(scale.left + scale.right) / 2,
            y=scale.bottom + 33,
            text_anchor="middle",
            class_="label",
        )
    )
    return tag("g", *parts, class_="axes", aria_hidden="true")


def sparkline(line: Series, title: str) -> Markup:
    """The course of a line in the height of a text."""
    thin = line.smoothed().thinned(60)
    finite = thin.y[np.isfinite(thin.y)]
    if len(finite) < 2:
        return Markup("")
    low, reach = float(finite.min()), float(np.ptp(finite)) or 1.0
    span = float(thin.x[-1] - thin.x[0]) or 1.0
    points = [
        f"{2 + 86 * (x - thin.x[0]) / span:.1f} {20 - 17 * (y - low) / reach:.1f}"
        for x, y in zip(thin.x, thin.y, strict=True)
        if math.isfinite(y)
    ]
    path = tag("path", d="M" + "L".join(points), class_="line")
    return tag(
        "svg",
        tag("title", title),
        tag("g", path, class_=colour(line.place)),
        viewBox="0 0 90 22",
        role="img",
        aria_label=title,
        class_="spark",
    )


def legend(names: Sequence[tuple[str, int]]) -> Markup:
    """The names of a chart's lines with their colours; pointing at one dims the others."""
    items = []
    for name, place in names:
        dash = DASHES[place // NUM_COLOURS % len(DASHES)]
        key = tag(
            "svg",
            tag("path", d="M1 5H23", class_="line", stroke_dasharray=dash),
            viewBox="0 0 24 10",
            class_="key",
            aria_hidden="true",
        )
        items.append(tag("li", key, name, class_=f"{colour(place)} k{place}"))
    return tag("ul", *items, class_="legend")


def dimming_style(num_places: int) -> str:
    """The rules behind :func:`legend`: without a script, one for each adapter."""
    return "\n".join(
        f"figure:has(.k{place}:hover) .series:not(.s{place}){{opacity:.12}}" for place in range(num_places)
    )
