"""Memory that is really freed, measured, and what stays because something else reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from effopt.compile import record
from effopt.errors import ReleasedWeightError
from tests.models.architectures import sampled
from tests.released_models import compile_released, layers, records, resident

_MEASURE = """
import ctypes, gc, json, sys, torch, transformers
from effopt.compile import effopt

def resident():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what malloc keeps for its next caller is nobody's
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096

def build(width, tied):
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=4, num_attention_heads=4,
        vocab_size=1000, tie_word_embeddings=tied, use_cache=False, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    return model

def run(model, tied):
    passes = "quantize-weights{bits=4,group=128,embeddings=%s}" % str(tied).lower()
    options = {"lowering": "eager", "passes": passes, "release_weights": True}
    with torch.no_grad():
        compiled = torch.compile(model, backend=effopt, options=options)
        compiled(torch.ones(1, 8, dtype=torch.long))
    return compiled

tied = sys.argv[1] == "tied"
run(build(256, tied), tied)  # what compiling for the first time loads stays, and is not the model's
torch._dynamo.reset()
before = resident()
model = build(2048, tied)
original = resident() - before
compiled = run(model, tied)
print(json.dumps({"original": original, "released": resident() - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which only Linux has")
@pytest.mark.parametrize("head", sampled(["tied", "untied"], "tied"))
def test_the_process_shrinks(head: str) -> None:
    """A 400 MB bfloat16 model at 4 bits in groups of 128 is resident at 0.30 of its bytes at most."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, head], capture_output=True, text=True, check=True, timeout=500
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["original"] > 4e8
    assert measured["released"] <= 0.30 * measured["original"], measured


@pytest.mark.parametrize("tied", [True, False])
def test_bytes_of_a_model_at_four_bits(tied: bool) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=40, tie_word_embeddings=tied, use_cache=False)
    model, ids = transformers.LlamaForCausalLM(config).bfloat16().eval(), torch.randint(40, (2, 5))
    before = resident(model)
    passes = f"quantize-weights{{bits=4,group=128,embeddings={str(tied).lower()}}}"
    from effopt.graph import derivation

    with torch.no_grad(), record() as report:
        compiled = compile_released(model, passes)
        compiled(ids)
    of_model = {id(p) for p in model.parameters()}
    made = [d for d in derivation._SHARED.values() if any(id(p) in of_model for p in d.parameters)]
    held = sum(t.untyped_storage().nbytes() for d in made for t in d.held.values())
    assert 0.25 * before < resident(model) + held <= 0.30 * before
    freed, kept = records(report)
    assert len(freed) == 15
    assert not kept
    assert sum(int(note.split(": ")[1].split()[0]) for note in freed) == before - resident(model)


def shared_views() -> nn.Module:
    model = layers()
    both = torch.randn(2, 24, 48)
    model[2].weight.data = both[0]
    return model


def shared_with_a_buffer() -> nn.Module:
    model = layers()
    model.register_buffer("same", model[2].weight.detach())
    return model


def of_numpy() -> nn.Module:
    model = layers()
    model[2].weight.data = torch.from_numpy(
        np.random.default_rng(0).standard_normal((24, 48), dtype=np.float32)
    )
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (shared_views, "another tensor shares its memory"),
        (shared_with_a_buffer, "another tensor shares its memory"),
        (of_numpy, "its memory belongs to something else"),
    ],
)
def test_memory_of_others_stays(make: Callable[[], nn.Module], reason: str) -> None:
    model, x = make(), torch.randn(5, 32)
    kept_weight = model[2].weight.detach().clone()
    with torch.no_grad(), record() as report:
        compile_released(model)(x)
    freed, kept = records(report)
    assert len(freed) == 1
    assert len(kept) == 1
    assert reason in kept[0]
    assert torch.equal(model[2].weight, kept_weight)


def test_one_parameter_in_two_modules() -> None:
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), torch.randn(5, 32)
    model[1].weight = model[0].weight
    with torch.no_grad(), record() as report:
        compile_released(model)(x)
    assert len(records(report)[0]) == 1
    for layer in model:
        with pytest.raises(ReleasedWeightError, match=r"0\.weight"):
            layer(x)
