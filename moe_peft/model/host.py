"""The bookkeeping of a model that carries adapters: attaching, detaching, naming their weights."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from moe_peft import strict
from moe_peft.model.batch import ADAPTER_NAME, parse_expert_name
from moe_peft.model.linear import AdapterDict


class AdapterHost(nn.Module):
    """A module whose submodules keep adapters in ``AdapterDict``s."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters_: dict[str, Any] = {}  # name -> the adapter's config object

    @property
    def adapter_names(self) -> list[str]:
        """The attached adapters, in the order of their coming."""
        return list(self.adapters_)

    def add_adapter(self, name: str, config: Any, *, seed: int = 0, tokenizer: Any = None) -> None:
        """Attach a new adapter.

        Args:
            name: letters, digits, ``_`` and ``-``; not yet taken.
            config: a method's config, e.g. ``LoraConfig``; it attaches itself.
            seed: of the adapter's initial weights and of its dropout.
            tokenizer: of the base; only methods that start from a text ask for it.

        Raises:
            ValueError: on a bad or taken name, or a config that does not fit this model. Nothing is attached then.
        """
        if not ADAPTER_NAME.fullmatch(name):
            raise ValueError(f"adapter name {name!r} must consist of letters, digits, '_' and '-'")
        if name in self.adapters_:
            raise ValueError(f"adapter name {name!r} is taken already; remove_adapter frees it")
        try:
            config.attach(self, name, seed, tokenizer)
        except BaseException:
            self._detach(name)
            raise
        self.adapters_[name] = config

    def remove_adapter(self, name: str) -> None:
        """Detach an adapter and free its weights.

        Raises:
            ValueError: when there is none of that name.
        """
        self.adapter_config(name)
        self._detach(name)
        del self.adapters_[name]

    def _detach(self, name: str) -> None:
        for module in self.modules():
            if isinstance(module, AdapterDict):
                for key in list(module.keys()):
                    expert = parse_expert_name(key)
                    if key == name or (expert and expert[0] == name):
                        del module[key]

    def adapter_config(self, name: str) -> Any:
        """The config an adapter was attached with.

        Raises:
            ValueError: when there is none of that name; the message names the nearest.
        """
        if name not in self.adapters_:
            hint = strict.nearest(name, self.adapters_) or "; none is attached"
            raise ValueError(f"adapter {name!r} is not attached to this model{hint}")
        return self.adapters_[name]

    def named_adapter_weights(self, name: str) -> Iterator[tuple[str, nn.Parameter, int | None]]:
        """Checkpoint name, the parameter that holds the weight, and its place there when the parameter is a stack."""
        found: Iterator[tuple[str, nn.Parameter, int | None]] = self.adapter_config(name).named_weights(self, name)
        return found

    def adapter_parameters(self, name: str) -> list[nn.Parameter]:
        """The adapter's trainable parameters, stacks of experts as one each: what its optimizer takes."""
        return list({id(weight): weight for _, weight, _ in self.named_adapter_weights(name)}.values())

    def adapter_state(self, name: str) -> dict[str, Tensor]:
        """Checkpoint names to tensors that view the live weights: editing one in place edits the adapter."""
        return {
            key: weight.detach() if index is None else weight.detach()[index]
            for key, weight, index in self.named_adapter_weights(name)
        }

    def adapter_buffers(self, name: str) -> dict[str, Tensor]:
        """What the adapter changes or has drawn without gradients, by name: the live tensors (masks, importances)."""
        return dict(self.adapter_config(name).named_buffers(self, name))

    def adapter_gradients(self, name: str) -> dict[str, Tensor | None]:
        """The names of ``adapter_state`` to views of the gradients; None before a backward."""
        return {
            key: weight.grad if weight.grad is None or index is None else weight.grad[index]
            for key, weight, index in self.named_adapter_weights(name)
        }
