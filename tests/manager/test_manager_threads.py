"""Nobody loses an adapter in use, whatever other threads and other processes do."""

import threading
from pathlib import Path

import pytest
import torch
from builders import add_random_adapter, tiny_model
from managed import SIZES, answer, bytes_of, loaded, manager_of, run_threads
from torch import Tensor

from moe_peft import AdapterManager, LoraConfig


def test_nothing_is_pulled_from_under_a_running_use(folder: Path, truth: dict[str, Tensor]) -> None:
    """A use of d fills the budget: who wants another one waits for its end; a switch to what is there does not."""
    manager = manager_of(folder, ranks=5)
    seen: list[str] = []
    in_use, may_end = threading.Event(), threading.Event()

    def first() -> None:
        with manager.using("d") as model:
            in_use.set()
            assert may_end.wait(30)
            assert torch.equal(answer(model, "d"), truth["d"])
            seen.append("d ends")

    def second() -> None:
        assert in_use.wait(30)
        manager.switch("a")  # has room beside d
        seen.append("a is active")
        threading.Timer(0.2, may_end.set).start()
        with manager.using("c") as model:
            seen.append("c begins")
            assert torch.equal(answer(model, "c"), truth["c"])

    run_threads(first, second)
    assert seen == ["a is active", "d ends", "c begins"]


def test_hammering_from_many_threads(folder: Path, truth: dict[str, Tensor]) -> None:
    """Six threads use, switch, change nothing and list, over a budget that holds one to three adapters."""
    manager = manager_of(folder, ranks=5)
    evictions: list[str] = []
    evict = manager._residents.evict
    manager._residents.evict = lambda name: (evictions.append(name), evict(name))

    def user(seed: int) -> None:
        names = [list(SIZES)[int(i)] for i in torch.randint(4, (40,), generator=torch.Generator().manual_seed(seed))]
        for i, name in enumerate(names):
            if i % 5 == 4:
                manager.switch(name)
                with manager.using() as model:  # whichever it is by now
                    pass
                continue
            with manager.using(name) as model:
                assert torch.equal(answer(model, name), truth[name]), name
            if i % 7 == 0:
                assert [info.name for info in manager.list()] == list(SIZES)

    run_threads(*(lambda seed=seed: user(seed) for seed in range(6)))
    assert len(evictions) > 20
    assert sum(bytes_of(SIZES[name]) for name in loaded(manager)) <= bytes_of(5)
    assert not manager._residents.any_in_use()


def test_two_managers_on_one_folder_never_see_half_an_adapter(tmp_path: Path) -> None:
    """Two models, as in two processes: one writes adapters of two ranks in turn, the other reads them all the while.

    Factors and scaling of one writing belong together: of rank r, every value and lora_alpha are r.
    """
    done = threading.Event()
    writer, reader = (AdapterManager(tiny_model(), tmp_path) for _ in range(2))
    ranks_read: set[int] = set()

    def fill(rank: int) -> None:
        writer.model.add_adapter("x", LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj"]))
        for tensor in writer.model.adapter_state("x").values():
            tensor.fill_(rank)
        writer.folder.save(writer.model, "x")
        writer.model.remove_adapter("x")

    def write() -> None:
        try:
            for i in range(60):
                fill(1 + i % 2)
        finally:
            done.set()

    def read() -> None:
        while not done.is_set():
            reader.load("x")
            config = reader.model.adapter_config("x")
            assert config.lora_alpha == config.r
            for tensor in reader.model.adapter_state("x").values():
                assert (tensor == config.r).all()
            ranks_read.add(config.r)
            reader.unload("x")

    fill(1)
    run_threads(write, read)
    assert ranks_read == {1, 2}


def test_two_managers_that_write_one_name(tmp_path: Path) -> None:
    """The last one wins, and no trace of the other stays."""
    managers = [AdapterManager(tiny_model(), tmp_path) for _ in range(2)]
    for rank, manager in enumerate(managers, start=1):
        manager.model.add_adapter("x", LoraConfig(r=rank))

    def write(manager: AdapterManager) -> None:
        for _ in range(20):
            manager.folder.save(manager.model, "x")

    run_threads(*(lambda manager=manager: write(manager) for manager in managers))
    managers[1].folder.save(managers[1].model, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert managers[0].folder.config("x").r == 2


def test_an_adapter_that_another_process_deletes(folder: Path) -> None:
    manager, other = manager_of(folder), manager_of(folder)
    manager.load("a")
    other.delete("a")
    other.delete("b")
    assert [info.name for info in manager.list()] == ["c", "d"]
    with pytest.raises(ValueError, match="'b' is no adapter of the folder"):
        manager.load("b")
    manager.save("a")  # it is still in memory
    assert "a" in manager.folder


def test_an_adapter_that_the_user_takes_off_the_model(folder: Path) -> None:
    manager = manager_of(folder, ranks=4)
    manager.load("a")
    manager.model.remove_adapter("a")
    assert loaded(manager) == ""
    manager.load("d")
    assert loaded(manager) == "d"


def test_a_thread_that_uses_adapters_does_not_wait_for_others(folder: Path) -> None:
    manager = manager_of(folder, ranks=4)
    with (
        manager.using("b"),
        pytest.raises(ValueError, match=r"memory_budget=\d+ leaves no room for d .* by this very thread \(b\)"),
        manager.using("d"),
    ):
        pass
    with manager.using("b"), manager.using("a"), manager.using("b"):
        assert loaded(manager) == "ab"


@pytest.mark.parametrize("change", ["add", "remove"])
def test_a_walk_through_the_model_goes_on_while_adapters_come_and_go(change: str) -> None:
    """As a generation in one thread walks over all modules while another thread attaches or evicts an adapter."""
    model = tiny_model()
    for name in ("kept", "other"):
        add_random_adapter(model, name, LoraConfig(r=1))
    first = model.decoder_layers[0].self_attn.q_proj.loras_["kept"]
    seen = []
    for module in model.modules():
        seen.append(module)
        if module is first and change == "add":
            model.add_adapter("new", LoraConfig(r=1))
        elif module is first:
            model.remove_adapter("other")
    assert model.decoder_layers[-1].mlp.down_proj.loras_["kept"] in seen
