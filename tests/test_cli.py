"""``moe-peft CMD`` finds its commands, and says so when it does not."""

import importlib.util
import subprocess
import sys

import pytest

from moe_peft import __version__
from moe_peft.cli import COMMANDS, main


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        (["--version"], 0, f"moe-peft {__version__}\n", ""),
        (["--help"], 0, "moe-peft COMMAND --help", ""),
        (["-h"], 0, "  train ", ""),
        (["-h"], 0, "  submit ", ""),
        (["stopp"], 2, "", "error: 'stopp' is not a command; did you mean 'stop'?\n"),
        (["submit", "--help"], 0, "Adds adapters to a run", ""),
        (["status", "nowhere"], 2, "", "error: there is no run folder nowhere"),
        ([], 2, "", "Usage:"),
        (["trian"], 2, "", "error: 'trian' is not a command; did you mean 'train'?\n"),
        (["merge", "--help"], 0, "Merges an adapter into its base model", ""),
        (["xyz"], 2, "", "error: 'xyz' is not a command; valid here: "),
        (["train", "--help"], 0, "Trains many adapters", ""),
        (["train", "nowhere.yaml"], 2, "", "error: config file 'nowhere.yaml' does not exist"),
    ],
)
def test_commands(argv: list[str], code: int, out: str, err: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == code
    got = capsys.readouterr()
    assert out in got.out if out else got.out == ""
    assert err in got.err if err else got.err == ""


def test_every_command_is_a_module() -> None:
    for name in COMMANDS:
        assert importlib.util.find_spec(f"moe_peft.{name}") is not None


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "moe_peft", "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"moe-peft {__version__}\n", "")
