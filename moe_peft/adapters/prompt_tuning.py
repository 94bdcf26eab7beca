"""Prompt tuning: trained embeddings before each sample (https://arxiv.org/abs/2104.08691).

Letters: V virtual tokens, D model.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from moe_peft import strict
from moe_peft.adapters.virtual_tokens import PROMPT_EMBEDDINGS, Draws, VirtualTokenMethod
from moe_peft.model.linear import wide_dtype
from moe_peft.model.virtual_tokens import FreeVirtualTokens

if TYPE_CHECKING:
    from moe_peft.model.llama import LlamaForCausalLM


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(VirtualTokenMethod):
    """Settings of prompt tuning, spelled as PEFT spells them.

    Raises:
        ValueError: on a value outside its rule, or an initial text that is missing or that nothing asks for.
    """

    prompt_tuning_init: Literal["RANDOM", "SAMPLE_VOCAB", "TEXT"] = field(
        default="RANDOM",
        metadata={"help": "RANDOM: normal; SAMPLE_VOCAB: embeddings of random tokens; TEXT: of a text's tokens"},
    )
    prompt_tuning_init_text: str | None = field(
        default=None, metadata={"help": "the text, cut or repeated to num_virtual_tokens"}
    )

    peft_type: ClassVar[str] = "PROMPT_TUNING"

    def __post_init__(self) -> None:
        super().__post_init__()
        wants_text, text = self.prompt_tuning_init == "TEXT", self.prompt_tuning_init_text
        if wants_text and not text:
            raise ValueError(f"prompt_tuning_init_text={text!r} must be a text for prompt_tuning_init='TEXT'")
        if text is not None and not wants_text:
            raise ValueError(
                f"prompt_tuning_init_text={strict.show(text)} is for prompt_tuning_init='TEXT', "
                f"not for {self.prompt_tuning_init!r}"
            )

    def attach(self, model: "LlamaForCausalLM", name: str, seed: int, tokenizer: Any = None) -> None:
        """Put fresh virtual tokens before the adapter's samples."""
        self.check_room(model)
        model.prompts_[name] = FreeVirtualTokens(self._initial(model, Draws(model, name, seed), tokenizer))

    def _initial(self, model: "LlamaForCausalLM", draws: Draws, tokenizer: Any) -> Tensor:
        """``[V, D]``."""
        shape = self.num_virtual_tokens, model.config_.hidden_size
        if self.prompt_tuning_init == "RANDOM":
            return draws.normal(PROMPT_EMBEDDINGS, *shape)
        if self.prompt_tuning_init == "TEXT":
            ids = self._text_ids(model.config_.vocab_size, tokenizer)
        else:
            generator = draws.generator(PROMPT_EMBEDDINGS)
            ids = torch.randint(model.config_.vocab_size, shape[:1], generator=generator, device="cpu").tolist()
        table = model.embed_tokens.weight.detach()
        return table.index_select(0, torch.tensor(ids, device=table.device)).to(wide_dtype(table.dtype))

    def _text_ids(self, vocab_size: int, tokenizer: Any) -> list[int]:
        text = self.prompt_tuning_init_text
        if tokenizer is None:
            raise ValueError("prompt_tuning_init='TEXT' needs the base model's tokenizer: add_adapter(..., tokenizer=)")
        ids: list[int] = tokenizer.encode(text)
        if not ids:
            raise ValueError(f"prompt_tuning_init_text={strict.show(text)} must come to at least one token")
        if max(ids) >= vocab_size:
            raise ValueError(
                f"prompt_tuning_init_text={strict.show(text)} gives token {max(ids)}, but the base model's "
                f"vocab_size={vocab_size}: tokenizer and model do not belong together"
            )
        return list(itertools.islice(itertools.cycle(ids), self.num_virtual_tokens))

    def peft_shape(self, model: "LlamaForCausalLM") -> dict[str, int]:
        """D and the query heads."""
        return {"token_dim": model.config_.hidden_size, "num_attention_heads": model.config_.num_attention_heads}

    @classmethod
    def from_peft(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Without the beginning of what the folder holds the end of."""
        beginning = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
        return {key: value for key, value in super().from_peft(data).items() if key not in beginning}

    def to_peft(self, model: "LlamaForCausalLM", name: str) -> dict[str, Any]:
        """PEFT refuses TEXT without the name of a tokenizer, though it reads none for an adapter that it loads."""
        beginning: dict[str, Any] = {"tokenizer_name_or_path": None}
        if self.prompt_tuning_init == "TEXT":
            beginning = {"tokenizer_name_or_path": model.source_ or "unknown"}
        return {**super().to_peft(model, name), **beginning}
