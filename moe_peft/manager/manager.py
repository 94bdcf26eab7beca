"""Named adapters on one loaded base model: added, switched between and put aside while others are in use."""

import dataclasses
import datetime
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_peft.adapters import Method
from moe_peft.config.job import method_of
from moe_peft.io.adapter_files import read_adapter_config
from moe_peft.manager.folder import AdapterFolder
from moe_peft.manager.residents import Residents
from moe_peft.manager.training import can_go_on, train_adapter
from moe_peft.model.draws import checked_seed
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.strict import show
from moe_peft.training.display.summary import AdapterResult
from moe_peft.training.errors import UnfinishedError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """One adapter of a manager.

    Args:
        name: of its folder.
        method: as the registry calls it.
        num_parameters: that are trained.
        num_bytes: of its files.
        is_loaded: whether it is in memory.
        is_active: whether it is the one that ``using()`` takes.
        num_users: how many use it at this moment.
        last_used: when this manager last loaded, switched to or used it; None: not yet.
    """

    name: str
    method: str
    num_parameters: int
    num_bytes: int
    is_loaded: bool
    is_active: bool
    num_users: int
    last_used: datetime.datetime | None

    @property
    def megabytes(self) -> float:
        """Its files' size."""
        return self.num_bytes / 1e6


Infos = list[AdapterInfo]  # inside the manager, `list` is its method


