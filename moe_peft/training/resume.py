"""Whether the run folder holds an earlier run of the same config, and what it takes to go on with it."""

import dataclasses
import platform
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_peft import ops
from moe_peft.config import TrainConfig
from moe_peft.strict import show
from moe_peft.training.folder.checkpoints import Checkpoint, Checkpoints
from moe_peft.training.folder.inbox import Inbox
from moe_peft.training.folder.journal import FILE as JOURNAL_FILE
from moe_peft.training.folder.journal import read_journal
from moe_peft.training.folder.run_folder import CONFIG_FILE, check_output_dir, is_occupied
from moe_peft.training.folder.run_lock import FILE as LOCK_FILE
from moe_peft.training.folder.run_lock import holder
from moe_peft.version import __version__

FORMAT = 1  # of state.json
# Keys that cannot change what comes out (num_threads can, in the last bits: the machine's description tells of it).
NEUTRAL_KEYS = (
    "output_dir",
    "save_steps",
    "keep_checkpoints",
    "answer_examples",
    "tensorboard",
    "num_threads",
    "activation_checkpointing",
)
# The run has decided what these mean: a resumed one takes its word.
CHOSEN_KEYS = ("dtype", "device")


@dataclass(frozen=True)
class EarlierRun:
    """A run to go on with.

    Args:
        folder: of the run.
        config: the given one, with the dtype and the device that the run chose.
        checkpoint: its newest intact one; None when there is none, and it begins again.
        paths: all its checkpoints.
    """

    folder: Path
    config: TrainConfig
    checkpoint: Checkpoint | None
    paths: list[Path]

    @property
    def is_complete(self) -> bool:
        """Whether every job of it has ended, and every request has been followed."""
        if self.checkpoint is None or not self.checkpoint.state["is_complete"]:
            return False
        entries = read_journal(self.folder / JOURNAL_FILE)
        return len(entries) == self.checkpoint.state["journal_position"] and Inbox(self.folder).is_closed


def find_earlier_run(config: TrainConfig, resume: bool, warn: Callable[[str], None]) -> EarlierRun | None:
    """Look into the run folder; nothing is written.

    Args:
        config: what is to be trained.
        resume: whether a run that is found may go on.
        warn: takes warnings.

    Returns:
        What to go on with; None where the folder is new or empty.

    Raises:
        ValueError: when the folder is occupied by something else, by the run of another config, or by a process.
    """
    folder = None if config.output_dir is None else Path(config.output_dir).expanduser()
    if folder is None or not is_occupied(folder):
        check_output_dir(config.output_dir)
        return None
    if not ((folder / LOCK_FILE).is_file() and (folder / CONFIG_FILE).is_file()):
        check_output_dir(config.output_dir)
    process = holder(folder)
    if process is not None:
        raise ValueError(
            f"output_dir={config.output_dir!r} is being trained by {process}: two processes never share a folder"
        )
    if not resume:
        raise ValueError(
            f"output_dir={config.output_dir!r} holds a run, which --no-resume does not go on with: "
            "give output_dir another name, or remove the folder"
        )
    earlier = TrainConfig.from_file(folder / CONFIG_FILE)
    changes = list(differences(config.to_dict(), earlier.to_dict()))
    if changes:
        raise ValueError(
            f"output_dir={config.output_dir!r} holds the run of another config, which differs in "
            f"{'; '.join(changes)}: give output_dir another name, or the run its own config, {folder / CONFIG_FILE}"
        )
    checkpoints = Checkpoints(folder)
    checkpoint = checkpoints.newest_intact(warn)
    if checkpoint is not None:
        _check_format(checkpoint)
    elif checkpoints.paths:
        warn(f"no checkpoint in {checkpoints.folder} is intact: the run begins again")
    chosen = {key: getattr(earlier, key) for key in CHOSEN_KEYS}
    return EarlierRun(folder, dataclasses.replace(config, **chosen), checkpoint, checkpoints.paths)


def _check_format(checkpoint: Checkpoint) -> None:
    found = checkpoint.state.get("format")
    if found != FORMAT:
        raise ValueError(f"{checkpoint.path} has the format {show(found)}; this version reads {FORMAT}")


def differences(given: Mapping[str, Any], earlier: Mapping[str, Any]) -> Iterator[str]:
    """Which keys of two configs differ in what may come out, each with both values."""
    for key in (key for key in given if key not in (*NEUTRAL_KEYS, "adapters")):
        # "auto" has become what the run chose, and "cuda" has become "cuda:0".
        is_chosen = key in CHOSEN_KEYS and given[key] in ("auto", earlier[key].removesuffix(":0"))
        if given[key] != earlier[key] and not is_chosen:
            yield _difference(key, given[key], earlier[key])
    ours, theirs = ({job["name"]: job for job in config["adapters"]} for config in (given, earlier))
    if list(ours) != list(theirs):
        yield _difference("the adapters", list(ours), list(theirs))
        return
    for name, job in ours.items():
        other = theirs[name]
        for key in dict.fromkeys([*job, *other]):
            if job.get(key) != other.get(key):
                yield _difference(f"adapters.{name}.{key}", job.get(key), other.get(key))


def _difference(key: str, given: Any, earlier: Any) -> str:
    return f"{key}={show(given)} (the run has {show(earlier)})"


def machine() -> dict[str, Any]:
    """What the last bits of a result depend on."""
    return {
        "moe_peft": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cpu": _cpu(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "code": None if torch.cuda.is_available() else ops.compiled_library().name,
    }


def warn_of_another_machine(earlier: Mapping[str, Any], warn: Callable[[str], None]) -> None:
    """Warn where what is recorded in a checkpoint is not what there is now."""
    changes = [
        f"{key} {show(value)} instead of {show(earlier.get(key))}"
        for key, value in machine().items()
        if value != earlier.get(key)
    ]
    if changes:
        warn(f"the run goes on with {', '.join(changes)}: its results may differ in their last bits")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
