"""The limiter binds on growth, and on nothing else."""

import torch

from mnemic.optim.limiter import limit, limit_as_published


def test_growth_is_limited_to_gamma():
    divisor, kept = limit(torch.tensor([30.0, 10.05]), torch.tensor([10.0, 10.0]), 1.01, 100)
    torch.testing.assert_close(kept, torch.tensor([10.1, 10.05]))
    torch.testing.assert_close(divisor, torch.tensor([30 / 10.1, 1.0]))


def test_zero_is_not_remembered_and_no_history_is_no_limit():
    divisor, kept = limit(torch.tensor([0.0, 50.0]), torch.tensor([3.0, 0.0]), 1.01, 100)
    assert divisor.tolist() == [1.0, 1.0] and kept.tolist() == [3.0, 50.0]


def test_a_tiny_norm_lets_go_within_231_steps():
    """From 1e-12 to the norm of a unit Adam step; the published rule needs 1,619."""

    def steps(rule) -> int:
        previous, count = torch.tensor(1e-12), 0
        while count < 5000:
            divisor, previous = rule(torch.tensor(10.0), previous)
            count += 1
            if divisor <= 1:
                return count
        return count

    assert steps(lambda norm, old: limit(norm, old, 1.01, 100)) <= 233
    published = steps(lambda norm, old: limit_as_published(norm, old, 1.01, first=False))
    assert published > 1600
