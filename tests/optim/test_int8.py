"""Int8 weights: what they hold, what they compute, how they are rounded, what they refuse."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

from mnemic.optim import int8
from mnemic.optim.apollo import Apollo
from mnemic.optim.int8 import Int8Weight
from mnemic.optim.random import stream_key
from mnemic.optim.write import rounding_noise, write

SHAPES = [(8, 256), (5, 300), (4, 100), (3, 1), (3000, 128)]
ONE = torch.ones(1, 1)


def made(*shape, dtype=torch.float32, group=128):
    return Int8Weight.quantize(torch.randn(shape, dtype=dtype), group)


def parameter(*shape, **settings):
    return nn.Parameter(made(*shape, **settings))


def steps_of(weight):
    """The step of each weight's group, (m, n)."""
    columns = torch.arange(weight.shape[1]) // weight.group
    return weight.scale[:, columns]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [1, 64, 128])
@pytest.mark.parametrize("low", [-1.0, 1.0, -2.0])
def test_weights_come_back_within_half_a_step(shape, group, low):
    """Also those of one sign, which a zero-point clamped to the codes would cut off."""
    weight = torch.rand(shape) * (1 if low != -1.0 else 2) + low
    held = Int8Weight.quantize(weight, group)
    found = held.dequantize()
    assert ((found - weight).abs() <= steps_of(held) / 2 + 1e-6).all()
    assert held.scale.max() <= 2.0 / 255 + 1e-6, "no step is longer than the range asks for"


def test_equal_weights_and_zeros_are_exact():
    weight = torch.full((3, 200), 0.3)
    weight[1] = 0
    assert torch.equal(Int8Weight.quantize(weight).dequantize(), weight)


def test_a_group_of_128_takes_1_06_bytes_a_weight():
    held = made(64, 512)
    assert held.held_bytes / held.numel() == 1 + 8 / 128
    assert held.codes.dtype == torch.int8
    assert {k for k, v in vars(held).items() if isinstance(v, torch.Tensor)} == {
        "codes", "scale", "zero",
    }  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4, 300), (2, 3, 300), (300,)])
def test_linear_is_that_of_the_dense_weight_bit_for_bit(shape, dtype, bias, autocast):
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    b = torch.randn(8, dtype=dtype, requires_grad=True) if bias else None
    held = parameter(8, 300, dtype=dtype)
    dense = nn.Parameter(held.dequantize())
    found = []
    for weight in (held, dense):
        x.grad = None
        if b is not None:
            b.grad = None
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            y = functional.linear(x, weight, b)
        y.float().square().sum().backward()
        grads = [x.grad, weight.grad] + ([b.grad] if b is not None else [])
        found.append([y.detach(), *grads])
        assert type(weight.grad) is torch.Tensor and weight.grad.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_between_forward_and_backward_only_codes_are_kept():
    kept = []
    held, x = parameter(8, 256), torch.randn(4, 256)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        functional.linear(x, held).sum()
    assert [t.dtype for t in kept].count(torch.int8) == 1
    assert all(t.dtype == torch.int8 or t.numel() < held.numel() or t is x for t in kept)


