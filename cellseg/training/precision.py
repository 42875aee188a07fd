"""The device to train on, and the number format that is safe and fast there."""

from contextlib import AbstractContextManager

import torch

from cellseg.errors import SettingsError

PRECISIONS = ("auto", "float32", "bfloat16", "float16")


def pick_device(device: str = "auto") -> torch.device:
    """Return the device to work on: "auto" takes CUDA, else MPS, else the CPU.

    Raises:
        SettingsError: if a device is asked for that this machine does not have.
    """
    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise SettingsError(f"device={device!r} is not one; use auto, cuda, mps or cpu") from None
    if (chosen.type == "cuda" and not torch.cuda.is_available()) or (
        chosen.type == "mps" and not has_mps
    ):
        raise SettingsError(f"device={device!r} is not available here; use auto or cpu")
    return chosen


def pick_precision(device: torch.device, precision: str = "auto") -> torch.dtype:
    """Return the type that convolutions and linear layers compute in.

    "auto" takes bfloat16 on CUDA from Ampere on and on CPUs that multiply it, float16 on older
    CUDA, else float32.

    Raises:
        SettingsError: if the precision is unknown, or float16 is asked for off CUDA, where
            gradients underflow without a scaler.
    """
    if precision not in PRECISIONS:
        raise SettingsError(f"precision is {precision!r}; use one of {', '.join(PRECISIONS)}")
    if precision == "float16" and device.type != "cuda":
        raise SettingsError("precision='float16' needs CUDA; use auto, bfloat16 or float32")
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    if device.type == "cpu" and _multiplies_bfloat16():
        return torch.bfloat16
    return torch.float32


def _multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for it; without them it is slower than float32."""
    can_do = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.10 does not tell
    return bool(can_do.get("avx512_bf16") or can_do.get("amx_bf16"))


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager:
    """Return the context in which the forward pass runs; float32 changes nothing."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
