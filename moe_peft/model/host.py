"""The bookkeeping of a model that carries adapters: attaching, detaching, naming their weights."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe_peft import strict
from moe_peft.model.batch import ADAPTER_NAME, parse_expert_name
from moe_peft.model.draws import checked_seed
from moe_peft.model.linear import AdapterDict
from moe_peft.model.merging import Merge, merge, unmerge


class AdapterHost(nn.Module):
    """A module whose submodules keep adapters in ``AdapterDict``s."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters_: dict[str, Any] = {}  # name -> the adapter's config object
        self.merged_: Merge | None = None

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
            ValueError: on a bad or taken name, a bad seed, a config that does not fit this model, or while an adapter
                is merged. Nothing is attached then.
        """
        seed = checked_seed(seed)
        if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
            raise ValueError(f"adapter name {strict.show(name)} must consist of letters, digits, '_' and '-'")
        if name in self.adapters_:
            raise ValueError(f"adapter name {name!r} is taken already; remove_adapter frees it")
        if self.merged_ is not None:
            raise ValueError(
                f"adapter {name!r} belongs beside the plain base model, but {self.merged_.name!r} is merged into it: "
                f"unmerge_adapter({self.merged_.name!r}) first"
            )
        try:
            with torch.inference_mode(False):  # whose tensors could never be trained
                config.attach(self, name, seed, tokenizer)
        except BaseException:
            self._detach(name)
            raise
        self.adapters_[name] = config

    def remove_adapter(self, name: str) -> None:
        """Detach an adapter and free its weights; one that is merged leaves the base weights first.

        Raises:
            ValueError: when there is none of that name.
        """
        self.adapter_config(name)
        if self.merged_adapter == name:
            self.unmerge_adapter(name)
        self._detach(name)
        del self.adapters_[name]

    @property
    def merged_adapter(self) -> str | None:
        """The adapter that is merged into the base weights; None: they are the base model's own."""
        return None if self.merged_ is None else self.merged_.name

    def merge_adapter(self, name: str) -> None:
        """Fold an adapter into the base weights: ``W`` becomes ``W + ΔW``, computed wide and rounded once.

        Batches of that adapter, and of ``""``, then run the base weights as they stand. Batches of other adapters are
        refused, as are further adapters. The adapter's own weights stay as they are, and so do the original base
        weights, beside the model.

        Raises:
            ValueError: on an unknown adapter, one that no change of the projections' weights equals, one whose merged
                weights are not finite, or while one is merged already. The base weights are then as they were.
        """
        if self.merged_ is not None:
            raise ValueError(
                f"adapter {name!r} cannot be merged while {self.merged_.name!r} is: "
                f"unmerge_adapter({self.merged_.name!r}) first"
            )
        self.merged_ = merge(self, name)

    def unmerge_adapter(self, name: str) -> None:
        """Give the base weights their original bits back.

        Raises:
            ValueError: when this adapter is not merged.
        """
        self.adapter_config(name)
        if self.merged_ is None or self.merged_.name != name:
            other = "none is" if self.merged_ is None else f"{self.merged_.name!r} is"
            raise ValueError(f"adapter {name!r} is not merged into the base model: {other}")
        unmerge(self, self.merged_)
        self.merged_ = None

    def check_runnable(self, name: str, *, training: bool = False) -> None:
        """Refuse an adapter whose batches this model cannot run as it stands.

        Args:
            name: the adapter.
            training: whether it is to be trained.

        Raises:
            ValueError: when it is not attached, when another is merged, or when it is merged and about to be trained.
        """
        self.adapter_config(name)
        merged = self.merged_adapter
        if merged is not None and merged != name:
            raise ValueError(
                f"adapter {name!r} runs beside the plain base model, but {merged!r} is merged into it: "
                f"unmerge_adapter({merged!r}) first"
            )
        if merged is not None and training:
            raise ValueError(
                f"adapter {name!r} is merged into the base model and cannot be trained: unmerge_adapter({name!r}) "
                "first; or call eval() on the model to run it as it is"
            )

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
        if not isinstance(name, str) or name not in self.adapters_:
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
