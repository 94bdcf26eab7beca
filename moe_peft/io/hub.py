"""Model folders from the Hugging Face Hub, through the ``huggingface_hub`` package and its cache."""

import re
from pathlib import Path

# Only data that is read, never code or pickles; and only the top level, where transformers keeps a model: some
# repositories repeat the weights in folders (original/, onnx/) or as consolidated.* files.
_WANTED = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")
_UNWANTED = ("*/*", "consolidated*")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def looks_like_hub_id(source: str) -> bool:
    """Whether the text has the form ``owner/name``."""
    return _HUB_ID.fullmatch(source) is not None


def hub_folder(hub_id: str, *, allow_download: bool = True) -> Path:
    """The folder of a Hub model: from the local Hub cache, fetched first when it may be.

    Args:
        allow_download: whether the network may be asked; without it only the cache counts.

    Raises:
        FileNotFoundError: the package is missing, or the model is neither cached nor to be had.
        ValueError: the repository holds no model that can be read.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"there is no folder {hub_id}; to fetch it from the Hugging Face Hub, install the extra: "
            "`python -m pip install 'moe-peft-torch[hub]'`"
        ) from None
    try:
        folder = Path(
            snapshot_download(
                hub_id,
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
                local_files_only=not allow_download,
            )
        )
    except Exception as error:  # the hub's errors share no base class that is public in every version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(
            f"there is no folder {hub_id}, and the Hugging Face Hub's model of that name is not to be had "
            f"({type(error).__name__}: {reason})"
        ) from error
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"the Hub repository {hub_id} has no config.json: it must be a transformers model with safetensors weights "
            "(of a GGUF repository, download one .gguf file and name its path)"
        )
    return folder
