"""The lines of JSON values, against the json module."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_peft.data.json_scan import Unreadable, scan_lines, scan_list

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
SPACE = st.text(" \t\r\n", max_size=4)


@given(st.lists(st.tuples(SPACE, VALUES, SPACE, st.sampled_from([None, 2]))), SPACE)
def test_a_list(items, around):
    text, expected = around + "[", []
    for index, (before, value, after, indent) in enumerate(items):
        text += ("," if index else "") + before
        expected.append((text.count("\n") + 1, value))
        text += json.dumps(value, indent=indent, ensure_ascii=False) + after
    text += "]" + around
    assert list(scan_list(text.encode("utf-8", "surrogatepass"))) == expected
    assert [value for _, value in expected] == json.loads(text)


@given(st.lists(VALUES | st.just(...)))
def test_lines(values):
    text = "\n".join("  " if value is ... else json.dumps(value, ensure_ascii=False) for value in values)
    expected = [(number, value) for number, value in enumerate(values, start=1) if value is not ...]
    assert list(scan_lines(text.encode())) == expected


def test_characters_that_only_look_like_line_ends_do_not_count():
    separators = "\u2028\u2029\x85\x0b\x0c"
    line = json.dumps(separators, ensure_ascii=False)
    assert list(scan_lines(f"{line}\r\n{line}\r\n".encode())) == [(1, separators), (2, separators)]


@pytest.mark.parametrize(
    ("text", "good", "line", "reason"),
    [
        ('[1,\n{"a": }]', 1, 2, "not valid JSON at column 7: Expecting value"),
        ("[1,\n]", 1, 2, "not valid JSON at column 1: Expecting value"),
        ("[1\n\n2]", 1, 3, "the list must go on with a comma or end with ]"),
        ("[1,\n2", 2, 2, "the list must go on with a comma or end with ]"),
        ("[1]\n[2]", 1, 1, "something follows the end of the list"),
        ('["a', 0, 1, "not valid JSON at column 2: Unterminated string"),
        ("[" * 100_000, 0, 1, "not valid JSON: "),
        ("[" + "1" * 5000 + "]", 0, 1, "not valid JSON: Exceeds the limit"),
    ],
)
def test_a_list_that_breaks_off(text, good, line, reason):
    *before, (last_line, last) = scan_list(text.encode())
    assert len(before) == good
    assert last_line == line
    assert isinstance(last, Unreadable)
    assert reason in last.reason


def test_lines_that_are_no_json():
    found = list(scan_lines(b'1\n{"a": \n\xff\n2\n' + b"[" * 100_000 + b"\n" + b"1" * 5000))
    assert [line for line, _ in found] == [1, 2, 3, 4, 5, 6]
    assert (found[0][1], found[3][1]) == (1, 2)
    reasons = [found[i][1].reason for i in (1, 2, 4, 5)]
    assert reasons[0] == "not valid JSON at column 7: Expecting value"
    assert reasons[1] == "byte 1 of the line is not UTF-8"
    assert reasons[2].startswith("not valid JSON: ")
    assert reasons[3].startswith("not valid JSON: Exceeds the limit")


@pytest.mark.parametrize("text", [b"", b" \n"])
def test_nothing(text):
    assert list(scan_list(text)) == list(scan_lines(text)) == []


def test_no_list():
    with pytest.raises(ValueError, match=r"must hold one list.*must be named \.jsonl"):
        list(scan_list(b'{"instruction": "x"}'))


def test_a_list_that_is_not_utf8():
    with pytest.raises(ValueError, match="line 3: byte 2 of the line is not UTF-8"):
        list(scan_list(b'[1,\n2,\n"\xe9"]'))
