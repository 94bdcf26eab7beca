"""A folder of adapters on one base: who is in memory, what is saved, what is refused."""

import datetime
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import fuse, random_run, randomize, tiny_model
from managed import SIZES, answer, bytes_of, loaded, manager_of
from torch import Tensor

from moe_peft import AdapterManager, LoraConfig, MixLoraConfig, VeraConfig, load_adapter
from moe_peft.adapters import METHODS
from moe_peft.manager.folder import AdapterFolder
from moe_peft.manager.footprint import digest_of, footprint_of, tensors_of


def test_what_leaves_memory_is_the_least_recently_used(folder: Path) -> None:
    manager = manager_of(folder, ranks=6)
    for name in "abc":
        manager.load(name)
    assert loaded(manager) == "abc"
    manager.load("a")  # used again
    manager.load("d")  # of 4 ranks: b and c must go
    assert loaded(manager) == "ad"
    manager.load("b")  # of 2, beside a and d: 7, so the older one of them goes
    assert loaded(manager) == "bd"


def test_the_active_one_leaves_last(folder: Path) -> None:
    manager = manager_of(folder, ranks=5)
    manager.switch("a")
    manager.load("b")
    manager.load("c")  # a is the oldest, but the active one
    assert (loaded(manager), manager.active) == ("ac", "a")
    manager.load("d")  # 4 beside 1
    assert loaded(manager) == "ad"
    budget_of_one = manager_of(folder, ranks=4)
    budget_of_one.switch("b")
    budget_of_one.load("d")
    assert (loaded(budget_of_one), budget_of_one.active) == ("d", "b")
    with budget_of_one.using() as model:  # it comes back on use
        assert model.adapter_names == ["b"]


def test_outputs_are_those_of_a_model_that_holds_all(folder: Path, truth: dict[str, Tensor]) -> None:
    manager = manager_of(folder, ranks=4)
    for name in "abcdacbdda":
        with manager.using(name) as model:
            assert torch.equal(answer(model, name), truth[name])
    with manager.using("a", "c") as model:
        batch = fuse(*(random_run(name, [5, 3], seed=7) for name in "ac"), with_labels=False)
        with torch.inference_mode():
            for name, output in zip("ac", model(batch), strict=True):
                assert torch.allclose(output.logits, truth[name], rtol=1e-5, atol=1e-6)


def test_the_size_in_memory_is_known_before_loading(folder: Path) -> None:
    manager = manager_of(folder)
    for name, rank in SIZES.items():
        assert manager._residents.on_disk(name)[1].num_bytes == bytes_of(rank)
        manager.load(name)
        assert footprint_of(manager.model, name).num_bytes == bytes_of(rank)


def test_what_adapters_share_counts_once(tmp_path: Path) -> None:
    """VeRA's pair, [R, 38] and [38, R], beside vectors on every projection of two layers: float32, by hand."""
    rank = 64
    pair, own = 4 * 2 * rank * 38, 4 * 2 * sum(out + rank for out in (24, 12, 12, 24, 38, 38, 24))
    manager = AdapterManager(tiny_model(), tmp_path, memory_budget=pair + 3 * own)
    for name in "abcd":
        manager.add(name, VeraConfig(r=rank))
    assert loaded(manager) == "bcd"
    with manager.using("a", "b", "c"):
        assert loaded(manager) == "abc"
    with manager.using("d"):
        manager.load("a")
        no_room = rf"\({pair + 3 * own} bytes\) beside the adapters in use \({pair + own} bytes\)"
        with pytest.raises(ValueError, match=no_room), manager.using("a", "b", "c"):
            pass
    manager.add("e", VeraConfig(r=rank, projection_prng_key=1))  # with a pair of its own
    assert loaded(manager) == "e"
    assert footprint_of(manager.model, "e").num_bytes == pair + own
    with pytest.raises(ValueError, match=rf"a, e together take {2 * (pair + own)} bytes"), manager.using("a", "e"):
        pass


