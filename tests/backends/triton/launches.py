"""What the host functions of the kernels launch, taken down on tensors without memory, and compiled.

    python tests/backends/triton/launches.py sm_90 [names of calls]

On tensors of the device `meta` a host function runs as on a GPU, with any sizes, and fails where it would
wait for the device to read a value. Arguments are then specialised by Triton's own launcher: sizes and
strides of 1 are constants, those that 16 does not divide are told apart, and those from 2**31 on have 64
bits. None of this is so in the interpreter, or in the cases of aot_cases.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

import effopt.backends.triton
from effopt.backends.triton import (
    block_sparse_attention,
    decode_attention,
    flash_attention,
    flash_attention_backward,
    linear_attention,
    linear_attention_backward,
    paged_attention,
    stream_k_attention,
    unified_max_attention,
)
from effopt.backends.triton.attention_refusals import prepare
from effopt.graph import ops

MODULES = [
    import_module(m.name)
    for m in iter_modules(effopt.backends.triton.__path__, f"{effopt.backends.triton.__name__}.")
]


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel."""

    kernel: Any
    programs: int
    args: tuple[Any, ...]
    options: dict[str, Any]

    def source(self, target: Any) -> tuple[ASTSource, dict[str, Any]]:
        """What Triton's launcher would compile for these arguments, and its options."""
        backend = make_backend(target)
        given = {"enable_fp_fusion": True, **self.options}
        bind = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = bind(*self.args, **given)
        made = self.kernel._pack_args(backend, options, bound, specialization, options)
        options, signature, constants, attributes = made
        return ASTSource(self.kernel, signature, constants, attributes), options.__dict__


@contextmanager
def recorded(shared: bool) -> Iterator[list[Launch]]:
    """The launches made inside, none of which runs. `shared`: as where matrix units read shared memory."""
    found: list[Launch] = []

    def record(kernel: Any, programs: int, _: Tensor, *args: Any, **options: Any) -> None:
        found.append(Launch(kernel, programs, args, options))

    with ExitStack() as patches:
        for module in MODULES:
            if hasattr(module, "launch"):
                patches.enter_context(mock.patch.object(module, "launch", record))
            if hasattr(module, "reads_shared_memory"):
                patches.enter_context(mock.patch.object(module, "reads_shared_memory", return_value=shared))
        yield found


