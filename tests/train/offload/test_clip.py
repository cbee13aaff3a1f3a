"""Clipping of a streamed update: two ways are exact, two are what they say."""

import pytest
import torch
from streaming import (
    Batches,
    first_model,
    one_step,
    streamed_update,
    train_in_memory,
    train_streamed,
)

TILES = {"tile_elements": 2048, "small": 0}
LIMIT = 0.8  # below the norm of every step here


def distance(found, expected):
    return max(float((found[n] - w).norm() / w.norm().clamp(min=1e-6)) for n, w in expected.items())


@pytest.mark.parametrize("layout", [{}, TILES], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("rule", ["adamw", "mini", "mini_all"])
@pytest.mark.parametrize("clip", ["speculative", "exact_spill"])
def test_exact_clipping_is_the_plain_trainers(clip, rule, layout, tmp_path):
    objective = Batches(2)
    losses, weights, norms = train_in_memory("llama", rule, objective, 5, max_grad_norm=LIMIT)
    assert min(norms) > LIMIT, "nothing to clip"
    found = train_streamed(
        "llama", rule, objective, 5, tmp_path, clip=clip, max_grad_norm=LIMIT, **layout
    )
    assert found[0] == pytest.approx(losses, rel=1e-6) and found[2] == pytest.approx(norms, 1e-5)
    assert distance(found[1], weights) < 2e-5


@pytest.mark.parametrize("clip", ["speculative", "exact_spill"])
def test_a_limit_that_is_never_reached_changes_no_bit(clip, tmp_path):
    objective = Batches(1)
    free = train_streamed("llama_tied", "adamw", objective, 3, tmp_path / "a", **TILES)
    found = train_streamed(
        "llama_tied", "adamw", objective, 3, tmp_path / "b", clip=clip, max_grad_norm=1e9, **TILES
    )
    assert found[0] == free[0] and found[2] == pytest.approx(free[2], rel=1e-6)
    assert all(torch.equal(found[1][n], w) for n, w in free[1].items())


def test_speculation_is_taken_back_only_where_the_norm_was_too_large(tmp_path):
    update = streamed_update("llama", "adamw", tmp_path, clip="speculative", max_grad_norm=1e9)
    one_step(update, Batches(1), 1)
    assert update.redone == 0
    update.max_grad_norm = LIMIT
    one_step(update, Batches(1), 2)
    assert update.redone == 1
    assert float(update.applier.arena.view("lm_head.weight:step")) == 2, "a step counted twice"
    update.engine.close()


def test_host_memory_can_be_taken_back_too(tmp_path):
    objective = Batches(2)
    settings = {"clip": "speculative", "max_grad_norm": LIMIT, **TILES}
    ssd = train_streamed("llama", "adamw", objective, 3, tmp_path / "a", **settings)
    host = train_streamed("llama", "adamw", objective, 3, tmp_path / "b", kind="host", **settings)
    assert all(torch.equal(host[1][n], w) for n, w in ssd[1].items())


def test_previous_norm_scales_by_the_norm_of_the_step_before(tmp_path):
    """The first step has none before it; the second step's gradients tell the factor."""
    objective, name = Batches(1), "model.layers.1.self_attn.q_proj.weight"
    grads, norms = {}, {}
    for clip, limit in (("none", None), ("previous_norm", LIMIT)):
        update = streamed_update(
            "llama", "adamw", tmp_path / clip, clip=clip, max_grad_norm=limit, **TILES
        )
        whole, seen = update.applier.whole, []

        def watch(param, update=update, whole=whole, seen=seen):
            if update.engine.names[id(param)] == name:
                seen.append(param.grad.clone())
            whole(param)

        update.applier.whole = watch
        norms[clip] = [one_step(update, objective, step)[1] for step in (1, 2)]
        grads[clip] = seen
        update.engine.close()
    assert norms["previous_norm"] == norms["none"], "what is logged is the norm before clipping"
    first = norms["none"][0]
    assert torch.equal(grads["previous_norm"][0], grads["none"][0]) and first > LIMIT
    expected = grads["none"][1] * (LIMIT / (first + 1e-6))
    torch.testing.assert_close(grads["previous_norm"][1], expected)


def test_layer_clips_every_tensor_by_itself(tmp_path):
    update = streamed_update("llama", "adamw", tmp_path, clip="layer", max_grad_norm=1e-4, **TILES)
    seen = {}
    whole, tile = update.applier.whole, update.applier.tile

    def watch(param):
        seen[update.engine.names[id(param)]] = float(param.grad.norm())
        whole(param)

    def watch_tile(name, number, weight, grad, step):
        if "embed" in name or "lm_head" in name:
            seen[name] = (seen.get(name, 0.0) ** 2 + float(grad.norm()) ** 2) ** 0.5
        tile(name, number, weight, grad, step)

    update.applier.whole, update.applier.tile = watch, watch_tile
    _, norm = one_step(update, Batches(1), 1)
    update.engine.close()
    assert norm > 1, "the norm is the true one"
    assert set(seen) == {n for n, _ in first_model("llama").named_parameters()}
    assert max(seen.values()) == pytest.approx(1e-4, rel=0.02)
    full = sum(value == pytest.approx(1e-4, rel=0.02) for value in seen.values())
    assert full > 30, f"{full} of {len(seen)} tensors reach the limit"