@pytest.mark.parametrize("method", METHODS)
def test_what_is_loaded_in_inference_mode_can_be_trained(tmp_path: Path, method: str) -> None:
    manager = manager_of(tmp_path)
    with torch.inference_mode():
        manager.add("x", METHODS[method]())
        assert not any(tensor.is_inference() for tensor in tensors_of(manager.model, "x").values())
    manager.unload("x")
    with torch.inference_mode(), manager.using("x") as model:
        assert not any(tensor.is_inference() for tensor in tensors_of(model, "x").values())
        answer(model, "x")
    batch = fuse(random_run("x", [5, 3], seed=7), with_labels=False)
    (output,) = manager.model(batch)
    output.logits.sum().backward()
    assert any(weight.grad is not None for weight in manager.model.adapter_parameters("x"))


@pytest.mark.parametrize("by", ["state", "data", "optimizer"])
def test_unsaved_changes_are_saved_before_an_adapter_leaves(folder: Path, by: str) -> None:
    manager = manager_of(folder, ranks=4)
    with manager.using("a") as model:
        weights = model.adapter_parameters("a")
        if by == "state":
            randomize(model.adapter_state("a"), seed=99)
        elif by == "data":
            weights[0].data.add_(1.0)  # which torch's version counters do not tell of
        else:
            for weight in weights:
                weight.grad = torch.ones_like(weight)
            torch.optim.AdamW(weights, fused=True).step()
        expected = {key: tensor.clone() for key, tensor in model.adapter_state("a").items()}
    before = (folder / "a" / "adapter_model.safetensors").read_bytes()
    manager.load("d")
    assert loaded(manager) == "d"
    assert (folder / "a" / "adapter_model.safetensors").read_bytes() != before
    with manager.using("a") as model:
        for key, tensor in model.adapter_state("a").items():
            assert torch.equal(tensor, expected[key]), key


def test_what_has_not_changed_is_not_written(folder: Path) -> None:
    manager = manager_of(folder, ranks=4)
    before = AdapterFolder(folder).identity("a")
    manager.load("a")
    manager.load("d")
    manager.save()
    assert AdapterFolder(folder).identity("a") == before


def test_saving_without_a_name_saves_what_has_changed(folder: Path) -> None:
    manager, identities = manager_of(folder), {}
    for name in "abc":
        manager.load(name)
        identities[name] = AdapterFolder(folder).identity(name)
    randomize(manager.model.adapter_state("b"), seed=3)
    manager.save()
    changed = [name for name in "abc" if AdapterFolder(folder).identity(name) != identities[name]]
    assert changed == ["b"]
    manager.save("c")
    assert AdapterFolder(folder).identity("c") != identities["c"]
    manager.save("d")  # not in memory, so there is nothing to write


def test_an_eviction_that_cannot_be_saved_does_not_happen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = manager_of(folder, ranks=4)
    manager.load("a")
    randomize(manager.model.adapter_state("a"), seed=3)
    changed = digest_of(manager.model, "a")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("moe_peft.manager.folder.save_adapter", full)
        patch.setattr("moe_peft.manager.folder._ATTEMPTS", 1)
        with pytest.raises(OSError, match="No space"):
            manager.load("d")
    assert digest_of(manager.model, "a") == changed
    manager.load("d")
    manager.load("a")
    assert digest_of(manager.model, "a") == changed


