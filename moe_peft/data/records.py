"""Reads files of training records, JSON lists and JSON lines, and reports every bad record with its line."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_peft.data.json_scan import Unreadable, scan_lines, scan_list
from moe_peft.strict import kind, nearest, show

ROLES = ("system", "user", "assistant", "tool")
_KINDS = ("instruction", "messages", "text")
_NUM_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class InstructionRecord:
    """A task and its answer.

    Args:
        instruction: what to do.
        input: what to do it with; empty where there is none.
        output: the answer.
        extra: the record's other keys.
        line: where it begins in its file, from 1.
    """

    instruction: str
    input: str = ""
    output: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    line: int = 0


@dataclass(frozen=True, kw_only=True)
class ChatRecord:
    """A conversation with at least one assistant turn.

    Args:
        messages: the turns; ``role`` and ``content`` are strings, other keys are left to the chat template.
        extra: the record's other keys.
        line: where it begins in its file, from 1.
    """

    messages: tuple[Mapping[str, Any], ...]
    extra: Mapping[str, Any] = field(default_factory=dict)
    line: int = 0


@dataclass(frozen=True, kw_only=True)
class TextRecord:
    """Text as it is.

    Args:
        text: all of it is learnt.
        extra: the record's other keys.
        line: where it begins in its file, from 1.
    """

    text: str
    extra: Mapping[str, Any] = field(default_factory=dict)
    line: int = 0


Record = InstructionRecord | ChatRecord | TextRecord


def read_records(path: str | Path) -> list[Record]:
    """Reads every record of a file.

    A file named ``.json`` holds one list; any other holds one record a line (``.jsonl``), unless it begins as a list. A
    record is a mapping with ``instruction`` and ``output`` (and ``input``), or with ``messages``, or with ``text``.

    Raises:
        FileNotFoundError: when there is no such file; says the nearest name that there is.
        ValueError: when the file is no UTF-8 JSON, holds no record, or holds bad ones: all of them are counted, and the
            first ten are named with line and reason.
    """
    path = Path(path)
    data = _read_bytes(path)
    records: list[Record] = []
    problems: list[tuple[int, str]] = []
    is_list = path.suffix.lower() == ".json" or data.lstrip().startswith(b"[")
    try:
        values = list(scan_list(data) if is_list else scan_lines(data))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for line, value in values:
        try:
            if isinstance(value, Unreadable):
                raise ValueError(value.reason)
            records.append(parse_record(value, line))
        except ValueError as error:
            problems.append((line, str(error)))
    if problems:
        raise problem_report(path, "bad records", problems, len(values))
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def problem_report(source: str | Path, what: str, problems: Sequence[tuple[int, str]], total: int) -> ValueError:
    """The one error for all problems of a file.

    Args:
        what: the file has.
        problems: line and reason; the first ten are told.
        total: records in the file.
    """
    lines = [f"{source} has {what}, {len(problems)} of {total}:"]
    lines += [f"  line {line}: {reason}" for line, reason in problems[:_NUM_SHOWN]]
    if len(problems) > _NUM_SHOWN:
        lines.append(f"  ... and {len(problems) - _NUM_SHOWN} more")
    return ValueError("\n".join(lines))


def _did_you_mean(matches: Iterable[str]) -> str:
    match = next(iter(matches), None)
    return f"; did you mean {match!r}?" if match is not None else ""


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise ValueError(f"{path} is a folder; the data must be a .json or .jsonl file")
    if not path.exists():
        siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
        close = [str(path.with_name(name)) for name in difflib.get_close_matches(path.name, siblings, n=1)]
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no data file {path}: the folder {path.parent} does not exist")
        raise FileNotFoundError(f"there is no data file {path}{_did_you_mean(close)}")
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16 text; it must be UTF-8")
    return data.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put before UTF-8


def parse_record(value: object, line: int = 0) -> Record:
    """Returns one record, its kind told by its keys.

    Args:
        value: what JSON gave.
        line: where it begins in its file.

    Raises:
        ValueError: naming key, value and rule.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"a record must be a mapping of keys to values, not {kind(value)}")
    kinds = [key for key in _KINDS if value.get(key) is not None]
    if not kinds:
        if empty := next((key for key in _KINDS if key in value), None):
            raise ValueError(f"{empty}=null: the record has nothing there")
        names = ", ".join(repr(key) for key in list(value)[:8]) or "no keys at all"
        hint = _did_you_mean(match for key in value for match in difflib.get_close_matches(str(key), _KINDS, n=1))
        raise ValueError(f"a record must have 'instruction', 'messages' or 'text'; this one has {names}{hint}")
    if kinds[:2] == ["instruction", "messages"]:
        raise ValueError("a record must have either 'instruction' or 'messages', not both")
    # Many instruction data sets carry the finished prompt as `text` beside its parts.
    kinds = kinds[:1]
    if kinds == ["instruction"]:
        return InstructionRecord(
            instruction=_text(value, "instruction", required=True),
            input=_text(value, "input"),
            output=_answer(value, "output"),
            extra={key: item for key, item in value.items() if key not in ("instruction", "input", "output")},
            line=line,
        )
    extra = {key: item for key, item in value.items() if key not in kinds}
    if kinds == ["messages"]:
        return ChatRecord(messages=_messages(value["messages"]), extra=extra, line=line)
    return TextRecord(text=_answer(value, "text"), extra=extra, line=line)


def _text(value: Mapping[str, Any], key: str, required: bool = False) -> str:
    text = value.get(key)
    if text is None and not required:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{key}={show(text)} must be a string, not {kind(text)}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{key} holds {half} at character {error.start}: half of a surrogate pair, no text") from None
    return text


def _answer(value: Mapping[str, Any], key: str) -> str:
    """A text that there must be, since it is what is learnt."""
    if value.get(key) is None:
        others = [name for name in value if isinstance(name, str) and name != key]
        raise ValueError(f"the record has no {key!r}{_did_you_mean(difflib.get_close_matches(key, others, n=1))}")
    text = _text(value, key, required=True)
    if not text.strip():
        raise ValueError(f"{key}={show(text)} must not be blank")
    return text


def _messages(value: object) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list):
        raise ValueError(f"messages={show(value)} must be a list, not {kind(value)}")
    for index, message in enumerate(value):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where}={show(message)} must be a mapping with role and content, not {kind(message)}")
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            hint = nearest(role, ROLES) if isinstance(role, str) else f"; valid here: {', '.join(ROLES)}"
            raise ValueError(f"{where}.role={show(role)} is not a known role{hint}")
        try:
            content = _text(message, "content", required=True)
        except ValueError as error:
            raise ValueError(f"{where}.{error}") from None
        if role == "assistant" and not content.strip():
            raise ValueError(f"{where}.content={show(content)} must not be blank: it is an answer")
    if not any(message["role"] == "assistant" for message in value):
        raise ValueError("messages has no assistant turn: there is no answer to learn")
    return tuple(dict(message) for message in value)
