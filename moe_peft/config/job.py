"""One adapter's part of a training run: its method, its data and its optimizer."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moe_peft import strict
from moe_peft.adapters import METHODS

LONGEST_NAME = 100
ADAPTER_NAME = re.compile(rf"[A-Za-z0-9_-]{{1,{LONGEST_NAME}}}")

# The keys that only one optimizer reads; a value for the other one is refused rather than ignored.
OPTIMIZER_KEYS = {"betas": "adamw", "eps": "adamw", "momentum": "sgd"}


def require(config: object, key: str, holds: bool, rule: str) -> None:
    """Raises the ValueError of a field that breaks its rule."""
    if not holds:
        raise ValueError(f"{key}={strict.show(getattr(config, key))} must {rule}")


def check_seed(config: object, seed: int | None) -> None:
    """Refuses a seed that torch could not take."""
    require(config, "seed", seed is None or 0 <= seed < 2**63, "be in 0..2**63-1")


def check_method(method: object, path: str = "") -> None:
    """Refuses a method that the registry does not have."""
    if not isinstance(method, str) or method not in METHODS:
        where, close = strict.join(path, "method"), strict.did_you_mean(method, METHODS)
        raise ValueError(f"{where}={strict.show(method)} must be one of {', '.join(METHODS)}{close}")


def method_of(config: object) -> str:
    """The registry's name of a config's method.

    Raises:
        ValueError: when the registry does not have it.
    """
    for name, kind in METHODS.items():
        if type(config) is kind:  # a subclass is another method
            return name
    kinds = ", ".join(kind.__name__ for kind in METHODS.values())
    raise ValueError(f"{strict.show(config)} is not the config of a method: {kinds}")


def _remarks_on_other_methods(method: object) -> dict[str, str]:
    return {
        key: f"it is a key of method {other}, not of {method}"
        for other, config in METHODS.items()
        for key in strict.field_names(config)
    }


@dataclass(frozen=True, kw_only=True)
class AdapterJob:
    """One adapter to train: its method, its data and its own optimizer.

    Raises:
        ValueError: naming the field, its value and its rule.
    """

    name: str = field(
        metadata={"help": "its name in the run and of its folder: letters, digits, _ and -; unique, case aside"}
    )
    method: str = field(metadata={"help": f"{', '.join(METHODS)}; it decides which further keys below are valid"})
    adapter: Any = field(metadata={"help": "the method's own config; in a file its keys stand inline, beside these"})
    data: str = field(
        metadata={"help": "training records, .json or .jsonl, relative to the current folder; or bundled:NAME"}
    )
    eval_data: str | None = field(
        default=None,
        metadata={"help": "held-out records for eval_loss, a file or bundled:NAME:eval; null: no evaluation"},
    )
    template: str = field(
        default="alpaca",
        metadata={
            "help": "how a record becomes a prompt: alpaca, moe_peft, chat, or the path of your own template file"
        },
    )
    cutoff_len: int = field(
        default=512, metadata={"help": "longest sample in tokens; a longer prompt is cut from the left"}
    )
    overlong: Literal["error", "skip"] = field(
        default="error",
        metadata={
            "help": "what becomes of an answer that alone is longer than cutoff_len: an error, or skipped and counted"
        },
    )
    batch_size: int = field(default=8, metadata={"help": "samples of one optimizer step"})
    micro_batch_size: int | None = field(
        default=None, metadata={"help": "samples of one forward, the step's gradients being summed; null: batch_size"}
    )
    num_epochs: int = field(default=3, metadata={"help": "passes over the data, reshuffled each time"})
    max_steps: int | None = field(
        default=None, metadata={"help": "optimizer steps in all; where given it decides instead of num_epochs"}
    )
    optimizer: Literal["adamw", "sgd"] = field(default="adamw", metadata={"help": "adamw, or sgd"})
    lr: float = field(default=2e-4, metadata={"help": "peak learning rate"})
    loraplus_lr_ratio: float = field(
        default=1.0, metadata={"help": "lora_B factors and 1-D weights learn at this many times lr (LoRA+)"}
    )
    betas: tuple[float, float] = field(
        default=(0.9, 0.999), metadata={"help": "decay of the running means of gradient and squared gradient (adamw)"}
    )
    eps: float = field(default=1e-8, metadata={"help": "added to the denominator of the update (adamw)"})
    momentum: float = field(default=0.0, metadata={"help": "share of the last update that is kept (sgd)"})
    weight_decay: float = field(
        default=0.0,
        metadata={"help": "decoupled with adamw, added to the gradient with sgd; spares routers and 1-D weights"},
    )
    decay_router: bool = field(default=False, metadata={"help": "let weight_decay act on routers too"})
    lr_scheduler: Literal["constant", "linear", "cosine"] = field(
        default="cosine", metadata={"help": "how lr goes on after the warm-up; linear and cosine fall to 0"}
    )
    warmup_steps: int = field(
        default=0, metadata={"help": "optimizer steps over which lr rises to its peak; instead of warmup_ratio"}
    )
    warmup_ratio: float = field(
        default=0.0, metadata={"help": "the same as a share of all steps; instead of warmup_steps"}
    )
    max_grad_norm: float | None = field(
        default=1.0, metadata={"help": "the adapter's gradient is scaled down to this norm; null: never"}
    )
    eval_steps: int | None = field(
        default=None,
        metadata={"help": "optimizer steps between two evaluations; null: before the first and after the last only"},
    )
    patience: int | None = field(
        default=None,
        metadata={"help": "evaluations in a row without a better eval_loss before it is stopped early; null: never"},
    )
    min_delta: float = field(
        default=0.0, metadata={"help": "how much lower than the best an eval_loss must be to count as better"}
    )
    max_bad_steps: int = field(
        default=3,
        metadata={
            "help": "steps in a row with a loss or gradient that is not finite, each of them skipped, before it fails"
        },
    )
    seed: int | None = field(default=None, metadata={"help": "of init, shuffling and dropout; null: the run's seed"})
    sweep: str | None = field(
        default=None,
        metadata={
            "help": "beside keys that hold lists: {halve_every: STEPS, keep: 0.5, metric: eval_loss} lets only the "
            "better members go on; in a resolved config the name of the sweep it belongs to"
        },
    )

    def __post_init__(self) -> None:
        strict.check_fields(self)
        if not ADAPTER_NAME.fullmatch(self.name):
            raise ValueError(f"name={self.name!r} must be 1 to 100 letters, digits, _ or -: it becomes a folder's name")
        check_method(self.method)
        if type(self.adapter) is not METHODS[self.method]:  # a subclass is another method
            wanted, given = METHODS[self.method].__name__, type(self.adapter).__name__
            raise ValueError(
                f"adapter={strict.show(self.adapter)} of method={self.method!r} must be {wanted}, not {given}"
            )
        for key in ("data", "eval_data", "template"):
            require(self, key, getattr(self, key) != "", "not be empty")
        require(self, "cutoff_len", self.cutoff_len >= 8, "be at least 8")
        require(self, "batch_size", self.batch_size >= 1, "be at least 1")
        if self.micro_batch_size is not None and not 1 <= self.micro_batch_size <= self.batch_size:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} must be in 1..batch_size={self.batch_size}, or null"
            )
        require(self, "num_epochs", self.num_epochs >= 1, "be at least 1")
        require(self, "max_steps", self.max_steps is None or self.max_steps >= 1, "be at least 1, or null")
        self._check_optimizer()
        require(self, "max_grad_norm", self.max_grad_norm is None or self.max_grad_norm > 0, "be above 0, or null")
        require(self, "eval_steps", self.eval_steps is None or self.eval_steps >= 1, "be at least 1, or null")
        if self.eval_steps is not None and self.eval_data is None:
            raise ValueError(f"eval_steps={self.eval_steps} needs eval_data: there is nothing to evaluate on")
        self._check_stopping()
        check_seed(self, self.seed)

    def _check_stopping(self) -> None:
        require(self, "patience", self.patience is None or self.patience >= 1, "be at least 1, or null")
        if self.patience is not None and self.eval_steps is None:
            raise ValueError(f"patience={self.patience} needs eval_steps: it counts evaluations")
        require(self, "min_delta", self.min_delta >= 0, "be at least 0")
        if self.min_delta and self.patience is None:
            raise ValueError(f"min_delta={self.min_delta} needs patience: without it nothing is stopped early")
        require(self, "max_bad_steps", self.max_bad_steps >= 1, "be at least 1")

    def _check_optimizer(self) -> None:
        require(self, "lr", self.lr > 0, "be above 0")
        require(self, "loraplus_lr_ratio", self.loraplus_lr_ratio >= 1, "be at least 1")
        if self.loraplus_lr_ratio != 1 and not self.adapter.takes_lr_ratio:
            raise ValueError(
                f"loraplus_lr_ratio={self.loraplus_lr_ratio} is for adapters with lora_B factors or 1-D weights: "
                f"method={self.method!r} with these settings has none"
            )
        require(self, "betas", all(0 <= beta < 1 for beta in self.betas), "both be in 0..1, 1 excluded")
        require(self, "eps", self.eps > 0, "be above 0")
        require(self, "momentum", 0 <= self.momentum < 1, "be in 0..1, 1 excluded")
        require(self, "weight_decay", self.weight_decay >= 0, "be at least 0")
        for key, optimizer in OPTIMIZER_KEYS.items():
            value, default = getattr(self, key), type(self).__dataclass_fields__[key].default
            if self.optimizer != optimizer and value != default:
                raise ValueError(f"{key}={value!r} is a key of optimizer={optimizer!r}, not of {self.optimizer!r}")
        if self.decay_router and not METHODS[self.method].has_router:
            raise ValueError(f"decay_router=true is for methods with a router, which method={self.method!r} has not")
        require(self, "warmup_steps", self.warmup_steps >= 0, "be at least 0")
        require(self, "warmup_ratio", 0 <= self.warmup_ratio < 1, "be in 0..1, 1 excluded")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and warmup_ratio={self.warmup_ratio} say one thing in two ways: "
                "leave one of them 0"
            )

    @classmethod
    def from_dict(cls, mapping: object, path: str = "", elsewhere: Mapping[str, str] | None = None) -> "AdapterJob":
        """Builds a job from plain data in which the method's keys stand beside the job's own.

        Args:
            path: where the mapping stands in its file; put before every field named in an error.
            elsewhere: what to say of a key that belongs to another place than an adapter.

        Raises:
            ValueError: as :func:`moe_peft.strict.build`.
        """
        method = mapping.get("method") if isinstance(mapping, Mapping) else None
        remarks = {**(elsewhere or {}), **_remarks_on_other_methods(method)}
        values = strict.check_keys(mapping, adapter_keys(method), path, remarks)
        if "method" not in values:
            raise ValueError(f"{strict.join(path, 'method')} is missing: it must be one of {', '.join(METHODS)}")
        check_method(method, path)
        own = {key: values.pop(key) for key in strict.field_names(METHODS[str(method)]) if key in values}
        values["adapter"] = strict.build(METHODS[str(method)], own, path)
        return strict.build(cls, values, path)

    def to_dict(self) -> dict[str, Any]:
        """The job as plain data, the method's keys inline."""
        values = strict.plain(self)
        own = values.pop("adapter")
        head = {key: values.pop(key) for key in ("name", "method")}
        return {**head, **own, **values}


def adapter_keys(method: object) -> tuple[str, ...]:
    """The keys that an adapter's entry in a file may have.

    Args:
        method: a key of the registry, or a list of them to sweep over; anything else (say, None where it is not known
            yet) gives all methods' keys.
    """
    methods = method if isinstance(method, (list, tuple)) else [method]
    configs = [METHODS[name] for name in methods if isinstance(name, str) and name in METHODS] or METHODS.values()
    job = [key for key in strict.field_names(AdapterJob) if key != "adapter"]
    return tuple(dict.fromkeys([*job, *(key for config in configs for key in strict.field_names(config))]))
