"""AdamW with one-byte moments, and AdamW on bf16 weights."""

import pytest
import torch

from mnemic.optim.apollo import Apollo
from mnemic.optim.eightbit import dequantize, quantize, zeros


def test_moments_come_back_close_and_second_moments_never_vanish():
    exp_avg = torch.randn(1000) * torch.logspace(-3, 0, 1000)
    exp_avg_sq = torch.logspace(-7, 0, 1000)
    state = zeros(torch.empty(1000))
    quantize(state, slice(0, 1000), exp_avg, exp_avg_sq)
    back, back_sq = dequantize(state, slice(0, 1000))
    scale = torch.nn.functional.pad(exp_avg, (0, 24)).view(4, 256).abs().amax(1)
    assert ((back - exp_avg).abs() <= 0.02 * scale.repeat_interleave(256)[:1000]).all()
    assert (back_sq >= exp_avg_sq * (1 - 1e-5)).all() and (back_sq > 0).all()
    assert ((back_sq - exp_avg_sq).abs() <= 0.02 * exp_avg_sq.max()).all()
    assert state["exp_avg"].dtype == torch.int8 and state["exp_avg_sq"].dtype == torch.uint8


def problem(rule: str, dtype: torch.dtype, steps: int = 150) -> float:
    """Mean squared distance to a target after training on noisy gradients."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(90, 100, generator=generator)
    weight = torch.nn.Parameter(torch.zeros(90, 100, dtype=dtype))
    optimizer = Apollo([weight], lr=0.05, rule=rule)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        noise = 0.3 * torch.randn(90, 100, generator=generator)
        weight.grad = (weight.detach().float() - target + noise).to(dtype)
        optimizer.step()
    return float((weight.detach().float() - target).square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_ends_where_fp32_moments_end(dtype):
    exact, eight = problem("adamw", dtype), problem("adamw8bit", dtype)
    assert exact < 0.02 and eight < 1.3 * exact + 1e-3


def test_adamw_is_torch_adamw():
    ours = [torch.nn.Parameter(torch.randn(30, 40)), torch.nn.Parameter(torch.randn(7))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    a = Apollo(ours, lr=0.01, weight_decay=0.1, rule="adamw")
    b = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, fused=True)
    for _ in range(20):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_bf16_weights_move_by_updates_below_half_a_unit():
    """lr 1e-5 on weights of 1: nearest rounding keeps every one of them where it was."""
    moved = {}
    for rounding in ("stochastic", "nearest"):
        weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = Apollo([weight], lr=1e-5, rule="adamw", rounding=rounding)
        for _ in range(100):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        moved[rounding] = 1 - float(weight.float().mean())
        assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.float32
    assert abs(moved["stochastic"] - 1e-3) < 2e-4 and moved["nearest"] == 0


@pytest.mark.parametrize("rule", ["adamw", "adamw8bit", "apollo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_transposed_weight_trains_as_a_plain_one(rule, dtype):
    """Gradients and state in another memory order than rows: nothing may work on a lost copy."""
    start = torch.randn(100, 90).to(dtype)
    plain = torch.nn.Parameter(start.clone())
    turned = torch.nn.Parameter(start.t().contiguous().t())
    pair = [(p, Apollo([p], lr=0.01, rule=rule)) for p in (plain, turned)]
    for _ in range(6):
        grad = torch.randn(100, 90).to(dtype)
        plain.grad, turned.grad = grad.clone(), grad.t().contiguous().t()
        for _, optimizer in pair:
            optimizer.step()
    assert not turned.is_contiguous() and (plain != start).float().mean() > 0.5
    torch.testing.assert_close(turned.detach(), plain.detach(), rtol=1e-5, atol=1e-6)
