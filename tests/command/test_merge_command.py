"""``python -m moe_peft.merge``: what is written, how it is told, how it ends."""

import json
import sys
from pathlib import Path

import pytest
import tiny_run
import torch
import transformers
from builders import Run, add_random_adapter, assert_close, fuse
from safetensors.torch import load_file

import moe_peft
from moe_peft import LoraConfig, load_adapter, load_base_model, load_tokenizer, save_adapter
from moe_peft.merge import main

SAMPLE = [5, 80, 81, 3, 120, 99]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, the same as GGUF, a run of two adapters, and an adapter for the GGUF."""
    folder = tmp_path_factory.mktemp("place")
    base = tiny_run.make_base_folder(folder / "base", dtype=torch.bfloat16)
    data = tiny_run.write_jsonl(folder / "data.jsonl", tiny_run.instructions(8))
    entries = [
        tiny_run.adapter_entry("qa", data, lr=0.1, max_steps=2),
        tiny_run.adapter_entry("mix", data, method="mixlora", num_experts=3, max_steps=1),
    ]
    tiny_run.train(tiny_run.run_config(base, folder / "run", *entries))
    path = tiny_run.make_base_gguf(folder / "base.gguf")
    model = load_base_model(path, device="cpu")
    add_random_adapter(model, "own", LoraConfig(r=2), std=0.1)
    save_adapter(model, "own", folder / "own")
    return folder


@pytest.fixture
def merge(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Calls the command in that folder with a fresh output."""
    monkeypatch.chdir(place)

    def call(*argv: str, output: Path = tmp_path / "out"):
        code = main([*argv, "--output", str(output)])
        return code, *capsys.readouterr(), output

    return call


def logits(model, name: str = "") -> torch.Tensor:
    with torch.no_grad():
        return model(fuse(Run(name, [SAMPLE]), with_labels=False))[0].logits


