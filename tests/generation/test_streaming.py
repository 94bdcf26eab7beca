"""Pieces of text out of tokens: whole characters, nothing of a stop string, and the same text however it is cut."""

import itertools
from collections.abc import Sequence

import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from moe_peft.generation.streaming import TextStream


class Pieces:
    """A tokenizer whose tokens are given stretches of bytes."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return b"".join(self.tokens[i] for i in ids).decode("utf-8", errors="replace")


class Library:
    """A pipeline of the tokenizers library."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


def stream(tokens: Sequence[bytes], stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    """The pieces that every token and then the end give out."""
    text = TextStream(Pieces(tokens), stop)
    return [*(text.push(i) for i in range(len(tokens))), text.finish()], text


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    """``data`` cut into tokens."""
    edges = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


TEXT = st.text(st.sampled_from("ab é漢🙂\n"), max_size=14)
PLACES = st.lists(st.integers(0, 60), max_size=20)


@given(TEXT, PLACES)
def test_pieces_are_whole_characters_that_join_to_the_text(text: str, places: list[int]) -> None:
    pieces, result = stream(cut(text.encode(), places))
    assert "".join(pieces) == result.text == text
    assert "\ufffd" not in result.text
    assert pieces[-1] == ""  # nothing is held back that is certain


@given(st.binary(max_size=16), PLACES)
@example(b"\xf0\x9f", [])
@example("a\ufffdb\ufffd".encode(), [1, 4])
def test_bytes_that_are_no_text_come_as_the_decoder_writes_them(data: bytes, places: list[int]) -> None:
    pieces, result = stream(cut(data, places))
    assert "".join(pieces) == result.text == data.decode("utf-8", errors="replace")


def test_a_character_is_given_out_with_its_last_byte() -> None:
    smile = "🙂".encode()
    pieces, _ = stream([b"hi ", smile[:1], smile[1:3], smile[3:] + b"!", b"?"])
    assert pieces == ["hi ", "", "", "🙂!", "?", ""]
    # What stands before half a character does not wait for it.
    pieces, _ = stream([b"hi" + smile[:2], smile[2:]])
    assert pieces == ["hi", "🙂", ""]
    pieces, _ = stream([b"hi" + smile[:2]])
    assert pieces == ["hi", "\ufffd"]


def character_by_character(text: str, stop: Sequence[str]) -> str:
    """The definition: text grows one character at a time until it ends with a stop string."""
    for end in range(len(text) + 1):
        done = [len(string) for string in stop if text[:end].endswith(string)]
        if done:
            return text[: end - max(done)]
    return text


STOPS = st.lists(st.text(st.sampled_from("ab é漢\n"), min_size=1, max_size=4), max_size=3)


@given(TEXT, STOPS, PLACES)
@example("xabcab", ["abd", "bcab"], [1, 2, 3, 4, 5])
@example("aab", ["ab"], [1, 2])
@example("abc", ["abc", "b"], [])
def test_stop_strings_cut_the_text_wherever_the_tokens_end(text: str, stop: list[str], places: list[int]) -> None:
    pieces, result = stream(cut(text.encode(), places), stop)
    expected = character_by_character(text, stop)
    assert "".join(pieces) == result.text == expected
    assert result.stopped == any(string in text for string in stop)
    given_out = ""
    for piece in pieces:
        given_out += piece
        assert expected.startswith(given_out)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    pieces, result = stream([b"a", b"\n", b"x\nEN", b"q", b"\nE", b"ND", b"never"], ["\nEND"])
    assert pieces == ["a", "", "\nx", "\nENq", "", "", "", ""]
    assert result.stopped
    pieces, result = stream([b"a", b"\nEN"], ["\nEND"])
    assert pieces == ["a", "", "\nEN"]
    assert not result.stopped


def sentencepiece_like() -> Library:
    """LLaMA 2's decoder: ▁ for a space, bytes as tokens, and no space before the first word."""
    vocab = ["<unk>", "<s>", "▁hello", "▁world", "s", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocab)}, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return Library(tokenizer)


def test_words_keep_their_spaces_and_bytes_become_characters() -> None:
    tokenizer = sentencepiece_like()

    def byte(value: int) -> int:
        return 6 + value

    ids = [2, 3, 1, 3, 4, 5, *map(byte, "é🙂".encode()), 3, 1, 2, byte(0xF0)]
    text = TextStream(tokenizer)
    pieces = [text.push(token_id) for token_id in ids]
    assert pieces[:6] == ["hello", " world", "", " world", "s", " "]
    assert pieces[6:15] == ["", "é", "", "", "", "🙂", " world", "", " hello"]
    assert text.finish() == "\ufffd"
    assert text.text == tokenizer.decode(ids)


def test_a_long_answer_is_not_decoded_again_and_again() -> None:
    num_tokens = 2000

    class Counting(Pieces):
        num_decoded = 0

        def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
            self.num_decoded += len(ids)
            return super().decode(ids)

    tokenizer = Counting([b"word "] * num_tokens)
    text = TextStream(tokenizer, ["never"])
    for i in range(num_tokens):
        text.push(i)
    assert tokenizer.num_decoded <= 4 * num_tokens
