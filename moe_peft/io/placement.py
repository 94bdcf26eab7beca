"""Which dtype and device a base model gets."""

import torch

from moe_peft.strict import did_you_mean

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DTYPE_ALIASES = {
    "fp64": "float64", "double": "float64", "f64": "float64",
    "fp32": "float32", "float": "float32", "f32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16", "half": "float16", "f16": "float16",
}  # fmt: skip
AUTO = "auto"


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """A floating dtype from its name or itself; None for ``auto``.

    Raises:
        ValueError: for a name that is not known, or a dtype no model computes in.
    """
    name = str(dtype).strip().lower().removeprefix("torch.")
    if name == AUTO:
        return None
    name = _DTYPE_ALIASES.get(name, name)
    if name not in _DTYPES:
        raise ValueError(
            f"dtype={str(dtype)!r} must be one of {', '.join([AUTO, *_DTYPES])}"
            + did_you_mean(name, [AUTO, *_DTYPES, *_DTYPE_ALIASES])
        )
    return _DTYPES[name]


def parse_device(device: str | int | torch.device) -> torch.device:
    """A device that this machine has; ``auto`` is the first CUDA GPU, or the CPU without one.

    Raises:
        ValueError: for a name torch does not know, or a device that is not there.
    """
    if device == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        parsed = torch.device(device.strip().lower() if isinstance(device, str) else device)
    except (RuntimeError, TypeError):
        kind = str(device).partition(":")[0].lower()
        hint = "; did you mean 'cuda'?" if kind == "gpu" else did_you_mean(kind, [AUTO, "cpu", "cuda"])
        raise ValueError(f"device={str(device)!r} must be auto, cpu, cuda or cuda:INDEX{hint}") from None
    if parsed.type == "cpu":
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type != parsed.type:
        there = "none" if accelerator is None else accelerator.type
        raise ValueError(f"device={str(device)!r} is not on this machine (its accelerator: {there}); use auto or cpu")
    if parsed.index is not None and parsed.index >= torch.accelerator.device_count():
        raise ValueError(
            f"device={str(device)!r} is not on this machine: it has {torch.accelerator.device_count()} of them, "
            "counted from 0"
        )
    return parsed


def computes_natively(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has arithmetic for this dtype rather than an emulation."""
    if dtype == torch.float32:
        return True
    if device.type == "cpu":
        return dtype == torch.float64 or (dtype == torch.bfloat16 and _cpu_has_bfloat16())
    if device.type == "mps":
        return dtype != torch.float64
    if device.type == "cuda" and dtype == torch.bfloat16:
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return True


def native_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype itself where the device has arithmetic for it; else float16 for bfloat16 on a GPU, else float32."""
    if computes_natively(dtype, device):
        return dtype
    # A GPU from before bfloat16 is fast in float16 alone, and has seldom the memory for twice the bytes.
    return torch.float16 if dtype == torch.bfloat16 and device.type == "cuda" else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Matrix instructions for bfloat16: AVX-512 BF16 or AMX on x86, the BF16 extension on ARM."""
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
