"""One adapter's training on a base model that is loaded already."""

import io
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moe_peft import strict
from moe_peft.adapters import Method
from moe_peft.config import AdapterJob, TrainConfig
from moe_peft.config.job import method_of
from moe_peft.data.tokenizer import Tokenizer
from moe_peft.io.atomic import write_text_atomically
from moe_peft.manager.folder import RUN
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.display.summary import AdapterResult
from moe_peft.training.folder.checkpoints import Checkpoints
from moe_peft.training.folder.run_folder import CONFIG_FILE
from moe_peft.training.resume import differences
from moe_peft.training.trainer import Trainer

if TYPE_CHECKING:
    from rich.console import Console

_OF_ADAPTER = tuple(
    key for key in strict.field_names(AdapterJob) if key not in ("name", "method", "adapter", "data", "seed", "sweep")
)
_OF_RUN = ("max_batch_tokens", "activation_checkpointing", "num_threads", "save_steps", "keep_checkpoints")


def can_go_on(place: Path) -> bool:
    """Whether a training has left at its workplace what it goes on from."""
    return bool(Checkpoints(place / RUN).paths)


def train_adapter(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer | None,
    place: Path,
    name: str,
    config: Method,
    data: str | Path | Sequence[Mapping[str, Any]],
    *,
    seed: int,
    console: "Console | None",
    settings: Mapping[str, Any],
) -> AdapterResult:
    """Train an adapter and save it in a run's folder at its workplace; a training that stopped there goes on.

    Args:
        model: the base, on which nothing stays of the training.
        tokenizer: of the base.
        place: the workplace.
        name: the adapter's.
        config: of its method.
        data: as in a training config, or records.
        seed: of everything drawn.
        console: takes the reports; None: nobody does.
        settings: keys of the adapter's entry in a config and of the run.

    Raises:
        ValueError: without a tokenizer, on an unknown setting, on other settings or data than those of a training that
            stopped there, while another process trains there, and as the training itself.
        UnfinishedError: when the adapter failed.
    """
    from rich.console import Console

    if tokenizer is None:
        raise ValueError(
            "tokenizer=None: training needs the base model's, AdapterManager(model, folder, tokenizer=...)"
        )
    strict.check_keys(settings, (*_OF_ADAPTER, *_OF_RUN), "")
    if not can_go_on(place):
        shutil.rmtree(place, ignore_errors=True)  # a process was killed before there was anything worth keeping
    own = {key: value for key, value in settings.items() if key in _OF_ADAPTER}
    job = {**own, "name": name, "method": method_of(config), "adapter": config, "data": _as_file(data, place)}
    run_config = TrainConfig(
        base_model=model.source_ or "loaded",
        output_dir=str(place / RUN),
        seed=seed,
        answer_examples=0,
        adapters=(AdapterJob(**job),),
        **{key: value for key, value in settings.items() if key in _OF_RUN},
    )
    with _left_as_it_was(model, name), torch.inference_mode(False):
        silent = console or Console(file=io.StringIO())
        with _as_it_began(run_config, place, name):
            trainer = Trainer(run_config, console=silent, model=model, tokenizer=tokenizer)
        (result,) = trainer.train().adapters
    return result


@contextmanager
def _as_it_began(config: TrainConfig, place: Path, name: str) -> Iterator[None]:
    """Refuses, in the manager's words, to go on with other settings or data than those that a training began with."""
    if not can_go_on(place):
        yield
        return
    way_out = f"add it as it was to go on, or delete({name!r}) to begin anew"
    earlier = TrainConfig.from_file(place / RUN / CONFIG_FILE)
    changes = [text.removeprefix(f"adapters.{name}.") for text in differences(config.to_dict(), earlier.to_dict())]
    if changes:
        raise ValueError(
            f"adapter {name!r} has an interrupted training of other settings, {'; '.join(changes)}: {way_out}"
        )
    try:
        yield
    except ValueError as error:
        reason = str(error).partition(": give output_dir")[0].removeprefix(f"adapter {name!r}: ")
        raise ValueError(
            f"adapter {name!r} has an interrupted training, which cannot go on: {reason}: {way_out}"
        ) from error


def _as_file(data: str | Path | Sequence[Mapping[str, Any]], place: Path) -> str:
    """The path that a config takes; records are written to one."""
    if isinstance(data, (str, Path)):
        return str(data)
    try:
        lines = [json.dumps(dict(record), ensure_ascii=False) + "\n" for record in data]
    except (TypeError, ValueError) as error:
        raise ValueError(f"data must be a file or a list of records, each a mapping: {error}") from error
    path = place.absolute() / "data.jsonl"
    write_text_atomically(path, "".join(lines))
    return str(path)


@contextmanager
def _left_as_it_was(model: LlamaForCausalLM, name: str) -> Iterator[None]:
    """Takes back what a training switches on the model and in torch; an interrupted one leaves its adapter, too."""
    training, checkpointing, num_threads = model.training, model.activation_checkpointing_, torch.get_num_threads()
    try:
        yield
    finally:
        if name in model.adapter_names:
            model.remove_adapter(name)
        model.train(training)
        model.activation_checkpointing_ = checkpointing
        torch.set_num_threads(num_threads)
