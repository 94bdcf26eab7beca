"""``python -m moe_peft.compare``: what methods would cost on a base model, before anything is trained."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from moe_peft.adapters import METHODS
from moe_peft.command import EXIT_CODES, CommandParser, run_command
from moe_peft.comparison import MethodCost, compare_methods
from moe_peft.comparison.compare import CONTEXT
from moe_peft.comparison.table import comparison_markdown, comparison_table
from moe_peft.comparison.words import read_methods
from moe_peft.training.display.summary import print_report

HELP = """Compares what methods would cost on a base model. No weights are read, and nothing is trained.

Usage:
  python -m moe_peft.compare BASE [METHOD [key=value ...]] ... [options]
  (moe-peft compare ... is the same command)

  BASE                      a Hugging Face folder, a .gguf file, a hub id, or the built-in smollm2-135m
  METHOD                    one of: {methods}
  key=value                 a setting of the method before it; the value is YAML
  METHOD:key=value,...      the same in one word
  CONFIG                    a config file of train (.yaml, .yml or .json): its adapters, by their names
                            (neither METHOD nor CONFIG: every method with its defaults)

Options:
  --context N               tokens of the sample that FLOPs are counted on; default: {context}
  --dtype DTYPE             of the base model: auto, float32, bfloat16, float16 or float64; default: auto
  --json                    print a JSON list instead, for programs
  --markdown                print a Markdown table instead, for documents
  --debug                   show the traceback of an error
  -h, --help                show this text

The columns:
  trainable, of base        the adapter's parameters, and their share of the base model's
  total, reduction          base and adapter together; how many times fewer are trained than the base has
  saved MB                  the adapter's folder, as it would be written
  AdamW MB                  the two running means of AdamW
  MFLOPs                    matrix products of forward and backward on the frozen base, in millions a token of a sample
                            that is learnt whole; a mixture's experts count as they run on a CPU, all side by side
  vs LoRA                   the same as a multiple of a LoRA of default settings

{exit_codes}

Examples:
  python -m moe_peft.compare smollm2-135m lora mixlora
  python -m moe_peft.compare smollm2-135m lora lora r=64 'target_modules=[q_proj, v_proj]' mixlora:num_experts=4,top_k=1
  python -m moe_peft.compare smollm2-135m lora config.yaml --context 128 --json
"""


def help_text() -> str:
    """The whole ``--help``."""
    return HELP.format(methods=", ".join(METHODS), context=CONTEXT, exit_codes=EXIT_CODES)


def prepare(arguments: argparse.Namespace) -> Callable[[], object]:
    """Reads the methods and compares them; returns the printing."""
    if arguments.json and arguments.markdown:
        raise ValueError("--json is for programs and --markdown for documents: give one of them")
    methods = read_methods(arguments.methods)
    costs = compare_methods(arguments.base, methods, context=arguments.context, dtype=arguments.dtype)
    if arguments.json:
        return lambda: print(json.dumps([cost.to_dict() for cost in costs], ensure_ascii=False, indent=1))
    if arguments.markdown:
        return lambda: print(comparison_markdown(costs), end="")
    return lambda: _print(arguments.base, costs)


def _print(base: str, costs: Sequence[MethodCost]) -> None:
    from rich.console import Console

    console = Console()
    text = f"{base}: {costs[0].base_parameters:,} frozen parameters; FLOPs a token in samples of {costs[0].context:,}"
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    print_report(console, comparison_table(costs))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = CommandParser("python -m moe_peft.compare", help_text)
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("methods", nargs="*", metavar="METHOD | key=value | CONFIG")
    parser.add_argument("--context", type=int, default=CONTEXT)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", action="store_true")
    return run_command(parser, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
