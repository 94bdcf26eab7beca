"""What a user may name as a base model, made into a path."""

import os
from pathlib import Path

from moe_peft.io.hub import hub_folder, looks_like_hub_id
from moe_peft.io.smollm2 import SMOLLM2_NAME, smollm2_file
from moe_peft.strict import did_you_mean, show

BUILT_IN_MODELS = (SMOLLM2_NAME,)


def resolve_source(source: str | Path, *, allow_download: bool = True) -> Path:
    """The Hugging Face folder or ``.gguf`` file that ``source`` names.

    Args:
        source: a folder, a ``.gguf`` file, a built-in name (which wins over a folder of that name: write
            ``./smollm2-135m`` for the folder), or a Hub id ``owner/name`` (when no such folder exists).
        allow_download: whether the network may be asked for what is not cached.

    Raises:
        FileNotFoundError: nothing of that name is to be had.
        ValueError: it is there, but no base model.
    """
    if source in BUILT_IN_MODELS:
        return smollm2_file(allow_download=allow_download)
    if not isinstance(source, (str, os.PathLike)) or not str(source).strip():
        raise ValueError(f"the base model {show(source)} must be a folder, a .gguf file, a hub id or {SMOLLM2_NAME}")
    path = Path(source).expanduser()
    if path.is_dir():
        return _checked_folder(path)
    if path.exists():
        if path.suffix.lower() != ".gguf":
            raise ValueError(
                f"{path} is a {path.suffix or 'nameless'} file: a base model is a folder with config.json and "
                "safetensors files, or a .gguf file"
            )
        return path
    if isinstance(source, str) and looks_like_hub_id(source):
        return hub_folder(source, allow_download=allow_download)
    raise FileNotFoundError(
        f"there is no base model {str(source)!r}: it must be an existing folder, an existing .gguf file, "
        f"a hub id like owner/name, or {', '.join(BUILT_IN_MODELS)}{_suggestion(path)}"
    )


def _checked_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"the folder {path} holds an adapter, not a base model")
    gguf_files = sorted(path.glob("*.gguf"))
    if gguf_files:
        raise ValueError(f"the folder {path} has no config.json; name its GGUF file instead: {gguf_files[0]}")
    raise ValueError(f"the folder {path} has no config.json: it is not a Hugging Face model folder")


def _suggestion(path: Path) -> str:
    siblings = [str(path.with_name(found.name)) for found in path.parent.iterdir()] if path.parent.is_dir() else []
    return did_you_mean(str(path), [*BUILT_IN_MODELS, *siblings])
