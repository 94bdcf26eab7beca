"""The pictures a run leaves in its folder: loss curves, and the load of every expert."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_peft.io.atomic import write_bytes_atomically
from moe_peft.training.folder.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Runs longer than this are too noisy to read step by step: a marked average is drawn over the faint raw curve.
SMOOTH_ABOVE_STEPS = 60
DPI = 130
LEGEND_LINES = 22
# Okabe and Ito's colours without yellow, told apart by nearly all eyes; line styles go on where they end.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")


def _save(figure: "Figure", png_path: str | Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write_bytes_atomically(Path(png_path), buffer.getvalue())


def moving_average(values: np.ndarray, span: float) -> np.ndarray:
    """Exponential moving average, started without bias; NaNs are stepped over.

    Args:
        values: ``[N]`` floats.
        span: steps the average looks back over, as pandas counts it (weight ``2 / (span + 1)`` on the newest).
    """
    keep = 1.0 - 2.0 / (span + 1.0)
    averages, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        if np.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1.0
        averages[i] = total / weight if weight else np.nan
    return averages


def _series(rows: list[dict[str, Any]], event: str, adapter: str, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one adapter's field; null, which stands for a non-finite value, becomes a gap."""
    own = [row for row in rows if row["event"] == event and row["adapter"] == adapter]
    steps = np.array([row["step"] for row in own], dtype=float)
    values = np.array([np.nan if row[field] is None else row[field] for row in own], dtype=float)
    return steps, values


def plot_loss_curves(metrics_path: str | Path, png_path: str | Path) -> None:
    """Draw every adapter's training and held-out loss, and below them the aux losses where there are any.

    Args:
        metrics_path: a run's ``metrics.jsonl``.
        png_path: the picture to write.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = read_metrics(metrics_path)
    # A job that never stepped, queued or refused, has no curve.
    rows = [row for row in rows if row["event"] in ("step", "eval")]
    adapters = list(dict.fromkeys(row["adapter"] for row in rows))
    has_aux = any(row.get("aux_loss") for row in rows)
    # The legend stands beside the axes, two lines an adapter: many adapters need columns, and room for them.
    has_evals = any(row["event"] == "eval" for row in rows)
    num_columns = 1 + (len(adapters) * (1 + has_evals) - 1) // LEGEND_LINES if adapters else 1
    width, height = 9.0 + 2.2 * (num_columns - 1), 6.4 if has_aux else 4.8
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(2 if has_aux else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + has_aux])
    loss_axis, aux_axis = axes[0, 0], axes[-1, 0]

    longest = max((row["step"] for row in rows), default=0)
    is_smooth = longest > SMOOTH_ABOVE_STEPS
    span = max(5, round(longest / 25))
    for i, adapter in enumerate(adapters):
        colour = COLOURS[i % len(COLOURS)]
        style = LINE_STYLES[i // len(COLOURS) % len(LINE_STYLES)]
        steps, losses = _series(rows, "step", adapter, "loss")
        if is_smooth:
            loss_axis.plot(steps, losses, color=colour, alpha=0.22, linewidth=0.9)
        shown = moving_average(losses, span) if is_smooth else losses
        loss_axis.plot(steps, shown, style, color=colour, linewidth=1.6, label=f"{adapter}: training")
        eval_steps, eval_losses = _series(rows, "eval", adapter, "eval_loss")
        if len(eval_steps):
            loss_axis.plot(
                eval_steps,
                eval_losses,
                linestyle=(0, (1, 2)),
                linewidth=1.1,
                marker="o",
                markersize=6.5,
                markeredgecolor="white",
                color=colour,
                zorder=3,
                label=f"{adapter}: held-out",
            )
        _, aux_losses = _series(rows, "step", adapter, "aux_loss")
        if has_aux and np.any(np.nan_to_num(aux_losses)):
            aux_axis.plot(steps, aux_losses, style, color=colour, linewidth=1.2, label=adapter)

    title = "Loss of every adapter"
    if is_smooth:
        title += f"\nfaint: each step; strong: exponential moving average over {span} steps"
    loss_axis.set_title(title, fontsize=11)
    loss_axis.set_ylabel("loss (nats a supervised token)")
    loss_axis.set_ylim(bottom=0.0)
    for axis in {loss_axis, aux_axis}:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.02)
    if has_aux:
        aux_axis.set_ylabel("aux loss\n(times coefficient)")
    axes[-1, 0].set_xlabel("optimizer step")
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    if adapters:
        # Beside the axes: over them it would hide some curve, wherever it stood.
        figure.legend(
            *loss_axis.get_legend_handles_labels(),
            loc="outside right upper",
            frameon=False,
            fontsize=9 if num_columns == 1 else 7.5,
            ncols=num_columns,
        )
    else:
        loss_axis.text(0.5, 0.5, "no step was taken", transform=loss_axis.transAxes, ha="center", va="center")
    _save(figure, png_path)


def plot_expert_load(load: np.ndarray, png_path: str | Path, adapter: str) -> None:
    """Draw which share of each layer's routed tokens every expert got, coloured by its distance from balance.

    Args:
        load: ``[L layers, E experts]``, each row summing to 1; NaN in a layer without tokens.
        png_path: the picture to write.
        adapter: the name in the title.
    """
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    assert load.ndim == 2, f"load must be [layers, experts], not {load.shape}"
    num_layers, num_experts = load.shape
    balanced = 1.0 / num_experts
    width = min(14.0, 3.2 + 0.55 * num_experts)
    height = min(16.0, 1.9 + 0.26 * num_layers)
    figure = Figure(figsize=(max(width, 4.6), max(height, 3.2)), layout="constrained")
    axis = figure.subplots()
    # White is balance, so a collapsed router shows as dark stripes whatever the number of experts.
    largest = max(2.0 * balanced, float(np.nanmax(load, initial=0.0)))
    norm = TwoSlopeNorm(vmin=0.0, vcenter=balanced, vmax=largest)
    image = axis.imshow(load, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
    if num_experts <= 16 and num_layers <= 48:
        for layer, expert in np.argwhere(np.isfinite(load)):
            shade = norm(load[layer, expert])
            axis.text(
                expert,
                layer,
                f"{100 * load[layer, expert]:.0f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if abs(shade - 0.5) > 0.33 else "black",
            )
    axis.set_title(f"Expert load of {adapter}\npercent of each layer's routed tokens", fontsize=11)
    axis.set_xlabel("expert")
    axis.set_ylabel("layer")
    for ticks, count in ((axis.xaxis, num_experts), (axis.yaxis, num_layers)):
        ticks.set_major_locator(MaxNLocator(nbins=min(count + 1, 32), integer=True, min_n_ticks=1))
    axis.tick_params(labelsize=8)

    bar = figure.colorbar(image, ax=axis)
    round_ticks = MaxNLocator(nbins=6).tick_values(0.0, largest)
    others = [tick for tick in round_ticks if tick <= largest and abs(tick - balanced) > 0.06 * largest]
    bar.set_ticks([*others, balanced])
    bar.ax.set_yticklabels([*(f"{100 * tick:.3g}%" for tick in others), f"{100 * balanced:.3g}% balanced"])
    bar.ax.axhline(balanced, color="black", linewidth=1.5)
    bar.ax.tick_params(labelsize=8)
    _save(figure, png_path)