def test_adding_saves_at_once(tmp_path: Path) -> None:
    manager = AdapterManager(tiny_model(), tmp_path / "new" / "adapters")
    assert manager.list() == []
    assert manager.add("qa", LoraConfig(r=2), seed=5) is None
    manager.add("mix", MixLoraConfig(num_experts=2), seed=5)
    fresh = tiny_model()
    fresh.add_adapter("qa", LoraConfig(r=2), seed=5)
    load_adapter(fresh, tmp_path / "new" / "adapters" / "qa", "read")
    for one, other in zip(fresh.adapter_parameters("qa"), fresh.adapter_parameters("read"), strict=True):
        assert torch.equal(one, other)
    mix, qa = manager.list()
    assert (qa.name, qa.method, qa.num_parameters, qa.is_loaded) == ("qa", "lora", bytes_of(2) // 4, True)
    assert (mix.method, mix.num_bytes) == (
        "mixlora",
        sum(f.stat().st_size for f in (manager.folder.path / "mix").iterdir()),
    )
    assert isinstance(qa.last_used, datetime.datetime)
    assert (qa.is_active, qa.num_users, qa.megabytes) == (False, 0, qa.num_bytes / 1e6)


def test_deleting(folder: Path) -> None:
    manager = manager_of(folder)
    manager.switch("a")
    with manager.using(), manager.using("b"):
        for name in "ab":
            with pytest.raises(ValueError, match=f"adapter '{name}' cannot be deleted: it is in use in 1 place"):
                manager.delete(name)
        with pytest.raises(ValueError, match="'a' cannot leave memory: it is in use"):
            manager.unload("a")
    manager.delete("a")
    manager.delete("c")  # which is not in memory
    assert manager.active is None
    assert [info.name for info in manager.list()] == ["b", "d"] == sorted(path.name for path in folder.iterdir())
    assert manager.model.adapter_names == ["b"]
    with pytest.raises(ValueError, match="no adapter is active"), manager.using():
        pass


BAD_BUDGETS = [0, -1, True, float("nan"), float("inf"), 1.5, "64MB"]


@pytest.mark.parametrize("budget", BAD_BUDGETS)
def test_bad_budgets(tmp_path: Path, budget: Any) -> None:
    with pytest.raises(ValueError, match=f"memory_budget={budget!r} must be at least 1 byte, or None"):
        AdapterManager(tiny_model(), tmp_path, memory_budget=budget)


def test_a_budget_too_small_for_an_adapter(folder: Path) -> None:
    manager = manager_of(folder, ranks=3)
    too_small = rf"memory_budget={bytes_of(3)} is too small: adapter 'd' takes {bytes_of(4)} bytes in memory"
    manager.load("c")
    with pytest.raises(ValueError, match=too_small):
        manager.load("d")
    with pytest.raises(ValueError, match=too_small), manager.using("d"):
        pass
    manager.switch("c")
    with pytest.raises(ValueError, match=too_small):
        manager.switch("d")
    assert (manager.active, loaded(manager)) == ("c", "c")  # nobody has left for what cannot be
    with pytest.raises(ValueError, match=f"a, c together take {bytes_of(4)} bytes"), manager.using("a", "c"):
        pass
    with pytest.raises(ValueError, match=f"adapter 'e' takes {bytes_of(8)} bytes"):
        manager.add("e", LoraConfig())
    assert "e" not in manager.folder


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a", "name='a' is taken: .* holds an adapter"),
        ("A", "name='A' is taken: .* holds an adapter"),
        ("notes", "name='notes' is taken: .* holds something else"),
        ("a b", "name='a b' must be 1 to 100 letters"),
        ("..", "must be 1 to 100 letters"),
        ("", "must be 1 to 100 letters"),
        ("x" * 101, "must be 1 to 100 letters"),
    ],
)
def test_bad_names(folder: Path, name: str, message: str) -> None:
    (folder / "notes").mkdir()
    manager = manager_of(folder)
    with pytest.raises(ValueError, match=message):
        manager.add(name, LoraConfig())
    assert manager.model.adapter_names == []


def test_unknown_names(folder: Path) -> None:
    (folder / "notes").mkdir()
    manager = manager_of(folder)
    for action in (manager.load, manager.switch, manager.save, manager.delete, manager.unload):
        with pytest.raises(ValueError, match=r"'nodes' is no adapter of the folder .*; valid here: a, b, c, d"):
            action("nodes")
    with pytest.raises(ValueError, match=r"'notes' is no adapter of the folder .*: it has no adapter_config\.json"):
        manager.load("notes")
    with pytest.raises(ValueError, match="it holds none yet"):
        AdapterManager(tiny_model(), folder / "notes").load("a")


