"""What the code will run on. The only module that asks torch.cuda anything."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """A device as the cost model and the lowerings see it."""

    device_type: str
    """`cpu`, `cuda` (also ROCm) or another torch device type."""
    arch: str
    """`sm_90`, `gfx942`, or `cpu`."""
    bytes_per_s: float
    """Memory bandwidth for streaming reads and writes; a roofline figure, not a promise."""
    flops_per_s: float
    """Matrix throughput in the fastest common dtype (bfloat16 on a GPU, float32 on a CPU)."""

    @property
    def has_triton(self) -> bool:
        """Whether compiled Triton kernels run here."""
        return self.device_type == "cuda"


_CPU = Target("cpu", "cpu", bytes_per_s=2.0e10, flops_per_s=1.0e11)

# Datasheet rates by architecture, used only to rank lowerings: (bytes/s, bf16 flop/s).
_CUDA_RATES = {
    "sm_80": (1.9e12, 3.1e14),
    "sm_90": (4.3e12, 7.9e14),
    "sm_100": (7.0e12, 2.2e15),
    "gfx942": (5.3e12, 1.3e15),
}


def target_of(device: torch.device) -> Target:
    """The target of a device. Asks the driver only when `device` is a GPU."""
    if device.type != "cuda":
        return _CPU if device.type == "cpu" else Target(device.type, device.type, 1e11, 1e12)
    props = torch.cuda.get_device_properties(device)
    gcn = getattr(props, "gcnArchName", "")
    arch = gcn.split(":")[0] if torch.version.hip else f"sm_{props.major}{props.minor}"
    rate_bytes, rate_flops = _CUDA_RATES.get(arch, (1.0e12, 1.0e14))
    return Target("cuda", arch, rate_bytes, rate_flops)


@cache
def reads_shared_memory(device: torch.device) -> bool:
    """Whether matrix units take operands out of shared memory: those of sm_90 and newer do."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_properties(device).major >= 9


def target_of_inputs(inputs: Iterable[Any]) -> Target:
    """The target of the first tensor; the CPU if there is none."""
    return target_of(next((t.device for t in inputs if isinstance(t, torch.Tensor)), torch.device("cpu")))
