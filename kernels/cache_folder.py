"""Where files are kept that can be made or fetched again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$MOE_PEFT_CACHE, else $XDG_CACHE_HOME/moe_peft, else ~/.cache/moe_peft."""
    if folder := os.environ.get("MOE_PEFT_CACHE"):
        return Path(folder).expanduser()
    if folder := os.environ.get("XDG_CACHE_HOME"):
        return Path(folder).expanduser() / "moe_peft"
    return Path.home() / ".cache" / "moe_peft"
