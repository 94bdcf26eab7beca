"""``python -m moe_peft.submit``: adds adapters to a run that is under way."""

import argparse
import sys
from collections.abc import Callable, Sequence

from moe_peft.command import EXIT_CODES, CommandParser, run_command
from moe_peft.training.folder.run_status import read_run
from moe_peft.training.folder.submission import at_resume, check_takes_requests, read_submission, submit

HELP = """Adds adapters to a run that is under way; they join it between two steps.

Usage:
  python -m moe_peft.submit CONFIG --run FOLDER [key=value ...]
  (moe-peft submit ... is the same command)

  CONFIG                    a config file as train takes it, with the adapters to add, and defaults if you like
  --run FOLDER              the folder of the run, such as runs/run-001
  key=value                 sets a key of CONFIG, as with train

  --debug                   show the traceback of an error
  -h, --help                show this text

A config of one more adapter is as short as this:

  adapters:
    - name: style
      method: lora
      data: chats.jsonl
      template: chat

The base model and the other keys of the run are those that the run was started with: leave them out, or repeat them as
they are. Names must be new to the run. Everything is checked here, the records included, before the run hears of it.

The adapters wait behind those that are queued already. What they learn depends on their own config and seed alone, not
on when they join. If no process trains the folder at the moment, they are taken up when the run is resumed:
python -m moe_peft.train FOLDER/config.yaml

{exit_codes}

Examples:
  python -m moe_peft.submit more.yaml --run runs/run-001
  python -m moe_peft.submit more.yaml --run runs/run-001 'adapters.*.lr=1e-4'
  python -m moe_peft.status runs/run-001
"""


def help_text() -> str:
    """The whole ``--help``."""
    return HELP.format(exit_codes=EXIT_CODES)


def prepare(arguments: argparse.Namespace) -> Callable[[], object]:
    """Reads and checks the new adapters; returns their submission."""
    run = read_run(arguments.run)
    check_takes_requests(run)
    jobs = read_submission(arguments.config, arguments.overrides, run)

    def go() -> None:
        submit(run, jobs)
        names = ", ".join(job.name for job in jobs)
        print(f"submitted to {run.folder}: {names}")
        if run.trained_by is None:
            print(at_resume(run.folder))

    return go


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = CommandParser("python -m moe_peft.submit", help_text)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--run", required=True)
    return run_command(parser, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
