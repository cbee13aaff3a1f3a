"""The optimizer: its state, its arithmetic beside a plain formula, what must not disturb it."""

import io

import pytest
import torch
from torch import nn

from mnemic.optim.apollo import Apollo, ApolloMini
from mnemic.optim.limiter import limit

# Llama-130M's matrices, the experts of a small mixture, and a rank above the smaller dimension.
SHAPES = [(768, 768), (2048, 768), (768, 2048), (4, 48, 96), (16, 64)]


def grads_like(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def make(shapes=((24, 40), (40, 24), (32,), (3, 16, 24)), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(*s, generator=generator).to(dtype)) for s in shapes]


def held_bytes(optimizer, param) -> int:
    state = optimizer.state[param]
    return sum(t.untyped_storage().nbytes() for t in state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_state_bytes_are_the_formula(shape, dtype):
    """4 * (2 n rank + 2) for a matrix of m <= n, Mini 4 * (2 n + 2), whatever the weights are."""
    m, n = sorted(shape[-2:])
    stack = shape[0] if len(shape) == 3 else 1
    for cls, rank, settings in ((Apollo, min(m, 192), {"rank": 192}), (ApolloMini, 1, {})):
        params = make([shape], dtype)
        optimizer = cls(params, **settings)
        grads_like(params, 0)
        optimizer.step()
        assert held_bytes(optimizer, params[0]) == 4 * (stack * (2 * n * rank + 1) + 1)
        assert not any(hasattr(v, "ortho_matrix") for v in optimizer.state[params[0]].values())


@pytest.mark.parametrize("proj", ["gaussian", "sparse"])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_it_is_the_formula_of_the_paper(shape, scale_type, proj):
    """Algorithm 1 written out with matrices, limiter and bias correction included, in fp64."""
    (weight,) = make([shape], torch.float64)
    plain = weight.detach().clone()
    settings = {"rank": 6, "betas": (0.9, 0.95), "weight_decay": 0.1, "update_proj_gap": 5}
    optimizer = Apollo([weight], 0.01, scale_type=scale_type, proj=proj, **settings)
    m = v = previous = None
    divisors = []
    for step in range(1, 14):
        grads_like([weight], step)
        weight.grad *= 10 if step == 9 else 1
        grad = weight.grad.clone()
        group = optimizer.param_groups[0]
        matrix = optimizer.projection(group, "0.0", weight, step).matrix()
        low = grad @ matrix if shape[0] >= shape[1] else matrix.mT @ grad
        m = 0.1 * low if m is None else 0.9 * m + 0.1 * low
        v = 0.05 * low**2 if v is None else 0.95 * v + 0.05 * low**2
        direction = m / (v.sqrt() + 1e-8)
        dims = (0, 1) if scale_type == "tensor" else (1,) if shape[0] >= shape[1] else (0,)
        update = grad * direction.norm(dim=dims, keepdim=True) / low.norm(dim=dims, keepdim=True)
        divisor, previous = limit(
            update.norm(), torch.tensor(0.0) if previous is None else previous, 1.01, 40 * 6
        )
        divisors.append(float(divisor))
        alpha = (24 / 6) ** 0.5
        rate = 0.01 * alpha * (1 - 0.95**step) ** 0.5 / (1 - 0.9**step)
        plain = (1 - 0.01 * 0.1) * plain - rate * update / divisor
        optimizer.step()
    assert max(divisors) > 1.05, "the limiter never bound"
    torch.testing.assert_close(weight.detach(), plain, rtol=1e-11, atol=1e-12)


def test_experts_are_separate_matrices():
    (stack,) = make([(3, 16, 24)], torch.float64)
    singles = [nn.Parameter(w.detach().clone()) for w in stack]
    together, alone = Apollo([stack], 0.01), Apollo(singles, 0.01)
    project = together.projection(together.param_groups[0], "0.0", stack, 1)
    alone.projection = lambda *_: project
    for step in range(6):
        grads_like([stack], step)
        stack.grad[1] *= 50 if step == 3 else 1
        for single, grad in zip(singles, stack.grad, strict=True):
            single.grad = grad.clone()
        together.step()
        alone.step()
    for single, expert in zip(singles, stack.detach(), strict=True):
        torch.testing.assert_close(single.detach(), expert, rtol=1e-12, atol=0)


@pytest.mark.parametrize("cls", [Apollo, ApolloMini])
def test_scale_makes_up_for_the_rank(cls):
    """With alpha = sqrt(min(m, n) / rank) a step has AdamW's norm, whatever the rank."""
    (ours,), (theirs,) = make([(128, 512)]), make([(128, 512)])
    optimizer = cls([ours], 0.01, gamma=None)
    adamw = torch.optim.AdamW([theirs], 0.01, weight_decay=0.0)
    lengths = [0.0, 0.0]
    for step in range(40):
        grads_like([ours, theirs], step)
        theirs.grad = ours.grad.clone()
        for i, (p, opt) in enumerate(((ours, optimizer), (theirs, adamw))):
            before = p.detach().clone()
            opt.step()
            lengths[i] += float((p.detach() - before).norm())
    assert 0.9 < lengths[0] / lengths[1] < 1.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_resume_is_bit_exact(at, dtype):
    """At steps 1, T-1, T and T+1 of T = 4, through a file that torch reads with weights_only."""

    def steps(params, optimizer, numbers):
        for step in numbers:
            grads_like(params, step)
            optimizer.step()

    def build(params):
        groups = [{"params": params[:3]}, {"params": params[3:], "rule": "adamw8bit"}]
        return Apollo(groups, 0.01, update_proj_gap=4, weight_decay=0.1)

    shapes = ((24, 40), (40, 24), (3, 16, 24), (32,), (90, 100))
    straight = make(shapes, dtype)
    steps(straight, build(straight), range(10))
    first = make(shapes, dtype)
    optimizer = build(first)
    steps(first, optimizer, range(at))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = build(second)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state[second[0]]["exp_avg"].dtype == torch.float32
    steps(second, resumed, range(at, 10))
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))