@pytest.mark.parametrize("name", [None, 5, ["a"], b"a"])
@pytest.mark.parametrize("action", ["load", "save", "switch", "unload", "delete", "using"])
def test_what_is_no_name_at_all(folder: Path, action: str, name: Any) -> None:
    manager = manager_of(folder)
    manager.load("a")
    if name is None and action in ("save", "switch"):
        return  # all of them, and none
    with ExitStack() as stack, pytest.raises(ValueError, match=re.escape(f"name={name!r} must be 1 to 100 letters")):
        if action == "using":
            stack.enter_context(manager.using(name))
        else:
            getattr(manager, action)(name)
    assert manager.model.adapter_names == ["a"]


def test_a_manager_needs_a_model_and_a_seed(folder: Path) -> None:
    with pytest.raises(ValueError, match="model=None must be a loaded base model"):
        AdapterManager(None, folder)  # type: ignore[arg-type]
    manager = manager_of(folder)
    for seed in (float("nan"), None, "x", -1, 2**70):
        with pytest.raises(ValueError, match=f"seed={seed!r} must be"):
            manager.add("e", LoraConfig(), seed=seed)  # type: ignore[arg-type]
    assert sorted(path.name for path in folder.iterdir()) == list("abcd")


def test_what_does_not_fit_is_not_added(folder: Path) -> None:
    manager = manager_of(folder)
    with pytest.raises(ValueError, match=r"lr=0\.1 is a setting of training, but there is no data"):
        manager.add("e", LoraConfig(), lr=0.1)
    with pytest.raises(ValueError, match="'lora' is not the config of a method"):
        manager.add("e", "lora")
    assert sorted(path.name for path in folder.iterdir()) == list("abcd")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_config.json", "holds a single adapter, not adapters by name: give the folder around it"),
        ("config.json", "holds a base model, not adapters by name: give a folder of its own"),
        ("config.yaml", "holds a training run, not adapters by name: give its folder .*adapters"),
    ],
)
def test_foreign_folders(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=message):
        AdapterManager(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="must be a folder, not a file"):
        AdapterManager(tiny_model(), tmp_path / file)


def test_damaged_adapters_are_left_out_and_named(folder: Path) -> None:
    """The others are listed and used; a damaged one is refused by itself, and deleted."""
    manager = manager_of(folder, ranks=6)
    manager.add("high", LoraConfig(r=1, layers_to_transform=[1]))
    config = folder / "high" / "adapter_config.json"
    config.write_text(config.read_text().replace('"layers_to_transform": [\n    1', '"layers_to_transform": [\n    7'))
    manager.unload("high")
    (folder / "b" / "adapter_config.json").write_text("{")
    weights = folder / "c" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (folder / "d" / "adapter_model.safetensors").unlink()
    fresh = manager_of(folder, ranks=6)
    assert [info.name for info in fresh.list()] == ["a"]
    reasons = {"b": "not valid JSON", "c": "truncated or corrupted", "d": "has no adapter_model", "high": "7"}
    assert fresh.foreign().keys() == reasons.keys()
    assert fresh.folder.foreign() == {name: fresh.foreign()[name] for name in "bcd"}  # the files alone fit no base
    for name, reason in reasons.items():
        assert reason in fresh.foreign()[name]
        with pytest.raises(ValueError, match=reason):
            fresh.load(name)
        fresh.delete(name)
    fresh.load("a")
    assert (loaded(fresh), fresh.foreign()) == ("a", {})


def test_what_is_no_adapter_is_ignored_and_named(folder: Path) -> None:
    (folder / "notes.txt").write_text("")
    (folder / "empty").mkdir()
    (folder / "my adapter").mkdir()
    (folder / ".a.0123.partial").mkdir()  # what a killed process was writing
    manager = manager_of(folder)
    assert [info.name for info in manager.list()] == list("abcd")
    assert (folder / ".a.0123.partial").exists()  # another process may be writing it still
    assert (
        manager.folder.foreign()
        == manager.foreign()
        == {
            "notes.txt": "it is a file",
            "empty": "it has no adapter_config.json",
            "my adapter": "an adapter's name is 1 to 100 letters, digits, _ or -",
        }
    )
