"""What may be named as a base model."""

from pathlib import Path

import pytest

from moe_peft.io import source as source_module
from moe_peft.io.source import resolve_source


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_folder_and_a_gguf_file(model_folder, tmp_path, monkeypatch):
    assert resolve_source(model_folder) == model_folder
    assert resolve_source(str(model_folder)) == model_folder
    file = tmp_path / "Model.GGUF"
    file.touch()
    assert resolve_source(str(file)) == file
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_source("~/my-model") == model_folder


def test_the_built_in_name_wins_over_a_folder(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_folder.rename(tmp_path / "smollm2-135m")
    monkeypatch.setattr(source_module, "smollm2_file", lambda *, allow_download: Path(f"built-in {allow_download}"))
    assert resolve_source("smollm2-135m") == Path("built-in True")
    assert resolve_source("smollm2-135m", allow_download=False) == Path("built-in False")
    assert resolve_source("./smollm2-135m") == Path("smollm2-135m")


def test_a_hub_id_is_asked_for_only_when_there_is_no_such_folder(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(source_module, "hub_folder", lambda name, *, allow_download: Path(f"hub {name}"))
    assert resolve_source("owner/name-1.5_x") == Path("hub owner/name-1.5_x")
    (tmp_path / "owner").mkdir()
    model_folder.rename(tmp_path / "owner" / "name")
    assert resolve_source("owner/name") == Path("owner/name")
    for path in ("./owner/no", "/owner/no", "owner/no/where", Path("owner/no"), "owner/"):
        with pytest.raises((FileNotFoundError, ValueError)):
            resolve_source(path)


def test_what_is_no_base_model(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no base model 'smolm2-135m'.*did you mean 'smollm2-135m'"):
        resolve_source("smolm2-135m")
    with pytest.raises(FileNotFoundError, match="did you mean 'my-model'"):
        resolve_source("./my-modle")
    with pytest.raises(ValueError, match="must be a folder"):
        resolve_source(" ")
    (tmp_path / "weights.safetensors").touch()
    with pytest.raises(ValueError, match=r"\.safetensors file: a base model is a folder"):
        resolve_source(tmp_path / "weights.safetensors")
    (model_folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"has no config\.json"):
        resolve_source(model_folder)
    (model_folder / "adapter_config.json").touch()
    with pytest.raises(ValueError, match="holds an adapter"):
        resolve_source(model_folder)
    (model_folder / "adapter_config.json").unlink()
    (model_folder / "a.gguf").touch()
    with pytest.raises(ValueError, match=r"name its GGUF file instead: .*a\.gguf"):
        resolve_source(model_folder)
