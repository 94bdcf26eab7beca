"""The adapters that are in memory: who uses them, what was saved of them, and which leave for others.

Nothing here is safe between threads: the manager lets one in at a time.
"""

import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from moe_peft.adapters import Method
from moe_peft.io.adapter_files import num_values_in
from moe_peft.manager.folder import AdapterFolder, Identity
from moe_peft.manager.footprint import Footprint, Room, Twin, digest_of, num_bytes_of, tensors_of
from moe_peft.model.llama import LlamaForCausalLM


class Resident:
    """An adapter in memory.

    Args:
        model: on which it is.
        name: the adapter's.
    """

    def __init__(self, model: LlamaForCausalLM, name: str) -> None:
        self.saved = digest_of(model, name)  # of what the folder was given, or gave
        self.users: list[int] = []  # threads


class Residents:
    """By name, the least recently used first.

    Args:
        model: carries them.
        folder: to which what has changed goes.
        budget: bytes that they may take together; None: no limit.
        tokenizer: for methods that start from a text.
    """

    def __init__(self, model: LlamaForCausalLM, folder: AdapterFolder, budget: int | None, tokenizer: Any) -> None:
        self._model = model
        self._folder = folder
        self._budget = budget
        self._tokenizer = tokenizer
        self._twin = Twin(model)
        self._on_disk: dict[str, tuple[Identity | None, Method, Footprint]] = {}
        self._found: dict[str, Resident] = {}

    def __iter__(self) -> Iterator[str]:
        """The names; one that its user has taken off the model is not there any more."""
        return iter([name for name in list(self._found) if self.get(name) is not None])

    def get(self, name: str) -> Resident | None:
        """The adapter, if it is in memory."""
        if name in self._found and name not in self._model.adapters_:
            del self._found[name]
        return self._found.get(name)

    def take_in(self, name: str) -> None:
        """Note an adapter that is on the model now, as it is in the folder."""
        self._found[name] = Resident(self._model, name)

    def touch(self, name: str) -> Resident:
        """Make an adapter the most recently used one."""
        self._found[name] = self._found.pop(name)
        return self._found[name]

    def config(self, name: str) -> Method:
        """Settings of an adapter in memory, or in the folder."""
        if self.get(name) is not None:
            own: Method = self._model.adapter_config(name)
            return own
        return self.on_disk(name)[0]

    def on_disk(self, name: str) -> tuple[Method, Footprint]:
        """Settings and size of an adapter in the folder.

        Raises:
            ValueError: when there is none that can be read, or that fits the base.
        """
        identity = self._folder.identity(name)
        if name not in self._on_disk or self._on_disk[name][0] != identity:
            config = self._folder.config(name)
            num_values_in(self._folder.path / name)  # refuses damaged weights
            self._on_disk[name] = identity, config, self._twin.footprint(config, self._tokenizer)
        return self._on_disk[name][1:]

    def check_fits(self, config: Method) -> None:
        """Refuses settings that do not fit the model.

        Raises:
            ValueError: saying why.
        """
        self._twin.footprint(config, self._tokenizer)

    def _room(self, needs: Mapping[str, Method], beside: Collection[str]) -> Room:
        """For residents, and those of other adapters that are not in memory."""
        incoming = {name: config for name, config in needs.items() if self.get(name) is None}
        return Room(self._model, self._twin, beside, incoming, self._tokenizer)

    def _num_bytes(self, needs: Mapping[str, Method]) -> int:
        """Of adapters together, in memory or not."""
        present = [name for name in needs if self.get(name) is not None]
        return self._room(needs, present).num_bytes(present)

    def check_size(self, needs: Mapping[str, Method]) -> None:
        """Refuses adapters that never fit together.

        Args:
            needs: their settings by name.

        Raises:
            ValueError: naming budget and bytes.
        """
        if self._budget is None or all(self.get(name) is not None for name in needs):
            return
        needed = self._num_bytes(needs)
        if needed > self._budget:
            what = f"adapter {next(iter(needs))!r} takes" if len(needs) == 1 else f"{', '.join(needs)} together take"
            raise ValueError(f"memory_budget={self._budget} is too small: {what} {needed} bytes in memory")

    def make_room(self, needs: Mapping[str, Method], spared: str | None) -> bool:
        """Have others leave memory, as few as it takes; none where even all that are not in use would not do.

        Args:
            needs: the settings by name of adapters that are to be in memory together.
            spared: leaves last.
        """
        if self._budget is None or all(self.get(name) is not None for name in needs):
            return True
        left = list(self)
        room = self._room(needs, left)
        staying = [name for name in left if name in needs or self._found[name].users]
        if room.num_bytes(staying) > self._budget:
            return False
        idle = [name for name in left if name not in staying]
        for name in sorted(idle, key=lambda name: name == spared):
            if room.num_bytes(left) <= self._budget:
                break
            left.remove(name)
            self.evict(name)
        return True

    def refuse_to_wait(self, needs: Mapping[str, Method]) -> None:
        """A thread that uses adapters waits for no others: two such threads could wait for each other for ever.

        Raises:
            ValueError: when this thread uses some.
        """
        own = self.used_here()
        if own:
            used = num_bytes_of(tensors_of(self._model, name) for name in self if self._found[name].users)
            raise ValueError(
                f"memory_budget={self._budget} leaves no room for {', '.join(needs)} ({self._num_bytes(needs)} bytes) "
                f"beside the adapters in use ({used} bytes), some of them by this very thread ({', '.join(own)}): "
                f"name all at once, as in using({', '.join(map(repr, [*own, *needs]))})"
            )

    def used_here(self) -> Sequence[str]:
        """Those that the calling thread uses."""
        return [name for name in self if threading.get_ident() in self._found[name].users]

    def any_in_use(self) -> bool:
        """Whether any thread uses any."""
        return any(resident.users for resident in self._found.values())

    def check_unused(self, name: str, what: str) -> None:
        """Refuses what cannot be done to an adapter in use.

        Raises:
            ValueError: naming it.
        """
        users = len(self._found[name].users)
        if users:
            raise ValueError(f"adapter {name!r} cannot {what}: it is in use in {users} place{'s' if users > 1 else ''}")

    def is_changed(self, name: str) -> bool:
        """Whether it is not what was saved, or loaded."""
        return self._found[name].saved != digest_of(self._model, name)

    def save(self, name: str) -> None:
        """Write it to the folder."""
        self._folder.save(self._model, name)
        self._found[name].saved = digest_of(self._model, name)

    def evict(self, name: str) -> None:
        """Take it off the model, saved before if it has changed."""
        if self.is_changed(name):
            self.save(name)
        self.forget(name)

    def forget(self, name: str) -> None:
        """Take it off the model as it is."""
        self._model.remove_adapter(name)
        del self._found[name]
