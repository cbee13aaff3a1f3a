"""APOLLO on an accelerator: projections equal to the bit, weights to round-off, no waiting."""

import pytest
import torch
from torch import nn

from mnemic.optim.apollo import Apollo, ApolloMini
from mnemic.optim.random import normals, signs, stream_key

pytestmark = pytest.mark.gpu

SHAPES = [(96, 256), (256, 96), (96, 96), (3, 48, 64), (40,)]


def device():
    return torch.accelerator.current_accelerator()


def test_random_numbers_are_the_same_bits():
    key = stream_key(0, "x", 1)
    for draw in (normals, signs):
        assert torch.equal(draw(key, 5, 10_001, device()).cpu(), draw(key, 5, 10_001))


def trained(cls, where, dtype, **settings):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(*s, generator=generator).to(where, dtype)) for s in SHAPES]
    optimizer = cls(params, 0.01, weight_decay=0.1, update_proj_gap=4, **settings)
    for _ in range(10):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(where, dtype)
        optimizer.step()
    return [p.detach().cpu().float() for p in params]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("proj", ["sparse", "gaussian"])
@pytest.mark.parametrize("cls", [Apollo, ApolloMini])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_cpu_s(cls, proj, dtype, compile):
    found = trained(cls, device(), dtype, proj=proj, compile=compile)
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, expected in zip(found, trained(cls, "cpu", dtype, proj=proj), strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", ["apollo", "adamw", "adamw8bit"])
def test_a_step_never_waits_for_the_device(rule):
    if device().type != "cuda":
        pytest.skip("only CUDA can report waits")
    params = [nn.Parameter(torch.randn(256, 96, device="cuda", dtype=torch.bfloat16))]
    optimizer = Apollo(params, 0.01, rule=rule)
    for step in range(4):
        params[0].grad = torch.randn_like(params[0])
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
