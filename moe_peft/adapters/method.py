"""What every method's config offers the rest of the project, which knows no method by its name."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from moe_peft import strict

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

NamedWeight = tuple[str, nn.Parameter, int | None]  # checkpoint name, what holds it, its place there if that is a stack


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """The settings of an adapter, spelled as PEFT spells them, and what they mean for a model.

    Raises:
        ValueError: on a value of the wrong type.
    """

    peft_type: ClassVar[str] = ""
    has_router: ClassVar[bool] = False

    def __post_init__(self) -> None:
        strict.check_fields(self)

    @abstractmethod
    def attach(self, model: "LlamaForCausalLM", name: str, seed: int, tokenizer: Any = None) -> None:
        """Put a fresh adapter's modules into the model.

        Args:
            model: the base.
            name: the adapter's.
            seed: of its initial weights and its dropout.
            tokenizer: for initial weights that are made from a text; None where there is none.

        Raises:
            ValueError: when the settings do not fit the model.
        """

    @abstractmethod
    def named_weights(self, model: "LlamaForCausalLM", name: str) -> Iterator[NamedWeight]:
        """Every trained weight under its checkpoint name."""

    def named_buffers(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[str, Tensor]]:
        """What is not trained by gradients but goes on changing, or was drawn: a run's checkpoint holds it."""
        return iter(())

    def saved_buffers(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[str, Tensor]]:
        """Those of the buffers without which the adapter could not be used: its folder holds them."""
        return iter(())

    def is_router(self, key: str) -> bool:
        """Whether a checkpoint name is a router's weight."""
        return False

    def penalty(self, model: "LlamaForCausalLM", name: str) -> Tensor | None:
        """A loss on the adapter's own weights, times its coefficient, scalar; None without one."""
        return None

    @classmethod
    def claims(cls, data: Mapping[str, Any]) -> bool:
        """Whether a folder's settings of this ``peft_type`` are of this method: several methods may share a type."""
        return True

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """A folder's settings as this method's own: renamed, translated, without what changes nothing.

        Raises:
            ValueError: on a setting that means something this method does not do.
        """
        return dict(data)

    def to_peft(self, model: "LlamaForCausalLM", name: str) -> dict[str, Any]:
        """The settings as they stand in the adapter's folder."""
        return dataclasses.asdict(self)

    def to_saved(self, model: "LlamaForCausalLM", name: str) -> dict[str, Tensor]:
        """The tensors of the adapter's folder."""
        return {**model.adapter_state(name), **dict(self.saved_buffers(model, name))}

    def from_saved(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A folder's tensors under the names, and of the shapes, of ``to_saved``'s default.

        Raises:
            ValueError: when they cannot be this method's.
        """
        return weights
