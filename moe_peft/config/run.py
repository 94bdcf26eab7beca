"""The dataclasses of a training run, read strictly from YAML, JSON or plain data."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from moe_peft import strict
from moe_peft.config.entries import check_unique_names, read_entries
from moe_peft.config.file import parse_mapping, read_mapping
from moe_peft.config.job import AdapterJob, adapter_keys, check_seed, require
from moe_peft.config.original import as_ours
from moe_peft.config.overrides import KnownKeys, apply_overrides
from moe_peft.config.sweep import Sweep, check_sweeps


def _run_keys() -> tuple[str, ...]:
    return (*strict.field_names(TrainConfig), "defaults")


def _entry_keys(entry: Mapping[str, Any] | None, data: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys that an override may set in ``entry``; of None, in any."""
    defaults = data.get("defaults")
    given = {**(defaults if isinstance(defaults, Mapping) else {}), **(entry or {})}
    return adapter_keys(None if entry is None else given.get("method"))


class _Dumper(yaml.SafeDumper):
    """``yaml.SafeDumper`` that quotes Unicode's own line breaks, which it writes bare and reads back as spaces."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = '"' if re.search("[\\x85\\u2028\\u2029\\ufeff]", data) else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _Dumper.represent_str)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: one frozen base model and the adapters that are trained on it together.

    Raises:
        ValueError: naming the field, its value and its rule.
    """

    base_model: str = field(
        metadata={"help": "a Hugging Face folder, a .gguf file, a hub id, or the built-in smollm2-135m"}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = field(
        default="auto",
        metadata={"help": "of the base model (adapters are float32 at least); auto: the checkpoint's, where it runs"},
    )
    device: str = field(
        default="auto", metadata={"help": "auto, cpu, cuda, cuda:N or mps; auto: a GPU where there is one"}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "the run's folder, new or empty; null: the first free name under runs/"}
    )
    seed: int = field(default=0, metadata={"help": "of every random draw; the same config gives the same run"})
    max_batch_tokens: int = field(
        default=4096, metadata={"help": "tokens of one fused forward, at most; adapters share it"}
    )
    max_concurrent_adapters: int | None = field(
        default=None,
        metadata={"help": "adapters that train at once, the others wait for a free place; null: all of them"},
    )
    activation_checkpointing: Literal["none", "full", "selective"] = field(
        default="none",
        metadata={
            "help": "what the backward computes again rather than keeps in memory: none; full, whole decoder layers; "
            "selective, all of them but attention"
        },
    )
    num_threads: int | None = field(default=None, metadata={"help": "CPU threads; null: torch's choice"})
    save_steps: int | None = field(
        default=100,
        metadata={
            "help": "fused forwards between two checkpoints to resume from; null: one at the end of an adapter and at "
            "an interruption only"
        },
    )
    keep_checkpoints: int = field(default=2, metadata={"help": "checkpoints that are kept, the newest ones"})
    tensorboard: bool = field(default=False, metadata={"help": "also write TensorBoard event files"})
    answer_examples: int = field(
        default=2, metadata={"help": "held-out prompts that base and adapter answer at the end, per adapter"}
    )
    adapters: tuple[AdapterJob, ...] = field(
        metadata={"help": "the adapters to train, each with the keys below; a key with a list of values is swept"}
    )
    sweeps: tuple[Sweep, ...] = field(
        default=(),
        metadata={"help": "of a resolved config: name, halve_every, keep and metric of each sweep; lists make them"},
    )
    # What the user should know about how the file was read; no key.
    remarks: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        strict.check_fields(self)
        require(self, "base_model", self.base_model != "", "not be empty")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps(:0)?", self.device):
            raise ValueError(f"device={self.device!r} must be auto, cpu, cuda, cuda:N or mps")
        require(self, "output_dir", self.output_dir != "", "not be empty; null picks a free name")
        check_seed(self, self.seed)
        require(self, "max_batch_tokens", self.max_batch_tokens >= 1, "be at least 1")
        require(
            self,
            "max_concurrent_adapters",
            self.max_concurrent_adapters is None or self.max_concurrent_adapters >= 1,
            "be at least 1, or null",
        )
        require(self, "save_steps", self.save_steps is None or self.save_steps >= 1, "be at least 1, or null")
        require(self, "keep_checkpoints", self.keep_checkpoints >= 1, "be at least 1")
        require(self, "num_threads", self.num_threads is None or self.num_threads >= 1, "be at least 1, or null")
        require(self, "answer_examples", self.answer_examples >= 0, "be at least 0")
        if not self.adapters:
            raise ValueError("adapters=[] must hold at least one adapter")
        places = [(f"adapters[{index}]", job) for index, job in enumerate(self.adapters)]
        check_unique_names(places)
        check_sweeps(self.sweeps, places)

    @classmethod
    def from_file(cls, path: str | Path, overrides: Sequence[str] = ()) -> "TrainConfig":
        """Reads a YAML or JSON file. Relative paths in it are relative to the current folder, not to the file's.

        Args:
            overrides: ``key=value`` strings, as :func:`moe_peft.config.overrides.apply_overrides` reads them.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: naming the file, the key's full path, its value and its rule.
        """
        return cls._from_source(read_mapping(path), str(path), overrides)

    @classmethod
    def default(cls, overrides: Sequence[str] = ()) -> "TrainConfig":
        """The embedded config: three small bundled tasks on ``smollm2-135m``.

        Raises:
            ValueError: on an override that does not fit.
        """
        source = "the embedded default config"
        text = resources.files("moe_peft").joinpath("default.yaml").read_text(encoding="utf-8")
        return cls._from_source(parse_mapping(text, source=source), source, overrides)

    @classmethod
    def _from_source(cls, data: dict[str, Any], source: str, overrides: Sequence[str]) -> "TrainConfig":
        data, source, remarks = as_ours(data, source)
        known = KnownKeys(of_run=_run_keys(), of_adapter=lambda entry: _entry_keys(entry, data))
        apply_overrides(data, overrides, known)
        try:
            config = cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        object.__setattr__(config, "remarks", tuple(remarks))
        return config

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "TrainConfig":
        """Builds a config from plain data, spelled as in a file (``defaults`` included).

        Raises:
            ValueError: naming the key's full path, its value and its rule.
        """
        remarks = dict.fromkeys(adapter_keys(None), "it is a key of an adapter: put it in its entry, or under defaults")
        values = strict.check_keys(mapping, _run_keys(), "", remarks)
        defaults = values.pop("defaults", None)
        if isinstance(values.get("adapters"), (list, tuple)):
            elsewhere = dict.fromkeys(_run_keys(), "it is a key of the run: put it at the top level")
            jobs, sweeps = read_entries(values["adapters"], {} if defaults is None else defaults, elsewhere)
            values["adapters"] = jobs
            if sweeps:
                given = strict.coerce(values.get("sweeps", ()), tuple[Sweep, ...], "sweeps")
                values["sweeps"] = (*given, *sweeps)
        return strict.build(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """The config as plain data that :meth:`from_dict` reads back to an equal one; nothing left to defaults."""
        return {**strict.plain(self), "adapters": [job.to_dict() for job in self.adapters]}

    def to_yaml(self) -> str:
        """:meth:`to_dict` as YAML."""
        return yaml.dump(self.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
