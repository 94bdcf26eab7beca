"""The base model and the adapters that a command's ``--base``, ``--run`` and ``--adapter`` name."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_peft.command import CommandParser
from moe_peft.config import TrainConfig
from moe_peft.data.tokenizer import Tokenizer, load_tokenizer
from moe_peft.io.adapter_files import CONFIG_FILE, load_adapter
from moe_peft.io.base_model import load_base_model
from moe_peft.io.smollm2 import SMOLLM2_NAME
from moe_peft.model.batch import ADAPTER_NAME
from moe_peft.model.llama import LlamaForCausalLM

MODEL_OPTIONS = f"""\
  --base MODEL              a Hugging Face folder, a .gguf file, a hub id or {SMOLLM2_NAME}; default: the run's base,
                            and without a run {SMOLLM2_NAME}
  --run FOLDER              the folder of a training run: its base model and all its adapters
  --adapter [NAME=]FOLDER   an adapter's folder, as training or PEFT saved it; may be given several times.
                            Without NAME it is called as its folder
  --dtype DTYPE             auto, float32, bfloat16, float16 or float64; default: the run's, or auto
  --device DEVICE           auto, cpu, cuda or cuda:N; default: auto"""


def add_model_arguments(parser: CommandParser) -> None:
    """Adds the options that ``MODEL_OPTIONS`` explains."""
    parser.add_argument("--base")
    parser.add_argument("--run")
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--dtype")
    parser.add_argument("--device", default="auto")


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What the options named.

    Args:
        model: with the adapters attached.
        tokenizer: of the base model.
        templates: the template that a run's adapter was trained with, by the adapter's name.
    """

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    templates: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class NamedSources:
    """What the options name, before any of it is loaded.

    Args:
        base: the base model.
        dtype: that it is to be loaded in.
        folders: the adapters' folders by their names.
        templates: the template that a run's adapter was trained with, by the adapter's name.
    """

    base: str
    dtype: str
    folders: dict[str, Path]
    templates: dict[str, str]


def find_named_sources(base: str | None, run: str | None, adapters: Sequence[str], dtype: str | None) -> NamedSources:
    """Reads ``--base``, ``--run``, ``--adapter`` and ``--dtype``.

    Raises:
        FileNotFoundError: when a folder named is not there.
        ValueError: when it is there, but is not what it should be, or a name is taken twice.
    """
    options = {"--base": base, "--run": run, "--dtype": dtype}
    for option, value in (*options.items(), *(("--adapter", adapter) for adapter in adapters)):
        check_not_empty(option, value)
    folder = Path(run) if run is not None else None
    config = TrainConfig.from_file(_run_config(folder)) if folder is not None else None
    folders = _run_adapters(folder) if folder is not None else {}
    for name, path in map(_split_name, adapters):
        if name in folders:
            raise ValueError(
                f"--adapter {path}: the name {name!r} is taken by {folders[name]}; give another: NAME=FOLDER"
            )
        folders[name] = path
    jobs = config.adapters if config is not None else ()
    return NamedSources(
        base=base or (config.base_model if config is not None else SMOLLM2_NAME),
        dtype=dtype or (config.dtype if config is not None else "auto"),
        folders=folders,
        templates={job.name: job.template for job in jobs},
    )


def check_not_empty(option: str, value: str | None) -> None:
    """Refuses an option given without a value, such as an empty variable of a shell: it would mean the current folder.

    Raises:
        ValueError: naming the option.
    """
    if value is not None and not value.strip():
        raise ValueError(f"{option} {value!r} must not be empty: give it a value, or leave it out")


def load_named_model(arguments: argparse.Namespace) -> LoadedModel:
    """Loads everything.

    Raises:
        FileNotFoundError: when something named is not there.
        ValueError: when it is there, but is not what it should be, or does not belong together.
    """
    named = find_named_sources(arguments.base, arguments.run, arguments.adapter, arguments.dtype)
    tell_loading(named.base)
    tokenizer = load_tokenizer(named.base)
    model = load_base_model(named.base, dtype=named.dtype, device=arguments.device)
    for name, folder in named.folders.items():
        load_adapter(model, folder, name)
    return LoadedModel(model=model, tokenizer=tokenizer, templates=named.templates)


def tell_loading(base: str) -> None:
    """Says on a terminal what takes its time."""
    if sys.stderr.isatty():
        print(f"loading {base} ...", file=sys.stderr, flush=True)


def _run_config(run: Path) -> Path:
    path = run / "config.yaml"
    if not run.is_dir():
        raise FileNotFoundError(f"--run {run}: there is no such folder")
    if not path.is_file():
        raise ValueError(f"--run {run} has no config.yaml: it is not the folder of a training run")
    return path


def _run_adapters(run: Path) -> dict[str, Path]:
    # A hidden folder is one that a killed process was still writing.
    found = sorted((run / "adapters").glob(f"[!.]*/{CONFIG_FILE}"))
    folders = {path.parent.name: path.parent for path in found}
    if not folders:
        raise ValueError(f"--run {run} has no adapters yet: {run / 'adapters'} holds none")
    return folders


def _split_name(argument: str) -> tuple[str, Path]:
    name, equals, folder = argument.partition("=")
    if equals and ADAPTER_NAME.fullmatch(name) and not Path(argument).exists():
        check_not_empty(f"--adapter {argument}", folder)
        path = Path(folder)
    else:
        path = Path(argument)
        name = path.resolve().name
    if not path.is_dir():
        raise FileNotFoundError(f"--adapter {argument}: there is no folder {path}")
    return name, path
