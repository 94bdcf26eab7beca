"""Whatever happens in a command becomes one message and an exit code."""

import argparse
import errno
import sys
from collections.abc import Callable

import pytest

from moe_peft.command import CommandParser, run_command
from moe_peft.training.errors import TrainingError


class OutOfMemoryError(RuntimeError):
    """Named as torch's."""


Outcome = tuple[int, str, str]
Runner = Callable[..., Outcome]


@pytest.fixture
def outcome(capsys: pytest.CaptureFixture[str]) -> Runner:
    """Runs a command whose two stages raise what they are given; returns exit code, stdout and stderr."""

    def run(*argv: str, preparing: BaseException | None = None, running: BaseException | None = None) -> Outcome:
        def prepare(arguments: argparse.Namespace) -> Callable[[], object]:
            if preparing is not None:
                raise preparing

            def go() -> None:
                if running is not None:
                    raise running
                print("done", arguments.words)

            return go

        parser = CommandParser("prog", lambda: "the help")
        parser.add_argument("words", nargs="*")
        parser.add_argument("--print-config", action="store_true")
        code = run_command(parser, prepare, argv)
        return code, *capsys.readouterr()

    return run


def test_success_is_silent_on_stderr(outcome: Runner) -> None:
    assert outcome("a", "--print-config", "b=1") == (0, "done ['a', 'b=1']\n", "")


def test_a_command_with_nothing_left_to_run_succeeds() -> None:
    assert run_command(CommandParser("prog"), lambda arguments: None, []) == 0


def test_help_is_printed_as_written(outcome: Runner) -> None:
    assert outcome("--help") == (0, "the help\n", "")
    assert outcome("-h", "x") == (0, "the help\n", "")


def test_help_is_argparses_own_where_none_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(CommandParser("prog"), lambda arguments: None, ["--help"]) == 0
    assert "--debug" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--print-confg"], "unknown argument '--print-confg'; did you mean '--print-config'?"),
        (["--print-confg=1"], "unknown argument '--print-confg=1'; did you mean '--print-config'?"),
        (["--print"], "unknown argument '--print'; did you mean '--print-config'?"),
        (["-x"], "unknown argument '-x'; valid here: --debug, --help, --print-config"),
        (["--debug=1"], "argument --debug: ignored explicit argument '1'"),
    ],
)
def test_a_mistake_in_the_arguments(outcome: Runner, argv: list[str], message: str) -> None:
    assert outcome(*argv) == (2, "", f"error: {message} (see prog --help)\n")


NO_SPACE = OSError(errno.ENOSPC, "No space left on device", "run/x")
NO_FILE = FileNotFoundError(errno.ENOENT, "No such file or directory", "x.jsonl")


@pytest.mark.parametrize(
    ("stage", "error", "code", "message"),
    [
        ("preparing", ValueError("lr=0 must be above 0"), 2, "error: lr=0 must be above 0"),
        ("running", ValueError("lr=0 must be above 0"), 1, "error: lr=0 must be above 0"),
        ("preparing", FileNotFoundError("config file 'x' does not exist"), 2, "error: config file 'x' does not exist"),
        ("preparing", NO_FILE, 2, "error: No such file or directory: 'x.jsonl'"),
        ("preparing", PermissionError(errno.EACCES, "Permission denied", "y"), 2, "error: Permission denied: 'y'"),
        ("preparing", NO_SPACE, 1, "error: No space left on device: 'run/x'"),
        ("running", NO_SPACE, 1, "error: No space left on device: 'run/x'"),
        ("running", NO_FILE, 1, "error: No such file or directory: 'x.jsonl'"),
        ("preparing", TrainingError("no loss"), 1, "error: no loss"),
        ("running", TrainingError("loss is nan"), 1, "error: loss is nan"),
        ("running", MemoryError(), 1, "error: out of memory"),
        ("running", OutOfMemoryError("tried 2 GiB\nand more"), 1, "error: out of memory: tried 2 GiB"),
        ("running", KeyboardInterrupt(), 130, "interrupted"),
        ("preparing", KeyboardInterrupt(), 130, "interrupted"),
        (
            "running",
            RuntimeError("shapes\ndiffer"),
            1,
            "internal error: RuntimeError: shapes (run again with --debug for the traceback)",
        ),
        ("preparing", KeyError("k"), 1, "internal error: KeyError: 'k' (run again with --debug for the traceback)"),
        ("preparing", AssertionError(), 1, "internal error: AssertionError (run again with --debug for the traceback)"),
    ],
)
def test_every_error_is_a_message_and_a_code(
    outcome: Runner, stage: str, error: BaseException, code: int, message: str
) -> None:
    assert outcome(**{stage: error}) == (code, "", f"{message}\n")


def test_a_run_that_answers_a_signal_keeps_its_code(outcome: Runner) -> None:
    assert outcome(running=SystemExit(143)) == (143, "", "")


@pytest.mark.parametrize("error", [ValueError("bad"), RuntimeError("bad")])
def test_debug_shows_the_traceback_and_keeps_the_code(outcome: Runner, error: Exception) -> None:
    plain, debugged = outcome(running=error), outcome("--debug", running=error)
    assert debugged[0] == plain[0]
    assert "Traceback (most recent call last)" in debugged[2]
    assert "Traceback" not in plain[2]
    assert debugged[2].splitlines()[-1] in (f"error: {error}", f"internal error: RuntimeError: {error}")


def test_the_processs_own_arguments_are_the_default(outcome: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prog", "--nope"])
    assert run_command(CommandParser("prog"), lambda arguments: None) == 2
