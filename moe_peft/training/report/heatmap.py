"""Heat maps of expert load, a row a layer, as inline SVG: balance is blank, a collapse a dark column."""

import math

import numpy as np

from moe_peft.training.display.expert_load import load_shares
from moe_peft.training.report.markup import Markup, table, tag

LEFT, TOP = 46.0, 24.0
# Numbers are written into cells while there is room for them.
MOST_NUMBERED_EXPERTS = 16
DARK = 0.55  # opacity from which a cell's number is white


def heat_map(counts: np.ndarray, title: str) -> Markup:
    """Which share of each layer's routed tokens every expert got.

    Args:
        counts: ``[L routed layers, E experts]`` tokens.
        title: what it shows, for those who cannot see it.
    """
    shares = load_shares(counts)
    num_layers, num_experts = counts.shape
    cell_width = min(46.0, max(7.0, 420.0 / num_experts))
    cell_height = min(20.0, max(9.0, 460.0 / num_layers))
    highest = max(2.0, float(np.nanmax(shares, initial=0.0)) * num_experts)
    is_numbered = num_experts <= MOST_NUMBERED_EXPERTS and cell_height >= 11
    cells = [
        _cell(
            float(shares[layer, expert]) * num_experts,
            highest,
            f"layer {layer}, expert {expert}",
            f"{100 * shares[layer, expert]:.0f}" if is_numbered else "",
            (LEFT + expert * cell_width, TOP + layer * cell_height, cell_width, cell_height),
            num_experts,
        )
        for layer, expert in np.ndindex(counts.shape)
    ]
    every = 1 + (num_layers - 1) // 24
    layers = [
        tag("text", layer, x=LEFT - 6, y=f"{TOP + (layer + 0.5) * cell_height:.1f}", dy="0.32em", text_anchor="end")
        for layer in range(0, num_layers, every)
    ]
    every = 1 + (num_experts - 1) // max(1, round(420 / 22))
    experts = [
        tag("text", expert, x=f"{LEFT + (expert + 0.5) * cell_width:.1f}", y=TOP - 6, text_anchor="middle")
        for expert in range(0, num_experts, every)
    ]
    width, height = LEFT + num_experts * cell_width + 4, TOP + num_layers * cell_height + 4
    return tag(
        "svg",
        tag("title", title),
        tag("text", "layer", x=2, y=TOP - 6, class_="label"),
        *layers,
        *experts,
        *cells,
        viewBox=f"0 0 {width:g} {height:g}",
        style=f"max-width:{width:.0f}px",
        role="img",
        aria_label=title,
        class_="heat",
    )


def _cell(
    ratio: float, highest: float, name: str, number: str, box: tuple[float, float, float, float], num_experts: int
) -> Markup:
    """One expert of one layer.

    Args:
        ratio: its load over the layer's mean: 1 is balance; NaN where the layer had no token.
        highest: the ratio of the strongest colour.
        number: what is written into it.
        box: its left, top, width and height.
    """
    x, y, width, height = box
    has_tokens = math.isfinite(ratio)
    strength = 0.0 if not has_tokens else (ratio - 1) / (highest - 1) if ratio > 1 else 1 - ratio
    side = "dead" if ratio == 0 else "over" if ratio > 1 else "under"
    rect = tag(
        "rect",
        tag("title", f"{name}: {ratio / num_experts:.1%} of the tokens" if has_tokens else f"{name}: no token"),
        x=f"{x + 0.5:.1f}",
        y=f"{y + 0.5:.1f}",
        width=f"{width - 1:.1f}",
        height=f"{height - 1:.1f}",
        rx=2,
        class_=side,
        fill_opacity=f"{0.06 + 0.94 * strength:.2f}",
    )
    if not number or not has_tokens:
        return rect
    text = tag(
        "text",
        number,
        x=f"{x + width / 2:.1f}",
        y=f"{y + height / 2:.1f}",
        dy="0.34em",
        text_anchor="middle",
        class_="dark" if strength > DARK else "number",
    )
    return Markup(rect + text)


def scale(num_experts: int) -> Markup:
    """What the colours mean."""
    return tag(
        "p",
        tag("span", "", class_="swatch dead"),
        " no token  ",
        tag("span", "", class_="swatch under"),
        " less than balance  ",
        tag("span", "", class_="swatch blank"),
        f" balance, {100 / num_experts:.3g}% of a layer's tokens  ",
        tag("span", "", class_="swatch over"),
        " more" + (", in percent of the layer's routed tokens" if num_experts <= MOST_NUMBERED_EXPERTS else ""),
        class_="scale",
    )


def load_table(counts: np.ndarray, caption: str) -> Markup:
    """The same in numbers."""
    shares = load_shares(counts)
    head = ["layer", *range(counts.shape[1]), "tokens", "largest / mean"]
    rows = [
        [
            layer,
            *(f"{100 * share:.1f}%" if np.isfinite(share) else "–" for share in row),
            f"{counts[layer].sum():,}",
            f"{row.max() * len(row):.2f}" if np.isfinite(row).all() else "–",
        ]
        for layer, row in enumerate(shares)
    ]
    return table(head, rows, caption=caption, class_="numbers")
