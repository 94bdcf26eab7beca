"""The prompts that a command is given, and the form in which the model sees them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_peft import strict
from moe_peft.data.templates import Template
from moe_peft.data.tokenizer import Tokenizer
from moe_peft.generation.request import Message, encode_prompt


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a user asks.

    Args:
        instruction: the text.
        input: what the instruction is about, where a template keeps it apart.
        messages: earlier turns of the conversation.
    """

    instruction: str
    input: str = ""
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """How a question becomes token ids.

    Args:
        template: what stands around it; None: nothing, the text is taken as it is.
        system: the first message of a conversation that brings none of its own; None: what the chat template itself
            puts there.

    Raises:
        ValueError: on a system message that no conversation would carry.
    """

    template: Template | None
    system: str | None = None

    def __post_init__(self) -> None:
        if self.system is not None and not self.is_chat:
            raise ValueError(
                f"system={strict.show(self.system)} needs a chat template: these prompts are no conversation"
            )

    @property
    def is_chat(self) -> bool:
        """Whether earlier turns are seen too."""
        return self.template is not None and self.template.is_chat

    def prompt_ids(self, question: Question, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The token ids to answer.

        Raises:
            ValueError: when there are none, when the chat template fails, or on earlier turns without a chat template.
        """
        if self.template is None:
            text = "\n\n".join(filter(None, (question.instruction, question.input)))
        else:
            text = self.template.prompt(question.instruction, question.input)
        if self.is_chat:
            has_system = any(message["role"] == "system" for message in question.messages[:1])
            system = [] if self.system is None or has_system else [{"role": "system", "content": self.system}]
            turn = {"role": "user", "content": text}
            return tuple(encode_prompt(tokenizer, [*system, *question.messages, turn]))
        if question.messages:
            raise ValueError("a conversation needs a chat template, and these prompts go without one")
        return tuple(encode_prompt(tokenizer, text))


def read_questions(path: Path) -> list[Question]:
    """The prompts in a file: one a line, or for ``.jsonl`` and ``.json`` one an entry.

    An entry is a string, or a mapping with ``prompt``, with ``instruction`` and ``input``, or with ``messages``; other
    keys, such as the answer in a data set's record, are left alone. Blank lines are skipped.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: naming file and line, when it cannot be understood or holds no prompt.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8") from None
    if path.suffix.lower() == ".json":
        entries = _parse(text, str(path))
        if not isinstance(entries, list):
            raise ValueError(f"{path} must hold a list of prompts, not {strict.kind(entries)}")
        questions = [_question(entry, f"{path}: entry {i}") for i, entry in enumerate(entries, start=1)]
    else:
        is_json = path.suffix.lower() == ".jsonl"
        lines = [(f"{path}:{i}", line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        questions = [
            _question(_parse(line, where) if is_json else line.removesuffix("\r"), where) for where, line in lines
        ]
    if not questions:
        raise ValueError(f"{path} holds no prompt")
    return questions


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None


def _question(entry: object, where: str) -> Question:
    if isinstance(entry, str):
        return Question(instruction=entry)
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: a prompt must be a string or a mapping, not {strict.kind(entry)}")
    if "messages" in entry:
        return _last_question(entry["messages"], where)
    key = "instruction" if "instruction" in entry else "prompt"
    if key not in entry:
        raise ValueError(f"{where}: a prompt must have 'prompt', 'instruction' or 'messages'")
    values = {"instruction": entry[key], "input": entry.get("input") or ""}
    for name, value in values.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name}={strict.show(value)} must be a string, not {strict.kind(value)}")
    return Question(**values)


def _last_question(messages: object, where: str) -> Question:
    """A conversation up to its last user turn; the answer that a data set's record has behind it is left out."""
    turns: Sequence[Any] = messages if isinstance(messages, list) else []
    for i, turn in enumerate(turns):
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str) or "role" not in turn:
            raise ValueError(f"{where}: messages[{i}]={strict.show(turn)} must be a mapping with role and content")
    asked = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    if not asked:
        raise ValueError(f"{where}: messages={strict.show(messages)} must be a list with a user's turn")
    return Question(instruction=turns[asked[-1]]["content"], messages=tuple(turns[: asked[-1]]))
