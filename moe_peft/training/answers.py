"""Held-out prompts answered by the base model and by each adapter, for a person to look at."""

from collections.abc import Sequence

from moe_peft.data.records import ChatRecord, InstructionRecord, Record
from moe_peft.data.samples import render_prompt
from moe_peft.data.templates import load_template
from moe_peft.data.tokenizer import Tokenizer
from moe_peft.generation import generate_tokens
from moe_peft.generation.request import Request
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.adapter_run import AdapterRun
from moe_peft.training.summary import AnswerExample

MAX_NEW_TOKENS = 48
BATCH_SIZE = 16


def answer_held_out_prompts(
    model: LlamaForCausalLM, tokenizer: Tokenizer, runs: Sequence[AdapterRun], count: int
) -> dict[str, tuple[AnswerExample, ...]]:
    """Greedy answers to each adapter's first held-out prompts, all in one batch.

    Args:
        model: with the adapters attached.
        tokenizer: of the base model.
        runs: adapters; one without held-out prompts gets no examples.
        count: prompts an adapter.

    Returns:
        Adapter name to its examples.
    """
    asked: list[tuple[str, Record]] = []
    requests: list[Request] = []
    for run in runs:
        template = load_template(run.job.template)
        for record in _with_prompt(run)[:count]:
            prompt_ids = tuple(render_prompt(record, tokenizer, template))
            limit = model.config_.context_limit
            room = MAX_NEW_TOKENS if limit is None else min(MAX_NEW_TOKENS, limit - len(prompt_ids))
            if room < 1:
                continue
            asked.append((run.job.name, record))
            for adapter_name in ("", run.job.name):
                requests.append(Request(prompt_ids=prompt_ids, adapter_name=adapter_name, max_new_tokens=room))
    answers = [completion.text for completion in generate_tokens(model, tokenizer, requests, batch_size=BATCH_SIZE)]
    examples: dict[str, tuple[AnswerExample, ...]] = {run.job.name: () for run in runs}
    for i, (name, record) in enumerate(asked):
        prompt, expected = _question(record)
        example = AnswerExample(
            prompt=prompt, expected=expected, base_answer=answers[2 * i], adapter_answer=answers[2 * i + 1]
        )
        examples[name] += (example,)
    return examples


def _with_prompt(run: AdapterRun) -> list[Record]:
    records = run.eval_set.records if run.eval_set is not None else ()
    return [record for record in records if isinstance(record, (InstructionRecord, ChatRecord))]


def _question(record: Record) -> tuple[str, str]:
    """What a person would read as the prompt, and the answer in the data."""
    if isinstance(record, InstructionRecord):
        return "\n".join(filter(None, (record.instruction, record.input))), record.output
    assert isinstance(record, ChatRecord)
    last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
    asked = [message["content"] for message in record.messages[:last] if message["role"] == "user"]
    return asked[-1] if asked else "(the assistant speaks first)", record.messages[last]["content"]
