"""A folder of named adapters on one loaded base model."""

from moe_peft.manager.folder import AdapterFolder, StoredAdapter
from moe_peft.manager.manager import AdapterInfo, AdapterManager

__all__ = ["AdapterFolder", "AdapterInfo", "AdapterManager", "StoredAdapter"]
