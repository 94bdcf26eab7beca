"""dtype and device from names and objects."""

import pytest
import torch

from moe_peft.io.placement import computes_natively, native_dtype, parse_device, parse_dtype


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("auto", None),
        ("float32", torch.float32),
        ("fp32", torch.float32),
        ("BF16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        ("half", torch.float16),
        ("double", torch.float64),
        (torch.float16, torch.float16),
    ],
)
def test_dtypes(given, expected):
    assert parse_dtype(given) == expected


@pytest.mark.parametrize("given", ["bfloat61", "int8", torch.int8, "", "4bit"])
def test_dtypes_that_are_refused(given):
    with pytest.raises(ValueError, match=r"dtype='.*' must be one of auto, float64, float32, bfloat16, float16"):
        parse_dtype(given)


def test_the_nearest_dtype_is_named():
    with pytest.raises(ValueError, match="did you mean 'bfloat16'"):
        parse_dtype("bloat16")


@pytest.mark.parametrize("given", ["cpu", "CPU", "cpu:0", torch.device("cpu")])
def test_the_cpu_in_all_spellings(given):
    assert parse_device(given) == torch.device("cpu")


def test_auto_takes_a_gpu_when_there_is_one():
    assert parse_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cdua", "device='cdua' must be auto, cpu, cuda or cuda:INDEX; did you mean 'cuda'"),
        ("gpu", "did you mean 'cuda'"),
        ("", "device='' must be"),
        ("cuda:99", "device='cuda:99' is not on this machine"),
        ("meta", "device='meta' is not on this machine"),
    ],
)
def test_devices_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        parse_device(given)


def test_what_a_cpu_computes():
    cpu = torch.device("cpu")
    assert computes_natively(torch.float32, cpu)
    assert computes_natively(torch.float64, cpu)
    assert not computes_natively(torch.float16, cpu)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True, "avx512_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"neon": True, "bf16": True}, True),
    ],
)
def test_bfloat16_needs_the_processors_instructions(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert computes_natively(torch.bfloat16, torch.device("cpu")) is expected


@pytest.mark.parametrize(
    ("dtype", "kind", "has_bfloat16", "expected"),
    [
        (torch.bfloat16, "cuda", True, torch.bfloat16),
        (torch.bfloat16, "cuda", False, torch.float16),
        (torch.float16, "cuda", False, torch.float16),
        (torch.float32, "cuda", False, torch.float32),
        (torch.bfloat16, "cpu", True, torch.bfloat16),
        (torch.bfloat16, "cpu", False, torch.float32),
        (torch.float16, "cpu", True, torch.float32),
    ],
)
def test_the_nearest_dtype_that_a_device_computes_in(dtype, kind, has_bfloat16, expected, monkeypatch):
    def of_gpu(including_emulation=True):
        return has_bfloat16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", of_gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bfloat16}, raising=False)
    assert native_dtype(dtype, torch.device(kind)) == expected
