"""The bundled tasks: found by name, regenerated to the byte, and answered by their own sentences."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_peft.data.bundled import bundled_names, bundled_records_path
from moe_peft.data.records import ChatRecord, read_records

NAMES = ("diary", "expenses", "orders")
GENERATOR = Path(__file__).parents[2] / "tools" / "make_tasks.py"
ONES = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("_", "_", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NUMBERS = {word: i for i, word in enumerate(ONES)} | {"a": 1, "an": 1, "a single": 1, "a couple of": 2, "a pair of": 2}
NUMBERS |= {f"{word}-{ONES[i]}" if i else word: 10 * n + i for n, word in enumerate(TENS) if n > 1 for i in range(10)}
ORDINALS = {"first": 1, "second": 2, "third": 3, "fifth": 5, "eighth": 8, "ninth": 9, "twelfth": 12, "twentieth": 20}
ORDINALS |= {f"{word}th": i for i, word in enumerate(ONES) if f"{word}th" not in ORDINALS}
ORDINALS |= {f"twenty-{word}": 20 + i for word, i in list(ORDINALS.items()) if i < 10}


def number(text):
    return int(text) if text.isdigit() else NUMBERS[text.lower()]


def turns(record):
    assert isinstance(record, ChatRecord)
    assert [message["role"] for message in record.messages] == ["system", "user", "assistant"]
    return [message["content"] for message in record.messages]


def pairs(spec):
    return [tuple(turns(record)[1:]) for record in read_records(bundled_records_path(spec))]


def test_names():
    assert bundled_names() == NAMES


@pytest.mark.parametrize(("name", "part", "count"), [(n, p, c) for n in NAMES for p, c in (("", 180), (":eval", 40))])
def test_every_record_is_a_short_conversation(name, part, count):
    records = read_records(bundled_records_path(f"bundled:{name}{part}"))
    assert len(records) == count
    assert len({turns(record)[0] for record in records}) == 1
    assert max(len(sentence) + len(answer) for sentence, answer in pairs(f"bundled:{name}{part}")) < 250


@pytest.mark.parametrize("name", NAMES)
def test_no_sentence_and_no_answer_stands_twice(name):
    for texts in zip(*(pairs(f"bundled:{name}") + pairs(f"bundled:{name}:eval")), strict=True):
        assert len(texts) == len(set(texts)) == 220


def test_the_generator_writes_the_same_bytes(tmp_path):
    subprocess.run([sys.executable, str(GENERATOR), "--to", str(tmp_path)], check=True)
    written = sorted(tmp_path.iterdir())
    assert len(written) == 6
    for path in written:
        name, part, _ = path.name.split(".")
        bundled = bundled_records_path(f"bundled:{name}" + (":eval" if part == "eval" else ""))
        assert path.read_bytes() == bundled.read_bytes(), f"run tools/make_tasks.py: {path.name} differs"


def read_order(sentence):
    """What a waiter would write down, read by other rules than the generator's."""
    amount = (
        r"(?:two, (?:no|sorry), )?(\d|a single|a couple of|a pair of|an?|one|two|three|four|five|six|seven|eight|nine)"
    )
    return [(number(n), item) for n, item in re.findall(rf"\b{amount} ([a-z]+(?: [a-z]+)?)\b", sentence, re.I)]


@pytest.mark.parametrize("part", ["", ":eval"])
def test_orders_are_right(part):
    for sentence, answer in pairs(f"bundled:orders{part}"):
        name, _, listed = answer.partition(": ")
        assert re.search(rf"\b{name}\b", sentence)
        wanted = [(int(entry.split(" ", 1)[0]), entry.split(" ", 1)[1]) for entry in listed.split(", ")]
        heard = read_order(sentence)
        assert len(heard) == len(wanted), sentence
        # The pattern may take a word too many behind a one-word item ("scones please").
        assert all(h[0] == w[0] and h[1].startswith(w[1]) for h, w in zip(heard, wanted, strict=True)), sentence


def read_date(sentence, month):
    day = re.search(
        rf"(?:(\d+) {month}|{month} (\d+)(?!\d*:)|the (\d+)\w\w of {month}|the ([a-z-]+) of {month})", sentence, re.I
    )
    digits = day[1] or day[2] or day[3]
    return int(digits) if digits else ORDINALS[day[4]]


def read_time(sentence):
    """As it is to be written: ``2:15 pm``."""
    if digits := re.search(r"\b(\d+)(:\d\d)? (am|pm)\b", sentence):
        return f"{digits[1]}{digits[2] or ':00'} {digits[3]}"
    words = re.search(r"(?:(quarter past|half past|quarter to) )?(\w+)(?: o'clock)? in the (\w+)", sentence, re.I)
    phrase, hour, part = words.group(1, 2, 3)
    quarters = {None: 0, "quarter past": 15, "half past": 30, "quarter to": -15}
    minutes = 60 * number(hour) + quarters[phrase and phrase.lower()]
    hours = minutes // 60 or 12
    return f"{hours}:{minutes % 60:02d} {'am' if part == 'morning' else 'pm'}"


@pytest.mark.parametrize("part", ["", ":eval"])
def test_diary_entries_are_right(part):
    for sentence, answer in pairs(f"bundled:diary{part}"):
        fields = re.fullmatch(r"(\w+ \w+): ([a-z ]+) \((\d+) (\w+), (.*)\)", answer)
        name, event, day, month, time = fields.groups()
        assert name in sentence and event in sentence and month in sentence
        assert read_date(sentence, month) == int(day), sentence
        assert read_time(sentence) == time, sentence


@pytest.mark.parametrize("part", ["", ":eval"])
def test_expenses_are_right(part):
    for sentence, answer in pairs(f"bundled:expenses{part}"):
        shop, amount, goods = re.fullmatch(r"(\w+ & \w+): (\d+\.\d\d) \(([a-z ]+)\)", answer).groups()
        assert shop in sentence and goods in sentence[:1].lower() + sentence[1:]
        heard = re.search(r"£?(\d+)\.(\d\d)|£(\d+)|([\w-]+) pounds(?: ([\w-]+))?", sentence)
        if heard[4]:
            pence = number(heard[5]) if heard[5] and heard[5].lower() in NUMBERS and heard[5] not in ("a", "an") else 0
            pounds = number(heard[4])
        else:
            pounds, pence = int(heard[1] or heard[3]), int(heard[2] or 0)
        assert f"{pounds}.{pence:02d}" == amount, sentence


@pytest.mark.parametrize(
    ("spec", "nearest"),
    [("bundled:order", "bundled:orders"), ("bundled:dairy:eval", "bundled:diary:eval"), ("bundled:no", "bundled:")],
)
def test_an_unknown_name_names_the_nearest(spec, nearest):
    with pytest.raises(ValueError, match=f"{spec!r} is not a bundled data set.*{nearest}"):
        bundled_records_path(spec)
