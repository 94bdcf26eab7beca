"""The folder of an adapter manager: one PEFT folder a name, each written, read and deleted as a whole."""

import contextlib
import datetime
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moe_peft import strict
from moe_peft.adapters import Method
from moe_peft.config.job import ADAPTER_NAME, LONGEST_NAME, method_of
from moe_peft.io.adapter_files import CONFIG_FILE, load_adapter, num_values_in, read_adapter_config, save_adapter
from moe_peft.model.llama import LlamaForCausalLM
from moe_peft.training.folder.run_lock import holder

TRAINING = ".training"  # where adapters are trained, a folder each, until they are whole
RUN = "run"  # the training's own folder there
# What another process replaces while it is read is read again, so often.
_ATTEMPTS = 20

Identity = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class StoredAdapter:
    """An adapter's files.

    Args:
        name: of its folder.
        method: as the registry calls it.
        num_values: in its weights file.
        num_bytes: of all its files.
        saved_at: when.
    """

    name: str
    method: str
    num_values: int
    num_bytes: int
    saved_at: datetime.datetime


class AdapterFolder:
    """Adapters on disk, by name. Several processes may share the folder: of two that write one adapter, the last wins.

    A process that is killed while it writes leaves a folder ``.NAME.HEX.partial``. Nobody reads it, nor removes it: of
    none is it certain that no other process is writing it at this moment.

    Args:
        path: made when it is first written to.

    Raises:
        ValueError: when it is a file, or a folder of another kind: an adapter, a base model or a training run.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"folder={str(path)!r} must be a folder, not a file")
        kinds = {CONFIG_FILE: "a single adapter", "config.json": "a base model", "config.yaml": "a training run"}
        for file, kind in kinds.items():
            if (self.path / file).exists():
                hint = "the folder around it" if file == CONFIG_FILE else "a folder of its own"
                hint = f"its folder {self.path / 'adapters'}" if file == "config.yaml" else hint
                raise ValueError(f"folder={str(path)!r} holds {kind}, not adapters by name: give {hint}")

    def __contains__(self, name: str) -> bool:
        return ADAPTER_NAME.fullmatch(name) is not None and (self.path / name / CONFIG_FILE).is_file()

    def __iter__(self) -> Iterator[str]:
        """The names, sorted; what is no adapter is left out."""
        return (name for name, reason in self.entries() if reason is None)

    def foreign(self) -> dict[str, str]:
        """What else lies in the folder, damaged adapters too, by name, and why it is no adapter."""
        return self.read_all()[1]

    def read_all(self) -> tuple[list[StoredAdapter], dict[str, str]]:
        """The adapters, and what else lies in the folder, with the reason why it is none."""
        found, foreign = [], {}
        for name, reason in self.entries():
            if reason is not None:
                foreign[name] = reason
                continue
            path = self.path / name
            try:
                found.append(
                    StoredAdapter(
                        name=name,
                        method=method_of(read_adapter_config(path)),
                        num_values=num_values_in(path),
                        num_bytes=self.num_bytes(name),
                        saved_at=datetime.datetime.fromtimestamp(path.stat().st_mtime),
                    )
                )
            except (ValueError, OSError) as error:
                foreign[name] = str(error)
        return found, foreign

    def entries(self) -> Iterator[tuple[str, str | None]]:
        """What lies in the folder, by name, without a look into the files; and why it can be no adapter, or None."""
        entries = sorted(self.path.iterdir()) if self.path.is_dir() else []
        for entry in entries:
            if entry.name.startswith("."):  # what is being written, or was when its process was killed
                continue
            if not entry.is_dir():
                yield entry.name, "it is a file"
            elif not ADAPTER_NAME.fullmatch(entry.name):
                yield entry.name, f"an adapter's name is 1 to {LONGEST_NAME} letters, digits, _ or -"
            elif not (entry / CONFIG_FILE).is_file():
                yield entry.name, f"it has no {CONFIG_FILE}"
            else:
                yield entry.name, None

    def check_known(self, name: str) -> None:
        """Refuses a name that no adapter has.

        Raises:
            ValueError: naming the nearest.
        """
        if name not in self:
            reason = dict(self.entries()).get(name)
            hint = f": {reason}" if reason else strict.nearest(name, tuple(self)) or "; it holds none yet"
            raise ValueError(f"{name!r} is no adapter of the folder {self.path}{hint}")

    def check_name(self, name: object) -> None:
        """Refuses what can be no adapter's name.

        Raises:
            ValueError: with the rule.
        """
        if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
            rule = f"must be 1 to {LONGEST_NAME} letters, digits, _ or -: it is a folder's name"
            raise ValueError(f"name={strict.show(name)} {rule}")

    def check_free(self, name: str) -> None:
        """Refuses a name for a new adapter.

        Raises:
            ValueError: when it is no name, or taken, case aside: on some file systems both would be one folder.
        """
        self.check_name(name)
        for taken, reason in self.entries():
            if taken.lower() == name.lower():
                what = "an adapter" if reason is None else "something else"
                raise ValueError(f"name={name!r} is taken: {self.path / taken} holds {what}")

    def config(self, name: str) -> Method:
        """An adapter's settings.

        Raises:
            ValueError: when there is no such adapter, or its config is not one that can be read.
        """
        self.check_known(name)
        return read_adapter_config(self.path / name)

    def identity(self, name: str) -> Identity | None:
        """What changes whenever an adapter is replaced; None when there is none."""
        try:
            found = (self.path / name).stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_mtime_ns

    def num_bytes(self, name: str) -> int:
        """Of an adapter's files."""
        return sum(file.stat().st_size for file in (self.path / name).iterdir())

    def attach(self, model: LlamaForCausalLM, name: str) -> None:
        """Put an adapter from disk on the model, both of its files from one writing.

        Raises:
            ValueError: as ``load_adapter``, and when there is no such adapter. Nothing is attached then.
        """
        for attempt in range(_ATTEMPTS):
            self.check_known(name)
            before = self.identity(name)
            try:
                load_adapter(model, self.path / name, name)
            except (ValueError, OSError):
                if self.identity(name) == before or attempt == _ATTEMPTS - 1:
                    raise
                continue
            if self.identity(name) == before:
                return
            model.remove_adapter(name)
        raise ValueError(f"{self.path / name} is replaced again and again by another process: it cannot be read")

    def save(self, model: LlamaForCausalLM, name: str) -> None:
        """Write an adapter; a crash leaves the old one or the new one."""
        for attempt in range(_ATTEMPTS):
            try:
                save_adapter(model, name, self.path / name)
            except OSError:  # another process made the same new folder at the same moment, or deleted it
                if attempt == _ATTEMPTS - 1 or not (self.path / name).exists():
                    raise
                continue
            return

    def delete(self, name: str) -> None:
        """Remove an adapter from disk, in one step for whoever else looks."""
        retired = self.path / f".{name}.{secrets.token_hex(6)}.partial"
        try:
            (self.path / name).rename(retired)
        except FileNotFoundError:
            return  # another process was faster
        shutil.rmtree(retired, ignore_errors=True)

    def workplace(self, name: str) -> Path:
        """Where an adapter is trained before it takes its place."""
        return self.path / TRAINING / name

    def has_workplace(self, name: str) -> bool:
        """Whether an adapter is being trained, or its training has not come to its end."""
        return ADAPTER_NAME.fullmatch(name) is not None and self.workplace(name).is_dir()

    def check_not_in_training(self, name: str) -> None:
        """Refuses an adapter that somebody trains now.

        Raises:
            ValueError: naming the process.
        """
        process = holder(self.workplace(name) / RUN)
        if process is not None:
            raise ValueError(f"adapter {name!r} is being trained by {process}")

    def clear_workplace(self, name: str) -> None:
        """Remove what a training has left.

        Raises:
            ValueError: when somebody trains there.
        """
        self.check_not_in_training(name)
        shutil.rmtree(self.workplace(name), ignore_errors=True)
        with contextlib.suppress(OSError):  # there is none, or others are at work there
            (self.path / TRAINING).rmdir()

    def take_over(self, trained: Path, name: str) -> None:
        """Give a trained adapter its place, and clear its workplace.

        Raises:
            ValueError: when another process has taken the name meanwhile; the trained adapter stays where it is.
        """
        try:
            trained.rename(self.path / name)
        except OSError as error:
            raise ValueError(f"name={name!r} is taken meanwhile; what was trained lies in {trained}") from error
        self.clear_workplace(name)
