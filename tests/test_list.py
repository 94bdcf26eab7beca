"""``moe-peft list``: the adapters of a folder, and what else lies in it."""

import json
from pathlib import Path

import pytest
from builders import add_random_adapter, tiny_model

from moe_peft import AdapterManager, LoraConfig, MixLoraConfig
from moe_peft.list import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two adapters, one whose weights are cut off, and a note."""
    manager = AdapterManager(tiny_model(), tmp_path)
    for name, config in {"qa": MixLoraConfig(num_experts=2), "style": LoraConfig(r=2), "torn": LoraConfig()}.items():
        manager.add(name, config)
    file = tmp_path / "torn" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    (tmp_path / "notes.txt").write_text("")
    return tmp_path


def test_a_table_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    add_random_adapter(model, "style", LoraConfig(r=2))
    assert main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (style,) = (line.split() for line in lines if line.strip().startswith("style"))
    assert style[1:3] == ["lora", f"{sum(weight.numel() for weight in model.adapter_parameters('style')):,}"]
    (qa,) = (line.split() for line in lines if line.strip().startswith("qa"))
    assert qa[1] == "mixlora"
    assert "ignored: notes.txt: it is a file" in lines
    assert any(line.startswith("ignored: torn: ") and "truncated or corrupted" in line for line in lines)


def test_json_for_programs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    sizes = {name: sum(file.stat().st_size for file in (folder / name).iterdir()) for name in ("qa", "style")}
    assert found["adapters"] == [
        {"name": "qa", "method": "mixlora", "bytes": sizes["qa"]},
        {"name": "style", "method": "lora", "bytes": sizes["style"]},
    ]
    assert found["ignored"].keys() == {"notes.txt", "torn"}


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "error: there is no folder"),
        ("style", "holds a single adapter, not adapters by name"),
        ("notes.txt", "must be a folder, not a file"),
    ],
)
def test_what_is_no_such_folder(folder: Path, place: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder / place)]) == 2
    assert message in capsys.readouterr().err
