"""Prompt templates: the built-in ones, the user's own, and bad ones."""

import json

import pytest
import yaml

from moe_peft.data.templates import Template, builtin_templates, load_template

OWN = {"prompt_input": "Q: {instruction}\nC: {input}\nA: ", "prompt_no_input": "Q: {instruction}\nA: "}


def test_alpaca_is_stanford_s():
    template = load_template("alpaca")
    # https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py
    assert template.prompt("Add.", "2 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:"
    )
    assert template.prompt("Add.") == (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:"
    )


def test_moe_peft():
    template = load_template("moe_peft")
    assert template.prompt("Add.", "2 2") == "### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Output:\n"
    assert template.prompt("Add.", "") == "### Instruction:\nAdd.\n\n### Output:\n"


def test_chat_is_a_user_s_turn():
    template = load_template("chat")
    assert template.is_chat
    assert template.prompt("Add.", "2 2") == "Add.\n\n2 2"
    assert template.prompt("Add.") == "Add."
    assert not load_template("alpaca").is_chat


def test_names():
    assert builtin_templates() == ("alpaca", "moe_peft", "chat")


@pytest.mark.parametrize("name", ["own.yaml", "own.yml", "own.json"])
def test_a_file_of_one_s_own(tmp_path, name):
    path = tmp_path / name
    path.write_text(json.dumps(OWN) if name.endswith("json") else yaml.safe_dump(OWN), encoding="utf-8")
    template = load_template(path)
    assert template == load_template(str(path))
    assert template.prompt("Add.", "2 2") == "Q: Add.\nC: 2 2\nA: "
    assert template.prompt("Add.", " \n") == "Q: Add.\nA: "


def test_braces_survive():
    template = Template(
        name="json",
        prompt_input='{"task": "{instruction}", "on": "{input}", {}, {0}, { x }, {a.b}} ',
        prompt_no_input="{instruction}{instruction}",
    )
    text = template.prompt("f(x) = {input} {{y}} \\1 \\g<0>", "{instruction} {% raw %}")
    assert text == (
        '{"task": "f(x) = {input} {{y}} \\1 \\g<0>", "on": "{instruction} {% raw %}", {}, {0}, { x }, {a.b}} '
    )
    assert template.prompt("{", "") == "{{"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_input": "{instruction}"}, "prompt_input must have the placeholder {input}"),
        ({"prompt_no_input": "text"}, "prompt_no_input must have the placeholder {instruction}"),
        ({"prompt_no_input": "{instruction}{input}"}, "prompt_no_input has the placeholder {input}, which is"),
        ({"prompt_input": "{instruction}{input}{imput}"}, "{imput}, which is not known here; did you mean 'input'?"),
        ({"prompt_input": "{instruction}{input}{output}"}, "the placeholder {output}"),
        ({"prompt_input": "{{ instruction }} {input}"}, "a placeholder has single braces, {instruction}"),
        ({"prompt_input": 3}, "prompt_input=3 must be a string, not int"),
        ({"prompt_inptu": "x"}, "prompt_inptu='x' is not a known key; did you mean 'prompt_input'?"),
        ({"prompt_input": ...}, "prompt_input is missing"),
    ],
)  # fmt: skip
def test_a_bad_file_is_named(tmp_path, change, message):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({key: value for key, value in {**OWN, **change}.items() if value is not ...}))
    with pytest.raises(ValueError) as caught:
        load_template(path)
    assert str(caught.value).startswith(f"the template file {path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.yaml", b"a: [", "not valid YAML"),
        ("bad.json", b"{", "not valid JSON"),
        ("bad.yaml", b"- x", "must hold the keys prompt_input and prompt_no_input, not a list"),
        ("bad.yaml", b"", "not a null"),
        ("bad.yaml", b"\xff", "byte 0 is not UTF-8"),
        ("bad.yaml", b"!!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        load_template(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_an_unknown_name():
    with pytest.raises(
        ValueError, match=r"template='alpca' is neither .* nor an existing file; did you mean 'alpaca'\?"
    ):
        load_template("alpca")
    with pytest.raises(ValueError, match=r"template='no/such/x' is neither .*; valid here: alpaca, chat, moe_peft"):
        load_template("no/such/x")
