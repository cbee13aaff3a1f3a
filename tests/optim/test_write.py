"""The pass that changes weights, and its rounding."""

import subprocess
import sys

import pytest
import torch

from mnemic.optim.random import stream_key
from mnemic.optim.write import rounding_noise, write


@pytest.mark.parametrize("shape", [(70, 33), (33, 70), (3, 40, 50), (2000, 300)])
@pytest.mark.parametrize("kind", ["tensor", "rows", "cols"])
@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_it_is_keep_w_plus_factor_g(shape, kind, keep):
    weight, grad = torch.randn(shape), torch.randn(shape)
    size = {"tensor": (1, 1), "rows": (shape[-2], 1), "cols": (1, shape[-1])}[kind]
    factor = torch.randn(*shape[:-2], *size)
    expected = keep * weight + factor * grad
    write(weight, grad, factor, keep)
    torch.testing.assert_close(weight, expected)


def test_bf16_is_computed_in_fp32_and_rounded_once():
    weight, grad = torch.randn(300, 70).bfloat16(), torch.randn(300, 70).bfloat16()
    factor = torch.randn(300, 1) * 1e-2
    expected = (0.99 * weight.float() + factor * grad.float()).bfloat16()
    write(weight, grad, factor, 0.99)
    assert (weight == expected).float().mean() > 0.999  # fused multiply-add may round once less


def test_stochastic_rounding_is_unbiased_and_between_neighbours():
    """Steps of a 40th of a unit in the last place: nearest rounding loses all of them."""
    start = torch.linspace(-3, 3, 64 * 64).view(64, 64).bfloat16()
    step = (start.float().abs() + 1e-3) * 2.0**-13
    exact = start.float() + step
    total = torch.zeros(64, 64, dtype=torch.float64)
    draws = 400
    for i in range(draws):
        weight = start.clone()
        noise = rounding_noise(stream_key(i), weight)
        write(weight, step.bfloat16(), torch.ones(1, 1), noise=noise)
        total += weight.double()
        assert ((weight.float() - exact).abs() <= exact.abs() * 2.0**-7 + 1e-9).all()
    moved = (total / draws - start.double()).sum() / step.bfloat16().double().sum()
    # One standard error of this ratio is about 0.014: 1.6 million roundings, 1/32 of them up.
    assert abs(moved - 1) < 0.06
    nearest = start.clone()
    write(nearest, step.bfloat16(), torch.ones(1, 1))
    assert torch.equal(nearest, start)


def test_noise_of_any_two_elements_is_uncorrelated():
    draws = [rounding_noise(stream_key("pair", i), torch.empty(6, 5)) for i in range(4000)]
    noise = torch.stack([(row ^ col).double() for row, col in draws]).view(4000, 30) / 65536
    assert (noise.mean(0) - 0.5).abs().max() < 5 * (12 * 4000) ** -0.5
    correlation = torch.corrcoef(noise.T) - torch.eye(30)
    assert correlation.abs().max() < 5 * 4000**-0.5


def test_a_shard_draws_its_rows_of_the_noise():
    whole = rounding_noise(7, torch.empty(10, 6))
    part = rounding_noise(7, torch.empty(4, 6), first_row=3)
    assert torch.equal(part[0], whole[0][3:7]) and torch.equal(part[1], whole[1])


COMPILED = """
import torch
from mnemic.optim.write import rounding_noise, write

# More shapes than the eight variants torch keeps of one function.
for dtype in (torch.float32, torch.bfloat16):
    for rows in range(60, 71):
        torch.manual_seed(rows)
        weight, grad = torch.randn(rows, 48).to(dtype), torch.randn(rows, 48).to(dtype)
        factor = torch.randn(rows, 1) * 1e-2
        noise = rounding_noise(3, weight) if dtype == torch.bfloat16 else None
        eager, compiled = weight.clone(), weight.clone()
        write(eager, grad, factor, 0.99, noise)
        write(compiled, grad, factor, 0.99, noise, compiled=True)
        # The compiler may contract a product and a sum, which moves a rare rounding.
        assert (eager == compiled).float().mean() > (0.99 if noise else 0.5), (rows, dtype)
        torch.testing.assert_close(eager, compiled)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_compiled_pass_is_the_same():
    """In a process of its own: torch's compiler minds what was imported before it."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr[-3000:]
