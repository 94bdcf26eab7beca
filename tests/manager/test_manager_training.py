"""Adding an adapter that learns from data: on the base that is loaded, as a run of its own would train it."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import randomize
from safetensors.torch import load_file
from tiny_run import adapter_entry, instructions, make_base_folder, run_config, train, write_jsonl

from moe_peft import (
    AdapterManager,
    AdaptiveLoraConfig,
    LlamaForCausalLM,
    LoraConfig,
    MixLoraConfig,
    Trainer,
    load_base_model,
    load_tokenizer,
)
from moe_peft.generation import generate
from moe_peft.manager.folder import TRAINING
from moe_peft.training.errors import UnfinishedError
from moe_peft.training.folder.run_folder import RunFolder
from moe_peft.training.folder.run_lock import RunLock
from moe_peft.training.fused_run import FusedRun


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model."""
    return make_base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def manager(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterManager:
    """An empty manager on it; from here on, nothing loads a base model or draws a picture."""
    model, tokenizer = load_base_model(base, device="cpu"), load_tokenizer(base)
    monkeypatch.setattr(RunFolder, "draw", lambda self, runs: None)
    for place in ("moe_peft.training.trainer.load_base_model", "moe_peft.training.trainer.load_tokenizer"):
        monkeypatch.setattr(place, lambda *_, **__: pytest.fail("the base is loaded already"))
    return AdapterManager(model, tmp_path / "adapters", tokenizer=tokenizer)


def settings(base: Path, **changes: Any) -> dict[str, Any]:
    """Of a training that takes a moment."""
    fields = {"template": str(base / "short.yaml"), "batch_size": 4, "max_steps": 3, "lr": 1e-2, "cutoff_len": 128}
    return {**fields, **changes}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in an adapter's folder."""
    return load_file(folder / "adapter_model.safetensors")


def test_generations_from_many_threads_while_adapters_come_and_go(manager: AdapterManager, tmp_path: Path) -> None:
    """The answers of a manager that holds all, out of one whose budget holds two of four adapters."""
    names = ["a", "b", "c", "d"]
    for seed, name in enumerate(names):
        manager.add(name, LoraConfig(r=2))
        randomize(manager.model.adapter_state(name), seed, std=0.5)
    manager.save()

    def ask(model: LlamaForCausalLM, name: str) -> str:
        return generate(model, manager.tokenizer, ["Repeat 3: "], adapter_names=name, max_new_tokens=6)[0]

    expected = {name: ask(manager.model, name) for name in names}
    assert len(set(expected.values())) > 2
    for name in names:
        manager.unload(name)
    size = manager._residents.on_disk("a")[1].num_bytes
    small = AdapterManager(manager.model, manager.folder.path, memory_budget=2 * size, tokenizer=manager.tokenizer)
    found: list[tuple[str, str]] = []

    def user(shift: int) -> None:
        for i in range(8):
            name = names[(i * 3 + shift) % 4]
            with small.using(name) as model:
                found.append((name, ask(model, name)))
                assert len(model.adapter_names) <= 2

    threads = [threading.Thread(target=user, args=(shift,), daemon=True) for shift in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 32  # no thread has failed, nor waits for ever
    assert all(text == expected[name] for name, text in found)


@pytest.mark.parametrize("as_records", [True, False])
def test_it_learns_what_a_run_of_its_own_learns(base: Path, tmp_path: Path, as_records: bool, request: Any) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", instructions(10))
    train(run_config(base, tmp_path / "run", adapter_entry("qa", data, r=4), seed=3))
    manager = request.getfixturevalue("manager")
    manager.add("old", LoraConfig(r=2))
    manager.switch("old")
    config = LoraConfig(r=4)
    result = manager.add("qa", config, instructions(10) if as_records else data, seed=3, **settings(base))
    assert (result.state, result.num_steps, result.saved_to) == ("done", 3, manager.folder.path / "qa")
    expected, found = weights_of(tmp_path / "run" / "adapters" / "qa"), weights_of(result.saved_to)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    assert (manager.active, manager.model.adapter_names) == ("old", ["old"])
    assert not manager.model.training
    assert manager.model.activation_checkpointing_ == "none"
    assert sorted(path.name for path in manager.folder.path.iterdir()) == ["old", "qa"]
    with manager.using("qa") as model:
        assert model.adapter_config("qa").r == config.r


def test_it_has_the_base_to_itself(base: Path, manager: AdapterManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for whoever uses an adapter, and whoever wants one then waits for it."""
    manager.add("a", LoraConfig(r=2))
    events: list[str] = []
    in_use, may_end, has_begun = threading.Event(), threading.Event(), threading.Event()
    take_step = FusedRun.take_step

    def step(self: FusedRun, micro_batches: Any) -> Any:
        events.append("step")
        has_begun.set()
        return take_step(self, micro_batches)

    monkeypatch.setattr(FusedRun, "take_step", step)

    def use() -> None:
        with manager.using("a"):
            in_use.set()
            assert may_end.wait(30)
            events.append("first use ends")
        assert has_begun.wait(30)
        with manager.using("a") as model:
            events.append("second use")
            assert not model.training

    user = threading.Thread(target=use, daemon=True)
    user.start()
    assert in_use.wait(30)
    threading.Timer(0.2, may_end.set).start()
    manager.add("qa", MixLoraConfig(num_experts=2, r=2), instructions(6), **settings(base))
    user.join(30)
    assert events == ["first use ends", "step", "step", "step", "second use"]


def test_an_interrupted_training_goes_on(
    base: Path, manager: AdapterManager, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", instructions(10))
    twin = AdapterManager(manager.model, tmp_path / "twin", tokenizer=manager.tokenizer)
    twin.add("qa", LoraConfig(r=4), data, save_steps=1, **settings(base))
    steps: list[int] = []
    take_step = FusedRun.take_step

    def interrupted(self: FusedRun, micro_batches: Any) -> Any:
        if self.fused_step == 2:
            raise KeyboardInterrupt
        steps.append(self.fused_step)
        return take_step(self, micro_batches)

    with monkeypatch.context() as patch:
        patch.setattr(FusedRun, "take_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            manager.add("qa", LoraConfig(r=4), data, save_steps=1, **settings(base))
    assert manager.list() == []
    assert manager.model.adapter_names == []
    assert not manager.model.training
    monkeypatch.setattr(
        FusedRun, "take_step", lambda self, parts: (steps.append(self.fused_step), take_step(self, parts))[1]
    )
    manager.add("qa", LoraConfig(r=4), data, save_steps=1, **settings(base))
    assert steps == [0, 1, 2]
    expected = weights_of(tmp_path / "twin" / "qa")
    for key, tensor in weights_of(manager.folder.path / "qa").items():
        assert torch.equal(tensor, expected[key]), key
    assert not (manager.folder.path / TRAINING).exists()


def interrupt_at(step: int) -> Any:
    """A ``take_step`` that ends before that one."""
    take_step = FusedRun.take_step

    def interrupted(self: FusedRun, micro_batches: Any) -> Any:
        if self.fused_step == step:
            raise KeyboardInterrupt
        return take_step(self, micro_batches)

    return interrupted


def test_a_training_that_fails_adds_nothing(base: Path, manager: AdapterManager) -> None:
    """Nor does it keep its name from being trained otherwise."""
    head = manager.model.lm_head_.weight
    values = head.data.clone()
    head.data.fill_(torch.nan)
    with pytest.raises(UnfinishedError, match="adapter 'qa': failed"):
        manager.add("qa", LoraConfig(r=2), instructions(6), **settings(base))
    assert manager.list() == []
    assert manager.model.adapter_names == []
    assert not (manager.folder.path / TRAINING).exists()
    head.data.copy_(values)
    assert manager.add("qa", LoraConfig(r=2), instructions(6), **settings(base, lr=1e-3)).state == "done"


@pytest.mark.parametrize("by", ["settings", "data"])
def test_an_interrupted_training_goes_on_as_it_was_or_is_deleted(
    base: Path, manager: AdapterManager, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(FusedRun, "take_step", interrupt_at(2))
        with pytest.raises(KeyboardInterrupt):
            manager.add("qa", LoraConfig(r=2), instructions(6), save_steps=1, **settings(base))
    if by == "settings":
        data, changes = instructions(6), settings(base, lr=1e-3)
        message = r"adapter 'qa' has an interrupted training of other settings, lr=0\.001 \(the run has 0\.01\)"
    else:
        data, changes = instructions(7), settings(base)
        message = "adapter 'qa' has an interrupted training, which cannot go on: its data, .* has changed"
    way_out = r": add it as it was to go on, or delete\('qa'\) to begin anew"
    with pytest.raises(ValueError, match=message + ".*" + way_out) as refusal:
        manager.add("qa", LoraConfig(r=2), data, save_steps=1, **changes)
    assert "output_dir" not in str(refusal.value)
    with RunLock(manager.folder.workplace("qa") / "run"):  # as another process holds it
        for action in (lambda: manager.delete("qa"), lambda: manager.add("qa", LoraConfig(r=2), data, **changes)):
            with pytest.raises(ValueError, match="adapter 'qa' is being trained by process"):
                action()
    manager.delete("qa")
    assert not (manager.folder.path / TRAINING).exists()
    assert manager.add("qa", LoraConfig(r=2), data, **changes).state == "done"
    with pytest.raises(ValueError, match=r"name='\.\.' must be 1 to 100 letters"):
        manager.delete("..")


def test_what_stops_before_its_first_checkpoint_keeps_no_name(
    base: Path, manager: AdapterManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(FusedRun, "take_step", interrupt_at(0))
        patch.setattr(
            "moe_peft.manager.manager.can_go_on", lambda place: True
        )  # as if it were killed: nobody tidies up
        with pytest.raises(KeyboardInterrupt):
            manager.add("qa", LoraConfig(r=2), instructions(6), **settings(base))
    assert (manager.folder.workplace("qa") / "run" / "config.yaml").is_file()
    manager.add("qa", LoraConfig(r=2), instructions(6), **settings(base, lr=1e-3))
    assert "qa" in manager.folder


def test_an_adapter_that_grows_over_the_budget_waits_for_a_larger_one(
    base: Path, manager: AdapterManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins with rank 1 and ends with rank 4."""
    config = AdaptiveLoraConfig(r=1, max_rank=4, grow_every=1, grow_share=1.0)
    arguments = {"name": "qa", "config": config, "data": instructions(6), **settings(base)}
    measured = AdapterManager(manager.model, manager.folder.path / "twin", tokenizer=manager.tokenizer)
    measured.add(**arguments)
    grown = measured._residents.on_disk("qa")[1].num_bytes
    expected = weights_of(measured.folder.path / "qa")
    folder = manager.folder.path / "own"
    small = AdapterManager(manager.model, folder, memory_budget=grown - 1, tokenizer=manager.tokenizer)
    for _ in range(2):  # once trained, and once found trained
        with pytest.raises(
            ValueError,
            match=rf"memory_budget={grown - 1} is too small: adapter 'qa' takes {grown} .* trained\. It lies in",
        ):
            small.add(**arguments)
        assert small.list() == []
    large = AdapterManager(manager.model, folder, memory_budget=grown, tokenizer=manager.tokenizer)
    monkeypatch.setattr(FusedRun, "take_step", lambda *_: pytest.fail("it is trained already"))
    assert large.add(**arguments).saved_to == folder / "qa"
    large.load("qa")
    for key, tensor in weights_of(folder / "qa").items():
        assert torch.equal(tensor, expected[key]), key


def test_a_training_leaves_torch_its_threads(
    base: Path, manager: AdapterManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, within = torch.get_num_threads(), []
    take_step = FusedRun.take_step
    monkeypatch.setattr(
        FusedRun, "take_step", lambda self, parts: (within.append(torch.get_num_threads()), take_step(self, parts))[1]
    )
    with torch.inference_mode():  # which a training does not inherit
        manager.add("qa", LoraConfig(r=2), instructions(6), num_threads=before + 1, **settings(base))
    assert set(within) == {before + 1}
    assert torch.get_num_threads() == before


def test_generations_side_by_side_on_a_model_that_was_in_training_mode(manager: AdapterManager, tmp_path: Path) -> None:
    """The one that began first ends first, and leaves the other's model in evaluation mode."""
    model = AdapterManager(manager.model.train(), tmp_path / "own", tokenizer=manager.tokenizer).model
    second_runs, first_has_ended = threading.Event(), threading.Event()
    modes: list[bool] = []

    def second() -> None:
        def look(_index: int, _piece: str) -> None:
            second_runs.set()
            assert first_has_ended.wait(30)
            modes.append(model.training)

        generate(model, manager.tokenizer, ["Repeat 3: "], max_new_tokens=8, on_text=look)

    thread = threading.Thread(target=second, daemon=True)

    def first_piece(_index: int, _piece: str) -> None:
        if not thread.is_alive():
            thread.start()
        assert second_runs.wait(30)

    generate(model, manager.tokenizer, ["Repeat 4: "], max_new_tokens=8, on_text=first_piece)
    first_has_ended.set()
    thread.join(30)
    assert modes
    assert not any(modes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1.0}, "learning_rate=1.0 is not a known key"),
        ({"max_step": 1}, "max_step=1 is not a known key; did you mean 'max_steps'"),
        ({"lr": -1.0}, "lr=-1.0 must be above 0"),
        ({"max_steps": 0}, "max_steps=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be in 0"),
        ({"max_batch_tokens": 0}, "max_batch_tokens=0 must be at least 1"),
        ({"template": "nowhere.yaml"}, "nowhere.yaml"),
        ({"data": []}, "data.jsonl"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"data": [1]}, "data must be a file or a list of records, each a mapping"),
        ({"name": "a"}, "name='a' is taken"),
    ],
)
def test_bad_settings(base: Path, manager: AdapterManager, changes: dict[str, Any], message: str) -> None:
    manager.add("a", LoraConfig(r=2))
    arguments = {"name": "qa", "config": LoraConfig(r=2), "data": instructions(6), **settings(base), **changes}
    with pytest.raises(ValueError, match=message):
        manager.add(**arguments)
    assert [info.name for info in manager.list()] == ["a"]
    assert manager.model.adapter_names == ["a"]
    assert not (manager.folder.path / TRAINING).exists()


def test_training_needs_a_tokenizer_and_an_idle_thread(base: Path, manager: AdapterManager, tmp_path: Path) -> None:
    plain = AdapterManager(manager.model, tmp_path / "plain")
    with pytest.raises(ValueError, match="tokenizer=None: training needs the base model's"):
        plain.add("qa", LoraConfig(r=2), instructions(6))
    manager.add("a", LoraConfig(r=2))
    with manager.using("a"), pytest.raises(ValueError, match="but this thread uses 'a'"):
        manager.add("qa", LoraConfig(r=2), instructions(6), **settings(base))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype='bfloat16' is not that of the base model, which is loaded in float32"),
        ({"device": "cuda"}, "device='cuda' is not that of the base model, which lies on cpu"),
    ],
)
def test_a_trainer_refuses_a_base_that_is_not_the_configs(
    base: Path, manager: AdapterManager, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", instructions(6))
    config = run_config(base, tmp_path / "run", adapter_entry("qa", data), **changes)
    with pytest.raises(ValueError, match=message):
        Trainer(config, model=manager.model, tokenizer=manager.tokenizer)
