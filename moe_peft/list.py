"""``python -m moe_peft.list``: the adapters of a folder."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_peft.command import EXIT_CODES, CommandParser, run_command
from moe_peft.manager import AdapterFolder, StoredAdapter
from moe_peft.training.display.summary import print_report

if TYPE_CHECKING:
    from rich.table import Table

HELP = """Lists the adapters of a folder that holds one folder for each, as an AdapterManager or a run's adapters/ does.

Usage:
  python -m moe_peft.list FOLDER [options]
  (moe-peft list ... is the same command)

Options:
  --json                    print one JSON object instead, for programs
  --debug                   show the traceback of an error
  -h, --help                show this text

The files alone are read, and of the weights their shapes. What else lies in the folder is named below the table.

{exit_codes}

Examples:
  python -m moe_peft.list runs/run-001/adapters
  python -m moe_peft.list runs/run-001/adapters --json
"""


def help_text() -> str:
    """The whole ``--help``."""
    return HELP.format(exit_codes=EXIT_CODES)


def prepare(arguments: argparse.Namespace) -> Callable[[], object]:
    """Reads the folder; returns the printing."""
    if not Path(arguments.folder).expanduser().exists():
        raise FileNotFoundError(f"there is no folder {arguments.folder}")
    folder = AdapterFolder(arguments.folder)
    adapters, foreign = folder.read_all()
    if arguments.json:
        rows = [{"name": own.name, "method": own.method, "bytes": own.num_bytes} for own in adapters]
        return lambda: print(json.dumps({"adapters": rows, "ignored": foreign}, ensure_ascii=False, indent=1))
    return lambda: _print(adapters, foreign)


def _print(adapters: Sequence[StoredAdapter], foreign: dict[str, str]) -> None:
    from rich.console import Console

    console = Console()
    print_report(console, _table(adapters))
    for name, reason in foreign.items():
        console.print(f"ignored: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)


def _table(adapters: Sequence[StoredAdapter]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("adapter", style="bold", overflow="fold")
    table.add_column("method")
    for title in ("values", "MB", "saved"):
        table.add_column(title, justify="right", no_wrap=True)
    for own in adapters:
        when = f"{own.saved_at:%Y-%m-%d %H:%M}"
        table.add_row(Text(own.name), own.method, f"{own.num_values:,}", f"{own.num_bytes / 1e6:,.2f}", when)
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = CommandParser("python -m moe_peft.list", help_text)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--json", action="store_true")
    return run_command(parser, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
