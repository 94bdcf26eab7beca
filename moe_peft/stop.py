"""``python -m moe_peft.stop``: ends the training of single adapters of a run."""

import argparse
import sys
from collections.abc import Callable, Sequence

from moe_peft.command import EXIT_CODES, CommandParser, run_command
from moe_peft.training.folder.run_status import read_run
from moe_peft.training.folder.submission import at_resume, find_stoppable, stop

HELP = """Ends the training of single adapters of a run; the others go on.

Usage:
  python -m moe_peft.stop FOLDER --adapter NAME [--adapter NAME ...]
  (moe-peft stop ... is the same command)

  FOLDER                    the folder of the run, such as runs/run-001
  --adapter NAME            the adapter to stop; may be given several times

  --debug                   show the traceback of an error
  -h, --help                show this text

An adapter that runs ends after the step in hand; its weights are saved as they are then, in FOLDER/adapters/NAME. One
that is still queued leaves the queue. Its place is free for the next one at once. If no process trains the folder at
the moment, this takes effect when the run is resumed. To end the whole run, interrupt its process (Ctrl-C, or SIGTERM).

{exit_codes}

Examples:
  python -m moe_peft.stop runs/run-001 --adapter style
  python -m moe_peft.status runs/run-001
"""


def help_text() -> str:
    """The whole ``--help``."""
    return HELP.format(exit_codes=EXIT_CODES)


def prepare(arguments: argparse.Namespace) -> Callable[[], object]:
    """Checks that there is something to stop; returns the asking."""
    run = read_run(arguments.folder)
    for name in arguments.adapter:
        find_stoppable(run, name)

    def go() -> None:
        stop(run, arguments.adapter)
        names = ", ".join(dict.fromkeys(arguments.adapter))
        print(f"asked {run.folder} to stop: {names}")
        if run.trained_by is None:
            print(at_resume(run.folder))

    return go


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = CommandParser("python -m moe_peft.stop", help_text)
    parser.add_argument("folder", metavar="FOLDER")
    parser.add_argument("--adapter", action="append", required=True)
    return run_command(parser, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
