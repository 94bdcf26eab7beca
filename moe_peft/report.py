"""``python -m moe_peft.report``: writes one HTML page about a run from the files in its folder."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_peft.command import EXIT_CODES, CommandParser, run_command
from moe_peft.io.atomic import write_text_atomically
from moe_peft.training.report.contents import read_contents
from moe_peft.training.report.page import REPORT_FILE, render

HELP = """Writes one HTML page about a run: jobs, faults, leaderboard, curves, expert load, settings.

Usage:
  python -m moe_peft.report RUN_DIR [--output FILE]
  (moe-peft report ... is the same command)

RUN_DIR is the folder of a run, such as runs/run-001, finished or not. The page is whole in itself: it opens without a
network, holds no script, and follows the light or dark setting of whoever reads it.

  --output FILE             where to write it; default: report.html in the run's folder
  --debug                   show the traceback of an error
  -h, --help                show this text

{exit_codes}

Examples:
  python -m moe_peft.report runs/run-001
  python -m moe_peft.report runs/run-001 --output report.html
"""


def help_text() -> str:
    """The whole ``--help``."""
    return HELP.format(exit_codes=EXIT_CODES)


def prepare(arguments: argparse.Namespace) -> Callable[[], object]:
    """Reads the run; returns the writing itself."""
    if arguments.run_dir is None:
        raise ValueError("RUN_DIR is missing: give the folder of a run (see python -m moe_peft.report --help)")
    page = render(read_contents(arguments.run_dir))
    folder = Path(arguments.run_dir).expanduser()
    output = folder / REPORT_FILE if arguments.output is None else Path(arguments.output).expanduser()
    if output.is_dir():
        raise ValueError(f"--output {arguments.output!r} must be a file, but it is a folder")

    def write() -> None:
        write_text_atomically(output, page)
        print(output)

    return write


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = CommandParser("python -m moe_peft.report", help_text)
    parser.add_argument("run_dir", nargs="?")
    parser.add_argument("--output")
    return run_command(parser, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
