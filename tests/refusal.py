"""What the tests of bad input ask of every refusal."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import adapter_entry, instructions, write_jsonl

from moe_peft.training.folder.run_folder import RunFolder

Main = Callable[[Sequence[str]], int]
Refused = Callable[..., None]


def enter_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a folder with good data in ``train.jsonl`` and ``eval.jsonl`` the current one; runs draw no pictures."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(RunFolder, "draw", lambda self, runs: None)
    write_jsonl(folder / "train.jsonl", instructions(6))
    write_jsonl(folder / "eval.jsonl", instructions(3))


def run_fields(base: Path | str, *entries: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """The fields of a good config, of one adapter unless ``entries`` say otherwise."""
    entries = entries or (adapter_entry("qa", "train.jsonl"),)
    fields = {"base_model": str(base), "device": "cpu", "output_dir": "run", "answer_examples": 0}
    return {**fields, "adapters": list(entries), **changes}


def write_config(fields: Mapping[str, Any] | str) -> None:
    """Write ``config.yaml`` into the current folder."""
    text = fields if isinstance(fields, str) else yaml.safe_dump(dict(fields), sort_keys=False)
    Path("config.yaml").write_text(text)


def assert_refused(
    main: Main, argv: Sequence[str], capsys: pytest.CaptureFixture[str], *words: str, lines: int = 1
) -> None:
    """A command must exit with 2, say these words in so many lines on stderr, and leave no trace in the folder."""
    before = _snapshot()
    capsys.readouterr()
    code = main(argv)
    _, errors = capsys.readouterr()
    assert code == 2, errors
    assert errors.startswith("error: ")
    assert "Traceback" not in errors
    assert errors.count("\n") == lines, errors
    for word in words:
        assert word in errors
    assert _snapshot() == before, "a refused command leaves no trace"


def _snapshot() -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}
