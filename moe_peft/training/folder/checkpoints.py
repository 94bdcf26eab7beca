"""A run's checkpoints: folders written aside and renamed, with a manifest that tells an intact one from a torn one."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moe_peft.io.atomic import atomic_folder, save_safetensors_atomically, write_text_atomically

FOLDER = "checkpoints"
STATE_FILE, MANIFEST_FILE = "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """An intact checkpoint.

    Args:
        path: its folder.
        state: what ``state.json`` holds.
    """

    path: Path
    state: dict[str, Any]

    def tensors(self, adapter: str) -> dict[str, Tensor]:
        """The tensors of an adapter under way, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / f"{adapter}.safetensors")


class Checkpoints:
    """The checkpoints of one run.

    Args:
        run_folder: of the run.
    """

    def __init__(self, run_folder: str | Path) -> None:
        self.folder = Path(run_folder) / FOLDER

    def write(
        self, fused_step: int, state: Mapping[str, Any], adapters: Mapping[str, Mapping[str, Tensor]], *, keep: int
    ) -> Path:
        """Write the checkpoint of a fused step, and remove those that are no longer kept.

        Args:
            fused_step: fused steps taken.
            state: plain data.
            adapters: the tensors of every adapter under way, by name.
            keep: how many checkpoints stay, the newest ones.

        Raises:
            OSError: when it could not be written, say because the disk is full; the older ones are as they were.
        """
        path = self.folder / f"step-{fused_step:08d}"
        with atomic_folder(path, replace=True) as partial:
            write_text_atomically(partial / STATE_FILE, json.dumps(state, ensure_ascii=False) + "\n")
            for name, tensors in adapters.items():
                # Clones, as some may be views of one storage, which safetensors refuses.
                plain = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
                save_safetensors_atomically(partial / f"{name}.safetensors", plain)
            files = {file.name: _fingerprint(file) for file in sorted(partial.iterdir())}
            write_text_atomically(partial / MANIFEST_FILE, json.dumps({"files": files}, indent=1) + "\n")
        for old in self.paths[keep:]:
            shutil.rmtree(old, ignore_errors=True)
        return path

    def newest_intact(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint whose manifest holds; ``warn`` is told of every newer one that is damaged."""
        for path in self.paths:
            try:
                return Checkpoint(path, _read(path))
            except (OSError, ValueError, KeyError, TypeError) as error:  # a manifest may hold anything
                warn(f"the checkpoint {path} is damaged ({error}): the one before it is taken")
        return None

    def remove_after(self, checkpoint: Checkpoint | None) -> None:
        """Remove those that are newer, which are damaged; of None, all. Removes too what a killed process left."""
        for path in self.paths:
            if checkpoint is not None and path == checkpoint.path:
                break
            shutil.rmtree(path, ignore_errors=True)
        for partial in self.folder.glob(".*.partial"):
            shutil.rmtree(partial, ignore_errors=True)

    @property
    def paths(self) -> list[Path]:
        """All there are, newest first, damaged ones too."""
        if not self.folder.is_dir():
            return []
        named = [(_NAME.fullmatch(path.name), path) for path in self.folder.iterdir()]
        return [path for _, path in sorted(((int(name[1]), path) for name, path in named if name), reverse=True)]


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as data:
        while block := data.read(1 << 20):
            digest.update(block)
    return {"size": file.stat().st_size, "sha256": digest.hexdigest()}


def _read(path: Path) -> dict[str, Any]:
    """The state of a checkpoint whose files are those of its manifest.

    Raises:
        ValueError: saying what is wrong.
        OSError: when a file is missing or cannot be read.
    """
    files = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
    for name, expected in files.items():
        if not (path / name).is_file():
            raise ValueError(f"{name} is missing")
        if (path / name).stat().st_size != expected["size"]:
            raise ValueError(f"{name} has {(path / name).stat().st_size:,} bytes instead of {expected['size']:,}")
        if _fingerprint(path / name) != expected:
            raise ValueError(f"{name} is not what was written: its sha256 differs")
    state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError(f"{STATE_FILE} must hold an object")
    return state
