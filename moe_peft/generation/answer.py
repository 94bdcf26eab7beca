"""Answers prompts, each with its own adapter, in one batch that shares the base model.

Letters: N rows still being answered, V vocabulary.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from moe_peft import strict
from moe_peft.data.tokenizer import Tokenizer
from moe_peft.generation.request import (
    Completion,
    FinishReason,
    Prompt,
    Request,
    check_request,
    context_tokens,
    encode_prompt,
)
from moe_peft.generation.sampling import Sampling, pick_tokens
from moe_peft.generation.streaming import TextStream
from moe_peft.model.batch import BatchConfig, ModelInput
from moe_peft.model.cache import KVCache
from moe_peft.model.fixed_weights import fixed_weights
from moe_peft.model.llama import LlamaForCausalLM

OnText = Callable[[int, str], None]


def generate(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    *,
    adapter_names: str | Sequence[str] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    batch_size: int | None = None,
    on_text: OnText | None = None,
) -> list[str]:
    """Answer prompts of any lengths and adapters in one batch; greedy unless a temperature is given.

    An answer depends on its own prompt, adapter and settings. Neighbours reach it only through the rounding of
    products over a larger batch.

    Args:
        prompts: each a text, taken as it is; or a conversation, a list of messages for the chat template; or token ids.
        adapter_names: one a prompt, or one for all; ``""`` and None mean the bare base model. One expert of a mixture
            is named ``moe.{task}.experts.{idx}``.
        max_new_tokens: the longest answer.
        temperature: as in ``Sampling``, like top_k and top_p.
        seed: of the draws, one a prompt or one for all: the same prompt, adapter and seed give the same answer.
        stop: a string that ends the answer, or several.
        batch_size: the most prompts answered at once; None: all.
        on_text: called with a prompt's index and the next piece of its answer as soon as that is certain.

    Returns:
        The answers, in the order of the prompts.

    Raises:
        ValueError: on a setting outside its rule, an unknown adapter, a prompt without tokens or longer than the model
            allows (``LlamaConfig.context_limit``), or when an adapter's logits are not finite.
    """
    if isinstance(prompts, (str, Mapping)):
        raise ValueError(f"prompts={strict.show(prompts)} must be a list of prompts: put it in brackets")
    count = len(prompts)
    if adapter_names is None or isinstance(adapter_names, str):
        adapter_names = [adapter_names or ""] * count
    names = list(adapter_names)
    seeds = list(seed) if isinstance(seed, Sequence) else [seed] * count
    for field_name, values in (("adapter_names", names), ("seed", seeds)):
        if len(values) != count:
            raise ValueError(
                f"{field_name} has {len(values)} entries for {count} prompts: give one each, or one for all"
            )
    requests = []
    for i, prompt in enumerate(prompts):
        try:
            prompt_ids = tuple(encode_prompt(tokenizer, prompt))
        except ValueError as error:
            raise ValueError(f"prompts[{i}]: {error}") from error
        requests.append(
            Request(
                prompt_ids=prompt_ids,
                adapter_name=names[i],
                max_new_tokens=max_new_tokens,
                sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seeds[i]),
                stop=(stop,) if isinstance(stop, str) else tuple(stop),
            )
        )
    completions = generate_tokens(model, tokenizer, requests, batch_size=batch_size, on_text=on_text)
    for name, completion in zip(names, completions, strict=True):
        if completion.finish_reason == "not_finite":
            raise ValueError(not_finite_message(name))
    return [completion.text for completion in completions]


def not_finite_message(adapter_name: str) -> str:
    """What to tell of a completion with finish_reason ``not_finite``."""
    who = f"adapter {adapter_name!r}" if adapter_name else "the base model"
    return f"{who} gives logits that are not finite: its weights are damaged, or overflow in this dtype"


def generate_tokens(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    batch_size: int | None = None,
    on_text: OnText | None = None,
) -> list[Completion]:
    """As ``generate``, for requests that differ in all their settings; it tells more than the text.

    Args:
        requests: answered in batches of neighbouring requests.
        batch_size: the most requests answered at once; None: all.
        on_text: called with a request's index and the next piece of its text. Weights that it changes by hand may act
            from the next batch on.

    Returns:
        One completion a request, in their order.

    Raises:
        ValueError: as ``generate``, before anything is computed. Logits that are not finite end their own request only.
    """
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    for i, request in enumerate(requests):
        try:
            check_request(model, request)
        except ValueError as error:
            raise ValueError(f"requests[{i}]: {error}" if len(requests) > 1 else str(error)) from error
    rows = [_Row(i, request, tokenizer, on_text) for i, request in enumerate(requests)]
    with torch.inference_mode(), _evaluating(model):
        for start in range(0, len(rows), batch_size or max(len(rows), 1)):
            with fixed_weights():  # one a batch: no more is kept than what its own adapters need
                _answer_batch(model, rows[start : start + (batch_size or len(rows))])
    return [row.completion() for row in rows]


@contextlib.contextmanager
def _evaluating(model: LlamaForCausalLM) -> Iterator[None]:
    """``model.eval()`` that leaves every module in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class _Row:
    """A request on its way."""

    def __init__(self, index: int, request: Request, tokenizer: Tokenizer, on_text: OnText | None) -> None:
        self.request = request
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._index = index
        self._on_text = on_text
        self._stream = TextStream(tokenizer, request.stop)
        self._eos_ids = tokenizer.eos_token_ids
        self._stop_ids = {tokenizer.special_ids[text] for text in request.stop if text in tokenizer.special_ids}

    @property
    def draw_key(self) -> tuple[object, ...]:
        """What sets its next draw apart from every other request's of the same seed."""
        return self.request.adapter_name, self.request.prompt_ids, self.num_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and answer so far."""
        return len(self.request.prompt_ids) + len(self.token_ids)

    def take(self, token_id: int, *, is_finite: bool) -> None:
        """Put the next token behind the answer, or end it when there is none to be had."""
        if not is_finite:
            self._finish("not_finite")
            return
        self.token_ids.append(token_id)
        if token_id in self._stop_ids:
            self._finish("stop")
        elif token_id in self._eos_ids:
            self._finish("eos")
        else:
            self._emit(self._stream.push(token_id))
            if self._stream.stopped:
                self._finish("stop")
            elif len(self.token_ids) == self.request.max_new_tokens:
                self._finish("length")

    def _finish(self, reason: FinishReason) -> None:
        self._emit(self._stream.finish())
        # Half a character at the end may have completed a stop string only now.
        self.finish_reason = "stop" if self._stream.stopped else reason

    def _emit(self, piece: str) -> None:
        if piece and self._on_text is not None:
            self._on_text(self._index, piece)

    def completion(self) -> Completion:
        assert self.finish_reason is not None
        return Completion(text=self._stream.text, token_ids=tuple(self.token_ids), finish_reason=self.finish_reason)


def _answer_batch(model: LlamaForCausalLM, rows: Sequence[_Row]) -> None:
    """Prefill, then one token a row and forward; an answered row leaves the batch."""
    # A stable order by adapter: each one's rows lie together, as a batch config wants them.
    rows = sorted(rows, key=lambda row: row.request.adapter_name)
    capacity = max(
        context_tokens(model, row.request.adapter_name) + row.num_tokens + row.request.max_new_tokens for row in rows
    )
    cache = KVCache(model.config_, len(rows), capacity, dtype=model.dtype, device=model.device)
    new_tokens: list[Sequence[int]] = [row.request.prompt_ids for row in rows]
    while True:
        logits = _next_logits(model, rows, new_tokens, cache)  # [N, V]
        finite = logits.isfinite().all(dim=1).tolist()
        tokens = pick_tokens(logits, [row.request.sampling for row in rows], [row.draw_key for row in rows])
        for row, token_id, is_finite in zip(rows, tokens, finite, strict=True):
            row.take(token_id, is_finite=is_finite)
        going = [i for i, row in enumerate(rows) if row.finish_reason is None]
        if not going:
            return
        cache.keep(going)
        rows = [rows[i] for i in going]
        new_tokens = [row.token_ids[-1:] for row in rows]


def _next_logits(
    model: LlamaForCausalLM, rows: Sequence[_Row], new_tokens: Sequence[Sequence[int]], cache: KVCache
) -> Tensor:
    """``[N, V]`` behind each row's new tokens."""
    configs, start = [], 0
    for adapter_name, run in itertools.groupby(rows, key=lambda row: row.request.adapter_name):
        end = start + len(list(run))
        configs.append(BatchConfig(adapter_name, start, end))
        start = end
    input_ids = torch.tensor([token_id for tokens in new_tokens for token_id in tokens])
    cu_seqlens = torch.tensor([0, *itertools.accumulate(map(len, new_tokens))], dtype=torch.int32)
    outputs = model(ModelInput(input_ids, cu_seqlens, tuple(configs)), last_logits_only=True, cache=cache)
    return torch.cat([output.logits for output in outputs])
