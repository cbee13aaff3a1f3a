"""Row kernels on an accelerator, in bf16 above all: Triton against torch on the same device."""

import pytest
import torch

from mnemic.models.tokens import kernels

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def the_kernels_are_triton_s():
    if not kernels.uses_triton(torch.empty(0, device=device())):
        pytest.skip(f"no triton for {device()}")


def device():
    return torch.accelerator.current_accelerator()


def normal(*shape, dtype=torch.float32, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device(), dtype).requires_grad_(grad)


def close(found, expected, dtype=torch.float32):
    assert found.dtype == expected.dtype
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def kept(batch, length, count, *, distinct=True):
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randperm(length, generator=generator)[:count] for _ in range(batch)]
    index = torch.stack(rows) if distinct else torch.stack(rows) // 3
    return index.to(device())


@DTYPES
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("distinct", [False, True])
def test_gather_norm(dtype, frozen, distinct):
    hidden = normal(2, 900, 600, dtype=dtype)
    weight = normal(600, dtype=dtype, seed=1, grad=not frozen)
    index = kept(2, 900, 300, distinct=distinct)
    upstream = [normal(2, 300, 600, dtype=dtype, seed=s, grad=False) for s in (2, 3)]
    inputs = (hidden,) if frozen else (hidden, weight)
    pairs = []
    for step in (kernels.gather_rms_norm, kernels.reference_gather_rms_norm):
        out = step(hidden, index, weight, 1e-5)
        pairs.append((*out, *torch.autograd.grad(out, inputs, upstream)))
    assert torch.equal(pairs[0][0], pairs[1][0])
    for ours, theirs in zip(*pairs, strict=True):
        # A weight's gradient is a sum over 600 rows.
        close(ours / 25, theirs / 25, dtype) if ours.dim() == 1 else close(ours, theirs, dtype)


@DTYPES
def test_scatter(dtype):
    hidden, rows = normal(2, 900, 600, dtype=dtype), normal(2, 300, 600, dtype=dtype, seed=1)
    index = kept(2, 900, 300)
    found = kernels.scatter_rows_(hidden.clone(), index, rows)
    assert torch.equal(found, kernels.reference_scatter_rows_(hidden.clone(), index, rows))
    added = kernels.scatter_add_rows_(hidden.clone(), index, rows)
    assert torch.equal(added, kernels.reference_scatter_add_rows_(hidden.clone(), index, rows))


@DTYPES
def test_equal_indices_add_up_to_the_same_bits_each_time(dtype):
    hidden, rows = normal(2, 900, 600, dtype=dtype), normal(2, 300, 600, dtype=dtype, seed=1)
    index = kept(2, 900, 300, distinct=False) // 20
    first, again = (kernels.scatter_add_rows_(hidden.clone(), index, rows) for _ in range(2))
    assert torch.equal(first, again)
    exact = hidden.double().scatter_add(1, index[..., None].expand(-1, -1, 600), rows.double())
    close(first, exact.to(dtype), dtype)


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "block", "width"), [(500, 64, 128), (130, 48, 80)])
def test_block_scores(length, block, width, causal, dtype):
    q = normal(2, length, 8, width, dtype=dtype, grad=False).transpose(1, 2)
    k = normal(2, length, 2, width, dtype=dtype, seed=1, grad=False).transpose(1, 2)
    how = {"block": block, "scale": width**-0.5, "causal": causal}
    # Products of bf16 are exact in fp32: both dtypes agree to the order of a sum. The reference
    # runs on the CPU, where no setting makes it TF32.
    expected = kernels.reference_block_scores(q.cpu(), k.cpu(), **how)
    close(kernels.block_scores(q, k, **how).cpu(), expected)


@DTYPES
def test_cross_entropy(dtype):
    logits = (5 * normal(70, 9000, grad=False)).to(dtype)
    logits[3] = float("nan")
    logits[4, :4500] = float("-inf")
    logits.requires_grad_()
    targets = torch.arange(70, device=device()) * 100
    targets[3], targets[4], targets[5] = -100, 8999, -100
    upstream = normal(70, grad=False, seed=2)
    pairs = []
    for step in (kernels.cross_entropy_rows, kernels.reference_cross_entropy_rows):
        losses = step(logits, targets)
        pairs.append((losses, *torch.autograd.grad(losses, logits, upstream)))
    (losses, grad), (wanted, wanted_grad) = pairs
    close(losses, wanted)
    close(grad, wanted_grad, dtype)
    assert not losses[[3, 5]].any() and not grad[[3, 5]].any()


def test_logits_past_two_to_the_31():
    """Offsets of 32 bits would read the first rows again, or nothing at all."""
    free, _ = torch.cuda.mem_get_info() if device().type == "cuda" else (0, 0)
    if free < 12 << 30:
        pytest.skip("needs 12 GiB of a CUDA device's memory")
    logits = torch.zeros(70_000, 32_000, dtype=torch.bfloat16, device=device())
    logits[-1, 5] = 8.0
    targets = torch.full((70_000,), 5, device=device())
    found = kernels.cross_entropy_rows(logits, targets)[-1:]
    close(found, torch.nn.functional.cross_entropy(logits[-1:].float(), targets[-1:])[None])


def test_segment_sums():
    values = normal(10_000)
    offsets = torch.tensor([3, 3, 5000, 5001, 9000], device=device())
    upstream = normal(4, grad=False, seed=1)
    pairs = []
    for step in (kernels.segment_sums, kernels.reference_segment_sums):
        sums = step(values, offsets)
        pairs.append((sums / 100, *torch.autograd.grad(sums, values, upstream)))
    for ours, theirs in zip(*pairs, strict=True):
        close(ours, theirs)


def test_no_kernel_waits_for_the_device():
    if device().type != "cuda":
        pytest.skip("only CUDA can report waits")
    hidden, weight = normal(1, 256, 64), normal(64)
    index, offsets = kept(1, 256, 64), torch.tensor([0, 10, 64], device=device())
    targets = kept(1, 64, 64)[0]

    def step():
        rows, normed = kernels.gather_rms_norm(hidden, index, weight, 1e-6)
        out = kernels.scatter_add_rows_(hidden.clone(), index, normed)
        kernels.scatter_rows_(out, index, rows)
        scored = kernels.block_scores(out[None], out[None], scale=1.0, causal=True)
        losses = kernels.cross_entropy_rows(rows[0], targets)
        (kernels.segment_sums(losses, offsets).sum() + out.sum() + scored.sum()).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
