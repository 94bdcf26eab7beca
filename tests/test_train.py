"""``python -m moe_peft.train``: what it is called with, what it prints, how it ends."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from moe_peft.config import AdapterJob, TrainConfig
from moe_peft.config.job import adapter_keys
from moe_peft.strict import field_names
from moe_peft.train import MINIMAL_CONFIG, main, read_config
from moe_peft.training.errors import TrainingError, UnfinishedError


def command(*argv: str, module: str = "moe_peft.train", cwd: Path | None = None) -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, "-m", module, *argv], capture_output=True, text=True, cwd=cwd, timeout=120)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL_CONFIG)
    return path


def test_help_teaches_every_key_and_its_config_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    for key in (*field_names(TrainConfig), "defaults", *adapter_keys(None)):
        assert f"\n  {key}: " in text, key
    for words in ("Usage:", "Exit codes:", "Examples:", "--print-config", "--debug", *MINIMAL_CONFIG.splitlines()):
        assert words in text
    assert [job.name for job in TrainConfig.from_dict(yaml.safe_load(MINIMAL_CONFIG)).adapters] == ["qa", "style"]


def test_the_overrides_that_help_teaches_are_valid(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    section = capsys.readouterr().out.split("key=value sets one key")[1].split("Relative paths")[0]
    overrides = [line.strip().split("  ")[0].strip("'") for line in section.splitlines() if line.startswith("  ")]
    assert len(overrides) == 5
    assert isinstance(TrainConfig.from_file(config_file, overrides).adapters[0], AdapterJob)


def test_the_three_ways_to_call_it(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_config([]) == TrainConfig.default()
    assert read_config(["seed=5"]) == TrainConfig.default(["seed=5"])
    assert read_config([str(config_file), "seed=5"]) == TrainConfig.from_file(config_file, ["seed=5"])
    # A file is a file, whatever its name.
    monkeypatch.chdir(tmp_path)
    config_file.rename("seed=5")
    assert read_config(["seed=5"]) == TrainConfig.from_file("seed=5")


def test_the_config_goes_to_the_trainer_and_its_end_becomes_the_exit_code(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[TrainConfig] = []
    ends: list[BaseException | None] = [
        None, KeyboardInterrupt(), TrainingError("no room"), UnfinishedError("'qa': failed"), None
    ]  # fmt: skip

    class Trainer:
        def __init__(self, config: TrainConfig, *, resume: bool) -> None:
            assert resume
            seen.append(config)

        def train(self) -> None:
            end = ends.pop(0)
            if end is not None:
                raise end

    monkeypatch.setitem(sys.modules, "moe_peft.training.trainer", SimpleNamespace(Trainer=Trainer))
    assert [main([str(config_file), f"seed={seed}"]) for seed in range(4)] == [0, 130, 1, 3]
    assert [config.seed for config in seen] == [0, 1, 2, 3]
    assert capsys.readouterr() == ("", "interrupted\nerror: no room\nerror: 'qa': failed\n")
    assert main([]) == 0
    assert seen[-1] == TrainConfig.default()
    assert capsys.readouterr().out.startswith("No config given: running the embedded default.")


def test_the_options_that_spend_nothing(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[object] = []
    config = TrainConfig.from_file(config_file)

    def verify(given: TrainConfig, num_steps: int) -> bool:
        assert given == config
        calls.append(num_steps)
        return num_steps != 7

    def trainer(given: TrainConfig, *, resume: bool) -> SimpleNamespace:
        calls.append(resume)
        return SimpleNamespace(train=lambda: None)

    plan = SimpleNamespace(print_plan=lambda given, console: calls.append(given))
    monkeypatch.setitem(sys.modules, "moe_peft.training.forecast.plan", plan)
    monkeypatch.setitem(sys.modules, "moe_peft.training.proof.verify", SimpleNamespace(verify=verify))
    monkeypatch.setitem(sys.modules, "moe_peft.training.trainer", SimpleNamespace(Trainer=trainer))
    path = str(config_file)
    assert main([path, "--plan"]) == 0
    for argv in ([path, "--verify"], ["--verify", path], ["--verify", "5", path], [path, "--verify=6"]):
        assert main(argv) == 0
    assert main([path, "--verify", "7"]) == 1
    assert capsys.readouterr().err.startswith("error: what an adapter learns beside the others is not what it learns")
    assert main([path, "--verify=x"]) == 2
    assert main([path, "--no-resume"]) == 0
    assert main([path, "--resume"]) == 0
    assert calls == [config, 3, 3, 5, 6, 7, False, True]


def test_print_config_prints_one_that_runs_the_same(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(config_file), "--print-config", "seed=5"]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    assert TrainConfig.from_dict(yaml.safe_load(text)) == TrainConfig.from_file(config_file, ["seed=5"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["runn.yaml"], "error: config file 'runn.yaml' does not exist; did you mean 'run.yaml'?\n"),
        (
            ["run.yaml", "other.yaml"],
            "error: override 'other.yaml' must be written key=value, as in max_batch_tokens=2048\n",
        ),
        (["run.yaml", "adapters.qa.lr=0"], "error: run.yaml: adapters[0].lr=0.0 must be above 0\n"),
        (
            ["run.yaml", "--sed=1"],
            "error: unknown argument '--sed=1'; valid here: --debug, --help, --no-resume, ",
        ),
    ],
)
def test_mistakes_exit_with_2_and_one_line(
    argv: list[str],
    message: str,
    config_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(config_file.parent)
    assert main(argv) == 2
    text, errors = capsys.readouterr()
    assert (text, errors.count("\n")) == ("", 1)
    assert errors.startswith(message)


def test_the_process_exits_with_the_same_codes(config_file: Path) -> None:
    folder = config_file.parent
    code, text, errors = command("run.yaml", "adapters.qa.lora_alhpa=3", cwd=folder)
    assert (code, text) == (2, "")
    assert errors == (
        "error: override 'adapters.qa.lora_alhpa=3': 'lora_alhpa' is not a key of an adapter; "
        "did you mean 'lora_alpha'?\n"
    )
    code, text, errors = command("run.yaml", "seed=x", "--debug", cwd=folder)
    assert code == 2
    assert errors.startswith("Traceback (most recent call last)")
    assert errors.endswith("error: run.yaml: seed='x' must be int, not str\n")
    assert sorted(path.name for path in folder.iterdir()) == ["run.yaml"], "a refused run leaves nothing behind"


def test_a_closed_pipe_is_no_error(config_file: Path) -> None:
    # Enough output that it cannot all lie in the pipe's buffer when its reader has gone.
    config_file.write_text(MINIMAL_CONFIG.replace("train.jsonl", "x" * 200_000))
    argv = [sys.executable, "-m", "moe_peft.train", str(config_file), "--print-config"]
    # Unbuffered, Python itself drops the rest of a partial write without an error.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 1
