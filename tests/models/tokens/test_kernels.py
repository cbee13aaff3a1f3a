"""Row kernels against the plain formulas and their autograd: torch here, Triton in a process apart.

Triton decides at its import whether it interprets, and in this process something else (peft, a
compiled optimizer) may have imported it for real. So one test below runs this same file again,
under TRITON_INTERPRET=1, where every other test takes the Triton backend.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from mnemic.models.tokens import kernels
from mnemic.models.tokens.kernels import cross_entropy as loss_module
from mnemic.models.tokens.kernels import gather_norm, scatter, scores, segments

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED else "torch"
# The interpreter's bf16 is silently wrong; tests/gpu/test_kernels.py has it.
HALF = torch.float16 if INTERPRETED else torch.bfloat16
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
outside = pytest.mark.skipif(INTERPRETED, reason="has nothing to do with the backend")
needs_triton = pytest.mark.skipif(
    not find_spec("triton"), reason="triton is not installed: pip install 'mnemic[kernels]'"
)


def normal(*shape, dtype=torch.float32, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_(grad)


def close(found, expected, dtype=torch.float32):
    torch.testing.assert_close(
        found.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


def llama_norm(rows, weight, eps):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(rows.shape[-1], eps)
    return torch.func.functional_call(norm, {"weight": weight}, (rows,))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (HALF, HALF),
                                    (HALF, torch.float32)], ids=str)  # fmt: skip
def test_gather_norm_is_the_norm_of_the_gathered_rows(dtypes, monkeypatch):
    monkeypatch.setattr(gather_norm, "_PARTS", 3)
    hidden, weight = normal(2, 7, 12, dtype=dtypes[0]), normal(12, dtype=dtypes[1], seed=1)
    # Unsorted, and position 4 twice, once beside the end of the row.
    index = torch.tensor([[4, 0, 6, 4], [1, 2, 3, 5]])
    rows, normed = kernels.gather_rms_norm(hidden, index, weight, 1e-5, backend=BACKEND)
    plain = hidden.gather(1, index[..., None].expand(-1, -1, 12))
    expected = llama_norm(plain, weight, 1e-5)
    assert torch.equal(rows, plain) and normed.dtype == expected.dtype
    close(normed, expected, dtypes[0])

    upstream = normal(2, 4, 12, dtype=rows.dtype, seed=2), normal(2, 4, 12, seed=3)
    upstream = upstream[0], upstream[1].to(normed.dtype)
    found = torch.autograd.grad((rows, normed), (hidden, weight), upstream)
    wanted = torch.autograd.grad((plain, expected), (hidden, weight), upstream)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        close(ours, theirs, HALF if dtypes[0] == HALF else torch.float32)
    assert not found[0][0, 1].any(), "a row that was not gathered"


def test_gather_norm_of_a_strided_view_under_a_frozen_weight():
    """LoRA's case; and each output alone, the other without a gradient."""
    whole = normal(3, 2, 10)
    hidden, weight = whole.transpose(0, 1)[..., ::2], normal(5, grad=False)
    index = torch.tensor([[2, 0], [1, 2]])
    plain = hidden.gather(1, index[..., None].expand(-1, -1, 5))
    wanted = plain, llama_norm(plain, weight, 1e-6)
    found = kernels.gather_rms_norm(hidden, index, weight, 1e-6, backend=BACKEND)
    for ours, theirs in zip(found, wanted, strict=True):
        close(ours, theirs)
        grads = (
            torch.autograd.grad(x.square().sum(), whole, retain_graph=True) for x in (ours, theirs)
        )
        close(*(grad for (grad,) in grads))


