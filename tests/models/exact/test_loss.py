"""Losses without logits: those of the logits, and none of the defects found in others' versions."""

import copy
from typing import Any

import architectures as a
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mnemic.models.exact.loss as module
from mnemic.models.exact.loss import LossHead, Scaling, token_losses
from mnemic.train.data.collate import Batch
from mnemic.train.objectives.tokens import token_batch, token_logprobs, token_loss

NONE = Scaling()
N, H, V = 41, 8, 50  # no chunk size divides 41


def reference(hidden: Any, weight: Any, targets: Any, scaling: Scaling = NONE) -> Any:
    logits = scaling(hidden @ weight.T).float()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


def case(dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[8:24] = -100  # a whole chunk of 8 and more
    return hidden, weight, targets


@pytest.mark.parametrize("scaling", [Scaling(), Scaling(0.25), Scaling(2.0, 5.0)])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_chunks_equal_the_formula(scaling: Scaling, scale: float) -> None:
    """Remainders count (mini-s drops them), an all-ignored chunk is 0 and not NaN, and the weight's
    gradient has the upstream factor (DeepSpeed's TiledFusedLogitsLoss ignores both).
    """
    hidden, weight, targets = case()
    losses = token_losses(
        lambda x: x @ weight.T, hidden, targets, params=[weight], vocabulary=V, scaling=scaling,
        rows=8,
    )  # fmt: skip
    assert losses.shape == (N,) and float(losses[8:24].abs().sum()) == 0
    found = torch.autograd.grad(losses.sum() * scale, [hidden, weight])
    whole = reference(hidden, weight, targets, scaling)
    expected = torch.autograd.grad(whole * scale, [hidden, weight])
    torch.testing.assert_close(losses.sum(), whole)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_each_row_has_its_own_factor() -> None:
    """What an objective makes of log-probabilities comes back row by row (Liger #968)."""
    hidden, weight, targets = case()
    factors = torch.linspace(-1, 2, N)
    losses = token_losses(
        lambda x: x @ weight.T, hidden, targets, params=[weight], vocabulary=V, scaling=Scaling(),
        rows=8,
    )  # fmt: skip
    found = torch.autograd.grad((losses * factors).sum(), [hidden, weight])
    each = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100, reduction="none")
    expected = torch.autograd.grad((each * factors).sum(), [hidden, weight])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_all_ignored() -> None:
    hidden, weight, targets = case()
    targets[:] = -100
    losses = token_losses(
        lambda x: x @ weight.T, hidden, targets, params=[weight], vocabulary=V, scaling=Scaling(),
        rows=8,
    )  # fmt: skip
    found = torch.autograd.grad(losses.sum(), [hidden, weight])
    assert all(float(g.abs().sum()) == 0 for g in found)


def test_gradients_of_a_bf16_head_are_summed_in_fp32() -> None:
    """Many small terms: a bf16 sum of chunks loses them (axolotl #1601)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4096, H, generator=generator).abs().bfloat16()
    weight = torch.randn(V, H, generator=generator).bfloat16().requires_grad_()
    targets = torch.zeros(4096, dtype=torch.int64)
    losses = token_losses(
        lambda x: x @ weight.T, hidden, targets, params=[weight], vocabulary=V, scaling=Scaling(),
        rows=16,
    )  # fmt: skip
    (found,) = torch.autograd.grad(losses.sum(), [weight])
    (exact,) = torch.autograd.grad(reference(hidden.float(), weight.float(), targets), [weight])
    error = (found.float() - exact.float()).norm() / exact.float().norm()
    assert float(error) < 0.006  # bf16 sums of the same chunks: 0.02


def models() -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    def lora(target: list[str]) -> Any:
        torch.manual_seed(1)
        model = get_peft_model(a.small("llama"), LoraConfig(r=2, target_modules=target))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
        return model

    frozen = a.small("llama")
    frozen.get_output_embeddings().weight.requires_grad_(False)
    return {
        "untied": a.small("llama"),
        "tied": a.small("llama", tie_word_embeddings=True),
        "frozen": frozen,
        "lora": lora(["q_proj"]),
        "lora_on_head": lora(["q_proj", "lm_head"]),
        "softcap": a.small("gemma3_text", final_logit_softcapping=3.0),
        "no_logits_to_keep": a.small("gpt_neox"),
    }


@pytest.mark.parametrize("kind", models())
@pytest.mark.parametrize("columns", [False, True])
def test_through_a_model(kind: str, columns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = a.ids(2, 40)
    labels = ids.clone()
    if columns:
        labels[:, :20] = -100
        labels[1, 30:] = -100
    tensors = {"input_ids": ids, "labels": labels}
    if columns:
        tensors["logit_columns"] = torch.arange(19, 39)
    batch = Batch(tensors, 1.0)
    model = models()[kind]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model

    def run(mode: str, native: bool) -> tuple[Any, Any]:
        module.loss_head(inner, mode)
        monkeypatch.setattr(module, "NATIVE", native and hasattr(F, "linear_cross_entropy"))
        model.zero_grad(set_to_none=True)
        loss = token_loss(model, batch)
        (loss * 0.25).backward()
        return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    monkeypatch.setattr(module, "chunk_rows", lambda _: 7)
    loss, grads = run("logits", False)
    for native in (False, True):
        found, others = run("chunked", native)
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
        a.close(others, grads, 3e-6)
    for mode in ("chunked", "logits"):
        module.loss_head(inner, mode)
        logprobs = token_logprobs(model, token_batch(batch))
        assert len(logprobs) == int((token_batch(batch).targets != -100).sum())
        torch.testing.assert_close(-logprobs.sum().detach(), loss, rtol=1e-6, atol=0)
    assert model(ids).logits.shape == (2, 40, 96)  # asked for logits, it gives them


def test_no_logits_are_ever_made_and_a_copy_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    model = a.small("llama", vocab_size=4096)
    module.loss_head(model, "chunked")
    most = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal most
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-1:] == (4096,) and out.ndim >= 2:
                most = max(most, out.numel() // 4096)
            return out

    batch = Batch({"input_ids": a.ids(1, 200), "labels": a.ids(1, 200)}, 1.0)
    monkeypatch.setattr(module, "chunk_rows", lambda _: 16)
    monkeypatch.setattr(module, "NATIVE", False)  # torch's own operation is opaque to the watch
    with Watch():
        token_loss(model, batch).backward()
    assert most == 32  # the head's weight is (4096, 32) and its transpose comes by; logits: 16
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert isinstance(twin.lm_head.forward, LossHead)
    assert float(twin(a.ids(1, 4)).logits.detach().abs().sum()) == 0


def test_auto_makes_few_logits_and_spares_many() -> None:
    head = module.loss_head(a.small("llama"))
    assert not head.wanted(1000)
    assert head.wanted((1 << 24) // 96 + 1)
