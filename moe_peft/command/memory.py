"""How the process gives memory back to the system."""

import ctypes
import os
import sys

# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more on 64-bit systems
_MOST_KEPT = 2**31 - 1

# Compiled products that are kept, each some 0.5 MB. torch and oneDNN would keep 1024 each; few shapes come again.
_PRODUCTS_KEPT = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "256"}


def reuse_freed_memory() -> bool:
    """Let glibc keep freed memory instead of returning it to the kernel, and torch keep fewer compiled products.

    A training step frees and takes the same megabytes again; by default each round trip costs a page fault every 4 KiB.

    Returns:
        Whether this C library took the setting (only glibc does).
    """
    for name, value in _PRODUCTS_KEPT.items():
        os.environ.setdefault(name, value)  # read at the first product
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = (
        (_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD),
        (_M_TRIM_THRESHOLD, _MOST_KEPT),
        (_M_TOP_PAD, 64 << 20),
    )
    results = [mallopt(parameter, value) for parameter, value in settings]
    return results == [1] * len(settings)
