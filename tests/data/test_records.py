"""Records of three kinds, and what is said of bad ones."""

import json

import pytest

from moe_peft.data.records import ChatRecord, InstructionRecord, TextRecord, parse_record, read_records

INSTRUCTION = {"instruction": "Add.", "input": "2 2", "output": "4", "answer": 4}
CHAT = {
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 1}],
    "id": 7,
}
TEXT = {"text": "Once upon a time", "source": "tale"}


def write(path, *values, indent=None):
    if path.suffix == ".json":
        path.write_text(json.dumps(values, indent=indent), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(value) for value in values), encoding="utf-8")
    return path


@pytest.mark.parametrize(("name", "lines"), [("a.json", [1, 1, 1]), ("a.jsonl", [1, 2, 3]), ("a.txt", [1, 2, 3])])
def test_all_kinds_in_one_file(tmp_path, name, lines):
    records = read_records(write(tmp_path / name, INSTRUCTION, CHAT, TEXT))
    assert records == [
        InstructionRecord(instruction="Add.", input="2 2", output="4", extra={"answer": 4}, line=lines[0]),
        ChatRecord(messages=tuple(CHAT["messages"]), extra={"id": 7}, line=lines[1]),
        TextRecord(text="Once upon a time", extra={"source": "tale"}, line=lines[2]),
    ]


def test_lines_of_an_indented_list(tmp_path):
    path = write(tmp_path / "a.json", INSTRUCTION, TEXT, INSTRUCTION, indent=1)
    lines = path.read_text().splitlines()
    assert [record.line for record in read_records(path)] == [i for i, line in enumerate(lines, 1) if line == " {"]


def test_a_list_counts_as_one_whatever_the_file_is_called(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps([INSTRUCTION, TEXT], indent=1))
    assert [type(record) for record in read_records(path)] == [InstructionRecord, TextRecord]


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    for name in ("a.json", "a.jsonl"):
        path = write(tmp_path / name, INSTRUCTION)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert len(read_records(str(path))) == 1


@pytest.mark.parametrize("input_value", [{}, {"input": ""}, {"input": None}])
def test_an_input_may_be_missing(input_value):
    assert parse_record({"instruction": "x", "output": "y", **input_value}).input == ""


def test_the_text_of_an_instruction_record_is_extra():
    record = parse_record({**INSTRUCTION, "text": "the finished prompt", "messages": None})
    assert isinstance(record, InstructionRecord)
    assert record.extra["text"] == "the finished prompt"


def turn(role, content):
    return {"role": role, "content": content}


