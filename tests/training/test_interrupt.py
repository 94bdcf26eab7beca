"""Ctrl-C and SIGTERM in a run: the step is finished, every adapter saved, and the user told where."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny_run import adapter_entry, new_trainer, run_config

from moe_peft import Trainer, load_adapter, load_base_model
from moe_peft.training.folder.metrics import read_metrics
from moe_peft.training.interrupt import InterruptGuard


def at_forward(trainer: Trainer, number: int, action: Callable[[], object]) -> None:
    """Have ``action`` done in the middle of the n-th forward, from 1."""
    forward, calls = trainer.model.forward, iter(range(1, 10**6))

    def stand_in(*args, **kwargs):
        if next(calls) == number:
            action()
        return forward(*args, **kwargs)

    trainer.model.forward = stand_in  # type: ignore[method-assign]


def loads(base: Path, folder: Path) -> bool:
    return load_adapter(load_base_model(base), folder, "again") == "again"


@pytest.mark.parametrize(
    ("number", "ending", "code"), [(signal.SIGINT, KeyboardInterrupt, None), (signal.SIGTERM, SystemExit, 143)]
)
@pytest.mark.usefixtures("no_pictures")
def test_a_signal_lets_the_step_finish_then_saves_and_says_where(
    number: signal.Signals, ending: type[BaseException], code: int | None, base: Path, data: str, tmp_path: Path
) -> None:
    entries = [
        adapter_entry("early", data, max_steps=2),
        adapter_entry("qa", data, max_steps=50),
        adapter_entry("mix", data, method="mixlora", max_steps=50),
    ]
    trainer = new_trainer(run_config(base, tmp_path / "run", *entries))
    at_forward(trainer, 5, lambda: signal.raise_signal(number))
    handlers = [signal.getsignal(number), signal.getsignal(signal.SIGINT)]
    with pytest.raises(ending) as caught:
        trainer.train()
    assert getattr(caught.value, "code", None) == code
    assert [signal.getsignal(number), signal.getsignal(signal.SIGINT)] == handlers
    steps = {name: job.record.steps_taken for name, job in trainer.jobs.items()}
    assert 0 < steps["qa"] < 50
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert max(row["step"] for row in rows if row["adapter"] == "qa") == steps["qa"]
    text = trainer.console.file.getvalue()
    for name in ("early", "qa", "mix"):
        folder = tmp_path / "run" / "adapters" / name
        assert f"\n  {folder}\n" in text
        assert loads(base, folder)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("a bug")], ids=repr)
def test_what_stops_a_step_halfway_still_saves_and_says_where(
    error: BaseException, base: Path, data: str, tmp_path: Path
) -> None:
    # So ends a second Ctrl-C, or any Ctrl-C where Python allows no handlers.
    def fail() -> None:
        raise error

    entries = [adapter_entry("qa", data, max_steps=50), adapter_entry("mix", data, method="mixlora")]
    run_dir = tmp_path / "[bold]" / "[" / "]"  # nothing that the console may read as markup
    trainer = new_trainer(run_config(base, run_dir, *entries))
    at_forward(trainer, 4, fail)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else RuntimeError):
        trainer.train()
    for name in ("qa", "mix"):
        folder = run_dir / "adapters" / name
        assert f"\n  {folder}\n" in trainer.console.file.getvalue()
        assert loads(base, folder)


@pytest.mark.usefixtures("no_pictures")
def test_ctrl_c_while_the_adapters_answer_says_where_too(
    base: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("moe_peft.training.trainer.answer_held_out_prompts", answer)
    trainer = new_trainer(run_config(base, tmp_path / "run", adapter_entry("qa", data)))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert f"\n  {tmp_path / 'run' / 'adapters' / 'qa'}\n" in trainer.console.file.getvalue()


def test_ctrl_c_on_the_command_exits_with_130(base: Path, data: str, tmp_path: Path) -> None:
    config = {
        "base_model": str(base),
        "device": "cpu",
        "num_threads": 1,
        "output_dir": "run",
        "adapters": [
            adapter_entry("qa", data, max_steps=10**6),
            adapter_entry("mix", data, method="mixlora", max_steps=10**6),
        ],
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = subprocess.Popen(
        [sys.executable, "-m", "moe_peft.train", "config.yaml"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while command.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and len(read_metrics(metrics)) > 10:
            command.send_signal(signal.SIGINT)
            break
        time.sleep(0.05)
    text, errors = command.communicate(timeout=120)
    assert (command.returncode, errors) == (130, "interrupted\n")
    for name in ("qa", "mix"):
        assert f"\n  run/adapters/{name}\n" in text
        assert loads(base, tmp_path / "run" / "adapters" / name)
    produced = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert produced == [
        "adapters", "checkpoints", "config.yaml", "experts-mix.png", "loss.png", "metrics.jsonl", "run.lock"
    ]  # fmt: skip


def test_the_guard_takes_one_signal_quietly_and_the_second_at_once() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with InterruptGuard() as guard:
        assert guard.signal is None
        guard.raise_if_asked()
        signal.raise_signal(signal.SIGINT)
        assert guard.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert guard.signal == signal.SIGINT
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    with pytest.raises(KeyboardInterrupt):
        guard.raise_if_asked()


def test_outside_the_main_thread_the_guard_stands_aside() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def enter() -> None:
        with InterruptGuard() as guard:
            seen.extend([guard.signal, signal.getsignal(signal.SIGINT)])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [None, before]
