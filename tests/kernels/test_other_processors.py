"""The compiled operations are right on processors with less than this one has, too."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from moe_peft.kernels.compiled import _compiler

ROOM = Path(__file__).parent
TESTS = ("test_mixlora_ffn_cpu.py", "test_causal_attention.py", "test_lora_linear.py", "test_wide_linear.py")


# No pairs of bfloat16; and what every x86-64 processor has.
@pytest.mark.parametrize("flag", ["-mno-avx512bf16", "-march=x86-64"])
def test_compiled_for_less(flag, tmp_path):
    compiler = _compiler()
    if compiler is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs a C++ compiler on an x86-64 processor")
    programs = tmp_path / "programs"
    programs.mkdir()
    wrapper = programs / "g++"
    # Its version is part of the library's name, so that no other one is taken for it.
    version = f'[ "$1" = --version ] && echo "for less: {flag}" && exit'
    wrapper.write_text(f'#!/bin/sh\n{version}\nexec {compiler} "$@" {flag}\n')
    wrapper.chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "MOE_PEFT_CACHE": str(tmp_path)}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not reference and not nan"]
    done = subprocess.run(
        [*command, *(str(ROOM / name) for name in TESTS)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert len(list((tmp_path / "kernels").glob("cpu-*.so"))) == 1
    assert " passed" in done.stdout.splitlines()[-1]
