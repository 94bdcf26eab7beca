"""What damaged and mismatched files get through the real commands, and a loss that is not finite."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from refusal import Refused, assert_refused, enter_folder, run_fields, write_config
from tiny_run import adapter_entry, make_base_folder, make_base_gguf

from moe_peft import LoraConfig, MixLoraConfig, load_base_model, save_adapter
from moe_peft.generate import main as generate
from moe_peft.train import main as train

QUESTION = ("--prompt", "hello", "--max-new-tokens", "2", "--device", "cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a good base model."""
    return make_base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder."""
    enter_folder(tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture
def refused(place: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs ``train`` on a config that must be refused with these words."""

    def check(fields: Mapping[str, Any] | str, *words: str, overrides: Sequence[str] = (), lines: int = 1) -> None:
        write_config(fields)
        assert_refused(train, ["config.yaml", *overrides], capsys, *words, lines=lines)

    return check


def damaged_copies(path: Path) -> list[tuple[bytes, str]]:
    """Ways in which a file may be cut or corrupted, with a name for each."""
    whole = path.read_bytes()
    copies = [(whole[:length], f"cut to {length}") for length in (0, 3, 8, 30, len(whole) // 2, len(whole) - 1)]
    generator = random.Random(0)
    noise = bytes(generator.randrange(256) for _ in range(200))
    copies += [(noise + whole[200:], "noise at the beginning"), (b"\0" * len(whole), "zeros")]
    return [*copies, (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS")]


def test_a_damaged_safetensors_base(place: Path, refused: Refused) -> None:
    base = make_base_folder(place / "base")
    weights = base / "model.safetensors"
    for content, _ in damaged_copies(weights):
        weights.write_bytes(content)
        refused(run_fields("base"), "base/model.safetensors is truncated or corrupted")
    weights.unlink()
    refused(run_fields("base"), "base has no model.safetensors")


def test_a_damaged_gguf_base(place: Path, refused: Refused, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_base_gguf(place / "base.gguf")
    fields = run_fields("base.gguf", adapter_entry("qa", "train.jsonl", cutoff_len=200))
    write_config({**fields, "output_dir": "good"})
    assert train(["config.yaml"]) == 0, capsys.readouterr().err
    for content, _ in damaged_copies(path):
        path.write_bytes(content)
        refused(fields, "base.gguf ")
    path.unlink()
    refused(fields, "there is no base model 'base.gguf'")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", "{", "config.json is not valid JSON"),
        ("config.json", '{"model_type": "gpt2"}', "gpt2"),
        ("tokenizer.json", "{}", "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json must hold a mapping"),
        ("config.json", None, "base has no config.json"),
        ("tokenizer.json", None, "base"),
    ],
)
def test_a_damaged_base_folder(file: str, content: str | None, words: str, place: Path, refused: Refused) -> None:
    base = make_base_folder(place / "base")
    (base / file).unlink()
    if content is not None:
        (base / file).write_text(content)
    refused(run_fields("base"), words)


def test_a_base_whose_config_is_not_its_weights(place: Path, refused: Refused) -> None:
    base = make_base_folder(place / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    refused(run_fields("base"), "mlp.gate_proj.weight has shape [36, 24] where the config says [40, 24]")


@pytest.fixture
def generate_refuses(place: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs ``generate`` with arguments that must be refused with these words."""

    def check(arguments: Sequence[str], *words: str) -> None:
        assert_refused(generate, [*arguments, *QUESTION], capsys, *words)

    return check


@pytest.mark.parametrize("method", ["lora", "mixlora"])
def test_an_adapter_folder_that_does_not_fit(
    method: str, base: Path, place: Path, generate_refuses: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    config = LoraConfig(r=2) if method == "lora" else MixLoraConfig(r=2, num_experts=2)
    model = load_base_model(base, device="cpu")
    model.add_adapter("qa", config)
    save_adapter(model, "qa", "qa")
    arguments = ["--base", str(base), "--adapter", "qa"]
    assert generate([*arguments, *QUESTION]) == 0
    for name, changes in (("wide", {"hidden_size": 32}), ("deep", {"num_hidden_layers": 3})):
        other = make_base_folder(place / name, **changes)
        generate_refuses(["--base", str(other), "--adapter", "qa"], "qa/adapter_model.safetensors", "another base")
    weights = place / "qa" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content, _ in damaged_copies(weights):
        weights.write_bytes(content)
        generate_refuses(arguments, "qa/adapter_model.safetensors is truncated or corrupted")
    weights.unlink()
    generate_refuses(arguments, "qa has no adapter_model.safetensors")
    weights.write_bytes(whole)
    settings = place / "qa" / "adapter_config.json"
    fields = json.loads(settings.read_text())
    settings.write_text(json.dumps({**fields, "lora_bias": True}))
    generate_refuses(arguments, "qa/adapter_config.json: lora_bias=True changes the adapter and is not supported")
    settings.write_text("{")
    generate_refuses(arguments, "qa/adapter_config.json is not valid JSON")
    generate_refuses(["--base", str(base), "--adapter", "qb"], "there is no folder qb")
    generate_refuses(["--base", str(base), "--adapter", "train.jsonl"], "train.jsonl")


def test_a_loss_that_is_not_finite_is_a_failure_with_the_others_saved(
    base: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [adapter_entry("bad", "train.jsonl", lr=1e30), adapter_entry("good", "train.jsonl")]
    write_config(run_fields(base, *entries))
    assert train(["config.yaml"]) == 3
    text, errors = capsys.readouterr()
    assert errors == (
        "error: adapter 'bad': failed: loss=nan and aux_loss=0.0 must be finite "
        "(after optimizer step 3; the weights of step 0 are kept)\n"
    )
    assert "Traceback" not in text
    for name in ("bad", "good"):
        assert f"{name}: saved to run/adapters/{name}" in text
        arguments = ["--base", str(base), "--adapter", f"run/adapters/{name}"]
        assert generate([*arguments, *QUESTION]) == 0
