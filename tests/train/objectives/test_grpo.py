"""The objective's rollouts: which rows they give, with which advantages, and what a step without
any difference does.
"""

import pytest
import torch
from memory_support import MEMORY

from mnemic.models.generation import Generated
from mnemic.models.memory.episode import MemoryConfig
from mnemic.models.memory.rule_reader import RuleReader
from mnemic.models.tiny import byte_tokenizer, tiny_llama
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.data.stream import Stage
from mnemic.train.objectives.grpo import PolicyObjective
from mnemic.train.objectives.policy import PREFIX
from mnemic.train.recipe.memory import GrpoObjective, Rewards

TOKENIZER = byte_tokenizer(512)
ROW = EpisodeRow(
    "a", "test", ("anna city rome", "anna city now oslo"),
    tuple(Question("anna city?", ("oslo",), "updated", (1,), ("rome",)) for _ in range(6)), "em",
    (
        ({"op": "insert", "key": "anna city", "content": "anna city rome"},),
        ({"op": "update", "key": "anna city", "content": "anna city oslo"},),
    ),
)  # fmt: skip


class Rows(Stage):
    """The same episode, over and over."""

    taken = 0

    def __next__(self):
        self.taken += 1
        return ROW

    def state_dict(self):
        return {"taken": self.taken}

    def load_state_dict(self, state):
        self.taken = state["taken"]


class Script:
    """Writes for rollout n what `texts[n]` says, chunk by chunk."""

    def __init__(self, texts):
        self.texts, self.turn = texts, 0

    def prepare(self):
        self.turn = 0

    def __call__(self, prompts, seeds):
        eos = TOKENIZER.eos_token_id
        made = [TOKENIZER(t[self.turn % 2]).input_ids for t in self.texts]
        self.turn += 1
        return [Generated([*ids, eos], False) for ids in made]


GOOD, STALE, SILENT = (
    ("+ anna city rome", "= m0 anna city oslo"),
    ("+ anna city rome", "+ anna city oslo"),
    ("noop", "noop"),
)


def objective(texts, micro=8, **changes):
    model = tiny_llama(TOKENIZER, hidden_size=32, layers=1, heads=4, max_position=512, seed=0)
    part = GrpoObjective(num_generations=len(texts), max_length=512, **changes)
    return PolicyObjective(
        Rows(), part, MemoryConfig(**{**MEMORY, "max_new_tokens": 64}), model=model,
        reference=model, generator=Script(texts), answerer=RuleReader(), tokenizer=TOKENIZER,
        batch_size=len(texts), micro_batch_size=micro, seed=0,
    )  # fmt: skip


def test_each_chunk_is_a_row_with_its_own_prompt_and_the_sampled_ids():
    made = objective([GOOD, STALE, SILENT])
    (batch,) = made.microbatches(1)
    assert len(made.rows) == 6
    texts = {(TOKENIZER.decode(r.prompt), TOKENIZER.decode(r.completion)) for r in made.rows}
    second = "memory:\nm0 anna city rome\nnew:\nanna city now oslo\nops:\n"
    assert (second, "= m0 anna city oslo<|end|>") in texts
    assert (second.replace("m0 anna city rome\n", ""), "noop<|end|>") in texts
    best = {r.advantage for r in made.rows if "= m0" in TOKENIZER.decode(r.completion)}
    assert best and min(best) > 0 > min(r.advantage for r in made.rows)
    assert batch.weight == sum(len(r.completion) for r in made.rows)
    assert len(batch.tensors[PREFIX + "advantage"]) == batch.weight
    metrics = made.metrics()
    assert metrics["reward/correct"] == pytest.approx(1 / 3)
    assert metrics["reward/stale"] == pytest.approx(-1 / 3)
    assert metrics["memory/updates"] == pytest.approx(1 / 3)


def test_a_counterfactual_praises_the_turn_that_made_the_answer():
    """Turn rewards alone, by turn: at the second chunk the update is worth all of the answer."""
    part = {"rewards": Rewards(valid=0, supported=0, compression=0, counterfactual=1.0),
            "credit": "mixed", "scale": False}  # fmt: skip
    made = objective([GOOD, SILENT], **part)
    made.microbatches(1)
    by_text = {TOKENIZER.decode(r.completion): r.advantage for r in made.rows}
    # The answer is worth +-0.5; each turn of the good one adds half of its own worth to that.
    assert by_text["= m0 anna city oslo<|end|>"] == pytest.approx(1.0)
    assert by_text["+ anna city rome<|end|>"] == pytest.approx(1.0)
    half = objective([STALE, SILENT], **part)
    half.microbatches(1)
    # The stale entry of its first turn hides the right one of its second: 0 - 1, of four turns.
    assert half.metrics()["reward/counterfactual"] == -0.25


def test_a_group_without_any_difference_gives_no_rows_and_a_step_that_changes_nothing():
    made = objective([SILENT, SILENT])
    batches = made.microbatches(1)
    assert made.rows == [] and made.stream.taken == 3  # drawn anew twice
    assert made.metrics()["rollout/tries"] == 3
    (batch,) = batches
    loss, _ = made.loss(made.model, batch)
    (loss / batch.weight).backward()
    assert batch.weight == 1
    assert all(p.grad is None or not p.grad.any() for p in made.model.parameters())


def test_rows_are_dealt_into_micro_batches_and_give_one_gradient():
    def gradient(micro):
        made = objective([GOOD, STALE, SILENT], micro, beta=0.1)
        batches = made.microbatches(1)
        total = sum(b.weight for b in batches)
        for batch in batches:
            loss, sums = made.loss(made.model, batch)
            (loss / total).backward()
            assert "policy/kl_sum" in sums
        return len(batches), {n: p.grad.clone() for n, p in made.model.named_parameters()}

    one, whole = gradient(8)
    six, parts = gradient(1)
    assert (one, six) == (1, 6)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-7)


def test_rollouts_are_used_again_with_the_ratio_to_the_policy_that_wrote_them():
    made = objective([GOOD, STALE, SILENT], reuse=2)
    (first,) = made.microbatches(1)
    rows = made.rows
    assert made.stream.taken == 1 and PREFIX + "old" in first.tensors
    with torch.no_grad():
        for param in made.model.parameters():
            param.add_(torch.randn_like(param) * 0.3)
    state = made.state_dict()
    (again,) = made.microbatches(2)
    assert made.rows is rows and made.stream.taken == 1
    _, sums = made.loss(made.model, again)
    assert sums["policy/clipped_tokens"] > 0
    back = objective([GOOD, STALE, SILENT], reuse=2)
    back.load_state_dict(state)
    (same,) = back.microbatches(2)
    for key, value in again.tensors.items():
        assert torch.equal(same.tensors[key], value), key
    made.microbatches(3)
    assert made.stream.taken == 2


def test_questions_are_drawn_anew_each_step_up_to_the_limit():
    made = objective([GOOD, STALE], max_questions=2)
    drawn = {tuple(made._questions(ROW, step, 0)) for step in range(20)}
    assert all(len(d) == 2 for d in drawn) and len(drawn) > 5
    assert made._questions(ROW, 3, 0) == made._questions(ROW, 3, 0)
