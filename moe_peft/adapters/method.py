"""What every method's config offers the rest of the project, which knows no method by its name."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from moe_peft import strict

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM

# Of ranks, widths and numbers of tokens: no projection is wider. What is beyond would be allocated before it fails.
LARGEST_SIZE = 1 << 16

NamedWeight = tuple[str, nn.Parameter, int | None]  # checkpoint name, what holds it, its place there if that is a stack


class Updates(Protocol):
    """What a method does to its own adapter while it trains, apart from what the optimizer does."""

    def after_step(self, step: int) -> None:
        """Called behind every optimizer step that is taken, while the (clipped) gradients are still there.

        It may change weights and buffers in place, keeping the tensor objects, and the shape of a weight by ``resize``.

        Args:
            step: the optimizer step's number, from 1. Skipped steps are missing.
        """


def check_size(name: str, value: int, most: int = LARGEST_SIZE) -> None:
    """Refuses a size that no adapter has.

    Args:
        name: the field's.
        value: from 1 on.
        most: the largest.

    Raises:
        ValueError: naming the field.
    """
    if not 1 <= value <= most:
        rule = "at least 1" if value < 1 else f"at most {most}"
        raise ValueError(f"{name}={strict.show(value)} must be {rule}")


def resize(weight: nn.Parameter, values: Tensor) -> None:
    """Give a parameter values of another shape and no gradient; the optimizer still knows it: the object stays.

    Args:
        weight: the parameter.
        values: those of the weight so far at the beginning of every dimension, new entries behind. Where it is called
            from ``after_step`` the run puts the same new entries behind the copies of earlier weights, whose effect
            they must not change either, and zeros behind the optimizer's state.
    """
    dtype = weight.dtype
    weight.grad = None
    # Another dtype has torch forget the node that takes in gradients of the old shape, which a graph may keep alive.
    weight.data = weight.new_empty(0, dtype=torch.float16)
    weight.data = values.to(weight.device, dtype)


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """The settings of an adapter, spelled as PEFT spells them, and what they mean for a model.

    Raises:
        ValueError: on a value of the wrong type.
    """

    peft_type: ClassVar[str] = ""
    has_router: ClassVar[bool] = False
    resizes: ClassVar[bool] = False  # whether weights or buffers take other shapes while it trains

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

    @property
    def takes_lr_ratio(self) -> bool:
        """Whether LoRA+ lets any of its weights learn faster: a factor lora_B, or a 1-D weight."""
        return True

    @property
    def context_tokens(self) -> int:
        """Virtual tokens before each of its samples: they take their places in the model's context."""
        return self.inserted_tokens

    @property
    def inserted_tokens(self) -> int:
        """Those of the virtual tokens that run through the layers as tokens do, and so cost what tokens cost."""
        return 0

    @abstractmethod
    def named_weights(self, model: "LlamaForCausalLM", name: str) -> Iterator[NamedWeight]:
        """Every trained weight under its checkpoint name."""

    def named_buffers(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[str, Tensor]]:
        """What is not trained by gradients but goes on changing, or was drawn: a run's checkpoint holds it."""
        return iter(())

    def saved_buffers(self, model: "LlamaForCausalLM", name: str) -> Iterator[tuple[str, Tensor]]:
        """Those of the buffers without which the adapter could not be used: its folder holds them."""
        return iter(())

    def restore_buffers(self, model: "LlamaForCausalLM", name: str, buffers: Mapping[str, Tensor]) -> None:
        """Fill the saved buffers of an adapter that has just been attached.

        Args:
            model: carries the adapter.
            name: the adapter's.
            buffers: values of all that ``saved_buffers`` yields, among other tensors of the folder.
        """
        for key, tensor in self.saved_buffers(model, name):
            tensor.copy_(buffers[key])

    def is_router(self, key: str) -> bool:
        """Whether a checkpoint name is a router's weight."""
        return False

    def penalty(self, model: "LlamaForCausalLM", name: str) -> Tensor | None:
        """A loss on the adapter's own weights, times its coefficient, scalar; None without one."""
        return None

    def updates(self, model: "LlamaForCausalLM", name: str, num_steps: int) -> Updates | None:
        """What the method does behind each optimizer step of a training that begins or goes on; None: nothing.

        Its state is in ``named_buffers``; where earlier weights are kept, ``saved_buffers`` are kept beside them.

        Args:
            model: carries the adapter.
            name: the adapter's.
            num_steps: optimizer steps of the whole training.

        Raises:
            ValueError: when the settings do not fit that many steps.
        """
        return None

    def at_largest(self, num_steps: int) -> "Method":
        """The settings of an adapter that begins as large as this one can become while it trains.

        Args:
            num_steps: optimizer steps of the whole training.
        """
        return self

    def on_few_layers(self, num_layers: int) -> "Method":
        """The settings for a trial model of a few layers, any of which is to stand for every layer of the real one.

        Args:
            num_layers: of the real one.
        """
        return self

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
