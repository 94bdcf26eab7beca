"""What is asked of a run is checked whole before the run hears of it."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_maker import make_run, new_job, put_job, put_stops, step_row
from tiny_run import adapter_entry, run_config

from moe_peft.config import AdapterJob, TrainConfig
from moe_peft.training.folder.inbox import Inbox
from moe_peft.training.folder.journal import Journal
from moe_peft.training.folder.metrics import JobMetrics
from moe_peft.training.folder.run_status import RunStatus, read_run
from moe_peft.training.folder.submission import find_stoppable, read_submission, stop, submit


@pytest.fixture
def run(base: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunStatus:
    """A run of one adapter ``qa`` in ``run``, with the data in the current folder beside it."""
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_bytes(Path(data).read_bytes())
    config = run_config(base, tmp_path / "run", adapter_entry("qa", data), seed=3, dtype="float32")
    Path("run").mkdir()
    Path("run/config.yaml").write_text(config.to_yaml())
    return read_run("run")


def write(name: str, *entries: dict[str, Any], **keys: Any) -> Path:
    path = Path(name)
    path.write_text(yaml.safe_dump({**keys, "adapters": list(entries)}))
    return path


def entry(name: str = "late", **changes: Any) -> dict[str, Any]:
    return {**adapter_entry(name, "train.jsonl"), **changes}


def test_a_short_config_becomes_jobs_with_absolute_paths(run: RunStatus, base: Path, tmp_path: Path) -> None:
    Path("mine.yaml").write_bytes((base / "short.yaml").read_bytes())
    home = os.path.relpath("train.jsonl", Path.home())
    path = write(
        "more.yaml",
        entry("late", eval_data=f"~/{home}", template="mine.yaml"),
        entry("tale", data="bundled:orders", eval_data="bundled:orders:eval", template="alpaca", cutoff_len=256),
        defaults={"lr": 0.125, "method": "mixlora"},
    )
    late, tale = read_submission(path, ["adapters.late.batch_size=2"], run)
    assert Path(late.data) == tmp_path / "train.jsonl"
    assert Path(late.eval_data or "").is_absolute()
    assert Path(late.eval_data or "").samefile("train.jsonl")
    assert Path(late.template) == tmp_path / "mine.yaml"
    assert (late.batch_size, late.lr, late.method) == (2, 1e-2, "lora"), "an entry's own keys win"
    assert (tale.data, tale.eval_data, tale.template) == ("bundled:orders", "bundled:orders:eval", "alpaca")
    expected = TrainConfig.from_file(path, [f"base_model={base}", "adapters.late.batch_size=2"]).adapters[0]
    paths = {"data": late.data, "eval_data": late.eval_data, "template": late.template}
    assert late == dataclasses.replace(expected, **paths)


def test_keys_of_the_run_may_be_repeated(run: RunStatus, base: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(base)
    for keys in (
        {"base_model": str(base), "seed": 3, "dtype": "auto", "output_dir": None, "max_batch_tokens": 4096},
        {"base_model": "link", "output_dir": "run", "dtype": "float32", "device": "cpu"},
        {"base_model": f"{base}/", "output_dir": str(tmp_path / "run")},
    ):
        assert [job.name for job in read_submission(write("more.yaml", entry(), **keys), [], run)] == ["late"]
    assert read_submission(write("more.yaml", entry()), ["seed=3"], run)


@pytest.mark.parametrize(
    ("keys", "overrides", "reason"),
    [
        ({"seed": 4}, [], r"seed=4 must be 3, as run has it, or be left out"),
        ({"seed": 3}, ["seed=5"], r"seed=5 must be 3"),
        ({"dtype": "bfloat16"}, [], r"dtype='bfloat16' must be 'float32'"),
        ({"max_concurrent_adapters": 2}, [], r"max_concurrent_adapters=2 must be None"),
        (
            {"base_model": "smollm2-135m"},
            [],
            r"base_model='smollm2-135m' must be '.*', which run trains on, or be left",
        ),
        ({"output_dir": "elsewhere"}, [], r"output_dir='elsewhere' must be the run's, 'run', or be left out"),
        ({"sed": 3}, [], r"sed=3 is not a known key; did you mean 'seed'"),
        ({"lr": 3}, [], r"lr=3 is not a known key: it is a key of an adapter"),
        ({}, ["adapters.late.rr=3"], r"override 'adapters.late.rr=3': 'rr' is not a key of an adapter"),
        ({"defaults": {"num_experts": 4}}, [], r"defaults.num_experts=4 reaches no adapter"),
    ],
)
def test_keys_that_are_unknown_or_disagree_are_refused_by_name(
    run: RunStatus, keys: dict[str, Any], overrides: list[str], reason: str
) -> None:
    with pytest.raises(ValueError, match=f"more.yaml: {reason}" if not overrides else reason):
        read_submission(write("more.yaml", entry(), **keys), overrides, run)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "qa"}, r"the name 'qa' is taken: run has an adapter 'qa' \(queued\)"),
        ({"name": "QA"}, r"the name 'QA' is taken: run has an adapter 'qa' \(queued\) \(names become folders"),
        ({"name": "waits"}, r"the name 'waits' is taken"),
        ({"method": "lroa"}, r"adapters\[0\].method='lroa' must be one of .*did you mean 'lora'"),
        ({"num_experts": 4}, r"adapters\[0\].num_experts=4 is not a known key: it is a key of method mixlora"),
        ({"r": 0}, r"adapters\[0\].r=0 must be at least 1"),
        (
            {"data": "trian.jsonl"},
            r"adapter 'late': there is no data file .*trian.jsonl; did you mean '.*/train.jsonl'",
        ),
        ({"data": "bundled:ordres"}, r"adapter 'late': 'bundled:ordres' is not a bundled data set; did you mean"),
        ({"data": "bad.jsonl"}, r"adapter 'late': .*bad.jsonl has bad records, 1 of 2:\n  line 2: "),
        ({"eval_data": "bad.jsonl"}, r"adapter 'late': .*bad.jsonl has bad records"),
        ({"cutoff_len": 8}, r"adapter 'late': .*train.jsonl has records too long for cutoff_len=8"),
        ({"template": "alpaka"}, r"template='alpaka' is neither a built-in template nor an existing file"),
    ],
)
def test_an_adapter_that_could_not_train_is_refused(run: RunStatus, changes: dict[str, Any], reason: str) -> None:
    put_job(Path("run"), "waits")
    Path("bad.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    with pytest.raises(ValueError, match=reason):
        read_submission(write("more.yaml", entry(**changes)), [], read_run("run"))
    assert len(Inbox("run").take()) == 1


def test_sweeps_join_as_a_grid_but_are_not_halved(run: RunStatus) -> None:
    names = [job.name for job in read_submission(write("more.yaml", entry(lr=[0.1, 0.2], seed=[0, 1])), [], run)]
    assert len(set(names)) == 4
    halving = entry(lr=[0.1, 0.2], max_steps=9, sweep={"halve_every": 2, "metric": "loss"})
    with pytest.raises(
        ValueError, match=r"the sweep 'late' has halve_every=2, but submitted adapters are not compared"
    ):
        read_submission(write("more.yaml", halving), [], run)


def test_two_entries_of_one_name_are_refused_as_in_any_config(run: RunStatus) -> None:
    with pytest.raises(ValueError, match=r"adapters\[1\].name='Late' must be unique"):
        read_submission(write("more.yaml", entry(), entry("Late")), [], run)


def test_a_base_model_that_only_the_run_can_see_leaves_the_records_to_check(run: RunStatus) -> None:
    config = dataclasses.replace(run.config, base_model="far/away/model.gguf")
    run = dataclasses.replace(run, config=config)
    assert read_submission(write("more.yaml", entry(cutoff_len=8)), [], run), "no tokenizer, no lengths"
    with pytest.raises(ValueError, match="there is no data file"):
        read_submission(write("more.yaml", entry(data="nowhere.jsonl")), [], run)


def submitted(run: str) -> list[AdapterJob | None]:
    return [request.job for request in Inbox(run).take()]


def test_submitting_puts_every_job_into_the_inbox_in_order(run: RunStatus) -> None:
    jobs = [new_job("b"), new_job("a")]
    submit(run, jobs)
    assert submitted("run") == jobs


def test_a_name_taken_since_the_check_is_refused_and_nothing_is_put_in(run: RunStatus) -> None:
    put_job(Path("run"), "a")
    with pytest.raises(ValueError, match="the name 'A' is taken"):
        submit(run, [new_job("b"), new_job("A")])
    assert submitted("run") == [new_job("a")]
    Journal("run/journal.jsonl").take_in(Inbox("run"), 0)
    with pytest.raises(ValueError, match="the name 'A' is taken"):
        submit(run, [new_job("A")])
    assert submitted("run") == []


def test_a_complete_run_takes_nothing(run: RunStatus) -> None:
    Inbox("run").close()
    with pytest.raises(ValueError, match="the run in run is complete: start a new one"):
        submit(run, [new_job("b")])
    assert submitted("run") == []


def test_only_what_is_under_way_can_be_stopped(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "run",
        step_row("qa", 1),
        JobMetrics(adapter="mix", state="failed", step=4, reason="loss nan"),
    )
    run = read_run(folder)
    with pytest.raises(ValueError, match=r"run has no adapter 'style'; valid here: mix, qa"):
        stop(run, ["style"])
    with pytest.raises(ValueError, match=r"run has no adapter 'MIX'; did you mean 'mix'\?"):
        stop(run, ["qa", "MIX"])
    with pytest.raises(
        ValueError, match=r"'mix' has ended already, it is failed \(loss nan\): there is nothing to stop"
    ):
        stop(run, ["mix"])
    assert Inbox(folder).take() == []
    stop(run, ["qa", "qa"])
    stop(run, ["qa"])
    assert [(request.action, request.adapter) for request in Inbox(folder).take()] == [("stop", "qa")]


def test_what_waits_in_the_inbox_can_be_stopped_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    put_job(folder, "late")
    run = read_run(folder)
    assert find_stoppable(run, "late").asked == "submit"
    stop(run, ["late", "mix"])
    assert [request.adapter for request in Inbox(folder).take()] == ["late", "late", "mix"]
    put_stops(folder, "qa")
    assert find_stoppable(read_run(folder), "qa").asked == "stop"
