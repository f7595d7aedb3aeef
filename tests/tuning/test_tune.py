"""`effopt.tune` on models and passes of known cost, and that its plans do what was judged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import effopt
from effopt.quality.logits import row_sums
from effopt.testing.quality import Text, Tier
from tests.models.architectures import build
from tests.tuning.synthetic import PLUGINS, SPECS, Terms, kl_of, left_of

AMOUNTS = (1.5, 0.02, 0.3, -0.2, 0.05)


def ids(rows: int = 2, length: int = 8, vocabulary: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def batches(vocabulary: int = 2, length: int = 8, count: int = 3) -> list[torch.Tensor]:
    return [ids(2, length, vocabulary, seed) for seed in range(count)]


def decisions(plan: effopt.Plan) -> dict[tuple[str, int], Any]:
    return {
        (section.name, int(entry.path.split(".")[1])): entry.decision
        for section in plan.sections
        for entry in section.entries
        if entry.decision is not None
    }


def compiled(model: nn.Module, plan: effopt.Plan, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(
        model, backend="effopt", options={"plans": plan, "lowering": "eager", "verify": "off", **options}
    )


@pytest.mark.parametrize("limit", [1e-5, 1e-3, 0.01, 0.05, 0.3])
def test_what_two_passes_of_known_cost_may_do(limit: float) -> None:
    """Against the closed form: what is accepted fits, is measured right, and nothing more fits beside it."""
    plan = effopt.tune(Terms(*AMOUNTS), batches(), f"kl<={limit}", SPECS, plugins=PLUGINS)
    report, taken = plan.report, decisions(plan)
    assert {(c.pass_name, int(c.path.split(".")[1])) for c in report.accepted} == set(taken)
    kl = kl_of(AMOUNTS, left_of(AMOUNTS, taken))
    assert kl <= limit
    for split in ("calibration", "validation"):
        assert report.compressed[split]["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-7)
        assert report.uncompressed[split] == pytest.approx(
            report.uncompressed[split] | {"kl": 0, "agreement": 1}
        )
    assert len(report.choices) == 15
    for choice in report.choices:
        number = int(choice.path.split(".")[1])
        alone = kl_of(AMOUNTS, left_of(AMOUNTS, {(choice.pass_name, number): choice.decision}))
        assert choice.alone is not None
        assert choice.alone["kl"] == pytest.approx(alone, rel=1e-3, abs=1e-7)
        assert choice.budget_share == pytest.approx(alone / limit, rel=1e-3, abs=1e-5 / limit)
        assert 0 < choice.saving < 1
        assert choice.is_accepted != bool(choice.reason)
    assert report.cost_after.seconds < report.cost_before.seconds
    assert report.measurements < 15 + 30


def test_a_plan_is_the_same_twice_and_survives_its_file(tmp_path: Path) -> None:
    model = Terms(*AMOUNTS)
    one, other = (effopt.tune(model, batches(), "kl<=0.01", SPECS, plugins=PLUGINS) for _ in range(2))
    assert one == other
    assert one.report.to_json() == other.report.to_json()
    one.save(tmp_path / "plan.json")
    assert effopt.Plan.load(tmp_path / "plan.json") == one
    data = json.loads(one.report.to_json(tmp_path / "report.json"))
    assert data["format"] == "effopt-tuning/1"
    assert data["choices"][0].keys() >= {"path", "decision", "saving", "budget_share", "reason"}
    assert "accepted" in str(one.report)


def test_the_passes_that_are_registered_take_part_by_default() -> None:
    plan = effopt.tune(Terms(*AMOUNTS), batches(), "kl<=0.01", plugins=PLUGINS)
    assert {c.pass_name for c in plan.report.choices} >= {"fade-terms", "bypass-terms", "skip-layers"}


def test_an_impossible_budget_gives_the_empty_plan_and_says_so() -> None:
    model = Terms(*AMOUNTS)
    plan = effopt.tune(model, batches(), "bits_per_byte<=0.01", SPECS, plugins=PLUGINS)
    assert plan.sections == ()
    assert "bits_per_byte<=0.01" in plan.report.impossible
    assert plan.report.summary().startswith("Nothing fits bits_per_byte<=0.01: for the uncompressed model")
    assert plan.report.accepted == ()
    assert plan.report.cost_after == plan.report.cost_before
    with torch.no_grad():
        assert torch.equal(compiled(model, plan)(ids()), model(ids()))


def test_a_relative_limit_is_relative_to_the_uncompressed_model() -> None:
    plan = effopt.tune(Terms(*AMOUNTS), batches(), "bits_per_byte<=1.001x", SPECS, plugins=PLUGINS)
    for split, figures in plan.report.compressed.items():
        assert figures["bits_per_byte"] <= 1.001 * plan.report.uncompressed[split]["bits_per_byte"]
    assert plan.report.accepted


def test_what_is_nan_or_refuses_is_reverted_with_that_reason() -> None:
    specs = ["fade-terms{keep=1.0,poison=layers.1.linear,refuse=layers.2.linear}"]
    plan = effopt.tune(Terms(*AMOUNTS), batches(), "kl<=0.05", specs, plugins=PLUGINS)
    reasons = {c.path: c.reason for c in plan.report.choices}
    assert reasons["layers.1.linear"] == "alone, kl is nan (calibration; kl<=0.05)"
    assert "this one never works" in reasons["layers.2.linear"]
    assert sorted(decisions(plan)) == [("fade-terms", 0), ("fade-terms", 3), ("fade-terms", 4)]
    assert json.loads(plan.report.to_json())


def test_a_choice_that_saves_nothing_is_refused() -> None:
    plan = effopt.tune(Terms(*AMOUNTS), batches(), "kl<=9", "fade-terms", plugins=PLUGINS, objective="bytes")
    assert plan.report.accepted
    copying = effopt.tune(
        build("llama")[0], batches(100), "kl<=9", "quantize-weights{include=*_proj}", objective="flops"
    )
    assert copying.sections == ()
    assert {c.reason for c in copying.report.choices} == {"it saves no flops"}
    assert {c.alone for c in copying.report.choices} == {None}


def figures(model: nn.Module, run: Any, calls: list[torch.Tensor]) -> dict[str, float]:
    sums = torch.zeros(3, dtype=torch.float64)
    count = 0
    with torch.no_grad():
        for tokens in calls:
            counted = torch.ones_like(tokens, dtype=torch.bool)
            counted[:, -1] = False
            rows = row_sums(run(tokens).logits, model(tokens).logits, tokens.roll(-1, 1), counted)
            sums += torch.stack([row.sum() for row in rows])
            count += int(counted.sum())
    nats, agreed, kl = (sums / count).tolist()
    return {"kl": kl, "agreement": agreed, "bits_per_byte": nats / torch.tensor(2.0).double().log().item()}


@pytest.mark.parametrize(
    ("layers", "budget", "specs", "changed"),
    [
        (2, "kl<=0.0005", None, {"quantize-weights"}),
        (
            3,
            "kl<=0.05",
            ["skip-layers{layers=[2]}", "share-kv-across-layers", "quantize-weights{include=*.down_proj}"],
            {"skip-layers", "share-kv-across-layers", "quantize-weights"},
        ),
    ],
)
def test_a_llama_runs_what_was_judged(layers: int, budget: str, specs: Any, changed: set[str]) -> None:
    """The compiled plan has exactly the metrics that were reported; then it generates."""
    model, _ = build("llama", num_hidden_layers=layers, use_cache=True)
    given = batches(100, 12)
    plan = effopt.tune(model, given, budget, specs)
    assert {section.name for section in plan.sections} == changed
    again = effopt.Plan.from_json(plan.to_json())
    assert again == plan
    run = compiled(model, again)
    want = plan.report.compressed
    assert figures(model, run, given[:2])["kl"] == want["calibration"]["kl"]
    assert figures(model, run, given[2:]) == pytest.approx(want["validation"], rel=1e-12)

    if layers == 3:  # token by token with a cache of what is left, and all tokens at once: the same choices
        model.forward = compiled(model.forward, again)
        cache = effopt.cache_for(model, again)
        tokens = model.generate(ids(1, 5, 100), past_key_values=cache, max_new_tokens=4, do_sample=False)
        with torch.no_grad():
            assert torch.equal(model(tokens).logits[:, 4:-1].argmax(-1), tokens[:, 5:])


def test_sites_of_skipped_layers_are_left_in_the_plan() -> None:
    """Everything fits: the linear layers of a skipped layer are gone, and the plan says that they stay."""
    model, _ = build("llama", num_hidden_layers=3)
    plan = effopt.tune(model, batches(100), "kl<=50", ["skip-layers", "quantize-weights{include=*.up_proj}"])
    skipped, quantised = plan.sections
    gone = [e.path for e in skipped.entries if e.decision]
    assert len(gone) == 2
    linear = [e for e in quantised.entries if e.kind.startswith("linear")]
    assert len(linear) == 3 * 7 + 1
    for entry in linear:
        is_there = entry.path.endswith("up_proj") and not any(
            entry.path.startswith(f"{path}.") for path in gone
        )
        assert (entry.decision is not None) == is_there
    moot = [c for c in plan.report.reverted if "leaves nothing of it to change" in c.reason]
    assert {c.path for c in moot} >= {f"{path}.mlp.up_proj" for path in gone}


class Broken(nn.Module):
    """A model that Dynamo cuts in two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.last = nn.Embedding(20, 32), nn.Linear(32, 32), nn.Linear(32, 20)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.first(self.embed(input_ids)).tanh()
        torch._dynamo.graph_break()
        return self.last(x)


