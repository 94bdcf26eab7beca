"""``python -m moe_peft.generate``: who answers what, how it is printed, how it ends."""

import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import tiny_run
import torch
import yaml
from safetensors.torch import load_file, save_file

import moe_peft
from moe_peft.data.templates import load_template
from moe_peft.generate import main
from moe_peft.generation import generate


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and a run of two adapters, of different templates and strong enough to differ."""
    folder = tmp_path_factory.mktemp("place")
    base = tiny_run.make_base_folder(folder / "base")
    data = tiny_run.write_jsonl(folder / "data.jsonl", tiny_run.instructions(12))
    entries = [
        tiny_run.adapter_entry("qa", data, template="chat", lr=0.3),
        tiny_run.adapter_entry("mix", data, template="alpaca", method="mixlora", num_experts=3, lr=0.3),
    ]
    tiny_run.train(tiny_run.run_config(base, folder / "run", *entries))
    return folder


class Result:
    """What a command left behind."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Calls the command in that folder."""
    monkeypatch.chdir(place)

    def call(*argv: str, stdin: str | None = None) -> Result:
        monkeypatch.setattr(sys, "stdin", StringIO(stdin) if stdin is not None else _Terminal())
        code = main([*argv, "--max-new-tokens", "8"] if "--max-new-tokens" not in argv else argv)
        return Result(code, *capsys.readouterr())

    return call


class _Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(scope="module")
def loaded(place: Path):
    """The same base and adapters, loaded through the library."""
    model = moe_peft.load_base_model(place / "base", device="cpu")
    for name in ("qa", "mix"):
        moe_peft.load_adapter(model, place / "run" / "adapters" / name)
    return model, moe_peft.load_tokenizer(place / "base")


def answer(loaded, prompt: object, name: str = "", **settings: object) -> str:
    model, tokenizer = loaded
    return generate(model, tokenizer, [prompt], adapter_names=name, **{"max_new_tokens": 8, **settings})[0]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


BASE = ("--base", "base")
RUN = ("--run", "run")


def test_one_prompt_prints_its_answer_and_nothing_else(run, loaded) -> None:
    result = run(*BASE, "--prompt", "Repeat 3")
    assert (result.code, result.err) == (0, "")
    assert result.out == answer(loaded, user("Repeat 3")) + "\n"
    assert run(*BASE, stdin="Repeat 3\n").out == result.out
    with_adapter = run(*BASE, "--adapter", "run/adapters/qa", "--prompt", "Repeat 3")
    assert with_adapter.out == answer(loaded, user("Repeat 3"), "qa") + "\n"
    assert with_adapter.out != result.out
    named = run(*BASE, "--adapter", "mine=run/adapters/qa", "--use", "mine", "--prompt", "Repeat 3")
    assert named.out == with_adapter.out


def test_the_forms_of_a_prompt(run, loaded) -> None:
    def out(*argv: str) -> str:
        return run(*BASE, "--prompt", "Repeat 3", *argv).out.removesuffix("\n")

    assert out("--chat") == out("--template", "chat") == answer(loaded, user("Repeat 3"))
    assert out("--raw") == answer(loaded, "Repeat 3")
    assert out("--template", "alpaca") == answer(loaded, load_template("alpaca").prompt("Repeat 3"))
    system = {"role": "system", "content": "Be brief."}
    assert out("--system", "Be brief.") == answer(loaded, [system, *user("Repeat 3")])
    assert len({out("--chat"), out("--raw"), out("--template", "alpaca"), out("--system", "Be brief.")}) == 4


def test_settings_reach_the_answer(run, loaded) -> None:
    sampled = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 3}
    options = [f"--{key.replace('_', '-')}={value}" for key, value in sampled.items()]
    result = run(*BASE, "--raw", "--prompt", "Repeat", *options, "--max-new-tokens", "20")
    expected = answer(loaded, "Repeat", **sampled, max_new_tokens=20)
    assert result.out.removesuffix("\n") == expected.removesuffix("\n")
    assert expected != answer(loaded, "Repeat", max_new_tokens=20)
    stop = expected[5:7]
    stopped = run(*BASE, "--raw", "--prompt", "Repeat", *options, "--max-new-tokens", "20", "--stop", stop)
    assert stopped.out.removesuffix("\n") == expected[: expected.index(stop)]


