"""Freed memory stays with the process, so that taking it again costs no page faults."""

import os
import subprocess
import sys

import pytest

# Prints the page faults of a second step, and the pages that it writes to.
FAULTS = """
import resource, sys, torch
from moe_peft.command.memory import reuse_freed_memory
if not reuse_freed_memory(2):
    sys.exit("the C library refused the setting")
def step():
    tensors = [torch.ones(6 << 20) for _ in range(8)]  # 24 MiB each, all freed together
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, 8 * (24 << 20) // resource.getpagesize())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_a_step_takes_its_memory_again_without_page_faults():
    done = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, text=True)
    faults, pages = map(int, done.stdout.split())
    assert faults < 0.3 * pages  # without the setting it is every page


CAPACITY = """
import os
from moe_peft.command.memory import reuse_freed_memory
reuse_freed_memory({})
print(os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
"""


@pytest.mark.parametrize(
    ("num_adapters", "own", "kept"), [(1, None, 32), (8, None, 88), (1000, None, 256), (None, None, 256), (1, "7", 7)]
)
def test_compiled_products_are_kept_by_the_number_of_adapters(
    num_adapters: int | None, own: str | None, kept: int
) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    environment |= {} if own is None else {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": own}
    code = CAPACITY.format(num_adapters)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)
    assert int(done.stdout) == kept
