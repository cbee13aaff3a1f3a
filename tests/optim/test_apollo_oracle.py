"""Against apollo-torch 1.0.3 (extra `bench`), given the same projections. It is an oracle only: its
licence is CC-BY-NC, and none of its code is in ours.

    pip install -e ".[bench]" && pytest tests/optim/test_apollo_oracle.py
"""

import pytest
import torch

from mnemic.optim.apollo import Apollo

apollo_torch = pytest.importorskip(
    "apollo_torch", reason="the oracle is not installed; it comes with the extra `bench`"
)

SHAPES = [(48, 20), (20, 48), (32, 32), (7, 64)]


def both(
    *, scale_type, weight_decay, steps=200, dtype=torch.float64, rank=4, scale=3.0, lr=0.01
):  # fmt: skip
    """Largest relative difference of the weights after `steps` steps on the same gradients."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    start = [draw(*shape) for shape in SHAPES]
    theirs = [torch.nn.Parameter(w.clone()) for w in start]
    ours = [torch.nn.Parameter(w.clone()) for w in start]
    oracle = apollo_torch.APOLLOAdamW(
        [{"params": theirs, "rank": rank, "proj": "random", "scale_type": scale_type,
          "scale": scale, "update_proj_gap": 60, "proj_type": "std"}],
        lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), eps=1e-6,
    )  # fmt: skip
    optimizer = Apollo(
        ours, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), eps=1e-6, rank=rank,
        scale_sq=scale, scale_type=scale_type, proj="gaussian", reference=True,
    )  # fmt: skip

    def injected(group, name, param, step):
        index = next(i for i, p in enumerate(ours) if p is param)
        matrix = oracle.state[theirs[index]]["projector"].ortho_matrix

        def project(grad, side):
            return grad @ matrix.T if side == "right" else matrix.T @ grad

        return project

    optimizer.projection = injected
    for _ in range(steps):
        # Growing and shrinking gradients, so that the limiter binds at times.
        size = 10.0 ** float(torch.randn((), generator=generator))
        for a, b in zip(theirs, ours, strict=True):
            grad = size * draw(*a.shape)
            a.grad, b.grad = grad.clone(), grad.clone()
        oracle.step()
        optimizer.step()
    assert all((w - b).norm() > 0.01 * w.norm() for w, b in zip(start, ours, strict=True)), "idle"
    return max(float((a - b).norm() / a.norm()) for a, b in zip(theirs, ours, strict=True))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_same_weights_after_200_steps(scale_type, weight_decay):
    assert both(scale_type=scale_type, weight_decay=weight_decay) <= 1e-12


def test_mini_is_rank_1_with_one_scale():
    assert both(scale_type="tensor", weight_decay=0.0, rank=1, scale=128.0) <= 1e-12


def moved(make, spoil) -> list[float]:
    """How far each matrix went in 30 steps whose first gradient `spoil` has changed."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(*s, generator=generator)) for s in SHAPES]
    start = [p.detach().clone() for p in params]
    optimizer = make(params)
    for step in range(30):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
            if step == 0:
                spoil(p.grad)
        optimizer.step()
    return [float((p.detach() - s).norm() / s.norm()) for p, s in zip(params, start, strict=True)]


def theirs(params):
    group = {"params": params, "rank": 4, "proj": "random", "scale_type": "channel", "scale": 1.0}
    return apollo_torch.APOLLOAdamW(
        [{**group, "update_proj_gap": 60, "proj_type": "std"}], lr=0.01, weight_decay=0.0
    )


def ours(params):
    return Apollo(params, lr=0.01, rank=4, scale=1.0)


def assert_unimpressed(found):
    """As far as without the spoiled step, give or take what one step of 30 makes."""
    for far, expected in zip(found, moved(ours, lambda grad: None), strict=True):
        assert 0.7 < far / expected < 1.3


def test_a_zero_first_gradient_freezes_theirs_and_not_ours():
    assert max(moved(theirs, torch.Tensor.zero_)) < 1e-5
    assert_unimpressed(moved(ours, torch.Tensor.zero_))


def test_a_nan_gradient_is_in_their_weights_and_not_in_ours():
    def spoil(grad):
        grad[0, 0] = float("nan")

    assert all(x != x for x in moved(theirs, spoil))
    assert_unimpressed(moved(ours, spoil))
