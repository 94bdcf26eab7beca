"""What is asked of a model, and what comes back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal

from moe_peft import strict
from moe_peft.data.tokenizer import Tokenizer
from moe_peft.generation.sampling import Sampling
from moe_peft.model.batch import parse_expert_name
from moe_peft.model.llama import LlamaForCausalLM

Message = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]
FinishReason = Literal["eos", "length", "stop", "not_finite"]


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt and how it is to be answered.

    Args:
        prompt_ids: tokens of the prompt, at least one.
        adapter_name: who answers: an adapter, one expert as ``moe.{task}.experts.{idx}``, or ``""`` for the bare base.
        max_new_tokens: the longest answer.
        sampling: how tokens are picked.
        stop: strings that end the answer; a special token's text means that token.

    Raises:
        ValueError: on a value outside its rule.
    """

    prompt_ids: tuple[int, ...]
    adapter_name: str = ""
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        strict.check_fields(self)
        if not self.prompt_ids:
            raise ValueError("prompt_ids=() must hold at least one token")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if "" in self.stop:
            raise ValueError(f"stop={list(self.stop)} must hold no empty string: every answer would stop at once")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """The answer to a request.

    Args:
        text: the answer without its end token, and up to a stop string.
        token_ids: every new token, the end token and those of a stop string included.
        finish_reason: ``eos`` (the model ended it), ``stop`` (a stop string), ``length`` (max_new_tokens), or
            ``not_finite`` (NaN or infinite logits: the weights are damaged, or overflow in this dtype).
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """The token ids of a prompt.

    A text gets the tokens that this tokenizer puts before every text and none behind it; a conversation gets its chat
    template and the opening of the answer.

    Raises:
        ValueError: when it is none of a text, a list of messages and a list of token ids, or comes to no tokens.
    """
    ids: list[int] | None = None
    items: Any = prompt if isinstance(prompt, (str, Mapping)) else list(prompt)
    if isinstance(items, str):
        ids = [*tokenizer.prefix_ids, *tokenizer.encode(items, add_special_tokens=False)]
    elif isinstance(items, list) and all(isinstance(item, Integral) and not isinstance(item, bool) for item in items):
        ids = [int(item) for item in items]
    elif isinstance(items, list) and all(isinstance(item, Mapping) for item in items):
        ids = tokenizer.apply_chat_template(items, add_generation_prompt=True)
    if ids is None:
        raise ValueError(f"{strict.show(prompt)} must be a text, a list of messages, or a list of token ids")
    if not ids:
        raise ValueError(f"{strict.show(prompt)} must come to at least one token")
    return ids


def check_request(model: LlamaForCausalLM, request: Request) -> None:
    """Refuses what this model cannot answer.

    Raises:
        ValueError: on an adapter or expert that is not attached, an id outside the vocabulary, or too many tokens.
    """
    config = model.config_
    check_adapter_name(model, request.adapter_name)
    for token_id in request.prompt_ids:
        if not 0 <= token_id < config.vocab_size:
            raise ValueError(f"token id {token_id} of the prompt must be in 0..vocab_size-1={config.vocab_size - 1}")
    limit, prompt_length = config.context_limit, len(request.prompt_ids)
    num_virtual = context_tokens(model, request.adapter_name)
    if limit is not None and num_virtual + prompt_length + request.max_new_tokens > limit:
        virtual = f" behind {num_virtual} virtual tokens" if num_virtual else ""
        raise ValueError(
            f"max_new_tokens={request.max_new_tokens} and a prompt of {prompt_length}{virtual} must come to at most "
            f"{limit} tokens, for which the model is made (max_position_embeddings={config.max_position_embeddings})"
        )


def context_tokens(model: LlamaForCausalLM, adapter_name: str) -> int:
    """Virtual tokens that an adapter puts before a prompt."""
    expert = parse_expert_name(adapter_name)
    task = expert[0] if expert else adapter_name
    number: int = model.adapter_config(task).context_tokens if task else 0
    return number


def check_adapter_name(model: LlamaForCausalLM, name: str) -> None:
    """Refuses a name that is neither empty nor that of an attached adapter or of one of its experts, or cannot run now.

    Raises:
        ValueError: with the nearest name.
    """
    if name == "":
        return
    expert = parse_expert_name(name)
    task = expert[0] if expert else name
    model.check_runnable(task)
    num_experts = getattr(model.adapter_config(task), "num_experts", 0)
    if expert and expert[1] >= num_experts:
        raise ValueError(f"adapter {expert[0]!r} has no expert {name!r}: it has num_experts={num_experts}")
