"""Packed prompts give what the padded batch gives, in fewer tokens, and the graph knows where each ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import effopt
from effopt.errors import EffoptError

transformers = pytest.importorskip("transformers")
SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 32}
LENGTHS = (5, 20, 3, 9, 7, 12, 1, 20)
T = 24
MATMULS = (torch.ops.aten.mm, torch.ops.aten.addmm)


def build(kind: str, attn: str = "sdpa", **config: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, **GPT2} if kind == "gpt2" else {**SHAPE, **HEADS}
    made = transformers.AutoConfig.for_model(kind, **{**sizes, "pad_token_id": 0, **config})
    made._attn_implementation = attn
    return transformers.AutoModelForCausalLM.from_config(made).eval()


def batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask; text against the padding, or with padding on both sides."""
    starts = [{"right": 0, "left": T - n, "both": (T - n) // 2}[side] for n in LENGTHS]
    at = torch.arange(T)
    mask = torch.stack([(at >= start) & (at < start + n) for start, n in zip(starts, LENGTHS, strict=True)])
    ids = torch.randint(1, 64, mask.shape, generator=torch.Generator().manual_seed(0))
    return ids * mask, mask.long()


def padded(model: Any, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> Any:
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **more)


MODELS = [
    ("llama", "sdpa", {}),
    ("llama", "eager", {}),
    ("gpt2", "sdpa", {}),
    ("gpt2", "eager", {}),
    ("mistral", "sdpa", {"sliding_window": 4}),
    ("gemma2", "eager", {"sliding_window": 4, "head_dim": 8}),
]


@pytest.mark.parametrize("side", ["right", "left", "both"])
@pytest.mark.parametrize(("kind", "attn", "config"), MODELS)
def test_equals_the_padded_batch(kind: str, attn: str, config: dict[str, Any], side: str) -> None:
    model, (ids, mask) = build(kind, attn, **config), batch(side)
    packed = effopt.prepack(model, ids, mask)
    assert packed.input_ids.shape == (4, 20)
    with torch.no_grad():
        wanted = padded(model, ids, mask, use_cache=False).logits * mask[..., None]
        out = model(**packed.inputs).logits
    torch.testing.assert_close(packed.unpack(out), wanted, rtol=1e-5, atol=1e-5)
    ends = T - 1 - mask.flip(1).argmax(1)
    torch.testing.assert_close(packed.last(out), wanted[range(len(ends)), ends], rtol=1e-5, atol=1e-5)


def test_operations_fall_as_the_tokens_do() -> None:
    model, (ids, mask) = build("llama"), batch("left")
    packed = effopt.prepack(model, ids, mask)
    assert (ids.numel(), packed.input_ids.numel(), int(mask.sum())) == (192, 80, 77)
    counted = []
    for inputs in ({"input_ids": ids, "attention_mask": mask, "use_cache": False}, packed.inputs):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs)
        products = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
        counted.append(products["aten.mm"])
    assert counted[0] * 80 == counted[1] * 192


def test_longer_rows_hold_more_prompts() -> None:
    model, (ids, mask) = build("gpt2"), batch("left")
    packed = effopt.prepack(model, ids, mask, length=77)
    assert packed.input_ids.shape == (1, 77)
    assert int(packed.position_ids.max()) == 19
    with torch.no_grad():
        out, wanted = model(**packed.inputs).logits, padded(model, ids, mask, use_cache=False).logits
    torch.testing.assert_close(packed.unpack(out), wanted * mask[..., None], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_decoding_goes_on_from_the_unpacked_cache(attn: str) -> None:
    model, (ids, mask) = build("llama", attn), batch("left")
    packed = effopt.prepack(model, ids, mask)
    follows = torch.arange(2, 2 + len(LENGTHS))[:, None]
    step = {
        "input_ids": follows,
        "attention_mask": torch.cat((mask, torch.ones_like(follows)), 1),
        "position_ids": mask.sum(1, keepdim=True),
    }
    with torch.no_grad():
        first = model(**packed.inputs_with_cache(torch.float32))
        wanted = padded(model, ids, mask, use_cache=True)
        torch.testing.assert_close(packed.last(first.logits), wanted.logits[:, -1], rtol=1e-5, atol=1e-5)
        cache = packed.unpack_cache(first.past_key_values)
        assert cache.get_seq_length() == T
        got, then = (model(**step, past_key_values=c).logits for c in (cache, wanted.past_key_values))
    torch.testing.assert_close(got, then, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "attn"), [("llama", "sdpa"), ("gpt2", "eager")])
def test_the_graph_knows_the_documents(kind: str, attn: str) -> None:
    model, (ids, mask) = build(kind, attn), batch("right")
    packed = effopt.prepack(model, ids, mask)
    torch._dynamo.reset()
    with torch.no_grad(), effopt.record() as report:
        compiled = torch.compile(model, backend="effopt", options={"lowering": "eager"})
        out = compiled(**packed.inputs).logits
        wanted = padded(model, ids, mask, use_cache=False).logits
    torch.testing.assert_close(packed.unpack(out), wanted * mask[..., None], rtol=1e-5, atol=1e-5)
    notes = [a.note for a in report.applied if a.pass_name == "recover-mask-structure"]
    assert notes == ["keys from the first .. 0 of the query, documents"] * 2


CACHED = [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa")]


@pytest.mark.parametrize(("kind", "attn"), CACHED)
def test_generate_goes_on_from_a_packed_prefill(kind: str, attn: str) -> None:
    """Its own prefill is one token a prompt; in the packed one the graph knows the documents."""
    wide = {"initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
    model, (ids, mask) = build(kind, attn, **wide), batch("left")
    packed = effopt.prepack(model, ids, mask)
    run = torch.compile(effopt.PackedPrefill(model), backend="effopt", options={"lowering": "eager"})
    with torch.no_grad(), effopt.record() as report:
        cache = packed.unpack_cache(run(**packed.inputs_of_prefill).past_key_values)
    notes = [a.note for a in report.applied if a.pass_name == "recover-mask-structure"]
    assert notes == ["keys from the first .. 0 of the query, documents"] * 2
    assert cache.get_seq_length() == T
    cache.crop(-1)
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    wanted = model.generate(ids, **given)
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(model.generate(ids, **given, past_key_values=cache), wanted)
    assert len(wanted[:, T:].unique()) > 6
    # Six calls of one token a prompt each: what was packed is not computed again.
    one = {"input_ids": ids[:, :1], "use_cache": False}
    with torch.no_grad(), FlopCounterMode(display=False) as single:
        model(**one)
    products = [
        {str(op): n for op, n in c.get_flop_counts()["Global"].items() if op in MATMULS}
        for c in (counter, single)
    ]
    assert products[0]
    assert products[0] == {op: 6 * n for op, n in products[1].items()}


def test_a_packed_prefill_is_refused_as_its_mask_is() -> None:
    with pytest.raises(EffoptError, match="would open the window"):
        effopt.PackedPrefill(build("mistral", sliding_window=4))


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_blocks_are_skipped(cached: bool) -> None:
    """Rows long enough that the predicted cost of a kernel that skips is the least."""
    model = build("llama", max_position_embeddings=2048)
    lengths = torch.tensor([2048, 700, 500, 400, 300])
    mask = (torch.arange(2048) < lengths[:, None]).long()
    ids = torch.randint(1, 64, mask.shape) * mask
    packed = effopt.prepack(model, ids, mask)
    assert packed.input_ids.shape == (2, 2048)
    torch._dynamo.reset()
    with torch.no_grad(), effopt.record() as report:
        run, inputs = (
            (effopt.PackedPrefill(model), packed.inputs_of_prefill) if cached else (model, packed.inputs)
        )
        out = torch.compile(run, backend="effopt")(**inputs).logits
        wanted = padded(model, ids, mask, use_cache=False).logits
    torch.testing.assert_close(packed.unpack(out), wanted * mask[..., None], rtol=1e-4, atol=1e-5)
    kernels = [r.kernel for g in report.graphs for r in g.lowerings if r.op == "attention"]
    assert kernels == ["blocks"] * 2


def test_batches_that_are_refused() -> None:
    model, (ids, mask) = build("gpt2"), batch("right")
    none, holes = mask.clone(), mask.clone()
    none[2], holes[1, 4] = 0, 0
    long = torch.ones(1, 40, dtype=torch.int64)
    for wrong, length, reason in (
        ((ids, none), None, "prompt 2 has no token"),
        ((ids, holes), None, "prompt 1 has padding between"),
        ((ids, mask[:, :-1]), None, r"one shape \[b, t\]"),
        ((ids, mask), 19, "make `length` larger"),
        ((long, long), None, "40 tokens, and GPT2LMHeadModel has 32 positions"),
        ((ids[:0], mask[:0]), None, r"got a batch \(0, "),
        ((ids[:, :0], mask[:, :0]), None, r"got a batch \(\d+, 0\)"),
    ):
        with pytest.raises(EffoptError, match=reason):
            effopt.prepack(model, *wrong, length=length)


BLOOM = {"hidden_size": 32, "n_head": 4, "n_layer": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        ("bloom", BLOOM, "does not keep packed prompts apart"),
        ("mamba", {"state_size": 4, "num_hidden_layers": 1}, "'linear_attention', to which"),
    ],
)
def test_models_that_do_not_keep_prompts_apart_are_refused(
    kind: str, config: dict[str, Any], reason: str, dtype: torch.dtype
) -> None:
    """In 16 bits too, where rounding is as large as what BLOOM makes of it."""
    made = transformers.AutoConfig.for_model(kind, vocab_size=64, pad_token_id=0, **config)
    model = transformers.AutoModelForCausalLM.from_config(made).eval().to(dtype)
    with pytest.raises(EffoptError, match=reason):
        effopt.prepack(model, *batch("right"))


def test_a_model_is_tried_once_and_again_with_another_attention() -> None:
    model, calls = build("llama"), []
    model.register_forward_hook(lambda *_: calls.append(1))
    effopt.prepack(model, *batch("right"))
    tried = len(calls)
    assert tried == 3  # packed, and each prompt alone
    effopt.prepack(model, *batch("left"))
    effopt.prepack(torch.compile(model, backend="eager"), *batch("both"))
    assert len(calls) == tried
    model.set_attn_implementation("eager")
    effopt.prepack(model, *batch("right"))
    assert len(calls) == 2 * tried


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_trial_in_float32_leaves_a_model_of_16_bits_as_it_is(dtype: torch.dtype) -> None:
    model, (ids, mask) = build("llama").to(dtype), batch("left")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    effopt.prepack(model, ids, mask)
    after = model.state_dict()
    assert all(x.dtype == after[name].dtype and torch.equal(x, after[name]) for name, x in before.items())


def test_models_that_are_refused() -> None:
    model, inputs = build("llama"), batch("right")
    with pytest.raises(EffoptError, match="training mode"):
        effopt.prepack(model.train(), *inputs)
    with pytest.raises(EffoptError, match="no model of transformers"):
        effopt.prepack(torch.nn.Linear(2, 2), *inputs)
    model.eval().config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(EffoptError, match="'chunked_attention', to which"):
        effopt.prepack(model, *inputs)
    windows = effopt.prepack(build("mistral", sliding_window=4), *inputs)
    with pytest.raises(EffoptError, match="would open the window"):
        windows.inputs_with_cache(torch.float32)
