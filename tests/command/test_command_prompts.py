"""Prompts from files, and the forms in which the model sees them."""

import json
from pathlib import Path

import pytest
from tiny_run import make_base_folder

from moe_peft.command.prompts import PromptForm, Question, read_questions
from moe_peft.data.records import InstructionRecord
from moe_peft.data.supervision import render_prompt
from moe_peft.data.templates import load_template
from moe_peft.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(make_base_folder(tmp_path_factory.mktemp("base")))


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "p.txt", "\ufefffirst\r\n\n  second, é\u2028still \n{}\n")
    texts = [question.instruction for question in read_questions(path)]
    assert texts == ["first", "  second, é\u2028still ", "{}"]


ENTRIES = [
    "a string\nof two lines",
    {"prompt": "p", "id": 7},
    {"instruction": "i", "input": "x", "output": "the answer"},
    {"instruction": "i", "input": None},
    {"messages": [{"role": "user", "content": "u"}]},
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a"},
        ]
    },
]
QUESTIONS = [
    Question(instruction="a string\nof two lines"),
    Question(instruction="p"),
    Question(instruction="i", input="x"),
    Question(instruction="i"),
    Question(instruction="u"),
    Question(instruction="u", messages=({"role": "system", "content": "s"},)),
]  # fmt: skip


def test_json_entries_may_be_records_of_a_data_set(tmp_path: Path) -> None:
    lines = "\n\n".join(json.dumps(entry) for entry in ENTRIES)
    assert read_questions(write(tmp_path, "p.jsonl", lines)) == QUESTIONS
    assert read_questions(write(tmp_path, "p.json", json.dumps(ENTRIES, indent=2))) == QUESTIONS


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("p.txt", "\n \n", "p.txt holds no prompt"),
        ("p.json", "[]", "p.json holds no prompt"),
        ("p.json", '{"prompt": "x"}', "p.json must hold a list of prompts, not mapping"),
        ("p.json", '["x", 3]', "p.json: entry 2: a prompt must be a string or a mapping, not int"),
        ("p.jsonl", '"x"\n{"prompt": ', "p.jsonl:2: not valid JSON"),
        ("p.jsonl", '{"question": "x"}', "p.jsonl:1: a prompt must have 'prompt', 'instruction' or 'messages'"),
        ("p.jsonl", '{"prompt": 3}', "p.jsonl:1: instruction=3 must be a string, not int"),
        ("p.jsonl", '{"messages": []}', r"p.jsonl:1: messages=\[\] must be a list with a user's turn"),
        ("p.jsonl", '{"messages": "x"}', "messages='x' must be a list with a user's turn"),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', r"messages\[0\]=.* must be a mapping with role and content"),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path: Path, name: str, text: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        read_questions(write(tmp_path, name, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_questions(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="byte 3 is not UTF-8"):
        read_questions(tmp_path / "latin.txt")


@pytest.mark.parametrize("name", ["alpaca", "moe_peft", "chat"])
@pytest.mark.parametrize("input_text", ["", "x y"])
def test_a_templates_prompt_is_the_one_of_training(tokenizer: Tokenizer, name: str, input_text: str) -> None:
    template = load_template(name)
    record = InstructionRecord(instruction="Do it", input=input_text, output="done", extra={}, line=1)
    ids = PromptForm(template=template).prompt_ids(Question(instruction="Do it", input=input_text), tokenizer)
    assert list(ids) == render_prompt(record, tokenizer, template)


def test_the_raw_form_adds_nothing(tokenizer: Tokenizer) -> None:
    form = PromptForm(template=None)
    assert list(form.prompt_ids(Question(instruction=" Do\n"), tokenizer)) == tokenizer.encode(" Do\n")
    assert list(form.prompt_ids(Question(instruction="Do", input="x"), tokenizer)) == tokenizer.encode("Do\n\nx")
    turn = {"role": "user", "content": "u"}
    with pytest.raises(ValueError, match="a conversation needs a chat template"):
        form.prompt_ids(Question(instruction="x", messages=(turn,)), tokenizer)


def test_a_conversation_has_its_turns_and_one_system_message(tokenizer: Tokenizer) -> None:
    form = PromptForm(template=load_template("chat"), system="Be brief.")
    system, user, answer = (
        {"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "u"), ("assistant", "a"))
    )
    last = {"role": "user", "content": "v"}

    def rendered(*messages: dict[str, str]) -> tuple[int, ...]:
        return tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True))

    assert form.prompt_ids(Question(instruction="v"), tokenizer) == rendered(system, last)
    earlier = Question(instruction="v", messages=(user, answer))
    assert form.prompt_ids(earlier, tokenizer) == rendered(system, user, answer, last)
    own = {"role": "system", "content": "My own."}
    assert form.prompt_ids(Question(instruction="v", messages=(own,)), tokenizer) == rendered(own, last)


@pytest.mark.parametrize("template", [None, "alpaca"])
def test_a_system_message_needs_a_conversation(template: str | None) -> None:
    with pytest.raises(ValueError, match="system='s' needs a chat template"):
        PromptForm(template=load_template(template) if template else None, system="s")
