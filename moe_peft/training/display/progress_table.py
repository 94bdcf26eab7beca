"""The live picture of a run on a terminal: a row a running adapter, a line for all others, never more than fits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moe_peft.training.display.adapter_progress import AdapterProgress
from moe_peft.training.folder.metrics import FINISHED, UNDER_WAY

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

NARROW = 110
# Lines of the picture that are no adapter's: the sums, a blank, the head and its rule, the folded ones, the cursor's.
OTHER_LINES = 10
SHORTEST_NAME, LONGEST_NAME = 8, 24
# What a narrow terminal does without, the least missed first.
DISPENSABLE = ("lr", "aux", "before", "progress", "trend", "share", "experts", "tok/s", "held-out", "faults", "left")


def format_seconds(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3675`` -> ``1:01:15``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def listed(names: Sequence[str], width: int) -> str:
    """As many names as fit: ``a, b, c and 5 more``."""
    text = ", ".join(names)
    shown = len(names)
    while len(text) > width and shown > 0:
        shown -= 1
        text = f"{', '.join(names[:shown])} and {len(names) - shown} more".lstrip()
    return text if shown or not names else f"{len(names)}"


def shortened(name: str, width: int) -> str:
    """A name that is too long, without its middle: ``custo…03-moe``, for names often differ at their ends alone."""
    if len(name) <= width:
        return name
    head = (width - 1) // 2
    return f"{name[:head]}…{name[len(name) - (width - 1 - head) :]}"


@dataclass(frozen=True)
class _Column:
    """One column: what it says of an adapter, an empty text where it has nothing to say."""

    title: str
    text: Callable[[AdapterProgress], str]
    style: str = ""
    justify: str = "right"


def picture(
    adapters: Mapping[str, AdapterProgress],
    *,
    width: int,
    height: int,
    max_batch_tokens: int | None = None,
    seconds: float | None = None,
) -> "Group":
    """The picture as it stands now.

    Args:
        adapters: by name, in the order of display.
        width: of the terminal, in characters.
        height: of the terminal, in lines; the picture stays below it.
        max_batch_tokens: the budget of which shares are told; None tells none.
        seconds: since the run began; None leaves it out.
    """
    from rich.console import Group
    from rich.text import Text

    running = {name: adapter for name, adapter in adapters.items() if adapter.state == "running"}
    num_rows = max(1, height - OTHER_LINES)
    shown = dict(list(running.items())[: num_rows if len(running) <= num_rows else num_rows - 1])
    parts: list[RenderableType] = [_sums(adapters, running, max_batch_tokens, seconds, width)]
    if shown:
        parts.append(_table(shown, width, max_batch_tokens))
    folded = [
        ("queued", "cyan", [name for name, adapter in adapters.items() if adapter.state == "queued"]),
        ("waiting", "cyan", [name for name, adapter in adapters.items() if adapter.state == "waiting"]),
        ("finished", "green", [_finished_text(*item) for item in adapters.items() if item[1].state in FINISHED]),
        ("ended", "red", [_ended_text(*item) for item in adapters.items() if _has_ended_badly(item[1])]),
    ]
    if len(shown) < len(running):
        folded.insert(0, ("running", "cyan", list(running)[len(shown) :]))
    for label, style, names in folded:
        if names:
            head = f"{label} {len(names)}"
            line = Text(no_wrap=True, overflow="ellipsis")
            line.append(f"{head:<13}", style=style).append(listed(names, width - 14))
            parts.append(line)
    return Group(*parts)


def _has_ended_badly(adapter: AdapterProgress) -> bool:
    return adapter.state not in UNDER_WAY + FINISHED


def _finished_text(name: str, adapter: AdapterProgress) -> str:
    loss = f" {adapter.evals[-1].eval_loss:.3f}" if adapter.evals else ""
    return name + loss + (f" ({adapter.state})" if adapter.state != "done" else "")


def _ended_text(name: str, adapter: AdapterProgress) -> str:
    # The reason was printed above the picture.
    return f"{name} ({adapter.state})"


def _sums(
    adapters: Mapping[str, AdapterProgress],
    running: Mapping[str, AdapterProgress],
    max_batch_tokens: int | None,
    seconds: float | None,
    width: int,
) -> "Text":
    """``4 running · 8 queued · 6 of 20 finished · 1,240 tok/s · 96% of the budget · 12:31``, as far as it fits."""
    from rich.text import Text

    num_queued = sum(adapter.state == "queued" for adapter in adapters.values())
    num_finished = sum(adapter.state in FINISHED for adapter in adapters.values())
    speed = sum(adapter.last.tokens_per_second for adapter in running.values() if adapter.last is not None)
    parts = [f"{len(running)} running"] if running else []
    if num_queued:
        parts.append(f"{num_queued} queued")
    parts.append(f"{num_finished} of {len(adapters)} finished")
    if speed:
        parts.append(f"{speed:,.0f} tok/s")
    if max_batch_tokens is not None:
        shares = [share for adapter in running.values() if (share := adapter.budget_share(max_batch_tokens))]
        if shares:
            parts.append(f"{min(1.0, sum(shares)):.0%} of the budget")
    if seconds is not None:
        parts.append(format_seconds(seconds))
    while len(" · ".join(parts)) > width and len(parts) > 1:
        parts.pop()
    return Text(" · ".join(parts), style="dim", no_wrap=True, overflow="ellipsis")


def _columns(width: int, max_batch_tokens: int | None) -> list[_Column]:
    def share(adapter: AdapterProgress) -> str:
        value = adapter.budget_share(max_batch_tokens) if max_batch_tokens is not None else None
        return f"{value:.0%}" if value is not None else ""

    def last(template: str, field: str) -> Callable[[AdapterProgress], str]:
        def text(adapter: AdapterProgress) -> str:
            value = getattr(adapter.last, field, None)
            return template.format(value) if value else ""

        return text

    def held_out(adapter: AdapterProgress, place: int) -> str:
        return f"{adapter.evals[place].eval_loss:.3f}" if adapter.evals else ""

    def left(adapter: AdapterProgress) -> str:
        eta = adapter.eta()
        return "–" if eta is None else format_seconds(eta)

    return [
        _Column("progress", lambda adapter: ""),
        _Column("step", lambda adapter: f"{adapter.current_step}/{adapter.num_steps or '?'}"),
        _Column("loss", last("{:.3f}", "loss"), style="bold"),
        _Column("trend", lambda adapter: adapter.trend.blocks(6 if width < NARROW else 12), "cyan", "left"),
        _Column("before", lambda adapter: held_out(adapter, 0)),
        _Column("held-out", lambda adapter: held_out(adapter, -1), style="bold"),
        _Column("aux", last("{:.4f}", "aux_loss")),
        _Column("lr", last("{:.1e}", "lr")),
        _Column("tok/s", last("{:.0f}", "tokens_per_second")),
        _Column("share", share),
        _Column("left", left),
        _Column("experts", lambda adapter: adapter.experts_text(), "magenta"),
        _Column("faults", lambda adapter: f"{adapter.num_skipped or ''}", "yellow"),
    ]


def _table(adapters: Mapping[str, AdapterProgress], width: int, max_batch_tokens: int | None) -> "Table":
    from rich import box
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    gap = 1 if width < NARROW else 2
    bar_width = 8 if width < 130 else 20
    cells = {
        column: [column.text(adapter) for adapter in adapters.values()] for column in _columns(width, max_batch_tokens)
    }
    widths = {
        column: bar_width if column.title == "progress" else max(map(len, [column.title, *texts]))
        for column, texts in cells.items()
        if any(texts) or column.title in ("progress", "loss")
    }
    wanted = min(LONGEST_NAME, max(len("adapter"), *map(len, adapters)))

    def room() -> int:
        return width - sum(taken + gap for taken in widths.values())

    for title in DISPENSABLE:
        # The bar and what stands before it in the list go rather than a letter of a name; the rest only at need.
        is_extra = DISPENSABLE.index(title) <= DISPENSABLE.index("progress")
        if room() >= (wanted if is_extra else SHORTEST_NAME):
            break
        widths = {column: taken for column, taken in widths.items() if column.title != title}

    # The box puts one space between two columns itself.
    table = Table(box=box.SIMPLE_HEAD, padding=(0, gap - 1, 0, 0), pad_edge=False, show_edge=False)
    name_width = max(1, min(wanted, room()))
    table.add_column("adapter", style="bold", no_wrap=True, overflow="ellipsis", width=name_width)
    for column, taken in widths.items():
        table.add_column(
            Text("" if column.title == "progress" else column.title),
            justify=column.justify,  # type: ignore[arg-type]
            style=column.style,
            no_wrap=True,
            width=taken,
        )
    for row, (name, adapter) in enumerate(adapters.items()):
        bar = ProgressBar(total=max(1, adapter.num_steps), completed=adapter.current_step, width=bar_width)
        table.add_row(
            Text(shortened(name, name_width)),
            *(bar if column.title == "progress" else Text(cells[column][row] or "–") for column in widths),
        )
    return table