def test_a_model_with_a_graph_break() -> None:
    model = Broken().eval()
    plan = effopt.tune(model, batches(20), "kl<=0.01", "quantize-weights")
    assert len(plan.sections[0].graphs) == 2
    assert len(plan.report.accepted) == 2
    with torch.no_grad(), effopt.record() as report:
        compiled(model, plan)(ids(vocabulary=20))
    assert report.ops["quantized_linear"] == 2


def test_texts_and_masks_say_what_counts() -> None:
    model = Terms(*AMOUNTS)
    texts = [Text(str(i), ids(1, 20 + i, seed=i)[0]) for i in range(5)]
    tier = Tier(context=16, stride=16, rows=2)
    plan = effopt.tune(model, texts, "kl<=0.01", SPECS, tier=tier, plugins=PLUGINS)
    masked = [{"input_ids": b, "attention_mask": torch.tensor([[1] * 6 + [0] * 2] * 2)} for b in batches()]

    class Masked(Terms):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids) + (1 - attention_mask[..., None]) * 1e4

    other = effopt.tune(Masked(*AMOUNTS), masked, "kl<=0.01", SPECS, plugins=PLUGINS)
    assert [c.is_accepted for c in other.report.choices] == [c.is_accepted for c in plan.report.choices]


def test_one_batch_is_split_by_rows() -> None:
    plan = effopt.tune(Terms(*AMOUNTS), [{"input_ids": ids(3)}], "kl<=0.01", SPECS, plugins=PLUGINS)
    assert plan.report.accepted