def test_codes_changed_before_the_backward_are_an_error_not_a_wrong_gradient():
    held = parameter(8, 256)
    y = functional.linear(torch.randn(4, 256, requires_grad=True), held).sum()
    held.update_(torch.ones(8, 256), ONE)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["tensor", "rows", "cols"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_write_is_keep_w_plus_factor_g_within_half_a_step(shape, kind, dtype):
    held, grad = made(*shape, dtype=dtype), torch.randn(shape).to(dtype)
    size = {"tensor": (1, 1), "rows": (shape[0], 1), "cols": (1, shape[1])}[kind]
    factor = torch.randn(size)
    expected = 0.9 * held.dequantize(torch.float32) + factor * grad.float()
    write(held, grad, factor, 0.9)
    error = (held.dequantize(torch.float32) - expected).abs()
    assert (error <= steps_of(held) / 2 + 1e-5).all()


def test_stochastic_rounding_is_unbiased_and_of_neighbours():
    """Updates of a twentieth of a step, which nearest rounding loses."""
    torch.manual_seed(0)
    start = made(16, 200)
    step = steps_of(start)
    update = step * torch.where(torch.rand(16, 200) < 0.5, 0.05, -0.03)
    exact = start.dequantize() + update
    draws, total = 2000, torch.zeros(16, 200).double()
    for seed in range(draws):
        held = start.clone()
        held.update_(update, ONE, noise=rounding_noise(stream_key("draw", seed), held))
        error = (held.dequantize() - exact).double() / steps_of(held)
        assert error.abs().max() < 1.001
        total += error
    columns = torch.arange(200) // 128
    share = ((exact - held.zero[:, columns]) / steps_of(held)).double().remainder(1)
    # Besides chance, fp32: an end of a group may lie 1e-5 of a step outside the codes.
    allowed = (share * (1 - share) / draws).sqrt()
    # 3,200 means: the largest is expected at 3.6 standard errors.
    assert ((total / draws).abs() <= 5.5 * allowed + 1e-3).all()
    # All together: any two roundings are independent.
    assert (total / draws).mean().abs() < 5 * allowed.square().mean().sqrt() / 3200**0.5
    nearest = start.clone()
    nearest.update_(update, ONE)
    assert (nearest.codes == start.codes).float().mean() > 0.9


def test_the_size_of_chunks_changes_nothing(monkeypatch):
    start, grad = made(50, 300), torch.randn(50, 300)
    found = []
    for size in (1 << 18, 7 * 300):
        monkeypatch.setitem(int8._CHUNK, "cpu", size)
        held = start.clone()
        held.update_(grad, torch.ones(50, 1), 0.9, rounding_noise(5, held))
        found.append((held.codes, held.scale, held.zero, held.dequantize(torch.bfloat16)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_an_update_weights_hardly_drift():
    held = Int8Weight.quantize(torch.rand(64, 512))
    before = held.dequantize()
    for step in range(50):
        held.update_(torch.zeros(64, 512), ONE, noise=rounding_noise(stream_key(step), held))
    # Measured 5e-5: arithmetic in fp32 near the ends of a group.
    assert (held.dequantize() - before).norm() / before.norm() < 2e-4


@pytest.mark.parametrize("rule", ["apollo", "adamw", "adamw8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_apollo_changes_int8_weights_as_dense_ones(rule, dtype):
    """One step on the same gradient, within a step of the codes; then the same seed, the same bits,
    and torch's generator unused.
    """
    start = made(80, 300, dtype=dtype)
    grad = torch.randn(80, 300).to(dtype)
    found = []
    for seed, weight in [
        (0, start.clone()), (0, start.clone()), (1, start.clone()), (0, start.dequantize()),
    ]:  # fmt: skip
        torch.manual_seed(len(found))
        state = torch.get_rng_state()
        param = nn.Parameter(weight)
        optimizer = Apollo([("w", param)], lr=0.1, rank=4, rule=rule, weight_decay=0.1, seed=seed)
        for _ in range(2):
            param.grad = grad.clone()
            optimizer.step()
        assert torch.equal(torch.get_rng_state(), state)
        found.append(param.detach())
    one, same, other, dense = found
    for name in ("codes", "scale", "zero"):
        assert torch.equal(getattr(one, name), getattr(same, name))
    assert not torch.equal(one.codes, other.codes)
    # Two roundings, up to a step each, and those of bf16.
    slack = 2.1 * steps_of(one) + (0.02 * dense.abs().float() if dtype == torch.bfloat16 else 0)
    assert ((one.dequantize().float() - dense.float()).abs() <= slack).all()
    assert (dense.float() - start.dequantize(torch.float32)).abs().mean() > 0.05


def test_apollos_noise_is_drawn_for_fp32_int8_weights_too():
    """Steps far below the codes': rounding to nearest would stand still."""
    held = parameter(64, 256)
    before = held.codes.clone()
    for rounding, least, most in (("nearest", 0, 1e-3), ("stochastic", 1e-2, 1)):
        optimizer = Apollo([("w", held)], lr=1e-3, rounding=rounding, gamma=None)
        for _ in range(5):
            held.grad = torch.randn(64, 256)
            optimizer.step()
        assert least <= (held.codes != before).float().mean() <= most


def test_it_is_a_parameter_to_modules_optimizers_and_copies(tmp_path):
    linear = nn.Linear(256, 8)
    linear.weight = nn.Parameter(Int8Weight.quantize(linear.weight.detach()))
    weight = linear.weight
    assert isinstance(weight, nn.Parameter) and weight.requires_grad and weight.is_leaf
    assert weight.dtype == torch.float32 and dict(linear.named_parameters())["weight"] is weight
    linear(torch.ones(2, 256)).sum().backward()
    twin = copy.deepcopy(linear)
    assert isinstance(twin.weight, Int8Weight) and isinstance(twin.weight, nn.Parameter)
    assert twin.weight.codes.data_ptr() != weight.codes.data_ptr()
    assert torch.equal(twin.weight.grad, weight.grad)
    torch.optim.SGD(linear.parameters(), 0.1).zero_grad()
    assert weight.grad is None
    codes = weight.codes.clone()
    linear.to(torch.bfloat16)
    assert linear.weight is weight and weight.dtype == torch.bfloat16
    assert isinstance(weight, Int8Weight) and torch.equal(weight.codes, codes)
    buffer = io.BytesIO()
    torch.save(linear.state_dict(), buffer)
    buffer.seek(0)
    twin.load_state_dict(torch.load(buffer, weights_only=False))
    assert torch.equal(twin.weight.codes, codes) and torch.equal(twin.weight.zero, weight.zero)
    parts, meta = weight.__tensor_flatten__()
    again = Int8Weight.__tensor_unflatten__({p: getattr(weight, p) for p in parts}, meta, 0, 0)
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert again.dtype == weight.dtype


def test_copy_rounds_to_nearest_and_takes_int8_as_it_is():
    held, dense = made(4, 200), torch.randn(4, 200)
    held.copy_(dense)
    assert torch.equal(held.codes, Int8Weight.quantize(dense).codes)
    other = made(4, 200)
    held.copy_(other)
    assert torch.equal(held.codes, other.codes) and torch.equal(held.scale, other.scale)
    dense.copy_(held)
    assert torch.equal(dense, held.dequantize())


def test_other_operations_see_the_dense_weight_with_gradients():
    held = parameter(8, 256)
    dense = nn.Parameter(held.dequantize())
    for weight in (held, dense):
        (torch.ones(2, 256) @ weight.T * 3 + weight[:, :2].sum()).sum().backward()
    assert torch.equal(held.grad, dense.grad)
    assert torch.equal(held.detach().norm(), dense.detach().norm())
    like = [torch.zeros_like(held), torch.empty_like(held), held.new_zeros(3)]
    assert all(type(x) is torch.Tensor for x in like) and like[0].shape == held.shape
    half = torch.zeros_like(held, dtype=torch.float64)
    assert half.dtype == torch.float64 and not half.any()


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.mul_(2),
        lambda w: w[0].zero_(),
        lambda w: w[2:4].zero_(),
        lambda w: w.t().mul_(2),
        lambda w: w.view(-1).add_(1),
        lambda w: w.t()[0].fill_(1),
        lambda w: torch._foreach_mul_([w], 2.0),
        lambda w: nn.init.normal_(w),
        lambda w: torch.add(torch.ones(8, 256), 1, out=w),
    ],
)
def test_a_change_that_would_be_lost_is_an_error(change):
    held = made(8, 256)
    before = held.codes.clone()
    with pytest.raises(RuntimeError, match=r"cannot change an int8 weight.*update_"):
        change(held)
    assert torch.equal(held.codes, before)


def test_other_optimizers_are_refused_at_their_first_step():
    for make in (torch.optim.SGD, torch.optim.AdamW):
        held = parameter(8, 256)
        held.grad = torch.ones(8, 256)
        with pytest.raises(RuntimeError, match="cannot change an int8 weight"):
            make([held], lr=0.1).step()
    with pytest.raises(RuntimeError, match="cannot be replaced; use copy_"):
        held.data = torch.ones(8, 256)


@pytest.mark.parametrize(
    ("weight", "group", "sentence"),
    [
        (
            torch.ones(3),
            128,
            r"made of matrices in fp32, bf16 or fp16, not of .*32 of shape \(3,\)",
        ),
        (torch.ones(3, 3).long(), 128, "not of torch.int64"),
        (torch.ones(3, 3).double(), 128, "not of torch.float64"),
        (torch.full((3, 3), torch.nan), 128, "holds inf or nan and has no int8 form"),
        (torch.ones(3, 3), 0, "group=0: a group has at least 1 weight"),
    ],
)
def test_what_cannot_be_int8_is_one_sentence(weight, group, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        Int8Weight.quantize(weight, group)
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_an_accelerator_gives_the_same_bits():
    device = torch.accelerator.current_accelerator()
    held, grad = made(300, 500), torch.randn(300, 500)
    there = held.to(device)
    for weight, g in ((held, grad), (there, grad.to(device))):
        noise = rounding_noise(stream_key(1), weight)
        weight.update_(g, ONE.to(weight.device) * 0.01, 0.99, noise)
    assert torch.equal(there.dequantize().cpu(), there.cpu().dequantize())
    # addcmul may be fused there: a rounding may differ by a step, rarely.
    assert (there.codes.cpu() == held.codes).float().mean() > 0.999