def test_a_run_brings_its_base_its_adapters_and_their_templates(run, loaded) -> None:
    result = run(*RUN, "--use", "qa", "--use", "mix", "--use", "moe.mix.experts.1", "--use", "base", "--prompt", "Go 1")
    alpaca = load_template("alpaca").prompt("Go 1")
    expected = {
        "qa": answer(loaded, user("Go 1"), "qa"),
        "mix": answer(loaded, alpaca, "mix"),
        "moe.mix.experts.1": answer(loaded, alpaca, "moe.mix.experts.1"),
        "base": answer(loaded, user("Go 1")),
    }
    assert len(set(expected.values())) == 4
    printed = "".join(f"--- {name}:\n{text.rstrip()}\n" for name, text in expected.items())
    assert result.out == "=== prompt 1 of 1: 'Go 1'\n" + printed
    # Without --use, all of the run's adapters answer.
    assert re.findall("^--- (.*):$", run(*RUN, "--prompt", "Go 1").out, re.MULTILINE) == ["mix", "qa"]
    raw = run(*RUN, "--use", "mix", "--raw", "--prompt", "Go 1")
    assert raw.out.removesuffix("\n") == answer(loaded, "Go 1", "mix").removesuffix("\n")


@pytest.mark.parametrize("batch_size", ["1", "3", "16"])
def test_several_prompts_in_batches_as_json(run, loaded, place: Path, batch_size: str) -> None:
    questions = [{"instruction": "Repeat 1"}, {"instruction": "Repeat 2", "input": "xx"}, "Go"]
    tiny_run.write_jsonl(place / "questions.jsonl", questions)
    argv = (*RUN, "--use", "qa", "--use", "base", "--prompts-file", "questions.jsonl", "--json")
    rows = [json.loads(line) for line in run(*argv, "--batch-size", batch_size).out.splitlines()]
    prompts = {"Repeat 1": "Repeat 1", "Repeat 2": "Repeat 2\n\nxx", "Go": "Go"}
    assert [(row["prompt"], row["adapter"], row["text"]) for row in rows] == [
        (prompt, name, answer(loaded, user(text), name.replace("base", "")))
        for prompt, text in prompts.items()
        for name in ("qa", "base")
    ]
    assert {row["finish_reason"] for row in rows} <= {"length", "eos"}
    assert all(1 <= row["num_tokens"] <= 8 for row in rows)


def test_an_adapter_may_be_called_base(run, loaded) -> None:
    result = run(*BASE, "--adapter", "base=run/adapters/qa", "--use", "base", "--prompt", "Repeat 3")
    assert result.out.removesuffix("\n") == answer(loaded, user("Repeat 3"), "qa")