def meta(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def heads(b: int, h: int, hkv: int, t: int, s: int, d: int, layout: str = "") -> tuple[Tensor, ...]:
    """Query, key and value as one block of memory, or as `layout` says."""

    def made(n: int, length: int) -> Tensor:
        if layout == "tokens first":
            return meta(b, length, n, d).transpose(1, 2)
        if layout == "turned":
            return meta(b, n, d, length).transpose(2, 3)
        if layout == "odd":
            return meta(b, n, length, d + 1)[..., 1:]
        if layout == "far":
            strides = (n * 2**33, 2**33, 2**32, 1)
            return torch.empty_strided((b, n, length, d), strides, dtype=torch.bfloat16, device="meta")
        return meta(b, n, length, d)

    return made(h, t), made(hkv, s), made(hkv, s)


def attend(op: Any, made: tuple[Tensor, ...], **more: Any) -> None:
    given = prepare(ops.attention.bind(made, {"scale": 0.1, **more}))
    is_flash = op is flash_attention._flash_attention
    op._init_fn(*given, *((0.0, None) if is_flash else ()))


def differentiate(made: tuple[Tensor, ...], **more: Any) -> None:
    given = prepare(ops.attention.bind(made, {"scale": 0.1, **more}))
    out, lse = torch.empty_like(made[0]).contiguous(), meta(*made[0].shape[:3], dtype=torch.float32)
    flash_attention_backward._backward._init_fn(out, None, out, lse, lse, [True] * 5, *given, 0.0, None)


def select(made: tuple[Tensor, ...], block: int) -> None:
    n = -(-made[0].shape[2] // block)
    blocks = meta(1, 1, n, n, dtype=torch.bool)
    block_sparse_attention._forward._init_fn(*made, blocks, block, 0.1, True, 0.0, None, False)


def look_up(b: int, h: int, hkv: int, t: int, room: int) -> None:
    pools = (meta(64, hkv, 64, 128) for _ in range(2))
    table, lengths = meta(b, room // 64, dtype=torch.int32), meta(b, dtype=torch.int32)
    paged_attention._forward._init_fn(meta(b, h, t, 128), *pools, table, lengths, scale=0.1)


def walk(b: int, h: int, t: int, d: int, decay: Tensor | None) -> None:
    made = [meta(b, t, h, d).transpose(1, 2) for _ in range(4)]
    last = meta(b, h, d, d, dtype=torch.float32)
    linear_attention.linear_attention_forward._init_fn(*made[:3], decay, None, 0.1)
    linear_attention_backward._backward._init_fn(made[3], last, *made[:3], decay, None, 0.1)


FLASH, DIVIDED = flash_attention._flash_attention, decode_attention._decode_attention
STREAMED, UNIFIED = stream_k_attention._stream_k_attention, unified_max_attention._unified_max_attention
DECODES = {"divided": DIVIDED, "streamed": STREAMED, "one maximum": UNIFIED}
LAYOUTS = ("tokens first", "turned", "odd", "far")
CALLS: dict[str, Callable[[], None]] = {
    "flash, far": lambda: attend(FLASH, heads(2, 8, 2, 300, 300, 128, "far"), high=0),
    "one head": lambda: attend(FLASH, heads(1, 1, 1, 300, 300, 128), is_causal=True),
    "one token of one head, walked": lambda: walk(1, 1, 1, 64, None),
    **{
        f"flash, {layout}": lambda layout=layout: attend(FLASH, heads(2, 8, 2, 300, 300, 128, layout), high=0)
        for layout in LAYOUTS
    },
    **{
        f"gradients, {layout}": lambda layout=layout: differentiate(
            heads(2, 8, 2, 300, 300, 128, layout), is_causal=True
        )
        for layout in LAYOUTS
    },
    "gradients, one head, bias of a row": lambda: differentiate(
        heads(1, 1, 1, 300, 300, 64), bias=meta(1, 1, 1, 300)
    ),
    "gradients, one head, bias of a key": lambda: differentiate(
        heads(1, 1, 1, 300, 300, 64), bias=meta(1, 1, 300, 1)
    ),
    **{
        f"{name}, {layout}": lambda op=op, layout=layout: attend(op, heads(2, 8, 2, 1, 9000, 128, layout))
        for name, op in DECODES.items()
        for layout in ("far", "odd")
    },
    **{
        f"{name}, one head": lambda op=op: attend(op, heads(1, 1, 1, 1, 9000, 128))
        for name, op in DECODES.items()
    },
    "pages, one head": lambda: look_up(1, 1, 1, 1, 4096),
    "blocks, one head": lambda: select(heads(1, 1, 1, 300, 300, 128), 64),
    "blocks, far": lambda: select(heads(2, 8, 2, 300, 300, 128, "far"), 128),
    "walk, one head": lambda: walk(1, 1, 300, 128, meta(1, 1, 300, dtype=torch.float32)),
    "walk, one head, gates": lambda: walk(1, 1, 300, 64, meta(1, 1, 300, 64, dtype=torch.float32)),
}
"""Calls whose arguments are specialised otherwise than most."""
FIRST = ("flash, far", "one head", "one token of one head, walked")
"""Those that are compiled in every run of the tests."""


def main() -> None:
    from tests.backends.triton.aot_compile import SHARED, TARGETS, binary_facts

    target, names, facts = sys.argv[1], sys.argv[2:] or list(CALLS), []
    for name in names:
        with recorded(target in SHARED) as launches:
            CALLS[name]()
        for made in launches:
            source, options = made.source(TARGETS[target])
            compiled = triton.compile(source, target=TARGETS[target], options=options)
            fact = {"call": name, "kernel": made.kernel.__name__, "types": str(source.signature)}
            facts.append(fact | {"shared_bytes": compiled.metadata.shared} | binary_facts(compiled))
    json.dump(facts, sys.stdout)


if __name__ == "__main__":
    main()
