"""Config files are read into plain data, and refused with file and line where they are malformed."""

from pathlib import Path

import pytest

from moe_peft.config.file import parse_mapping, read_mapping


def parsing(text: str, *, is_json: bool = False) -> str:
    with pytest.raises(ValueError) as caught:
        parse_mapping(text, source="run.yaml", is_json=is_json)
    return str(caught.value)


def test_yaml_and_json_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("\ufeffseed: 1\nadapters:\n  - name: é\n", encoding="utf-8")
    (tmp_path / "a.json").write_text('{"seed": 1, "adapters": [{"name": "é"}]}', encoding="utf-8")
    assert (
        read_mapping(tmp_path / "a.yaml")
        == read_mapping(tmp_path / "a.json")
        == {"seed": 1, "adapters": [{"name": "é"}]}
    )


def test_a_key_that_stands_twice_is_refused_with_both_lines() -> None:
    assert parsing("seed: 1\nadapters:\n  - lr: 1\n    name: a\n    lr: 2\n") == (
        "run.yaml:5: not valid YAML: the key 'lr' stands twice in one mapping, first on line 3"
    )
    assert "the key 'a' stands twice" in parsing("{a: 1, 'a': 2}")
    assert parsing('{"a": 1, "a": 2}', is_json=True) == "run.yaml: the key 'a' stands twice in one mapping"


def test_merge_keys_may_be_overridden() -> None:
    text = "b: &b {x: 1, y: 1}\nl: [[&a {<<: *b, y: 2}]]\nc: {<<: *a, x: 3}\n"
    assert parse_mapping(text, source="s") == {"b": {"x": 1, "y": 1}, "l": [[{"x": 1, "y": 2}]], "c": {"x": 3, "y": 2}}


@pytest.mark.parametrize(
    ("text", "is_json", "message"),
    [
        ("", False, "run.yaml: the file is empty; a config needs at least base_model and adapters"),
        ("# only a comment\n", False, "run.yaml: the file is empty"),
        (" ", True, "run.yaml: the file is empty"),
        ("- a\n", False, "run.yaml: the top level must be a mapping of keys to values, not list"),
        ("3", True, "run.yaml: the top level must be a mapping of keys to values, not int"),
        ("a: 1\nb: [1,\n", False, "run.yaml:3: not valid YAML: "),
        ("a: 1\n\tb: 2\n", False, "run.yaml:2: not valid YAML: "),
        (
            "a: !!python/object/apply:os.getcwd []",
            False,
            "run.yaml:1: not valid YAML: could not determine a constructor",
        ),
        ("a: *nowhere", False, "run.yaml:1: not valid YAML: found undefined alias 'nowhere'"),
        ("a: \x01", False, "run.yaml: not valid YAML: "),
        ("a: 2024-13-01", False, "run.yaml: month must be in 1..12"),
        ('{"a": 1,\n "b": }', True, "run.yaml:2: not valid JSON: Expecting value"),
        ('{"a": NaN}', True, "run.yaml: NaN is not a JSON number"),
        ("[" * 100_000, False, "run.yaml: nested too deeply"),
        ("[" * 100_000, True, "run.yaml: nested too deeply"),
    ],
)
def test_malformed_text_is_refused(text: str, is_json: bool, message: str) -> None:
    assert parsing(text, is_json=is_json).startswith(message)


def test_a_missing_file_is_named_with_its_nearest_neighbour(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("a: 1")
    with pytest.raises(FileNotFoundError) as caught:
        read_mapping(tmp_path / "confg.yaml")
    expected = f"config file '{tmp_path / 'confg.yaml'}' does not exist; did you mean '{tmp_path / 'config.yaml'}'?"
    assert str(caught.value) == expected
    with pytest.raises(FileNotFoundError, match=r"nowhere[/\\]x\.yaml' does not exist$"):
        read_mapping(tmp_path / "nowhere" / "x.yaml")


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_mapping(tmp_path)
    (tmp_path / "weights.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match=r"weights\.yaml' cannot be read: it is not UTF-8 text"):
        read_mapping(tmp_path / "weights.yaml")
