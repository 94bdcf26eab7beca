"""Turns new tokens into text as they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Protocol

# What a decoder writes for bytes that are no character, or not yet one.
_HALF_CHARACTER = "\ufffd"


class Decoder(Protocol):
    """The part of a tokenizer that reads ids back."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


class TextStream:
    """The text of one answer, given out in pieces that are never taken back.

    Args:
        tokenizer: reads ids back.
        stop: strings that end the answer; neither they nor what follows are given out.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()) -> None:
        self._characters = _CharacterStream(tokenizer)
        self._stop = tuple(stop)
        self._held = ""  # decoded, but it may yet become a stop string
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take a new token; returns the text that is certain now and was not before, often none."""
        return self._give_out(self._characters.push(token_id), is_last=False)

    def finish(self) -> str:
        """Returns what was held back, once no token follows."""
        return self._give_out(self._characters.finish(), is_last=True)

    def _give_out(self, new: str, *, is_last: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        end = self._stop_start()
        if end is not None:
            self.stopped = True
        else:
            end = len(self._held) - (0 if is_last else self._num_undecided())
        piece, self._held = self._held[:end], self._held[end:]
        self.text += piece
        return piece

    def _stop_start(self) -> int | None:
        """Where the stop string begins that is complete first, as if text came one character at a time."""
        found = [(start + len(stop), start) for stop in self._stop if (start := self._held.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _num_undecided(self) -> int:
        """Length of the longest end of the held text with which a stop string begins."""
        return max(
            (n for stop in self._stop for n in range(1, len(stop)) if self._held.endswith(stop[:n])),
            default=0,
        )


class _CharacterStream:
    """Whole characters out of token ids.

    A token's text depends on the one before it (a word's first space, bytes of one character), so tokens are decoded
    behind the last ones that gave text, and a character that is not whole yet waits for its other bytes.
    """

    def __init__(self, tokenizer: Decoder) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []  # tokens of known text, then new ones
        self._num_known_tokens = 0
        self._num_given = 0  # characters of the window's text that are out

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        whole = text.rstrip(_HALF_CHARACTER)
        new = whole[self._num_given :]
        if len(text) > self._num_given and whole == text:
            self._window = self._window[self._num_known_tokens :]
            self._num_known_tokens = len(self._window)
            self._num_given = len(self._tokenizer.decode(self._window))
        else:
            self._num_given += len(new)
        return new

    def finish(self) -> str:
        return self._tokenizer.decode(self._window)[self._num_given :]
