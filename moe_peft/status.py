"""``python -m moe_peft.status``: tells how far every adapter of a run is."""

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_peft.command import EXIT_CODES, CommandParser, run_command
from moe_peft.training.display.summary import print_report
from moe_peft.training.folder.run_status import read_run
from moe_peft.training.folder.status_table import status_dict, status_report

if TYPE_CHECKING:
    from rich.console import Console

HELP = """Tells how far every adapter of a run is, from the files in its folder. It disturbs nothing.

Usage:
  python -m moe_peft.status FOLDER [options]
  (moe-peft status ... is the same command)

  FOLDER                    the folder of a run, such as runs/run-001, under way or not

Options:
  --watch                   show it anew every few seconds until the run is complete; Ctrl-C ends it
  --json                    print one JSON object instead, for programs
  --debug                   show the traceback of an error
  -h, --help                show this text

The states of an adapter:
  queued                    waits for a free place (max_concurrent_adapters)
  running                   trains
  waiting                   a member of a sweep, until its turn is decided
  done, early-stopped       has taken all its steps, or stopped because its held-out loss no longer fell
  halved                    dropped by its sweep, which kept better members
  stopped                   ended by moe-peft stop
  failed                    ended by a loss or gradient that was not finite; its last good weights are saved
  refused                   was submitted, but could not join

tokens/s counts the tokens that are learnt, prompts left out, over the latest steps.

{exit_codes}

Examples:
  python -m moe_peft.status runs/run-001
  python -m moe_peft.status runs/run-001 --watch
  python -m moe_peft.status runs/run-001 --json > jobs.json
"""

PAUSE = 2.0  # seconds between two looks


def help_text() -> str:
    """The whole ``--help``."""
    return HELP.format(exit_codes=EXIT_CODES)


def prepare(arguments: argparse.Namespace) -> Callable[[], object] | None:
    """Tells once; returns the watching where that is asked for."""
    folder = Path(arguments.folder)
    if arguments.watch and arguments.json:
        raise ValueError("--watch is for people and --json for programs: give one of them")
    run = read_run(folder)
    if arguments.json:
        print(json.dumps(status_dict(run), ensure_ascii=False, indent=1, allow_nan=False))
        return None
    from rich.console import Console

    console = Console()
    if arguments.watch and not console.is_terminal:
        raise ValueError("--watch needs a terminal to draw on; without it the status is printed once")
    if arguments.watch:
        return lambda: watch(folder, console)
    print_report(console, status_report(run))
    return None


def watch(folder: Path, console: "Console") -> None:
    """Shows the status until the run is complete or the user has seen enough."""
    from rich.live import Live

    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            start = time.monotonic()
            run = read_run(folder)
            live.update(status_report(run), refresh=True)
            if run.is_complete:
                return
            # Reading the rows of a long run takes a while: never more than a small share of a processor.
            time.sleep(max(PAUSE, 10 * (time.monotonic() - start)))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = CommandParser("python -m moe_peft.status", help_text)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--watch", action="store_true")
    parser.add_argument("--json", action="store_true")
    return run_command(parser, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
