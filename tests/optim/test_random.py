"""Random numbers are functions of (key, position)."""

from itertools import pairwise

import pytest
import torch

from mnemic.optim.projection import Projection
from mnemic.optim.random import normals, signs, stream_key, words


def test_words_are_splitmix64():
    """The published sequence of seed 0."""
    found = [int(x) % 2**64 for x in words(0, 1, 3)]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_a_slice_is_a_slice():
    key = stream_key(0, "layer.weight", 3)
    whole = normals(key, 0, 5000)
    assert torch.equal(normals(key, 1001, 333), whole[1001:1334])
    assert torch.equal(signs(key, 7, 90), signs(key, 0, 97)[7:])


def test_keys_differ_in_every_part():
    keys = {stream_key(*parts) for parts in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))}
    assert len(keys) == 4


def test_normals_are_standard_normal():
    x = normals(stream_key("moments"), 0, 400_000).double()
    error = 400_000**-0.5
    assert abs(x.mean()) < 4 * error and abs(x.var() - 1) < 6 * error
    assert abs((x**4).mean() - 3) < 0.06
    y = normals(stream_key("others"), 0, 400_000).double()
    assert abs((x * y).mean()) < 4 * error and abs((x[1:] * x[:-1]).mean()) < 4 * error


def test_the_global_generator_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Projection("sparse", 1, 4, 0, 64, "cpu", torch.float32)
    Projection("gaussian", 1, 4, 0, 64, "cpu", torch.float32)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("entries", [1, 3])
@pytest.mark.parametrize("rank", [1, 6, 24, 50, 96])
@pytest.mark.parametrize("kind", ["gaussian", "sparse"])
def test_both_sides_are_products_with_one_matrix(kind, rank, entries):
    grad = torch.randn(96, 130, dtype=torch.float64)
    project = Projection(kind, 5, rank, 0, 96, "cpu", torch.float64, entries)
    matrix = project.matrix()
    assert matrix.shape == (96, rank)
    torch.testing.assert_close(project(grad, "left"), matrix.mT @ grad)
    torch.testing.assert_close(project(grad.T.contiguous(), "right"), grad.T @ matrix)
    stack = torch.stack([grad, 2 * grad])
    torch.testing.assert_close(project(stack, "left")[1], 2 * matrix.mT @ grad)


@pytest.mark.parametrize("kind", ["gaussian", "sparse"])
def test_shards_add_up(kind):
    grad = torch.randn(96, 30, dtype=torch.float64)
    whole = Projection(kind, 5, 20, 0, 96, "cpu", torch.float64)(grad, "left")
    cuts = [0, 1, 40, 41, 96]
    parts = [
        Projection(kind, 5, 20, a, b - a, "cpu", torch.float64)(grad[a:b], "left")
        for a, b in pairwise(cuts)
    ]
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize(("kind", "rank", "bound"), [("gaussian", 24, 0.3), ("sparse", 24, 0.28)])
def test_norms_are_kept_in_expectation(kind, rank, bound):
    """Over 300 keys: mean of ||P g||^2 / ||g||^2 is 1, its deviation about sqrt(2 / rank)."""
    grad = torch.randn(96, 1, dtype=torch.float64)
    ratios = torch.stack(
        [
            Projection(kind, stream_key(kind, i), rank, 0, 96, "cpu", torch.float64)(grad, "left")
            .square()
            .sum()
            / grad.square().sum()
            for i in range(300)
        ]
    )
    assert abs(ratios.mean() - 1) < 4 * bound / 300**0.5
    assert 0.5 * bound < ratios.std() < 1.15 * bound


def test_rows_of_one_run_never_meet():
    """The sketch of a gradient whose energy lies in `rank` neighbouring rows is exact."""
    project = Projection("sparse", 9, 16, 0, 96, "cpu", torch.float64)
    grad = torch.zeros(96, 5, dtype=torch.float64)
    grad[32:48] = torch.randn(16, 5, dtype=torch.float64)
    torch.testing.assert_close(project(grad, "left").norm(dim=0), grad.norm(dim=0))
    assert (project.matrix() != 0).sum(1).eq(1).all()
