"""A folder of adapters on one base: who is in memory, what is saved, what is refused."""

import datetime
from pathlib import Path

import pytest
import torch
from builders import fuse, random_run, randomize, tiny_model
from managed import SIZES, answer, bytes_of, loaded, manager_of
from torch import Tensor

from moe_peft import AdapterManager, LoraConfig, MixLoraConfig, load_adapter
from moe_peft.manager.folder import AdapterFolder
from moe_peft.manager.footprint import digest_of, footprint_of


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
        assert manager._residents.need(name) == bytes_of(rank)
        manager.load(name)
        assert footprint_of(manager.model, name).num_bytes == bytes_of(rank)


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


BAD_BUDGETS = [0, -1, True]


@pytest.mark.parametrize("budget", BAD_BUDGETS)
def test_bad_budgets(tmp_path: Path, budget: int) -> None:
    with pytest.raises(ValueError, match=f"memory_budget={budget} must be at least 1 byte, or None"):
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


def test_what_is_no_adapter_is_ignored_and_named(folder: Path) -> None:
    (folder / "notes.txt").write_text("")
    (folder / "empty").mkdir()
    (folder / "my adapter").mkdir()
    (folder / ".a.0123.partial").mkdir()  # what a killed process was writing
    manager = manager_of(folder)
    assert [info.name for info in manager.list()] == list("abcd")
    assert manager.folder.foreign() == {
        "notes.txt": "it is a file",
        "empty": "it has no adapter_config.json",
        "my adapter": "an adapter's name is 1 to 100 letters, digits, _ or -",
    }
