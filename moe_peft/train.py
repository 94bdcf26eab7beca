"""``python -m moe_peft.train``: trains the adapters of a config together on one frozen base model."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moe_peft.command import EXIT_CODES, CommandParser, run_command
from moe_peft.command.memory import reuse_freed_memory
from moe_peft.config import TrainConfig

HELP = """Trains many adapters (LoRA, mixtures of LoRA experts) at once on one frozen LLaMA-family model.

Usage:
  python -m moe_peft.train                              the embedded default: three small tasks, a few minutes
  python -m moe_peft.train CONFIG [key=value ...]       your own config, YAML or JSON
  python -m moe_peft.train key=value [key=value ...]    the embedded default, changed
  python -m moe_peft.train CONFIG base_model=MODEL      a config of the original MoE-PEFT, its adapters under "lora"
  (moe-peft train ... is the same command)

Options:
  --plan            print what the run would train, how much memory and how long it would take, and stop
  --verify [N]      prove on N optimizer steps (3) that no adapter learns anything else than alone, and stop
  --resume          go on with the run of the same config that is in output_dir, if there is one: the default
  --no-resume       refuse a folder with a run in it
  --print-config    print the config with all its keys resolved, and stop; a start for your own
  --debug           show the traceback of an error
  -h, --help        show this text

A run that was interrupted or killed goes on when the same command is given again, if output_dir names its folder:
  python -m moe_peft.train runs/run-001/config.yaml

A complete config:

{minimal}
key=value sets one key after the file is read; the value is YAML, and quotes keep the shell off [ ] and *:
  max_batch_tokens=2048                 a key of the run
  adapters.qa.lr=1e-4                   a key of the adapter named qa (adapters.0.lr=1e-4: of the first)
  'adapters.*.max_steps=20'             a key of every adapter whose method has it
  defaults.batch_size=16                a key of every adapter that does not set it itself
  'adapters.qa.target_modules=[up_proj, down_proj]'

Relative paths are relative to the folder that the command runs in. Unknown keys are refused, never ignored.

{reference}

{exit_codes}

Examples:
  python -m moe_peft.train max_batch_tokens=2048 output_dir=runs/first
  python -m moe_peft.train --print-config > my.yaml
  python -m moe_peft.train my.yaml 'adapters.*.lr=1e-4' seed=1
"""

VERIFY_STEPS = 3

MINIMAL_CONFIG = """\
base_model: smollm2-135m          # or a Hugging Face folder, a .gguf file, a hub id
adapters:
  - name: qa
    method: mixlora
    data: train.jsonl             # one {"instruction": ..., "input": ..., "output": ...} a line
  - name: style
    method: lora
    data: chats.jsonl             # one {"messages": [{"role": ..., "content": ...}, ...]} a line
    template: chat
"""


def help_text() -> str:
    """The whole ``--help``, its list of keys made from the config's dataclasses."""
    from moe_peft.config.help import config_reference

    minimal = "".join(f"  {line}\n" for line in MINIMAL_CONFIG.splitlines())
    return HELP.format(minimal=minimal, reference=config_reference(), exit_codes=EXIT_CODES)


def read_config(arguments: Sequence[str]) -> TrainConfig:
    """Returns the config that ``[CONFIG] [key=value ...]`` means.

    Raises:
        FileNotFoundError: when CONFIG does not exist.
        ValueError: on a mistake in the config or an override.
    """
    has_file = bool(arguments) and ("=" not in arguments[0] or Path(arguments[0]).is_file())
    return TrainConfig.from_file(arguments[0], arguments[1:]) if has_file else TrainConfig.default(arguments)


def prepare(arguments: argparse.Namespace) -> Callable[[], object] | None:
    """Reads the config and the data; returns the training itself."""
    config = read_config(arguments.config)
    if arguments.print_config:
        print("".join(f"# {remark}\n" for remark in config.remarks) + config.to_yaml(), end="")
        return None
    for remark in config.remarks:
        print(remark, flush=True)
    if not arguments.config:
        print("No config given: running the embedded default. --help says how to write your own.", flush=True)
    # A plan tries a step out several times, and what is compiled for it counts once.
    reuse_freed_memory(None if arguments.plan else config.max_concurrent_adapters or len(config.adapters))
    if arguments.plan:
        _print_plan(config)
        return None
    if arguments.verify is not None:
        _verify(config, arguments.verify)
        return None
    from moe_peft.training.trainer import Trainer

    return Trainer(config, resume=arguments.resume).train


def _print_plan(config: TrainConfig) -> None:
    from rich.console import Console

    from moe_peft.training.forecast.plan import print_plan

    print_plan(config, Console())


def _verify(config: TrainConfig, num_steps: int) -> None:
    from moe_peft.training.errors import TrainingError
    from moe_peft.training.proof.verify import verify

    if not verify(config, num_steps):
        raise TrainingError("what an adapter learns beside the others is not what it learns alone: see the table above")


def _with_number_of_steps(argv: Sequence[str]) -> list[str]:
    """``--verify 5`` as ``--verify=5``, a bare ``--verify`` with the default: argparse would take a config for N."""
    joined: list[str] = []
    for argument in argv:
        if joined and joined[-1] == "--verify" and argument.isdecimal():
            joined[-1] = f"--verify={argument}"
        else:
            joined.append(argument)
    return [f"--verify={VERIFY_STEPS}" if argument == "--verify" else argument for argument in joined]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = CommandParser("python -m moe_peft.train", help_text)
    parser.add_argument("config", nargs="*", metavar="CONFIG | key=value")
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--verify", type=int, metavar="N")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True)
    return run_command(parser, prepare, _with_number_of_steps(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
