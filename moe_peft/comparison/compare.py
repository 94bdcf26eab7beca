"""The cost of methods on one base model: parameters, bytes and FLOPs, from shapes alone."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_peft import strict
from moe_peft.adapters import METHODS, LoraConfig, Method
from moe_peft.comparison.flops import NAME, flops_per_token
from moe_peft.config.job import check_method, method_of
from moe_peft.data.tokenizer import load_tokenizer
from moe_peft.io.adapter_files import size_of_files
from moe_peft.io.base_model import BaseModelShape, read_base_model_shape, without_memory
from moe_peft.model.llama import LlamaForCausalLM

CONTEXT = 512  # tokens of the sample that FLOPs are counted on
_MOMENTS = 2  # AdamW's running means, each as large as the weights


@dataclass(frozen=True, kw_only=True)
class MethodCost:
    """One method on one base model.

    Args:
        name: of the row.
        method: as the registry calls it.
        config: the method's settings.
        base_parameters: of the frozen base model.
        trainable_parameters: of the adapter.
        saved_bytes: of the folder that ``save_adapter`` writes.
        optimizer_bytes: of the state that AdamW keeps.
        flops_per_token: of forward and backward, on a sample of ``context`` tokens.
        relative_flops: the same, as a multiple of what a LoRA of default settings takes on this base.
        context: tokens of that sample.
    """

    name: str
    method: str
    config: Method
    base_parameters: int
    trainable_parameters: int
    saved_bytes: int
    optimizer_bytes: int
    flops_per_token: float
    relative_flops: float
    context: int

    @property
    def total_parameters(self) -> int:
        """Of base model and adapter."""
        return self.base_parameters + self.trainable_parameters

    @property
    def share(self) -> float:
        """Trainable parameters as a share of the base model's."""
        return self.trainable_parameters / self.base_parameters

    @property
    def reduction(self) -> float | None:
        """How many times fewer parameters are trained than the base model has; None when none are."""
        return self.base_parameters / self.trainable_parameters if self.trainable_parameters else None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        derived = {key: getattr(self, key) for key in ("total_parameters", "share", "reduction")}
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**own, "config": strict.plain(self.config), **derived}


def compare_methods(
    base: str | Path | BaseModelShape | LlamaForCausalLM,
    methods: Mapping[str, Method] | Sequence[Method | str],
    *,
    context: int = CONTEXT,
    dtype: str | torch.dtype = "auto",
    tokenizer: Any = None,
) -> list[MethodCost]:
    """What methods would cost on a base model; of its files only the headers are read, and no weight takes memory.

    Args:
        base: as ``load_base_model`` takes it; or its shape, or a loaded model, whose shape alone is looked at.
        methods: configs by the names of their rows; or a list of configs, of methods' names (with their defaults), or
            of both, whose rows are named after what they set.
        context: tokens of the sample that FLOPs are counted on.
        dtype: of the base model.
        tokenizer: of the base model, for methods that start from a text; None: read when one of them asks for it.

    Returns:
        One row a method, in the order of ``methods``.

    Raises:
        FileNotFoundError: when the base model is not there.
        ValueError: when it is none; on no or an unknown method, two rows of one name, a config that does not fit this
            base, and a context that is longer than it allows.
    """
    named, context = _named(methods), strict.coerce(context, int, "context")
    if isinstance(base, LlamaForCausalLM):
        shape = BaseModelShape(base.config_, base.dtype, base.device)
    else:
        shape = base if isinstance(base, BaseModelShape) else read_base_model_shape(base, dtype, "cpu")
    if tokenizer is None and isinstance(base, (str, Path)):
        tokenizer = _Unread(base)
    _check_context(context, named, shape.config.context_limit)
    model = shape.empty_model().eval()
    num_base = sum(weight.numel() for weight in model.parameters())
    plain = _flops(shape, "plain LoRA", LoraConfig(), context, tokenizer)
    costs = []
    for name, config in named.items():
        _attach(model, name, config, tokenizer)
        weights = model.adapter_parameters(NAME)
        flops = plain if config == LoraConfig() else _flops(shape, name, config, context, tokenizer)
        costs.append(
            MethodCost(
                name=name,
                method=method_of(config),
                config=config,
                base_parameters=num_base,
                trainable_parameters=sum(weight.numel() for weight in weights),
                saved_bytes=size_of_files(model, NAME),
                optimizer_bytes=_MOMENTS * sum(weight.nbytes for weight in weights),
                flops_per_token=flops,
                relative_flops=flops / plain,
                context=context,
            )
        )
        model.remove_adapter(NAME)
    return costs


def describe(config: Method) -> str:
    """A method's name and what its config sets: ``lora r=16``."""
    return " ".join([method_of(config), *_changes(config)])


def _changes(config: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _changes(value, f"{prefix}{field.name}.")
        elif value != _default(field):
            yield f"{prefix}{field.name}={_shown(value)}"


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(value: object) -> str:
    """As YAML, without a space."""
    if isinstance(value, tuple):
        return f"[{','.join(map(_shown, value))}]"
    return json.dumps(value, separators=(",", ":")).strip('"')


def _named(methods: Mapping[str, Method] | Sequence[Method | str]) -> dict[str, Method]:
    if isinstance(methods, (str, Method)):
        raise ValueError(f"methods={strict.show(methods)} must be a list of methods: put it in brackets")
    if not isinstance(methods, Iterable):
        raise ValueError(f"methods={strict.show(methods)} must be a list of methods, or configs by their rows' names")
    named: dict[str, Method] = {}
    if isinstance(methods, Mapping):
        for config in methods.values():
            method_of(config)
        named, methods = dict(methods), ()
    for given in methods:
        if isinstance(given, str):
            check_method(given)
        config = METHODS[given]() if isinstance(given, str) else given
        name = describe(config)
        if name in named:
            raise ValueError(f"methods has {name!r} twice")
        named[name] = config
    if not named:
        raise ValueError("methods must hold at least one method")
    return named


def _check_context(context: int, named: Mapping[str, Method], limit: int | None) -> None:
    widest = max(named, key=lambda name: named[name].context_tokens)
    virtual = named[widest].context_tokens
    if limit is not None and virtual > limit - 2:
        raise ValueError(
            f"{widest}: {virtual} virtual tokens leave a sample no two of the {limit} for which the base model is made"
        )
    most = None if limit is None else limit - virtual
    if context < 2 or (most is not None and context > most):
        places = f" less the {virtual} virtual tokens of a method" if virtual else ""
        rule = "be at least 2" if most is None else f"be in 2..{most}, for which the base model is made{places}"
        raise ValueError(f"context={context} must {rule}")


def _flops(shape: BaseModelShape, name: str, config: Method, context: int, tokenizer: Any) -> float:
    return flops_per_token(shape, lambda model: _attach(model, name, config, tokenizer), context)


def _attach(model: LlamaForCausalLM, name: str, config: Method, tokenizer: Any) -> None:
    """Put the adapter of a row on a model without memory."""
    try:
        with without_memory():
            model.add_adapter(NAME, config, tokenizer=tokenizer)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


class _Unread:
    """A base model's tokenizer, read when it is first asked for something: a base without one can be compared, too."""

    def __init__(self, source: str | Path) -> None:
        self._source = source
        self._tokenizer: Any = None

    def __getattr__(self, name: str) -> Any:
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self._source)
        return getattr(self._tokenizer, name)