two = [torch.zeros(1, 4, dtype=torch.long)] * 2


@pytest.mark.parametrize(
    ("given", "budget", "specs", "words"),
    [
        ([], "kl<=1", SPECS, "there are no batches to tune on"),
        ([two[0]], "kl<=1", SPECS, "one batch of 1 row cannot be split"),
        ([t[:, :1] for t in two], "kl<=1", SPECS, r"\[1, 1\] predicts nothing"),
        ([t[:0] for t in two], "kl<=1", SPECS, r"\[0, 4\] predicts nothing"),
        ([t.float() for t in two], "kl<=1", SPECS, "no token ids, int64"),
        ([Text("a", two[0][0])], "kl<=1", SPECS, "one text cannot be split"),
        ([Text("a", two[0][0]), two[0]], "kl<=1", SPECS, "partly texts and partly calls"),
        (two, "", SPECS, "the budget must be text such as 'kl<=0.05'"),
        (two, "perplexity<=3", SPECS, "unknown metric of the budget 'perplexity'"),
        (two, "agrement>=0.9", SPECS, "Did you mean 'agreement'"),
        (two, "kl", SPECS, "cannot read 'kl' in the budget"),
        (two, "kl>=0.05", SPECS, "kl is bounded with <=: write 'kl<=0.05'"),
        (two, "kl<=-1", SPECS, "kl cannot be bounded by -1"),
        (two, "kl<=nan", SPECS, "kl cannot be bounded by nan"),
        (two, "kl<=many", SPECS, "'many' in the budget is not a number"),
        (two, "agreement>=98", SPECS, "agreement cannot be bounded by 98"),
        (two, "kl<=1.1x", SPECS, "write it without x"),
        (two, "kl<=1,kl<=2", SPECS, "bounds 'kl' twice"),
        (two, "kl<=1", "fade-term", "Did you mean 'fade-terms'"),
        (two, "kl<=1", "remove-no-ops", "remove-no-ops is exact"),
        (two, "kl<=1", "quantize-weights,quantize-activations", "decides nothing place by place"),
        (two, "kl<=1", "skip-layers,drop-layers", "conflict"),
        (two, "kl<=1", "share-kv-across-layers", "share-kv-across-layers can change nothing in this model"),
    ],
)
def test_bad_input(given: Any, budget: str, specs: Any, words: str) -> None:
    with pytest.raises(effopt.EffoptError, match=words):
        effopt.tune(Terms(*AMOUNTS), given, budget, specs, plugins=PLUGINS)


def test_bad_models_and_objectives() -> None:
    with pytest.raises(effopt.OptionError, match=r"unknown objective 'second'.*Did you mean 'seconds'"):
        effopt.tune(Terms(1.0, 1.0), two, "kl<=1", SPECS, plugins=PLUGINS, objective="second")
    model = Terms(1.0, torch.nan)
    with pytest.raises(effopt.EffoptError, match="logits that are NaN"):
        effopt.tune(model, two, "kl<=1", SPECS, plugins=PLUGINS)
    with pytest.raises(effopt.EffoptError, match=r"the model gave \[1, 4\] for tokens \[1, 4\]"):
        effopt.tune(lambda tokens: tokens.float(), two, "kl<=1", SPECS, plugins=PLUGINS)
    with pytest.raises(effopt.EffoptError, match="in training mode"):
        effopt.tune(Terms(1.0, 1.0).train(), two, "kl<=1", SPECS, plugins=PLUGINS)