@outside
def test_the_backward_keeps_the_rows_once_and_a_number_a_row():
    hidden, index = normal(1, 64, 32, dtype=HALF), torch.arange(16)[None]
    weight, kept = normal(32, dtype=HALF), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        rows, _ = kernels.gather_rms_norm(hidden, index, weight, 1e-6)
        shared = {rows.data_ptr(), weight.data_ptr(), index.data_ptr()}
        assert [t.shape for t in kept if t.data_ptr() not in shared] == [(1, 16)]
        kept.clear()
        kernels.scatter_rows_(hidden.clone(), index, rows)
        kernels.scatter_add_rows_(hidden.clone(), index, rows)
    assert [t.data_ptr() for t in kept] == 2 * [index.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("add", [False, True])
def test_rows_are_scattered_where_the_stream_lies(add, dtype):
    hidden, rows = normal(2, 6, 5, dtype=dtype), normal(2, 3, 5, dtype=dtype, seed=1)
    index = torch.tensor([[5, 0, 3], [1, 4, 2]])
    ours = kernels.scatter_add_rows_ if add else kernels.scatter_rows_
    stream = hidden.clone()
    where = stream.data_ptr()
    found = ours(stream, index, rows, backend=BACKEND)
    assert found is stream and found.data_ptr() == where
    spread = index[..., None].expand(-1, -1, 5)
    expected = (hidden.scatter_add if add else hidden.scatter)(1, spread, rows)
    assert torch.equal(found, expected)
    upstream = normal(2, 6, 5, dtype=dtype, seed=2)
    grads = [torch.autograd.grad(out, (hidden, rows), upstream) for out in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_equal_indices_add_up(dtype):
    hidden, rows = normal(2, 4, 3, dtype=dtype), normal(2, 5, 3, dtype=dtype, seed=1)
    # A run at the end of one row meets the same index at the start of the next.
    index = torch.tensor([[3, 1, 3, 3, 0], [3, 3, 3, 3, 3]])
    wanted = hidden.double().scatter_add(1, index[..., None].expand(-1, -1, 3), rows.double())
    found = kernels.scatter_add_rows_(hidden.clone(), index, rows, backend=BACKEND)
    close(found, wanted, dtype)
    for grad in torch.autograd.grad(found.sum(), (hidden, rows)):
        assert torch.equal(grad, torch.ones_like(grad))


def test_scattering_into_a_strided_view_from_one():
    base, rows = normal(4, 2, 6, grad=False), normal(2, 6, 2, grad=False, seed=1).transpose(1, 2)
    for ours in (kernels.scatter_rows_, kernels.scatter_add_rows_):
        mine, theirs = base.clone(), base.clone().transpose(0, 1)
        index = torch.tensor([[3, 1], [0, 2]])
        ours(mine.transpose(0, 1), index, rows, backend=BACKEND)
        for b in range(2):
            if ours is kernels.scatter_rows_:
                theirs[b, index[b]] = rows[b]
            else:
                theirs[b, index[b]] += rows[b]
        assert torch.equal(mine.transpose(0, 1), theirs)


def plain_scores(q, k, block, scale, causal):
    """The definition, all (S, S) scores of all heads at once."""
    length, group = q.shape[2], q.shape[1] // k.shape[1]
    pairs = q.double() @ k.double().repeat_interleave(group, 1).transpose(2, 3) * scale
    pairs = pairs.relu().sum(1)
    if causal:
        pairs = pairs.tril()
    count = -(-length // block)
    cuts = [slice(i * block, (i + 1) * block) for i in range(count)]
    return torch.stack(
        [torch.stack([pairs[:, i, j].amax((1, 2)) for j in cuts], 1) for i in cuts], 1
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize(("length", "block"), [(40, 16), (32, 16), (7, 16), (13, 5)])
def test_block_scores_are_the_definition(length, block, heads, causal):
    q, k = normal(2, heads[0], length, 8), normal(2, heads[1], length, 8, seed=1)
    found = kernels.block_scores(q, k, block=block, scale=0.3, causal=causal, backend=BACKEND)
    assert found.dtype == torch.float32 and not found.requires_grad
    close(found, plain_scores(q, k, block, 0.3, causal))
    assert not causal or not found.triu(1).any()


def test_block_scores_in_half_precision_of_the_models_layout():
    """Heads transposed out of (B, S, H * D), a width that is no power of two, fp32 products."""
    q, k = (normal(1, 20, n, 12, dtype=HALF, seed=n).transpose(1, 2) for n in (4, 2))
    found = kernels.block_scores(q, k, block=8, scale=0.3, causal=True, backend=BACKEND)
    close(found, plain_scores(q, k, 8, 0.3, True), HALF if INTERPRETED else torch.float32)


def test_blocks_that_see_nothing_positive_score_zero():
    q = torch.ones(1, 1, 6, 4)
    assert not kernels.block_scores(q, -q, block=2, scale=1.0, causal=False, backend=BACKEND).any()


@outside
def test_block_scores_hold_a_stripe_of_queries_at_a_time():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    q = normal(1, 4, 256, 4, grad=False)
    with Largest() as largest:
        kernels.reference_block_scores(q, q, block=16, scale=1.0, causal=False)
    assert largest.numel == 4 * 16 * 256


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("width", [11, 37])
def test_cross_entropy_of_rows(width, dtype, monkeypatch):
    monkeypatch.setattr(loss_module, "_CHUNK", 2 * width)
    monkeypatch.setattr(loss_module, "_BLOCK", 16)
    logits = (3 * normal(5, width, grad=False)).to(dtype)
    # A padded vocabulary, a whole block of it, and an ignored row that is not even finite.
    logits[1, : width // 2] = float("-inf")
    logits[3] = float("nan")
    targets = torch.tensor([0, width - 1, -100, -100, width // 2])
    wanted = cross_entropy(logits.float(), targets, reduction="none")
    logits.requires_grad_()
    found = kernels.cross_entropy_rows(logits, targets, backend=BACKEND)
    assert found.dtype == torch.float32
    close(found, wanted)
    assert not found[2:4].any()

    upstream = normal(5, grad=False, seed=4)
    (grad,) = torch.autograd.grad(found, logits, upstream)
    clean = logits.detach().float().nan_to_num(0.0, neginf=float("-inf")).requires_grad_()
    loss = cross_entropy(clean, targets, reduction="none")
    assert grad.dtype == dtype
    close(grad, torch.autograd.grad(loss, clean, upstream)[0], dtype)
    assert not grad[2:4].any()


def test_every_row_ignored_and_no_row_at_all():
    logits = normal(3, 8)
    losses = kernels.cross_entropy_rows(logits, torch.full((3,), 7), 7, backend=BACKEND)
    (grad,) = torch.autograd.grad(losses.sum(), logits)
    assert not losses.any() and not grad.any()
    empty = kernels.cross_entropy_rows(
        logits[:0], torch.empty(0, dtype=torch.int64), backend=BACKEND
    )
    assert empty.shape == (0,)


def test_logits_cut_from_a_wider_tensor():
    wide, targets = normal(4, 12), torch.tensor([1, 0, 4, 2])
    found, wanted = (
        f(wide[:, ::2].t()[:, :4].t())
        for f in (
            lambda x: kernels.cross_entropy_rows(x, targets, backend=BACKEND),
            lambda x: cross_entropy(x, targets, reduction="none"),
        )
    )
    close(found, wanted)
    close(*(torch.autograd.grad(x.sum(), wide)[0] for x in (found, wanted)))


@pytest.mark.parametrize("offsets", [[0, 3, 3, 9, 20], [2, 2, 5], [0, 0], [4]], ids=str)
def test_segment_sums(offsets, monkeypatch):
    monkeypatch.setattr(segments, "_BLOCK", 4)
    values, offsets = normal(20), torch.tensor(offsets)
    found = kernels.segment_sums(values, offsets, backend=BACKEND)
    bounds = list(pairwise(offsets.tolist()))
    parts = [values[a:b].sum() for a, b in bounds]
    assert found.shape == (len(parts),)
    close(found, torch.stack(parts) if parts else found)
    upstream = normal(len(parts), grad=False, seed=1)
    (grad,) = torch.autograd.grad(found, values, upstream)
    expected = torch.zeros(20)
    for (a, b), g in zip(bounds, upstream, strict=True):
        expected[a:b] = g
    assert torch.equal(grad, expected)


def test_nothing_kept():
    hidden, index = normal(2, 3, 4), torch.empty(2, 0, dtype=torch.int64)
    rows, normed = kernels.gather_rms_norm(hidden, index, normal(4), 1e-6, backend=BACKEND)
    assert rows.shape == normed.shape == (2, 0, 4)
    (grad,) = torch.autograd.grad(normed.sum(), hidden)
    assert grad.shape == hidden.shape and not grad.any()
    for ours in (kernels.scatter_rows_, kernels.scatter_add_rows_):
        assert torch.equal(ours(hidden.clone(), index, rows, backend=BACKEND), hidden)


@outside
def test_an_index_outside_is_found():
    """By torch. Triton looks under TRITON_DEBUG=1 alone, and its interpreter never does."""
    hidden, rows = normal(1, 3, 4, grad=False), normal(1, 1, 4, grad=False)
    found = (IndexError, RuntimeError)
    for bad in (3, -1):
        index = torch.tensor([[bad]])
        with pytest.raises(found, match=r"out of (range|bounds)"):
            kernels.gather_rms_norm(hidden, index, normal(4), 1e-6, backend=BACKEND)
        for ours in (kernels.scatter_rows_, kernels.scatter_add_rows_):
            with pytest.raises(found, match=r"out of (range|bounds)"):
                ours(hidden, index, rows, backend=BACKEND)
        with pytest.raises(found, match=r"out of (range|bounds)"):
            kernels.cross_entropy_rows(hidden[0, :1, :3], index[0], backend=BACKEND)


@outside
def test_shapes_and_dtypes_that_do_not_fit_are_refused():
    hidden, rows, index = normal(2, 6, 4), normal(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    how: dict = {"scale": 1.0, "causal": True}
    for call, word in [
        (lambda: kernels.gather_rms_norm(hidden, index[:1], normal(4), 1e-6), "index"),
        (lambda: kernels.gather_rms_norm(hidden, index.int(), normal(4), 1e-6), "int64"),
        (lambda: kernels.gather_rms_norm(hidden, index, normal(5), 1e-6), "weight"),
        (lambda: kernels.scatter_rows_(hidden, index, rows[:, :2]), "rows"),
        (lambda: kernels.scatter_add_rows_(hidden, index, rows.half()), "float16"),
        (lambda: kernels.block_scores(hidden[None], hidden[None, :, :5], **how), "q must"),
        (lambda: kernels.block_scores(rows[None], normal(1, 3, 3, 4), **how), "multiple"),
        (lambda: kernels.block_scores(rows[None], rows[None].half(), **how), "one dtype"),
        (lambda: kernels.block_scores(rows[None], rows[None], block=0, **how), "block=0"),
        (lambda: kernels.cross_entropy_rows(rows[0], index[0, :2]), "targets"),
        (lambda: kernels.segment_sums(rows[0, 0].half(), index[0]), "fp32"),
        (lambda: kernels.segment_sums(rows[0, 0], index[0].int()), "offsets"),
        (lambda: kernels.segment_sums(rows[0, 0], index[0], backend="cuda"), "backend"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=word):
            call()


def test_where_triton_is_used():
    here = torch.zeros(1)
    assert not kernels.uses_triton(here) and not kernels.uses_triton(here, "torch")
    if INTERPRETED:
        assert kernels.uses_triton(here, "triton")
        with pytest.raises(ValueError, match="bfloat16"):
            kernels.uses_triton(here.bfloat16(), "triton")
    else:
        with pytest.raises(ValueError, match=r"TRITON_INTERPRET|mnemic"):
            kernels.uses_triton(here, "triton")


@outside
def test_importing_the_kernels_never_imports_triton():
    code = "import mnemic.models.tokens.kernels, sys; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@outside
@needs_triton
def test_the_triton_kernels_pass_these_tests_interpreted():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


KERNELS = [
    (gather_norm._forward_kernel, "x i x x x f n n n n n n f32", {"BLOCK": 64}),
    (gather_norm._backward_kernel, "x x x f x i i x f n n n n n", {"TRAIN_WEIGHT": 1, "BLOCK": 64}),
    (scatter._write_kernel, "x i x n n n n n n n n n", {"BLOCK": 64}),
    (scatter._add_kernel, "x i i x n n n n n n n n n", {"BLOCK": 64}),
    (scores._score_kernel, "x x f" + 14 * " n" + " f32", {"CAUSAL": 1, "BLOCK": 16, "DEPTH": 16}),
    (loss_module._forward_kernel, "x i f f n n n n", {"BLOCK": 64}),
    (loss_module._backward_kernel, "x i f f x n n n n", {"BLOCK": 64}),
    (segments._sum_kernel, "f i f", {"BLOCK": 64}),
]


@outside
@needs_triton
@pytest.mark.parametrize("case", KERNELS, ids=lambda c: c[0].function.__module__[29:] + str(c[2]))
def test_the_kernels_compile_for_a_card_that_is_not_here(case, tmp_path, monkeypatch):
    """To machine code, in bf16: what the interpreter takes and the compiler refuses shows here."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, kinds, constants = case
    types = {"x": "*bf16", "i": "*i64", "f": "*fp32", "n": "i32", "f32": "fp32"}
    names = kernel.compiled.arg_names
    signature = dict(zip(names, [types[kind] for kind in kinds.split()], strict=False))
    signature |= dict.fromkeys(constants, "constexpr")
    assert list(signature) == names
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel.compiled, signature, constexprs=values)
    assert compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