def assert_answers(folder: Path, expected: torch.Tensor) -> None:
    assert_close(logits(load_base_model(folder, device="cpu")), expected, 1e-4, "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert_close(theirs(torch.tensor([SAMPLE])).logits[0], expected, 1e-4, "transformers'")


@pytest.mark.parametrize(
    "argv",
    [("--run", "run", "--use", "qa"), ("--base", "base", "--adapter", "x=run/adapters/qa")],
    ids=["run", "folder"],
)
def test_an_adapter_of_a_run_or_a_folder(merge, place: Path, argv: tuple[str, ...]) -> None:
    code, out, err, output = merge(*argv, "--dtype", "float32")
    name = "qa" if "--run" in argv else "x"
    assert (code, err) == (0, "")
    size = (output / "model.safetensors").stat().st_size
    assert out == f"{output}: {name} merged, {size / 1e6:.1f} MB in 1 file\n"
    model = load_base_model(place / "base", dtype="float32", device="cpu")
    load_adapter(model, place / "run" / "adapters" / "qa", "qa")
    assert (logits(model, "qa") - logits(model)).abs().max() > 1e-2
    assert_answers(output, logits(model, "qa"))
    theirs = transformers.AutoTokenizer.from_pretrained(output)
    assert theirs("Repeat 3").input_ids == load_tokenizer(place / "base").encode("Repeat 3")


def test_the_bases_own_dtype_is_the_default_and_sums_are_rounded_once(merge, place: Path) -> None:
    assert merge("--run", "run", "--use", "qa")[0] == 0
    *_, narrow = merge("--run", "run", "--use", "qa", output=place / "narrow")
    *_, wide = merge("--run", "run", "--use", "qa", "--dtype", "float32", output=place / "wide")
    *_, half = merge("--run", "run", "--use", "qa", "--dtype", "float16", output=place / "half")
    files = [load_file(folder / "model.safetensors") for folder in (narrow, wide, half)]
    for name, weight in files[1].items():
        assert torch.equal(files[0][name], weight.bfloat16()), name
        assert torch.equal(files[2][name], weight.half()), name
    assert json.loads((narrow / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_from_a_gguf_file_into_shards(merge, place: Path) -> None:
    code, out, err, output = merge(
        "--base", "base.gguf", "--adapter", "own", "--dtype", "float32", "--max-shard-size", "10kB"
    )
    assert (code, err) == (0, "")
    assert out.endswith(" files\n") and "model.safetensors.index.json" in {path.name for path in output.iterdir()}
    model = load_base_model(place / "base.gguf", dtype="float32", device="cpu")
    load_adapter(model, place / "own", "own")
    assert_answers(output, logits(model, "own"))
    theirs = transformers.AutoTokenizer.from_pretrained(output)
    text = "Below is <turn>12</s>"
    assert theirs(text).input_ids == load_tokenizer(place / "base.gguf").encode(text)


def test_without_a_tokenizer(merge) -> None:
    *_, output = merge("--run", "run", "--use", "qa", "--no-tokenizer")
    assert sorted(path.name for path in output.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "there is no adapter: give --adapter FOLDER, or --run FOLDER with --use NAME"),
        (("--run", "run"), "--use is missing: give one of mix, qa"),
        (("--run", "run", "--use", "qb"), "--use qb: there is no such adapter"),
        (("--run", "run", "--use", "mix"), "adapter 'mix' cannot be merged: the router of MixLoraConfig"),
        (("--run", "nowhere", "--use", "qa"), "--run nowhere: there is no such folder"),
        (("--base", "base", "--adapter", "nowhere"), "--adapter nowhere: there is no folder nowhere"),
        (("--base", "base", "--adapter", "own"), "unlike an adapter of this config on this base"),
        (("--base", "bass", "--adapter", "own"), "did you mean 'base'?"),
        (("--run", "run", "--use", "qa", "--dtype", "int8"), "dtype='int8' must be one of"),
        (("--run", "run", "--use", "qa", "--max-shard-size", "big"), "max_shard_size='big' must be a number of bytes"),
        (("--run", "run", "--use", "qa", "--max-shard-size", "9" * 400), "above 0 and below 2**63"),
        (("--base", "", "--adapter", "own"), "--base '' must not be empty"),
        (("--run", "", "--use", "qa"), "--run '' must not be empty"),
        (("--base", "base", "--adapter", ""), "--adapter '' must not be empty"),
        (("--base", "base", "--adapter", "x="), "--adapter x= '' must not be empty"),
        (("--run", "run", "--use", "qa", "--outputt", "x"), "unknown argument '--outputt'; did you mean '--output'?"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(merge, argv: tuple[str, ...], message: str) -> None:
    code, out, err, output = merge(*argv)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not output.exists()


def test_a_folder_in_use_is_refused_before_anything_is_loaded(
    merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("moe_peft.merge.load_base_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    code, _, err, _ = merge("--run", "run", "--use", "qa")
    assert (code, "already exists and is not empty" in err) == (2, True)
    assert main(["--run", "run", "--use", "qa"]) == 2
    assert capsys.readouterr().err == "error: --output is missing: give the folder to be written\n"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("own/sub", "must not lie inside an adapter's, which "),
        ("run/adapters/qa/deep/sub", "must not lie inside an adapter's, which "),
        ("base/sub", "must not lie inside the base model's, which "),
        ("base/config.json/sub", "config.json is a file: it cannot hold the folder "),
        ("/proc/x", "the folder /proc/x cannot be made: "),
        ("x" * 300, "cannot be made: File name too long"),
        (f"{'x' * 300}/deep", "cannot be made: File name too long"),
        ("", "--output '' must not be empty"),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_an_output_that_cannot_be_is_refused_before_anything_is_loaded(
    place: Path, output: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("moe_peft.merge.load_base_model", lambda *_, **__: pytest.fail("loaded"))
    before = sorted(place.rglob("*"))
    assert main(["--base", "base", "--adapter", "qa=run/adapters/qa", "--output", output]) == 2
    assert message in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before


def test_the_library_refuses_such_a_folder_too(place: Path) -> None:
    model = load_base_model(place / "base", device="cpu")
    for folder in (place / "base" / "sub", place / "own" / "sub"):
        with pytest.raises(ValueError, match="must not lie inside"):
            moe_peft.save_merged_model(model, "", folder, source=place / "base")


def test_progress_is_shown_on_a_terminal(merge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    code, out, err, _ = merge("--run", "run", "--use", "qa")
    assert code == 0
    assert "loading " in err
    assert "merging  " in err and "model.layers.1.mlp.down_proj.weight" in err
    assert out.count("\n") == 1


def test_the_library_does_the_same(merge, place: Path, tmp_path: Path) -> None:
    *_, output = merge("--run", "run", "--use", "qa")
    model = load_base_model(place / "base", dtype="bfloat16", device="cpu")
    load_adapter(model, place / "run" / "adapters" / "qa")
    moe_peft.save_merged_model(model, "qa", tmp_path / "again", source=place / "base")
    names = sorted(path.name for path in output.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((output / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
