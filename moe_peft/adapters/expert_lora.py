"""Settings of a mixture's experts where they differ from those of its attention."""

from dataclasses import dataclass, field, fields

from moe_peft import strict
from moe_peft.adapters.lora import PLAIN_INITS, LoraConfig


@dataclass(frozen=True, kw_only=True)
class ExpertLoraConfig:
    """What is not None replaces the adapter's own setting on the projections that carry experts.

    Raises:
        ValueError: on a value of the wrong type.
    """

    r: int | None = field(default=None, metadata={"help": "rank of an expert's update"})
    lora_alpha: float | None = field(default=None, metadata={"help": "an expert's update is scaled by lora_alpha / r"})
    lora_dropout: float | None = field(default=None, metadata={"help": "dropout on the experts' input"})
    use_rslora: bool | None = field(default=None, metadata={"help": "scale by lora_alpha / sqrt(r) instead"})
    init_lora_weights: bool | str | None = field(default=None, metadata={"help": "as the adapter's"})

    def __post_init__(self) -> None:
        strict.check_fields(self)

    def over(self, adapter: LoraConfig) -> LoraConfig:
        """The settings of the experts' factors.

        Args:
            adapter: gives what is None here, and the target modules.

        Raises:
            ValueError: on a value outside its rule.
        """
        values = {f.name: getattr(adapter, f.name) for f in fields(LoraConfig)}
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        try:
            if isinstance(self.init_lora_weights, str) and self.init_lora_weights not in PLAIN_INITS:
                choices = ", ".join(map(repr, PLAIN_INITS))
                raise ValueError(f"init_lora_weights={self.init_lora_weights!r} must be true, false or {choices}")
            return LoraConfig(**{**values, **{key: value for key, value in own.items() if value is not None}})
        except ValueError as error:
            raise ValueError(f"expert_lora.{error}") from error