def test_dtype_and_device_are_passed_on(run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    load = moe_peft.load_base_model

    def spy(source, dtype, device):
        seen.update(source=source, dtype=dtype, device=device)
        return load(source, dtype, device)

    monkeypatch.setattr("moe_peft.command.model.load_base_model", spy)
    assert run(*BASE, "--prompt", "x", "--dtype", "bfloat16", "--device", "cpu").code == 0
    assert seen == {"source": "base", "dtype": "bfloat16", "device": "cpu"}
    assert run(*RUN, "--prompt", "x").code == 0
    assert Path(seen["source"]).name == "base"
    assert (seen["dtype"], seen["device"]) == ("float32", "auto")


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    source = Path(moe_peft.generate.__file__).read_text() + Path(moe_peft.command.model.__file__).read_text()
    options = set(re.findall(r'add_argument\("(--[a-z-]+)"', source)) | {"--debug", "--help"}
    assert len(options) > 15
    for option in options:
        assert f"{option} " in text or f"{option}\n" in text, option
    assert all(words in text for words in ("Examples:", "Exit codes:", "Usage:"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "there is no prompt: give --prompt TEXT, --prompts-file FILE or --interactive, or pipe one in"),
        (("--prompt", " "), "the prompt ' ' is blank"),
        (("--prompt", ""), "the prompt '' is blank"),
        (("--prompt", "x", "--interactive"), "exclude each other"),
        (("--interactive", "--json"), "--json is not for --interactive"),
        (("--prompt", "x", "--tmperature", "1"), "unknown argument '--tmperature'; did you mean '--temperature'?"),
        (("--prompt", "x", "--top-k", "many"), "argument --top-k: invalid int value: 'many'"),
        (("--prompt", "x", "--raw", "--chat"), "not allowed with argument"),
        (("--prompt", "x", "--temperature", "-1"), "temperature=-1.0 must be at least 0"),
        (("--prompt", "x", "--max-new-tokens", "0"), "max_new_tokens=0 must be at least 1"),
        (("--prompt", "x", "--max-new-tokens", "999"), "max_new_tokens=999 and a prompt of"),
        (("--prompt", "x", "--batch-size", "0"), "--batch-size 0 must be at least 1"),
        (("--prompt", "x", "--stop", ""), "must hold no empty string"),
        (
            ("--prompt", "x", "--use", "qb", "--run", "run"),
            "adapter 'qb' is not attached to this model; valid here: mix, qa",
        ),
        (("--prompt", "x", "--use", "moe.mix.experts.3", "--run", "run"), "it has num_experts=3"),
        (("--prompt", "x", "--adapter", "nowhere"), "--adapter nowhere: there is no folder nowhere"),
        (("--prompt", "x", "--adapter", "a=nowhere"), "--adapter a=nowhere: there is no folder nowhere"),
        (("--prompt", "x", "--adapter", "base"), "base has no adapter_config.json"),
        (("--prompt", "x", "--run", "run", "--adapter", "run/adapters/qa"), "the name 'qa' is taken by run"),
        (("--prompt", "x", "--run", "nowhere"), "--run nowhere: there is no such folder"),
        (("--prompt", "x", "--run", "base"), "--run base has no config.yaml"),
        (("--prompt", "x", "--base", "bass"), "did you mean 'base'?"),
        (("--prompt", "x", "--dtype", "float33"), "dtype='float33' "),
        (("--prompt", "x", "--template", "alpacca"), "template='alpacca' "),
        (("--prompt", "x", "--raw", "--system", "s"), "system='s' needs a chat template"),
        (("--prompts-file", "none.txt"), "No such file or directory: 'none.txt'"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(run, argv: tuple[str, ...], message: str) -> None:
    result = run(*argv, *(() if {"--base", "--run"} & {*argv} else BASE))
    assert result.code == 2
    assert result.out == ""
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1


def test_a_run_without_adapters_yet(run, place: Path) -> None:
    config = yaml.safe_load((place / "run" / "config.yaml").read_text())
    (place / "young").mkdir(exist_ok=True)
    (place / "young" / "config.yaml").write_text(yaml.safe_dump(config))
    result = run("--run", "young", "--prompt", "x")
    assert result.code == 2
    assert "--run young has no adapters yet" in result.err


def test_debug_shows_the_traceback(run) -> None:
    result = run(*BASE, "--prompt", "x", "--use", "qa", "--debug")
    assert result.code == 2
    assert "Traceback" in result.err
    assert result.err.splitlines()[-1].startswith("error: adapter 'qa' is not attached")


def test_a_broken_adapter_fails_after_the_others_are_printed(run, loaded, place: Path) -> None:
    broken = place / "broken"
    moe_peft.save_adapter(loaded[0], "qa", broken)
    weights = load_file(broken / "adapter_model.safetensors")
    save_file(
        {key: torch.full_like(weight, 1e30) for key, weight in weights.items()},  # finite, but no product of two is
        broken / "adapter_model.safetensors",
    )
    argv = (*BASE, "--adapter", "broken", "--adapter", "run/adapters/qa", "--prompt", "Repeat 3")
    result = run(*argv)
    assert result.code == 1
    assert answer(loaded, user("Repeat 3"), "qa").rstrip() in result.out
    reason = "gives logits that are not finite: its weights are damaged, or overflow in this dtype"
    assert result.err == f"error: adapter 'broken' {reason}\n"
    assert run(*argv, "--use", "broken").code == 1


def test_the_module_runs_and_chats_through_pipes(place: Path, loaded) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-m", "moe_peft.generate", *RUN, "--use", "base", "--interactive", "--max-new-tokens", "8"],
        input="Go 1\n/adapter qa\n/reset\nGo 1\n/quit\nnever\n",
        capture_output=True,
        encoding="utf-8",
        cwd=place,
        env=environment,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert answer(loaded, user("Go 1")) in done.stdout
    assert answer(loaded, user("Go 1"), "qa") in done.stdout.split("(qa answers)")[1]
    assert done.stdout.endswith("> ")
