"""The comparison as a table for a terminal, or in Markdown."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_peft.comparison.compare import MethodCost
from moe_peft.training.display.summary import format_reduction, format_share

if TYPE_CHECKING:
    from rich.table import Table

TITLES = ("trainable", "total", "of base", "reduction", "saved MB", "AdamW MB", "MFLOPs", "vs LoRA")


def cells_of(cost: MethodCost) -> tuple[str, ...]:
    """What stands under ``TITLES``."""
    return (
        f"{cost.trainable_parameters:,}",
        f"{cost.total_parameters / 1e6:,.1f}M",
        format_share(cost.trainable_parameters, cost.base_parameters),
        format_reduction(cost.trainable_parameters, cost.base_parameters),
        f"{cost.saved_bytes / 1e6:,.2f}",
        f"{cost.optimizer_bytes / 1e6:,.2f}",
        f"{cost.flops_per_token / 1e6:,.1f}",
        f"{cost.relative_flops:.3f}×",
    )


def comparison_table(costs: Sequence[MethodCost]) -> "Table":
    """For a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("method", style="bold", overflow="fold")
    for title in TITLES:
        table.add_column(title, justify="right", no_wrap=True)
    for cost in costs:
        table.add_row(Text(cost.name), *cells_of(cost))
    return table


def comparison_markdown(costs: Sequence[MethodCost]) -> str:
    """For a document."""
    rows = [("method", *TITLES), ("---", *["---:"] * len(TITLES))]
    rows += [(cost.name.replace("|", "\\|"), *cells_of(cost)) for cost in costs]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
