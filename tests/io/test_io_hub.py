"""Hub ids, against a Hub cache made here; no network."""

import sys

import huggingface_hub
import pytest

from moe_peft.io.hub import hub_folder, looks_like_hub_id

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A cache with one model, and no way to the Hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    (snapshot / "model.safetensors").touch()
    return snapshot


@pytest.mark.parametrize("allow_download", [True, False])
def test_a_cached_model_needs_no_network(cached, allow_download):
    assert hub_folder("someone/tiny", allow_download=allow_download) == cached


def test_a_model_that_is_not_cached(cached):
    with pytest.raises(FileNotFoundError, match="no folder someone/other, and the Hugging Face Hub's model"):
        hub_folder("someone/other", allow_download=False)
    with pytest.raises(FileNotFoundError, match="no folder someone/other, and the Hugging Face Hub's model"):
        hub_folder("someone/other")


def test_a_repository_without_a_transformers_model(cached):
    (cached / "config.json").unlink()
    with pytest.raises(ValueError, match=r"someone/tiny has no config\.json"):
        hub_folder("someone/tiny")


def test_only_harmless_top_level_files_are_asked_for(monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    asked = {}

    def snapshot_download(repo_id, **settings):
        asked.update(settings)
        raise OSError("enough")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="enough"):
        hub_folder("a/b")
    wanted = [
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "merges.txt",
        "chat_template.jinja",
    ]
    unwanted = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json.pkl",
        "modeling_evil.py",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
        "onnx/config.json",
        "README.md",
    ]
    chosen = filter_repo_objects(
        [*wanted, *unwanted], allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(chosen) == wanted
    assert asked["local_files_only"] is False


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"moe-peft-torch\[hub\]"):
        hub_folder("a/b")


@pytest.mark.parametrize(
    ("source", "expected"),
    [("a/b", True), ("meta-llama/Llama-3.2-1B", True), ("a/b/c", False), ("./a", False), ("/a/b", False), ("a", False)],
)
def test_the_form_of_an_id(source, expected):
    assert looks_like_hub_id(source) is expected