class AdapterManager:
    """A folder of adapters on one base model, of which as many as the budget allows are in memory.

    Any thread may call any method. What runs an adapter does so inside ``using``: no switch, eviction or deletion takes
    it away meanwhile. Otherwise the adapter that was least recently used leaves memory first, the active one last; it
    is saved before if it is not what was saved, and comes back when it is used.

    Args:
        model: the loaded base, which is put into evaluation mode: whoever generates would otherwise switch the modes of
            others who do. It may carry other adapters, which the manager leaves alone.
        folder: holds an adapter's folder a name, as ``save_adapter`` and PEFT write them; made when first needed.
        memory_budget: the most bytes that the adapters' weights take in memory; None: no limit. Training an adapter
            takes its own on top.
        tokenizer: of the base; only training asks for it, and methods that start from a text.

    Raises:
        ValueError: when the model is none, the folder holds something else, or the budget is no positive number of
            bytes.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        folder: str | Path,
        *,
        memory_budget: int | None = None,
        tokenizer: Any = None,
    ) -> None:
        if not isinstance(model, LlamaForCausalLM):
            raise ValueError(f"model={show(model)} must be a loaded base model, as load_base_model gives it")
        if memory_budget is not None:
            is_whole = isinstance(memory_budget, Integral) and not isinstance(memory_budget, bool)
            if not is_whole or memory_budget < 1:
                raise ValueError(
                    f"memory_budget={show(memory_budget)} must be at least 1 byte, or None, and a whole number"
                )
        self.model = model.eval()
        self.folder = AdapterFolder(folder)
        self.memory_budget = memory_budget
        self.tokenizer = tokenizer
        self._residents = Residents(model, self.folder, memory_budget, tokenizer)
        self._last_used: dict[str, float] = {}
        self._active: str | None = None
        self._in_training: str | None = None
        self._changed = threading.Condition()  # guards all of the above, and what is attached to the model

    @property
    def active(self) -> str | None:
        """The adapter that ``using()`` takes; None: none yet, or it was deleted."""
        return self._active

    def add(
        self,
        name: str,
        config: Method,
        data: str | Path | Sequence[Mapping[str, Any]] | None = None,
        *,
        seed: int = 0,
        console: "Console | None" = None,
        **settings: Any,
    ) -> AdapterResult | None:
        """Make a new adapter and save it: a fresh one, or one that learns from data before anybody sees it.

        Training has the base model to itself: it waits until nobody uses an adapter, and whoever wants one meanwhile
        waits for it. Interrupted, it goes on when the same adapter is added again.

        Args:
            name: letters, digits, ``_`` and ``-``; new to the folder, case aside.
            config: of the method.
            data: as ``data`` of a training config; or the records themselves. None: the adapter is not trained.
            seed: of its initial weights, and of the training.
            console: where the training reports; None: nowhere.
            settings: keys of an adapter's entry in a training config, such as ``lr`` or ``max_steps``; and of the run,
                such as ``max_batch_tokens``.

        Returns:
            How the training went; None without data.

        Raises:
            ValueError: on a bad or taken name, a config that does not fit, settings without data, bad data or settings,
                other ones than those of an interrupted training of that name (``delete`` removes it), training without
                a tokenizer, or an adapter larger than the budget, before training or behind it. Nothing is added then.
            UnfinishedError: when the training failed. Nothing is added then, and nothing of it stays.
        """
        if data is None and settings:
            key = next(iter(settings))
            raise ValueError(f"{key}={show(settings[key])} is a setting of training, but there is no data to train on")
        method_of(config)
        seed = checked_seed(seed)
        with self._changed:
            self._residents.check_fits(config)
            self._residents.check_size({name: config})
            if data is None:
                self.folder.check_free(name)
                self._wait_for_room({name: config})
                self.folder.check_free(name)  # another thread may have been faster
                self._attach_new(name, config, seed)
                return None
        with self._training(name):
            place = self.folder.workplace(name)
            self.folder.check_not_in_training(name)  # by another process
            try:
                result = train_adapter(
                    self.model, self.tokenizer, place, name, config, data, seed=seed, console=console, settings=settings
                )
            except BaseException as error:
                if isinstance(error, UnfinishedError) or not can_go_on(place):
                    with suppress(ValueError):  # another process trains there
                        self.folder.clear_workplace(name)
                raise
            assert result.saved_to is not None
            self._check_trained(name, result.saved_to)
            self.folder.take_over(result.saved_to, name)
        return dataclasses.replace(result, saved_to=self.folder.path / name)

    def _check_trained(self, name: str, trained: Path) -> None:
        """Refuses an adapter that has grown over the budget: it could never be loaded."""
        with self._changed:
            try:
                self._residents.check_size({name: read_adapter_config(trained)})
            except ValueError as error:
                raise ValueError(
                    f"{error}, now that it is trained. It lies in {trained}: added again as it was, a manager of a "
                    f"larger budget takes it over; delete({name!r}) removes it"
                ) from error

    def _attach_new(self, name: str, config: Method, seed: int) -> None:
        self.model.add_adapter(name, config, seed=seed, tokenizer=self.tokenizer)
        try:
            self.folder.save(self.model, name)
        except BaseException:
            self.model.remove_adapter(name)
            raise
        self._residents.take_in(name)
        self._last_used[name] = time.time()

    def save(self, name: str | None = None) -> None:
        """Write an adapter as it is in memory; without a name, all that are not what was saved.

        Raises:
            ValueError: when there is no adapter of that name. One that is not in memory is saved already.
        """
        with self._changed:
            if name is None:
                for other in self._residents:
                    if self._residents.is_changed(other):
                        self._residents.save(other)
                return
            self.folder.check_name(name)
            if self._residents.get(name) is None:
                self.folder.check_known(name)
            else:
                self._residents.save(name)

    def load(self, name: str) -> None:
        """Bring an adapter into memory; one that is there already stays as it is.

        Raises:
            ValueError: when there is none of that name, it does not fit the base, or it is larger than the budget.
        """
        with self._changed:
            self.folder.check_name(name)
            self._acquire([name])

    def unload(self, name: str) -> None:
        """Take an adapter out of memory, saved before if it is not what was saved; it stays in the folder.

        Raises:
            ValueError: when there is none of that name, or it is in use.
        """
        with self._changed:
            self.folder.check_name(name)
            if self._residents.get(name) is None:
                self.folder.check_known(name)
                return
            self._residents.check_unused(name, "leave memory")
            self._residents.evict(name)
            self._changed.notify_all()

    def switch(self, name: str | None) -> None:
        """Make an adapter the active one, in memory; None: none is. Whoever uses another goes on undisturbed.

        Raises:
            ValueError: as ``load``; the active one then stays what it was.
        """
        with self._changed:
            if name is not None:
                self.folder.check_name(name)
                self._acquire([name])
            self._active = name

    @contextmanager
    def using(self, *names: str) -> Iterator[LlamaForCausalLM]:
        """The model, on which these adapters stay until the block ends; without names, the active one.

        It waits where the budget leaves no room beside the adapters that other threads use.

        Raises:
            ValueError: as ``load``, when none is active, and when there is no room beside what this very thread uses.
        """
        with self._changed:
            if not names and self._active is None:
                raise ValueError("no adapter is active: name one, or switch to it before")
            for name in names:
                self.folder.check_name(name)
            chosen = list(dict.fromkeys(names or (str(self._active),)))
            self._acquire(chosen)
            thread = threading.get_ident()
            residents = [self._residents.touch(name) for name in chosen]
            for resident in residents:
                resident.users.append(thread)
        try:
            yield self.model
        finally:
            with self._changed:
                for resident in residents:
                    resident.users.remove(thread)
                self._changed.notify_all()

    def list(self) -> Infos:
        """All adapters, by name. What else lies in the folder is told by ``foreign``."""
        return self._read_all()[0]

    def foreign(self) -> dict[str, str]:
        """What lies in the folder and is no adapter of this base, damaged ones too, by name, and why it is none."""
        return self._read_all()[1]

    def _read_all(self) -> tuple[Infos, dict[str, str]]:
        infos: Infos = []
        foreign: dict[str, str] = {}
        with self._changed:
            for name, reason in self.folder.entries():
                if reason is not None:
                    foreign[name] = reason
                    continue
                resident = self._residents.get(name)
                try:
                    config, size = self._residents.on_disk(name)
                    num_bytes = self.folder.num_bytes(name)
                except (ValueError, OSError) as error:
                    if self.folder.identity(name) is not None:  # otherwise another process has deleted it meanwhile
                        foreign[name] = str(error)
                    continue
                used = self._last_used.get(name)
                infos.append(
                    AdapterInfo(
                        name=name,
                        method=method_of(config),
                        num_parameters=size.num_parameters,
                        num_bytes=num_bytes,
                        is_loaded=resident is not None,
                        is_active=name == self._active,
                        num_users=len(resident.users) if resident is not None else 0,
                        last_used=datetime.datetime.fromtimestamp(used) if used is not None else None,
                    )
                )
        return infos, foreign

    def delete(self, name: str) -> None:
        """Remove an adapter from memory and from the folder, and what a training of it has left there.

        Raises:
            ValueError: when there is none of that name, or it is in use, or being trained.
        """
        with self._changed:
            self.folder.check_name(name)
            if self._in_training == name:
                raise ValueError(f"adapter {name!r} cannot be deleted: it is being trained")
            if self._residents.get(name) is not None:
                self._residents.check_unused(name, "be deleted")
            elif not self.folder.has_workplace(name):
                self.folder.check_known(name)
            if self.folder.has_workplace(name):
                self.folder.clear_workplace(name)
            if self._residents.get(name) is not None:
                self._residents.forget(name)
            self.folder.delete(name)
            self._last_used.pop(name, None)
            self._changed.notify_all()
            if self._active == name:
                self._active = None

    def _acquire(self, names: Sequence[str]) -> None:
        """Have adapters in memory, the most recently used of all."""
        has_waited = True
        while has_waited:  # others may have come and gone meanwhile
            for name in names:
                if self._residents.get(name) is None:
                    self.folder.check_known(name)
            has_waited = self._wait_for_room({name: self._residents.config(name) for name in names})
        for name in names:
            if self._residents.get(name) is None:
                self.folder.attach(self.model, name)
                self._residents.take_in(name)
            self._residents.touch(name)
            self._last_used[name] = time.time()

    def _wait_for_room(self, needs: Mapping[str, Method]) -> bool:
        """Wait until adapters of these settings have their place, others having left memory for it.

        Returns:
            Whether it has waited.

        Raises:
            ValueError: when that cannot be.
        """
        has_waited = False
        self._residents.check_size(needs)
        while self._in_training is not None or not self._residents.make_room(needs, spared=self._active):
            self._residents.refuse_to_wait(needs)
            self._changed.wait()
            has_waited = True
        return has_waited

    @contextmanager
    def _training(self, name: str) -> Iterator[None]:
        """The model for a training alone."""
        with self._changed:
            self.folder.check_free(name)
            own = self._residents.used_here()
            if own:
                raise ValueError(
                    f"{name!r} waits to train until nobody uses an adapter, but this thread uses {own[0]!r}"
                )
            while self._in_training is not None or self._residents.any_in_use():
                self._changed.wait()
            self.folder.check_free(name)
            self._in_training = name
        try:
            yield
        finally:
            with self._changed:
                self._in_training = None
                self._changed.notify_all()
