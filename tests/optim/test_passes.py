"""Bytes of an optimizer step: its traffic by the counter, its state by the formula."""

import pytest
import torch

from mnemic.optim.apollo import Apollo, ApolloMini
from mnemic.optim.passes import count_passes
from mnemic.optim.select import state_bytes

# A layer of a Llama of 130 M parameters.
SHAPES = [(768, 768)] * 4 + [(2048, 768)] * 2 + [(768, 2048)]


def steady(make):
    """An optimizer after its first step, and its parameters."""
    draw = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=draw)) for s in SHAPES]
    for param in params:
        param.grad = torch.randn(param.shape, generator=draw)
    optimizer = make(params)
    optimizer.step()
    return optimizer, params


def passes_of(make):
    optimizer, params = steady(make)
    return count_passes(optimizer.step, params)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (lambda ps: torch.optim.SGD(ps, lr=1e-6, fused=True), 3),
        (lambda ps: torch.optim.AdamW(ps, lr=1e-6, fused=True), 7),
        # lerp_ 3, mul_ 2, addcmul_ 3, sqrt 2, div_ 2, add_ 2, addcdiv_ 4; decay is a mul_ more.
        (lambda ps: torch.optim.AdamW(ps, lr=1e-6, foreach=True, weight_decay=0.0), 18),
        (lambda ps: torch.optim.AdamW(ps, lr=1e-6, foreach=True), 20),
    ],
)
def test_known_optimizers(how, expected):
    assert passes_of(how) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        (lambda x: x.add_(x), 2),  # given twice, counts once; read and written
        (lambda x: x.clone(), 2),
        (lambda x: x.view(4, 16)[1:].t().unsqueeze(0).detach(), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: torch.zeros_like(x), 1),
        (lambda x: x.zero_(), 1),
        (lambda x: x.copy_(torch.ones(())), 1 + 2 / 64),  # ones: one element written and read
        (lambda x: x + x[:1].expand(8, 8), 2 + 1 / 8),  # an expanded row is a row
        (lambda x: torch.add(x, 1, out=torch.empty(8, 8)), 2),
        (lambda x: x.half(), 1.5),
        (lambda x: torch._foreach_add_([x, x[:0]], 1), 2),
    ],
)
def test_what_an_operator_counts(op, expected):
    x = torch.zeros(8, 8)
    assert count_passes(lambda: op(x), [x]) == expected


def test_weights_without_bytes_are_refused():
    with pytest.raises(ValueError, match="these have none"):
        count_passes(lambda: None, [])


@pytest.mark.parametrize(
    ("make", "most"),
    [
        # Five passes over weight and gradient; the rest are vectors of state.
        (lambda ps: ApolloMini(ps, 1e-6), 5.02),
        (
            lambda ps: Apollo(ps, 1e-6, rank=192, proj="gaussian", cache_projection=True),
            8.2,
        ),
        (lambda ps: Apollo(ps, 1e-6, rank=192, proj="gaussian"), 11.55),
        # Its buckets are added to in place, so the low-rank matrix counts for each run of rows.
        (lambda ps: Apollo(ps, 1e-6, rank=192), 9.56),
    ],
    ids=["mini", "gaussian cached", "gaussian", "sparse"],
)
def test_ours(make, most):
    assert passes_of(make) <= most


@pytest.mark.parametrize("settings", [{}, {"proj": "gaussian"}], ids=["sparse", "gaussian"])
@pytest.mark.parametrize(("kind", "rank"), [(Apollo, 192), (ApolloMini, 1)])
def test_state_is_two_moments_a_norm_and_a_step_number(kind, rank, settings):
    optimizer, params = steady(lambda ps: kind(ps, 1e-6, rank=rank, **settings))
    group = optimizer.param_groups[0]
    for param in params:
        held = [v for v in optimizer.state[param].values() if isinstance(v, torch.Tensor)]
        assert len(held) == len(optimizer.state[param])
        size = sum(x.untyped_storage().nbytes() for x in held)
        assert size == 4 * (2 * max(param.shape) * rank + 2)
        assert size == state_bytes(group, param)
