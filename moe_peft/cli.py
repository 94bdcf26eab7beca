"""``moe-peft CMD``: finds the command and hands it the rest of the line."""

import importlib
import sys
from collections.abc import Sequence

from moe_peft.command import SUCCESS, USAGE
from moe_peft.strict import nearest
from moe_peft.version import __version__

# Each is a module of the package with main(argv) -> exit code, imported only when called.
COMMANDS = {
    "train": "train adapters together on one frozen base model",
    "submit": "add adapters to a run that is under way",
    "status": "tell how far every adapter of a run is",
    "stop": "end the training of single adapters of a run",
    "report": "write one HTML page about a run",
    "generate": "answer prompts with a base model and its adapters",
    "compare": "tell what methods would cost on a base model",
    "list": "list the adapters of a folder",
    "merge": "write a model with an adapter in its weights",
}


def help_text() -> str:
    """The commands, one a line."""
    commands = "".join(f"  {name:<12}{meaning}\n" for name, meaning in COMMANDS.items())
    return (
        "Fine-tunes many adapters at once (LoRA, mixtures of LoRA experts) on one frozen LLaMA-family model.\n\n"
        f"Usage:\n  moe-peft COMMAND ...\n\nCommands:\n{commands}\n"
        "moe-peft COMMAND --help teaches the command; moe-peft --version tells the version.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``moe-peft`` and returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(help_text(), end="", file=sys.stderr)
        return USAGE
    first, rest = arguments[0], arguments[1:]
    if first in ("-h", "--help"):
        print(help_text(), end="")
        return SUCCESS
    if first == "--version":
        print(f"moe-peft {__version__}")
        return SUCCESS
    if first not in COMMANDS:
        print(f"error: {first!r} is not a command{nearest(first, COMMANDS)}", file=sys.stderr)
        return USAGE
    return int(importlib.import_module(f"moe_peft.{first}").main(rest))


if __name__ == "__main__":
    sys.exit(main())
