"""How the process gives memory back to the system."""

import ctypes
import os
import sys

# mallopt's parameters, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20  # glibc refuses more on 64-bit systems
_MOST_KEPT = 2**31 - 1

# oneDNN compiles a product for every shape of its factors, and would keep 1024 of them. Batches seldom have as many
# tokens as one before, and what is compiled in the middle of a step stays where it is, between tensors of the step:
# once they are freed, larger ones do not fit in between. So those are kept that a step's layers have in common: some of
# all tokens, and some of each adapter's own. With too few, every layer compiles its products again.
_SHARED_PRODUCTS, _PRODUCTS_OF_ADAPTER, _MOST_PRODUCTS = 24, 8, 256
_TORCH_KEEPS = 16  # products of its own list; oneDNN's has them all


def reuse_freed_memory(num_adapters: int | None) -> bool:
    """Let glibc keep freed memory instead of returning it to the kernel, and torch keep fewer compiled products.

    A training step frees and takes the same megabytes again; by default each round trip costs a page fault every 4 KiB.

    Args:
        num_adapters: that train at once, at most; None: of a process that comes back to shapes of long before.

    Returns:
        Whether this C library took the setting (only glibc does).
    """
    kept = _MOST_PRODUCTS
    if num_adapters is not None:
        kept = min(kept, _SHARED_PRODUCTS + _PRODUCTS_OF_ADAPTER * num_adapters)
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(kept))  # read at the first product
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(_TORCH_KEEPS))
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
