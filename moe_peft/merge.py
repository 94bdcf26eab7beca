"""``python -m moe_peft.merge``: writes a Hugging Face folder of a base model with an adapter in its weights."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from moe_peft.command import EXIT_CODES, CommandParser, run_command
from moe_peft.command.model import check_not_empty, find_named_sources, tell_loading
from moe_peft.io.adapter_files import load_adapter
from moe_peft.io.base_model import load_base_model, stored_dtype
from moe_peft.io.hf_export import DEFAULT_SHARD_SIZE, HfExport, check_output, parse_size
from moe_peft.io.placement import parse_dtype
from moe_peft.io.smollm2 import SMOLLM2_NAME
from moe_peft.strict import nearest

HELP = """Merges an adapter into its base model, and writes the result as a Hugging Face folder.

Usage:
  python -m moe_peft.merge --base MODEL --adapter FOLDER --output FOLDER [options]
  python -m moe_peft.merge --run FOLDER --use NAME --output FOLDER [options]
  (moe-peft merge ... is the same command)

  --base MODEL              a Hugging Face folder, a .gguf file, a hub id or {smollm2}; default: the run's base,
                            and without a run {smollm2}
  --run FOLDER              the folder of a training run, one of whose adapters is meant
  --adapter [NAME=]FOLDER   an adapter's folder, as training or PEFT saved it
  --use NAME                which adapter, where there are several
  --output FOLDER           what is written: it must not exist, or be empty

  --dtype DTYPE             of the written weights: float32, bfloat16, float16 or float64; default: the base's own
                            (of a quantized .gguf file bfloat16)
  --max-shard-size SIZE     the largest file of weights, such as 500MB; default: {shard_size}
  --no-tokenizer            leave the tokenizer out
  --debug                   show the traceback of an error
  -h, --help                show this text

Each weight is W + ΔW, computed in float32 and rounded once. The folder holds the config, the weights, the tokenizer and
the base's generation settings; transformers, vLLM and this program load it. A mixture of experts cannot be merged: its
router chooses for every token.

{exit_codes}

Examples:
  python -m moe_peft.merge --run runs/run-001 --use style --output style-model
  python -m moe_peft.merge --base base --adapter runs/run-001/adapters/style --dtype bfloat16 --output style-bf16
"""


def help_text() -> str:
    """The whole ``--help``."""
    return HELP.format(smollm2=SMOLLM2_NAME, shard_size=DEFAULT_SHARD_SIZE, exit_codes=EXIT_CODES)


def prepare(arguments: argparse.Namespace) -> Callable[[], object]:
    """Loads the base model and the adapter, and checks that one fits into the other; returns the writing itself."""
    if arguments.output is None:
        raise ValueError("--output is missing: give the folder to be written")
    check_not_empty("--output", arguments.output)
    output = Path(arguments.output).expanduser()
    parse_size(arguments.max_shard_size)
    wanted = parse_dtype(arguments.dtype)
    named = find_named_sources(arguments.base, arguments.run, arguments.adapter, None)
    name = _chosen(arguments.use, named.folders)
    check_output(output, named.base)
    stored = stored_dtype(named.base)
    tell_loading(named.base)
    # Wide enough for both: the sum is to be rounded, not what goes into it.
    model = load_base_model(named.base, dtype=torch.promote_types(stored, wanted or stored), device="cpu")
    load_adapter(model, named.folders[name], name)
    export = HfExport(
        model,
        name,
        source=named.base,
        with_tokenizer=not arguments.no_tokenizer,
        dtype=wanted or stored,
        max_shard_size=arguments.max_shard_size,
    )

    def write() -> None:
        is_terminal = sys.stderr.isatty()

        def tell(tensor: str, done: int) -> None:
            if is_terminal:
                share = done / export.num_bytes
                print(f"\r\x1b[Kmerging {share:4.0%}  {tensor}", end="", file=sys.stderr, flush=True)

        export.write(output, tell)
        if is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        files = "1 file" if export.num_files == 1 else f"{export.num_files} files"
        print(f"{output}: {name} merged, {export.num_bytes / 1e6:,.1f} MB in {files}")

    return write


def _chosen(use: str | None, folders: dict[str, Path]) -> str:
    if not folders:
        raise ValueError("there is no adapter: give --adapter FOLDER, or --run FOLDER with --use NAME")
    if use is None and len(folders) > 1:
        raise ValueError(f"--use is missing: give one of {', '.join(folders)}")
    name = next(iter(folders)) if use is None else use
    if name not in folders:
        raise ValueError(f"--use {name}: there is no such adapter{nearest(name, folders)}")
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = CommandParser("python -m moe_peft.merge", help_text)
    parser.add_argument("--base")
    parser.add_argument("--run")
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--use")
    parser.add_argument("--output")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max-shard-size", default=DEFAULT_SHARD_SIZE)
    parser.add_argument("--no-tokenizer", action="store_true")
    return run_command(parser, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