def lora_loss(**settings) -> tuple[float, float]:
    """Loss after 300 steps of a rank-4 adapter, and how far A moved. B = 0, so A's first gradient
    is exactly zero.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    target, inputs = draw(32, 4) @ draw(4, 64) / 8, draw(256, 64)
    a, b = nn.Parameter(draw(4, 64) / 8), nn.Parameter(torch.zeros(32, 4))
    start = a.detach().clone()
    optimizer = Apollo([a, b], 0.01, rank=2, scale_type="tensor", **settings)
    for _ in range(300):
        loss = (inputs @ a.mT @ b.mT - inputs @ target.mT).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), ((a - start).norm() / start.norm()).item()


def test_a_zero_first_gradient_freezes_nothing():
    """The published limiter (reference=True) moves A by 1e-6 of its norm in 300 steps."""
    ours, ours_moved = lora_loss()
    free, free_moved = lora_loss(gamma=None)
    published, published_moved = lora_loss(reference=True)
    assert published_moved < 1e-4 and ours_moved > 0.5 * free_moved > 0.1
    assert ours < 0.5 * published and ours < 1.3 * free


def test_an_expert_without_tokens_at_first_starts_when_they_come():
    def moved(**settings) -> torch.Tensor:
        (stack,) = make([(2, 16, 24)])
        start = stack.detach().clone()
        optimizer = Apollo([stack], 0.01, **settings)
        for step in range(20):
            grads_like([stack], step)
            if step == 0:
                stack.grad[0] = 0
            optimizer.step()
        return (stack.detach() - start).flatten(1).norm(dim=1)

    ours, published = moved(), moved(reference=True)
    assert 0.6 < ours[0] / ours[1] < 1.5 and published[0] < 1e-5 * published[1]


@pytest.mark.parametrize("rule", ["apollo", "adamw", "adamw8bit"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_as_if_it_had_not_been(value, rule):
    shapes = ((24, 40), (70, 60))
    with_it, without = make(shapes), make(shapes)
    a, b = Apollo(with_it, 0.01, rule=rule), Apollo(without, 0.01, rule=rule)
    for step in range(8):
        for params, optimizer in ((with_it, a), (without, b)):
            grads_like(params, step)
            if step == 3:
                if optimizer is b:
                    params[0].grad = None
                else:
                    params[0].grad[0, 0] = value
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(with_it, without, strict=True))


def test_a_missing_gradient_leaves_a_tensor_alone():
    params = make()
    start = params[0].detach().clone()
    optimizer = Apollo(params, 0.01)
    grads_like(params[1:], 0)
    optimizer.step()
    assert torch.equal(params[0], start) and not optimizer.state[params[0]]


def test_the_order_of_tensors_changes_nothing():
    """Projections go by name, so groups may be split and reordered."""
    a, b = make(), make()
    names = [f"layer.{i}" for i in range(len(a))]
    first = Apollo(list(zip(names, a, strict=True)), 0.01)
    second = Apollo(list(zip(names, b, strict=True))[::-1], 0.01)
    for step in range(3):
        grads_like(a, step)
        for p, q in zip(a, b, strict=True):
            q.grad = p.grad.clone()
        first.step()
        second.step()
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_closures_see_gradients():
    (weight,) = make([(24, 40)])
    optimizer = Apollo([weight], 0.01)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0: a whole number from 1, or a share"),
        ({"rank": 1.5}, "rank=1.5"),
        ({"proj": "svd"}, "proj='svd': one of sparse, gaussian"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"scale": 2.0, "scale_sq": 4.0}, "scale_sq=4.0"),
        ({"gamma": 0.9}, "gamma=0.9: a growth factor above 1"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Apollo(make(), **settings)


def test_unknown_group_keys_are_named():
    with pytest.raises(ValueError, match="rnak: unknown key; a group takes rule, lr"):
        Apollo([{"params": make(), "rnak": 8}])
    with pytest.raises(ValueError, match="dense gradients"):
        sparse = nn.Embedding(10, 8, sparse=True)
        sparse(torch.tensor([1])).sum().backward()
        Apollo(sparse.parameters()).step()