def user(content):
    return turn("user", content)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "a record must be a mapping of keys to values, not int"),
        ([INSTRUCTION], "a record must be a mapping of keys to values, not list"),
        ({}, "this one has no keys at all"),
        ({"prompt": "x", "end": "y"}, "must have 'instruction', 'messages' or 'text'; this one has 'prompt', 'end'"),
        ({"instructions": "x", "output": "y"}, "did you mean 'instruction'?"),
        ({"message": []}, "did you mean 'messages'?"),
        ({"instruction": None, "output": "y"}, "instruction=null: the record has nothing there"),
        ({"instruction": "x", "messages": []}, "either 'instruction' or 'messages', not both"),
        ({"instruction": "x"}, "the record has no 'output'"),
        ({"instruction": "x", "output": None}, "the record has no 'output'"),
        ({"instruction": "x", "ouput": "y"}, "the record has no 'output'; did you mean 'ouput'?"),
        ({"instruction": "x", "output": "  \n"}, "output='  \\n' must not be blank"),
        ({"instruction": "x", "output": 4}, "output=4 must be a string, not int"),
        ({"instruction": ["x"], "output": "y"}, "instruction=['x'] must be a string, not list"),
        ({"instruction": "x", "input": 3.5, "output": "y"}, "input=3.5 must be a string, not float"),
        ({"instruction": "x", "output": "a\ud83d"}, "output holds \\ud83d at character 1: half of a surrogate pair"),
        ({"text": ""}, "text='' must not be blank"),
        ({"text": 1}, "text=1 must be a string, not int"),
        ({"messages": "hi"}, "messages='hi' must be a list, not str"),
        ({"messages": []}, "messages has no assistant turn"),
        ({"messages": [user("x")]}, "messages has no assistant turn: there is no answer to learn"),
        ({"messages": ["hi"]}, "messages[0]='hi' must be a mapping with role and content, not str"),
        ({"messages": [user("x"), turn("asistant", "y")]}, "messages[1].role='asistant' is not a known role; did you"),
        ({"messages": [{"content": "y"}]}, "messages[0].role=None is not a known role; valid here: system, user, "),
        ({"messages": [{"role": "user"}]}, "messages[0].content=None must be a string, not null"),
        ({"messages": [user("x"), turn("assistant", " ")]}, "messages[1].content=' ' must not be blank: it is"),
        ({"messages": [user([{"type": "text"}])]}, "messages[0].content=[{'type': 'text'}] must be a string, not list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["bad.json", "bad.jsonl"])
def test_a_bad_record_is_named_with_file_and_line(tmp_path, name, value, message):
    path = write(tmp_path / name, INSTRUCTION, value, TEXT)
    if name == "bad.json":
        path.write_text(path.read_text().replace(", ", ",\n"))
    with pytest.raises(ValueError) as caught:
        read_records(path)
    first, second, *rest = str(caught.value).split("\n")
    assert first == f"{path} has bad records, 1 of 3:"
    assert second.startswith("  line ")
    if name == "bad.jsonl":
        assert second.startswith("  line 2: ")
        assert message in second
    assert not rest


def test_all_bad_records_are_counted_and_ten_are_shown(tmp_path):
    lines = ["{", *(["{}"] * 11), json.dumps(INSTRUCTION), b"\xff".decode("latin-1")]
    path = tmp_path / "bad.jsonl"
    path.write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        read_records(path)
    message = str(caught.value).split("\n")
    assert message[0] == f"{path} has bad records, 13 of 14:"
    assert message[1].startswith("  line 1: not valid JSON")
    assert message[2].startswith("  line 2: a record must have")
    assert message[-2].startswith("  line 10:")
    assert message[-1] == "  ... and 3 more"


def test_a_list_that_breaks_off_is_told_with_the_bad_records_before(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('[{"text": "x"},\n {},\n {"text": "y"')
    with pytest.raises(ValueError, match=r"2 of 3:\n  line 2: .*\n  line 3: not valid JSON at column"):
        read_records(path)


@pytest.mark.parametrize("content", ["", "\n \n", "[]", "[ ]\n"])
def test_no_records(tmp_path, content):
    path = tmp_path / ("empty.json" if "[" in content else "empty.jsonl")
    path.write_text(content)
    with pytest.raises(ValueError, match=r"empty\.jsonl? holds no records"):
        read_records(path)


def test_an_empty_json_file(tmp_path):
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(ValueError, match=r"empty\.json holds no records"):
        read_records(tmp_path / "empty.json")


def test_not_a_list(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(INSTRUCTION))
    with pytest.raises(ValueError, match=r"one\.json: a \.json file must hold one list"):
        read_records(tmp_path / "one.json")


def test_a_missing_file(tmp_path):
    write(tmp_path / "train.jsonl", TEXT)
    with pytest.raises(FileNotFoundError, match=r"no data file .*trian\.jsonl; did you mean '.*train\.jsonl'\?"):
        read_records(tmp_path / "trian.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no data file .*zzz$"):
        read_records(tmp_path / "zzz")
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        read_records(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(ValueError, match="is a folder"):
        read_records(tmp_path)


def test_other_encodings(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(json.dumps([TEXT]).encode("utf-16"))
    with pytest.raises(ValueError, match=r"a\.json is UTF-16 text; it must be UTF-8"):
        read_records(path)
    path.write_bytes('[{"text":\n"é"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.json: line 2: byte 2 of the line is not UTF-8"):
        read_records(path)
