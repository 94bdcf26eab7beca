"""The shape every command shares: arguments in, one message and an exit code out, a traceback only with ``--debug``."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from moe_peft.strict import nearest
from moe_peft.training.errors import TrainingError

SUCCESS, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130

EXIT_CODES = """Exit codes:
  0    success
  1    the run failed on its way (a full disk, say)
  2    a mistake in the command, the config or the data, found before anything was written
  3    the run came to its end, but an adapter failed, or was stopped or refused
  130  interrupted with Ctrl-C; 143: with SIGTERM"""

# What the file system says of a path that the user gave; once running, our own files are meant.
_PATH_MISTAKES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)


class CommandParser(argparse.ArgumentParser):
    """argparse with ``--debug``, in which a mistake is a ValueError.

    Args:
        prog: the command as the user types it, such as ``python -m moe_peft.train``.
        help_text: makes the whole ``--help``, only when asked for; None leaves it to argparse.
    """

    def __init__(self, prog: str, help_text: Callable[[], str] | None = None) -> None:
        super().__init__(prog=prog, allow_abbrev=False)
        self._help_text = help_text
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def format_help(self) -> str:
        return self._help_text().rstrip() + "\n" if self._help_text else super().format_help()

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses options and positional arguments in any order.

        Raises:
            ValueError: on a mistake, with the nearest option to an unknown one.
        """
        arguments, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            options = [option for option in self._option_string_actions if option.startswith("--")]
            self.error(f"unknown argument {unknown[0]!r}{nearest(unknown[0].partition('=')[0], options)}")
        return arguments


def run_command(
    parser: CommandParser,
    prepare: Callable[[argparse.Namespace], Callable[[], object] | None],
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a command in two stages and turns what happens into an exit code.

    Args:
        prepare: reads and checks all that the user gave and returns the run itself, or None when nothing is left to do.
        argv: the arguments; None takes the process's own.

    Returns:
        An exit code: see ``EXIT_CODES``. A message on stderr goes with every code but 0.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    running = False
    try:
        run = prepare(parser.parse(argv))
        if run is not None:
            running = True
            run()
        sys.stdout.flush()  # here rather than at exit, where a closed pipe could no longer be handled
        return SUCCESS
    except SystemExit as done:  # argparse has printed the help, or a run has answered SIGTERM
        return done.code if isinstance(done.code, int) else SUCCESS
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone (say, `| head`): leave quietly, and keep the interpreter's last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        if debug:
            traceback.print_exc()
        message, code = _verdict(error, running=running, debug=debug)
        print(message, file=sys.stderr)
        return code


def _verdict(error: Exception, *, running: bool, debug: bool) -> tuple[str, int]:
    """The message and the exit code of an error."""
    if isinstance(error, OSError):
        reason = str(error)
        if error.strerror and error.filename is not None:
            reason = f"{error.strerror}: '{error.filename}'"
        return f"error: {reason}", USAGE if isinstance(error, _PATH_MISTAKES) and not running else FAILURE
    if isinstance(error, ValueError):
        return f"error: {error}", FAILURE if running else USAGE
    if isinstance(error, TrainingError):
        return f"error: {error}", error.exit_code
    # An error of torch can go on for pages; the traceback of --debug has them all.
    reason = (str(error).splitlines() or [""])[0]
    # torch.OutOfMemoryError by its name: not every command imports torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ": ".join(filter(None, ["error: out of memory", reason])), FAILURE
    message = ": ".join(filter(None, ["internal error", type(error).__name__, reason]))
    return message + ("" if debug else " (run again with --debug for the traceback)"), FAILURE
