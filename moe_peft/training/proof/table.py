"""What the proof tells: a row for every adapter and step, and what is wrong in words."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moe_peft.training.proof.check import Check

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table


def proof_report(checks: Sequence[Check], missing: Sequence[str] = ()) -> "Group":
    """The table, the problems, and the sum of it all.

    Args:
        checks: in the order of display.
        missing: adapters that were never compared.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_table(checks)]
    lines = [f"{check.adapter}, step {check.step}: {problem}" for check in checks for problem in check.problems]
    lines += [f"{name}: no step of it could be compared" for name in missing]
    parts += [Text(line, style="red", no_wrap=True, overflow="ignore") for line in lines]
    bad = [check for check in checks if not check.is_good]
    if checks and all(check.share == 1 for check in checks):
        parts.append(
            Text(
                "No batch held more than one adapter: there was nothing to fuse, so only the order of its"
                " samples was changed."
            )
        )
    if bad or missing:
        parts.append(Text(f"Not proved: {len(bad)} of {len(checks)} comparisons differ.", style="bold red"))
    else:
        exact = sum(check.is_exact for check in checks)
        found = (
            "all {} comparisons are equal to the bit"
            if exact == len(checks)
            else "in all {} comparisons only rounding differs"
        ).format(len(checks))
        parts.append(Text(f"Proved: {found}.", style="bold green"))
    return Group(*parts)


def _table(checks: Sequence[Check]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    has_routers = any(check.num_choices for check in checks)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    longest = max((len(check.adapter) for check in checks), default=0)
    table.add_column("adapter", style="bold", overflow="fold", min_width=min(longest, 16))
    titles = ["step", "share", "loss", "alone", "gradient", "alone", "difference\n(allowed)", "reordered"]
    for title in titles + ["flips"] * has_routers:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for check in checks:
        flips = f"{check.num_flips}/{check.num_choices}" if check.num_choices else "–"
        table.add_row(
            Text(check.adapter),
            str(check.step),
            f"{100 * check.share:.0f}%",
            f"{check.loss:.4f}",
            f"{check.loss_alone:.4f}",
            f"{check.norm:.4g}",
            f"{check.norm_alone:.4g}",
            "–" if check.fused is None else f"{check.fused.value:.1e} ({check.fused.allowed:.0e})",
            "–" if check.reordered is None else f"{check.reordered.value:.1e}",
            *[flips] * has_routers,
            Text("same", style="green") if check.is_good else Text("DIFFERS", style="bold red"),
        )
    return table
