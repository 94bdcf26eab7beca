"""One adapter's training on a base model that is loaded already."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_peft import strict
from moe_peft.adapters import Method
from moe_peft.config import AdapterJob, TrainConfig
from moe_peft.config.job import method_of
from moe_peft.data.tokenizer import Tokenizer
from moe_peft.io.atomic import write_text_atomically
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.display.summary import AdapterResult
from moe_peft.training.trainer import Trainer

if TYPE_CHECKING:
    from rich.console import Console

_OF_ADAPTER = tuple(
    key for key in strict.field_names(AdapterJob) if key not in ("name", "method", "adapter", "data", "seed", "sweep")
)
_OF_RUN = ("max_batch_tokens", "activation_checkpointing", "num_threads", "save_steps", "keep_checkpoints")


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
        ValueError: without a tokenizer, on an unknown setting, and as the training itself.
        UnfinishedError: when the adapter failed.
    """
    from rich.console import Console

    if tokenizer is None:
        raise ValueError(
            "tokenizer=None: training needs the base model's, AdapterManager(model, folder, tokenizer=...)"
        )
    strict.check_keys(settings, (*_OF_ADAPTER, *_OF_RUN), "")
    own = {key: value for key, value in settings.items() if key in _OF_ADAPTER}
    job = {**own, "name": name, "method": method_of(config), "adapter": config, "data": _as_file(data, place)}
    run_config = TrainConfig(
        base_model=model.source_ or "loaded",
        output_dir=str(place / "run"),
        seed=seed,
        answer_examples=0,
        adapters=(AdapterJob(**job),),
        **{key: value for key, value in settings.items() if key in _OF_RUN},
    )
    with _left_as_it_was(model, name):
        silent = console or Console(file=io.StringIO())
        (result,) = Trainer(run_config, console=silent, model=model, tokenizer=tokenizer).train().adapters
    return result


def _as_file(data: str | Path | Sequence[Mapping[str, Any]], place: Path) -> str:
    """The path that a config takes; records are written to one."""
    if isinstance(data, (str, Path)):
        return str(data)
    try:
        lines = [json.dumps(dict(record), ensure_ascii=False) + "\n" for record in data]
    except (TypeError, ValueError) as error:
        raise ValueError(f"data must be a file or a list of records, each a mapping: {error}") from error
    path = place / "data.jsonl"
    write_text_atomically(path, "".join(lines))
    return str(path)


@contextmanager
def _left_as_it_was(model: LlamaForCausalLM, name: str) -> Iterator[None]:
    """Takes back what a training switches on the model; one that is interrupted leaves its adapter, too."""
    training, checkpointing = model.training, model.activation_checkpointing_
    try:
        yield
    finally:
        if name in model.adapter_names:
            model.remove_adapter(name)
        model.train(training)
        model.activation_checkpointing_ = checkpointing
