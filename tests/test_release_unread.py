"""Option `release_weights` also frees what a plan leaves unread: skipped layers, shared projections."""

from __future__ import annotations

import pytest
import torch

import effopt
from tests.models.architectures import build
from tests.models.eager_twin import relative, twin_of


def test_skipped_layers_and_shared_projections_are_freed() -> None:
    model, inputs = build("llama", num_hidden_layers=4)
    twin = twin_of(model, keep=0.5, share=2)
    passes = "skip-layers{keep=0.5},share-kv-across-layers{group=2}"
    options = {"passes": passes, "release_weights": True, "lowering": "eager"}
    compiled = torch.compile(model, backend="effopt", options=options)
    ids = inputs["input_ids"]
    with torch.no_grad():
        for given in (ids, ids[:, :1], ids[:1, :7]):  # graphs that come after the memory is gone
            assert relative(compiled(given).logits, twin(given).logits) < 2e-5
    left = {n: p.untyped_storage().nbytes() for n, p in model.named_parameters()}
    freed = {n for n, size in left.items() if not size}
    layers = [{n for n in left if n.startswith(f"model.layers.{i}.")} for i in (1, 2)]
    shared = {f"model.layers.3.self_attn.{p}_proj.weight" for p in "kv"}
    assert freed == {*layers[0], *layers[1], *shared}
    with pytest.raises(effopt.ReleasedWeightError, match=r"model\.layers\.1"):
        model(ids)


def test_a_model_that_nothing_was_taken_from_keeps_everything() -> None:
    model, inputs = build("llama", num_hidden_layers=4)
    options = {"passes": "skip-layers{keep=1.0}", "release_weights": True, "lowering": "eager"}
    with torch.no_grad():
        torch.compile(model, backend="effopt", options=options)(**inputs)
    assert all(p.untyped_storage().nbytes() for p in model.parameters())
