"""The policy-gradient loss: equal to TRL's GRPOTrainer for the same rows; closed forms."""

import pytest
import torch

from mnemic.models.tiny import byte_tokenizer, tiny_llama
from mnemic.train.objectives.policy import PREFIX, PolicyRow, policy_batch, policy_loss
from mnemic.train.objectives.tokens import token_batch, token_logprobs


def model_and_rows():
    tokenizer = byte_tokenizer(256)
    model = tiny_llama(tokenizer, hidden_size=32, layers=2, heads=4, max_position=256, seed=0)
    draw = torch.Generator().manual_seed(1)
    rows = []
    for n, m, advantage in ((5, 7, 0.7), (9, 3, -1.2), (4, 12, 0.1), (11, 1, -0.4)):
        ids = torch.randint(0, 256, (n + m,), generator=draw).tolist()
        old = (-6 + torch.rand(m, generator=draw)).tolist()
        reference = (-6 + torch.rand(m, generator=draw)).tolist()
        rows.append(PolicyRow(ids[:n], ids[n:], advantage, 1.0, old, reference))
    return tokenizer, model, rows


def ours(model, rows, loss, *, low=0.2, high=0.28, beta=0.0, constant=16):
    batch = policy_batch(rows, loss=loss, constant=constant, pad_id=257)
    own = {k: v for k, v in batch.tensors.items() if not k.startswith(PREFIX)}
    logprobs = token_logprobs(model, token_batch(type(batch)(own, 1.0)))
    total, sums = policy_loss(logprobs, batch, clip_low=low, clip_high=high, beta=beta)
    return total / batch.weight, sums


def trl_loss(model, tokenizer, rows, loss, tmp_path, *, beta, old, constant=16):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    config = trl.GRPOConfig(
        output_dir=str(tmp_path), loss_type=loss, beta=0.0, epsilon=0.2, epsilon_high=0.28,
        per_device_train_batch_size=len(rows), num_generations=len(rows),
        max_completion_length=constant, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, temperature=1.0, mask_truncated_completions=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=model, reward_funcs=lambda completions, **kw: [0.0] * len(completions), args=config,
        train_dataset=Dataset.from_list([{"prompt": "a"}] * 8), processing_class=tokenizer,
    )  # fmt: skip
    prompt = max(len(r.prompt) for r in rows)
    answer = max(len(r.completion) for r in rows)

    def padded(lists, size, left, value):
        out = torch.full((len(lists), size), value, dtype=torch.tensor(lists[0]).dtype)
        for row, values in zip(out, lists, strict=True):
            span = slice(size - len(values), None) if left else slice(0, len(values))
            row[span] = torch.tensor(values)
        return out

    inputs = {
        "prompt_ids": padded([r.prompt for r in rows], prompt, True, 257),
        "prompt_mask": padded([[1] * len(r.prompt) for r in rows], prompt, True, 0),
        "completion_ids": padded([r.completion for r in rows], answer, False, 257),
        "completion_mask": padded([[1] * len(r.completion) for r in rows], answer, False, 0),
        "advantages": torch.tensor([r.advantage for r in rows]),
        "num_items_in_batch": torch.tensor(sum(len(r.completion) for r in rows)),
    }
    if old:
        inputs["old_per_token_logps"] = padded([r.old for r in rows], answer, False, 0.0)
    if beta:
        inputs["ref_per_token_logps"] = padded([r.reference for r in rows], answer, False, 0.0)
    trainer.current_gradient_accumulation_steps = 1
    # Set late: at the start it would load a second model by its hub name as the reference.
    trainer.beta = beta
    return trainer._compute_loss(trainer.model, inputs)


@pytest.mark.parametrize("loss", ["dapo", "grpo", "dr_grpo"])
@pytest.mark.parametrize(("old", "beta"), [(False, 0.0), (True, 0.0), (True, 0.04)])
def test_the_loss_and_its_gradient_are_trls(tmp_path, monkeypatch, loss, old, beta):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    tokenizer, model, rows = model_and_rows()
    given = [
        PolicyRow(r.prompt, r.completion, r.advantage, 1.0, r.old if old else None, r.reference)
        for r in rows
    ]
    value, _ = ours(model, given, loss, beta=beta)
    value.backward()
    mine = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    theirs = trl_loss(model, tokenizer, given, loss, tmp_path, beta=beta, old=old)
    theirs.backward()
    assert float(value.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6, abs=1e-7)
    for name, param in model.named_parameters():
        scale = float(param.grad.abs().max())
        assert torch.allclose(mine[name], param.grad, rtol=1e-5, atol=1e-6 * max(scale, 1e-3)), name


def test_micro_batches_add_up_to_the_whole():
    _, model, rows = model_and_rows()
    whole, _ = ours(model, rows, "grpo", beta=0.1)
    parts = [ours(model, rows[:1], "grpo", beta=0.1)[0], ours(model, rows[1:], "grpo", beta=0.1)[0]]
    joined = (parts[0] + 3 * parts[1]) / 4
    assert float(whole.detach()) == pytest.approx(float(joined.detach()), rel=1e-5)


def test_a_ratio_outside_the_clip_has_no_gradient_where_the_advantage_would_push_it_on():
    logprobs = torch.tensor([0.5, -0.5, 0.5, -0.5], requires_grad=True)
    rows = [PolicyRow([1], [1], a, 1.0, [0.0], None) for a in (1.0, 1.0, -1.0, -1.0)]
    batch = policy_batch(rows, loss="dapo", constant=1, pad_id=0)
    total, sums = policy_loss(logprobs, batch, clip_low=0.2, clip_high=0.2, beta=0.0)
    total.backward()
    assert sums["policy/clipped_tokens"] == 2
    assert logprobs.grad[0] == 0 and logprobs.grad[3] == 0
    assert logprobs.grad[1] < 0 < logprobs.grad[2]


def test_a_factor_of_one_over_the_turns_takes_the_length_of_an_episode_out():
    """Four turns of one rollout at a quarter each pull as much as one turn of another."""
    _, model, rows = model_and_rows()
    one = rows[0]
    quarters = [PolicyRow(one.prompt, one.completion, 1.0, 0.25) for _ in range(4)]
    alone = PolicyRow(one.prompt, one.completion, -1.0, 1.0)
    value, _ = ours(model, [*quarters, alone], "dapo")
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-6)
    unweighted = [PolicyRow(one.prompt, one.completion, 1.0) for _ in range(4)]
    value, _ = ours(model, [*unweighted, alone], "dapo")
    assert float(value.detach()) == pytest.approx(-0.6, abs=1e-6)
