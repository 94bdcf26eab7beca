"""Held-out prompts answered by the base model and by each adapter, for a person to look at."""

from collections.abc import Sequence
from pathlib import Path

from moe_peft.data.records import ChatRecord, InstructionRecord, Record
from moe_peft.data.samples import render_prompt
from moe_peft.data.templates import load_template
from moe_peft.data.tokenizer import Tokenizer
from moe_peft.generation import generate_tokens
from moe_peft.generation.request import Request
from moe_peft.io.adapter_files import load_adapter
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.display.summary import AnswerExample
from moe_peft.training.job_queue import Job

MAX_NEW_TOKENS = 48
BATCH_SIZE = 16
ADAPTERS_AT_ONCE = 8


def answer_held_out_prompts(
    model: LlamaForCausalLM, tokenizer: Tokenizer, jobs: Sequence[Job], run_folder: Path, count: int
) -> dict[str, tuple[AnswerExample, ...]]:
    """Greedy answers to each saved adapter's first held-out prompts; for it they are loaded back, a few at once.

    Args:
        model: without the adapters.
        tokenizer: of the base model.
        jobs: whose adapters answer; one without a saved adapter or held-out prompts gets no examples.
        run_folder: holds the saved adapters.
        count: prompts an adapter.

    Returns:
        Adapter name to its examples.
    """
    answering = [job for job in jobs if count and job.saved_to is not None and _with_prompt(job)]
    examples: dict[str, tuple[AnswerExample, ...]] = {job.name: () for job in jobs}
    for start in range(0, len(answering), ADAPTERS_AT_ONCE):
        group = answering[start : start + ADAPTERS_AT_ONCE]
        try:
            for job in group:
                load_adapter(model, run_folder / str(job.saved_to), job.name)
            examples |= _answers(model, tokenizer, group, count)
        finally:
            for job in group:
                if job.name in model.adapter_names:
                    model.remove_adapter(job.name)
    return examples


def _answers(
    model: LlamaForCausalLM, tokenizer: Tokenizer, jobs: Sequence[Job], count: int
) -> dict[str, tuple[AnswerExample, ...]]:
    asked: list[tuple[str, Record]] = []
    requests: list[Request] = []
    for job in jobs:
        template = load_template(job.settings.template)
        for record in _with_prompt(job)[:count]:
            prompt_ids = tuple(render_prompt(record, tokenizer, template))
            limit = model.config_.context_limit
            length = job.settings.adapter.context_tokens + len(prompt_ids)
            room = MAX_NEW_TOKENS if limit is None else min(MAX_NEW_TOKENS, limit - length)
            if room < 1:
                continue
            asked.append((job.name, record))
            for adapter_name in ("", job.name):
                requests.append(Request(prompt_ids=prompt_ids, adapter_name=adapter_name, max_new_tokens=room))
    answers = [completion.text for completion in generate_tokens(model, tokenizer, requests, batch_size=BATCH_SIZE)]
    examples: dict[str, tuple[AnswerExample, ...]] = {job.name: () for job in jobs}
    for i, (name, record) in enumerate(asked):
        prompt, expected = _question(record)
        example = AnswerExample(
            prompt=prompt, expected=expected, base_answer=answers[2 * i], adapter_answer=answers[2 * i + 1]
        )
        examples[name] += (example,)
    return examples


def _with_prompt(job: Job) -> list[Record]:
    records = job.data.eval_set.records if job.data.eval_set is not None else ()
    return [record for record in records if isinstance(record, (InstructionRecord, ChatRecord))]


def _question(record: Record) -> tuple[str, str]:
    """What a person would read as the prompt, and the answer in the data."""
    if isinstance(record, InstructionRecord):
        return "\n".join(filter(None, (record.instruction, record.input))), record.output
    assert isinstance(record, ChatRecord)
    last = max(i for i, message in enumerate(record.messages) if message["role"] == "assistant")
    asked = [message["content"] for message in record.messages[:last] if message["role"] == "user"]
    return asked[-1] if asked else "(the assistant speaks first)", record.messages[last]["content"]
