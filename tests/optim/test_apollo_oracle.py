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


def both(*, scale_type, weight_decay, steps=200, dtype=torch.float64, rank=4, scale=3.0, lr=0.01,
         first_zero=False):  # fmt: skip
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
    for step in range(steps):
        # Growing and shrinking gradients, so that the limiter binds at times.
        size = 10.0 ** float(torch.randn((), generator=generator))
        for a, b in zip(theirs, ours, strict=True):
            grad = size * draw(*a.shape)
            if first_zero and step == 0:
                grad.zero_()
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
