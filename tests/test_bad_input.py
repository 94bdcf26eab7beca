"""What bad input gets through the real commands: one clear message, the right exit code, and nothing written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from refusal import Refused, assert_refused, enter_folder, run_fields, write_config
from tiny_run import adapter_entry, make_base_folder, write_jsonl

from moe_peft.adapters import METHODS
from moe_peft.train import main as train


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


def test_the_good_config_runs(base: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(run_fields(base))
    assert train(["config.yaml"]) == 0
    assert capsys.readouterr().err == ""
    assert (place / "run" / "adapters" / "qa" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("place_of", "key", "value", "message"),
    [
        # Unknown and misspelt keys.
        ("run", "outputdir", "x", "config.yaml: outputdir='x' is not a known key; did you mean 'output_dir'?"),
        ("run", "lr", 1e-3, "lr=0.001 is not a known key: it is a key of an adapter: put it in its entry"),
        ("entry", "learning_rat", 1, "adapters[0].learning_rat=1 is not a known key"),
        ("entry", "lora_alhpa", 8, "adapters[0].lora_alhpa=8 is not a known key; did you mean 'lora_alpha'?"),
        ("entry", "num_experts", 4, "num_experts=4 is not a known key: it is a key of method mixlora, not of lora"),
        ("entry", "output_dir", "x", "output_dir='x' is not a known key: it is a key of the run"),
        # Wrong types.
        ("run", "seed", "x", "seed='x' must be int, not str"),
        ("run", "max_batch_tokens", 1.5, "max_batch_tokens=1.5 must be int, not float"),
        ("run", "adapters", "qa", "adapters='qa' must be"),
        ("entry", "lr", "fast", "adapters[0].lr='fast' must be float, not str"),
        ("entry", "batch_size", True, "adapters[0].batch_size=True must be int, not bool"),
        ("entry", "target_modules", 3, "adapters[0].target_modules=3 must be"),
        ("entry", "data", None, "adapters[0].data=None must be str, not null"),
        ("entry", "optimizer", "adam", "adapters[0].optimizer='adam' must be one of adamw, sgd; did you mean 'adamw'?"),
        ("entry", "method", "mixlra", f"method='mixlra' must be one of {', '.join(METHODS)}; did you mean 'mixlora'?"),
        # Out of range.
        ("run", "seed", -1, "seed=-1 must be in 0.."),
        ("run", "max_batch_tokens", 0, "max_batch_tokens=0 must be at least 1"),
        ("run", "adapters", [], "adapters=[] must hold at least one adapter"),
        ("run", "device", "tpu", "device='tpu' must be auto, cpu, cuda, cuda:N or mps"),
        ("run", "dtype", "int8", "dtype='int8' must be"),
        ("entry", "r", 0, "adapters[0].r=0 must be at least 1"),
        ("entry", "r", 10**9, "adapters[0].r=1000000000 must be at most 65536"),
        ("entry", "r", 10**400, "... must be at most 65536"),
        ("entry", "rank_pattern", {"q_proj": 10**400}, "... must be at most 65536"),
        ("entry", "rank_pattern", {"((a|.)*)*Z": 4}, "rank_pattern has '((a|.)*)*Z', which could take forever"),
        ("entry", "lr", 0, "adapters[0].lr=0.0 must be above 0"),
        ("entry", "lr", float("nan"), "adapters[0].lr=nan must be a finite number"),
        ("entry", "lora_dropout", 1.0, "adapters[0].lora_dropout=1.0 must be in [0, 1)"),
        ("entry", "lora_alpha", -2, "adapters[0].lora_alpha=-2.0 must be above 0"),
        ("entry", "micro_batch_size", 5, "adapters[0].micro_batch_size=5 must be in 1..batch_size=4"),
        ("entry", "warmup_ratio", 1.0, "adapters[0].warmup_ratio=1.0 must be in 0..1, 1 excluded"),
        ("entry", "eval_steps", 5, "adapters[0].eval_steps=5 needs eval_data"),
        # Unknown target modules.
        ("entry", "target_modules", ["q_prj"], "target_modules has 'q_prj', but must be"),
        ("entry", "target_modules", ["wq", "wv"], "target_modules has 'wq', but must be"),
        ("entry", "target_modules", [], "target_modules=() must be"),
        ("entry", "target_modules", "all_linear", "did you mean 'all-linear'?"),
        # Files that are missing.
        ("run", "base_model", "no/model/here", "there is no base model 'no/model/here'"),
        ("run", "base_model", "smollm-135m", "did you mean 'smollm2-135m'?"),
        ("entry", "data", "tran.jsonl", "adapter 'qa': there is no data file tran.jsonl; did you mean 'train.jsonl'?"),
        ("entry", "data", "no/such.jsonl", "adapter 'qa': there is no data file no/such.jsonl"),
        (
            "entry",
            "eval_data",
            "evil.jsonl",
            "adapter 'qa': there is no data file evil.jsonl; did you mean 'eval.jsonl'?",
        ),
        ("entry", "data", "bundled:nothing", "adapter 'qa': 'bundled:nothing' is not a bundled data set"),
        ("entry", "template", "alpacca", "adapter 'qa': template='alpacca' is neither a built-in template nor"),
    ],
)
def test_a_wrong_field(place_of: str, key: str, value: object, message: str, base: Path, refused: Refused) -> None:
    entry = adapter_entry("qa", "train.jsonl")
    fields = run_fields(base, {**entry, key: value}) if place_of == "entry" else {**run_fields(base, entry), key: value}
    refused(fields, message)


def test_fields_that_are_not_there(base: Path, refused: Refused) -> None:
    for key in ("name", "method", "data"):
        entry = {name: value for name, value in adapter_entry("qa", "train.jsonl").items() if name != key}
        refused(run_fields(base, entry), f"adapters[0].{key} is missing")
    for key in ("base_model", "adapters"):
        refused({name: value for name, value in run_fields(base).items() if name != key}, f"{key} is missing")


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ("qa", "qa", "adapters[1].name='qa' must be unique: adapters[0] is named 'qa'"),
        ("qa", "QA", "adapters[1].name='QA' must be unique: adapters[0] is named 'qa' (names become folders"),
        ("qa", "a/b", "adapters[1].name='a/b' must be 1 to 100 letters, digits, _ or -"),
        ("qa", "..", "adapters[1].name='..' must be"),
        ("qa", "moe.qa.experts.0", "adapters[1].name='moe.qa.experts.0' must be"),
        ("qa", "", "adapters[1].name='' must be"),
    ],
)
def test_names_of_adapters(first: str, second: str, message: str, base: Path, refused: Refused) -> None:
    refused(run_fields(base, *(adapter_entry(name, "train.jsonl") for name in (first, second))), message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "config.yaml: the file is empty"),
        ("- a\n- b\n", "config.yaml: the top level must be a mapping"),
        ("base_model: [\n", "config.yaml:2: not valid YAML"),
        ("seed: 1\nseed: 2\n", "config.yaml:2: not valid YAML: the key 'seed' stands twice"),
        ("a: !!python/object/apply:os.system ['touch pwned']\n", "config.yaml:1: not valid YAML"),
    ],
)
def test_a_broken_config_file(text: str, message: str, refused: Refused) -> None:
    refused(text, message)


def test_a_wrong_override(base: Path, refused: Refused) -> None:
    refused(run_fields(base), "lora_alhpa", "did you mean 'lora_alpha'?", overrides=("adapters.qa.lora_alhpa=3",))
    refused(run_fields(base), "there is no adapter named 'qb'; valid here: qa", overrides=("adapters.qb.r=3",))
    refused(run_fields(base), "adapters[0].r='x' must be int", overrides=("adapters.qa.r=x",))


def test_a_missing_config_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "config.yaml").write_text("")
    assert train(["confg.yaml"]) == 2
    assert capsys.readouterr().err == "error: config file 'confg.yaml' does not exist; did you mean 'config.yaml'?\n"


@pytest.mark.parametrize(
    ("content", "lines", "words"),
    [
        ("", 1, ["adapter 'qa': bad.jsonl holds no records"]),
        ("\n \n", 1, ["adapter 'qa': bad.jsonl holds no records"]),
        ('{"instruction": "x"}', 2, ["adapter 'qa': bad.jsonl has bad records, 1 of 1", "line 1: ", "no 'output'"]),
        ('{"instruction": "x", "output": " "}', 2, ["line 1: output=' ' must not be blank"]),
        ('{"instruction": "x", "outptu": "y"}', 2, ["line 1: the record has no 'output'; did you mean 'outptu'?"]),
        ('{"messages": [{"role": "user", "content": "x"}]}', 2, ["line 1: messages has no assistant turn"]),
        ('{"messages": [{"role": "usr", "content": "x"}]}', 2, ["messages[0].role='usr' is not a known role"]),
        ('{"text": ""}', 2, ["line 1: text='' must not be blank"]),
        ('{"prompt": "x"}', 2, ["line 1: a record must have", "this one has 'prompt'"]),
        ('{"text": "ok"}\n\n{"text": 3}\nnonsense\n', 3, ["2 of 3", "line 3: text=3 must be a string", "line 4: "]),
    ],
)  # fmt: skip
def test_bad_records(content: str, lines: int, words: list[str], base: Path, place: Path, refused: Refused) -> None:
    (place / "bad.jsonl").write_text(content)
    refused(run_fields(base, adapter_entry("qa", "bad.jsonl")), *words, lines=lines)
    held_out = adapter_entry("qa", "train.jsonl", eval_data="bad.jsonl")
    refused(run_fields(base, held_out), *words, lines=lines)


def test_records_that_do_not_fit(base: Path, place: Path, refused: Refused) -> None:
    write_jsonl(place / "long.jsonl", [{"instruction": "x", "output": "word " * 99}])
    entry = adapter_entry("qa", "long.jsonl", cutoff_len=64)
    refused(run_fields(base, entry), "adapter 'qa': long.jsonl", "too long for cutoff_len=64", "line 1: ", lines=2)
    refused(run_fields(base, {**entry, "overlong": "skip"}), "nothing is left to learn from long.jsonl")


def test_an_output_folder_that_is_taken(base: Path, place: Path, refused: Refused) -> None:
    (place / "run").mkdir()
    (place / "run" / "precious.txt").write_text("data")
    refused(run_fields(base), "output_dir='run' must be new or empty")
    refused(run_fields(base, output_dir="train.jsonl"), "'train.jsonl' must be a folder, but train.jsonl is a file")
    refused(run_fields(base, output_dir="train.jsonl/x"), "'train.jsonl/x' must be a folder, but train.jsonl is a file")


def test_debug_adds_the_traceback(base: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(run_fields(base, seed="x"))
    assert train(["config.yaml", "--debug"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("Traceback (most recent call last):")
    assert errors.endswith("error: config.yaml: seed='x' must be int, not str\n")
