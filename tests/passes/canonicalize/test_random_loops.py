"""Random loops over time: the result is what it was, and what is known becomes calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.conftest import run_compiled

PIPELINE = "stack-before-pointwise,recognize-recurrent-attention,recognize-selective-scan"

UPDATES: dict[str, Any] = {
    "s * g + kv": lambda s, k, v, g: s * g + k * v,
    "kv + g * s": lambda s, k, v, g: k * v + g * s,
    "s / 2 - kv": lambda s, k, v, g: s / 2 - k * v,
    "addcmul(s * g, k, v)": lambda s, k, v, g: torch.addcmul(s * g, k, v, value=0.5),
    "addcmul(kv, s, g)": lambda s, k, v, g: torch.addcmul(k * v, s, g),
    "lerp(s, kv, g)": lambda s, k, v, g: torch.lerp(s, k * v, g.expand_as(s)),
    "s + k @ v": lambda s, k, v, g: s + k @ v,
}
GATES: dict[str, Any] = {
    "one": lambda g: g[0, 0, 0, 0].sigmoid(),
    "of heads": lambda g: g[0, :, 0, 0, None, None].exp(),
    "of tokens": lambda g, t=None: g[:, :, t, :1, None].sigmoid(),
    "of channels": lambda g, t=None: (1 - g[:, :, t, :, None].sigmoid()) ** 0.5,
}
WORKS: dict[str, Any] = {
    "none": lambda y, z, v: y,
    "scaled": lambda y, z, v: y * 0.5,
    "normalised": lambda y, z, v: y / (z.square() + 1),
    "gated": lambda y, z, v: torch.nn.functional.silu(v) * y,
}
READS: dict[str, Any] = {
    "after": lambda old, new, kv: new,
    "before": lambda old, new, kv: old,
    "bonus": lambda old, new, kv: old + 0.3 * kv,
}


@dataclass(frozen=True)
class Loop:
    """One loop, by the names of its parts."""

    update: str
    gate: str
    start: str
    read: str
    work: str
    join: str
    backwards: bool
    keeps: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> list[Tensor]:
        gate, work = GATES[self.gate], WORKS[self.work]
        s = torch.zeros_like(s) if self.start == "zeros" else s
        z, out, written = k[:, :, 0] * 0, [], torch.empty_like(v)
        for t in range(q.shape[2])[:: -1 if self.backwards else 1]:
            key, value = k[:, :, t, :, None], v[:, :, t, None]
            factor = gate(g, t) if self.gate in ("of tokens", "of channels") else gate(g)
            opens = self.start == "first" and not out
            old, s = s, key * value if opens else UPDATES[self.update](s, key, value, factor)
            z = z + k[:, :, t]
            seen = (q[:, :, t, :, None] * READS[self.read](old, s, key * value)).sum(-2)
            out.append(work(seen, (q[:, :, t] * z).sum(-1, keepdim=True), v[:, :, t]))
            written[:, :, t] = out[-1] if self.join == "written" else 0.0
        out = out[::-1] if self.backwards and self.join != "turned" else out
        whole = written if self.join == "written" else torch.stack(out, 1 if self.join == "turned" else 2)
        return [whole, s] if self.keeps else [whole]

    @property
    def is_known(self) -> bool:
        """Whether it is to be recognised."""
        if self.update == "lerp(s, kv, g)" and self.gate not in ("one", "of tokens"):
            return False  # what other gates leave of 1 may be below 0
        # A first step that is another is to add what the others add, and there is no state ahead of it.
        alike = self.update in ("s * g + kv", "kv + g * s", "addcmul(kv, s, g)")
        return self.start != "first" or (self.read == "after" and alike)


loops = st.builds(
    Loop,
    update=st.sampled_from(sorted(UPDATES)),
    gate=st.sampled_from(sorted(GATES)),
    start=st.sampled_from(["first", "given", "zeros"]),
    read=st.sampled_from(sorted(READS)),
    work=st.sampled_from(sorted(WORKS)),
    join=st.sampled_from(["stack", "turned", "written"]),
    backwards=st.booleans(),
    keeps=st.booleans(),
)


# Each example is compiled: shrinking one would take minutes.
@settings(max_examples=12, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(loop=loops, t=st.integers(4, 5), sizes=st.tuples(*[st.integers(1, 3)] * 4))
def test_a_loop_is_what_it_was_and_a_known_one_is_a_call(
    loop: Loop, t: int, sizes: tuple[int, int, int, int]
) -> None:
    b, h, d, e = sizes
    generator = torch.Generator().manual_seed(0)
    shapes = ((b, h, t, d), (b, h, t, d), (b, h, t, e), (b, h, t, d), (b, h, d, e))
    given = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    leaves = [x.requires_grad_() for x in given]
    got, report = run_compiled(loop.__call__, *leaves, pipeline=PIPELINE)
    want = loop(*leaves)
    assert not report.faults
    assert report.ops["linear_attention"] or report.rejected, "a loop that is left alone has a reason"
    if loop.is_known and min(sizes) > 1:
        calls = 1 + (loop.work == "normalised")
        assert report.ops["linear_attention"] == calls, [r.reason for r in report.rejected]
    for a, b_ in zip(got, want, strict=True):
        assert [n for n, size in zip(a.stride(), a.shape, strict=True) if size > 1] == [
            n for n, size in zip(b_.stride(), b_.shape, strict=True) if size > 1
        ]
        assert (a - b_).abs().max() <= 1e-12 * (b_.abs().max() + 1)
    pairs = [
        torch.autograd.grad(sum(y.cos().sum() for y in ys), leaves, allow_unused=True) for ys in (got, want)
    ]
    for one, other in zip(*pairs, strict=True):
        one, other = (torch.zeros((), dtype=torch.float64) if x is None else x for x in (one, other))
        assert (one - other).abs().max() <= 1e-12 * (other.abs().max() + 1)
