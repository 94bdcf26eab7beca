"""Walks through the values of a JSON list or of JSON lines, with the line where each begins."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

_WHITE_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class Unreadable:
    """Stands for what is no JSON."""

    reason: str


def scan_lines(data: bytes) -> Iterator[tuple[int, object]]:
    """Yields the value of every line that is not blank, or why it has none.

    Args:
        data: JSON lines, UTF-8.
    """
    # Lines end at \n alone: splitlines would also cut at characters that may stand inside of a JSON string.
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield number, Unreadable(f"byte {error.start + 1} of the line is not UTF-8")
        except json.JSONDecodeError as error:
            yield number, Unreadable(f"not valid JSON at column {error.colno}: {error.msg}")
        except (ValueError, RecursionError) as error:
            yield number, Unreadable(f"not valid JSON: {error}")


def scan_list(data: bytes) -> Iterator[tuple[int, object]]:
    """Yields the values of a list; where it stops being JSON, the reason, and nothing after that.

    Args:
        data: one JSON list, UTF-8, or nothing but white space.

    Raises:
        ValueError: when it is no list, or no UTF-8.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise ValueError(f"line {line}: byte {column} of the line is not UTF-8") from None
    position = _skip(text, 0)
    if position == len(text):
        return
    if text[position] != "[":
        raise ValueError(
            "a .json file must hold one list, [{...}, {...}]; a file with one record a line must be named .jsonl"
        )
    decoder = json.JSONDecoder()
    line, counted = 1, 0
    position = _skip(text, position + 1)
    is_last = text.startswith("]", position)
    while not is_last:
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            yield error.lineno, Unreadable(f"not valid JSON at column {error.colno}: {error.msg}")
            return
        except (ValueError, RecursionError) as error:
            yield line, Unreadable(f"not valid JSON: {error}")
            return
        yield line, value
        position = _skip(text, position)
        is_last = not text.startswith(",", position)
        position = position if is_last else _skip(text, position + 1)
    line += text.count("\n", counted, position)
    if not text.startswith("]", position):
        yield line, Unreadable("not valid JSON: the list must go on with a comma or end with ]")
    elif _skip(text, position + 1) != len(text):
        yield line, Unreadable("not valid JSON: something follows the end of the list")


def _skip(text: str, position: int) -> int:
    match = _WHITE_SPACE.match(text, position)
    assert match is not None
    return match.end()
