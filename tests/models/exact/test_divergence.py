"""Divergences without logits: TRL's on the same logits, and those of the plain formula through any
head, with no tensor of rows x vocabulary on the way.
"""

import copy
from typing import Any

import architectures as a
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mnemic.models.exact.divergence import (
    Divergence,
    Head,
    at_head,
    chunked_divergence,
    chunked_losses,
    head_of,
)
from mnemic.models.exact.loss import Scaling, chunk_rows

KINDS = [
    Divergence("forward_kl"),
    Divergence("reverse_kl", 2.5),
    Divergence("jsd", 0.7, 0.1),
    Divergence("jsd", 1.0, 0.8),
]
TRL_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0}
N, H, V = 41, 8, 50  # no chunk size divides 41


def case(vocabularies: tuple[int, int] = (V, V), cap: float | None = None) -> Any:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    hidden, others = draw(N, H).requires_grad_(), draw(N, 2 * H)
    weight, frozen = draw(vocabularies[0], H).requires_grad_(), draw(vocabularies[1], 2 * H)
    student = Head(lambda x: x @ weight.T, (weight,), Scaling(0.5, cap), vocabularies[0])
    teacher = Head(lambda x: x @ frozen.T, (), Scaling(0.3), vocabularies[1])
    return hidden, weight, others, student, teacher


def trl_losses(student: Any, teacher: Any, divergence: Divergence) -> Any:
    """Each row's, by TRL's function."""
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    each = gkd.GKDTrainer.generalized_jsd_loss(
        student, teacher, beta=TRL_BETA.get(divergence.kind, divergence.beta),
        temperature=divergence.temperature, reduction="none",
    )  # fmt: skip
    return each.sum(-1)


@pytest.mark.parametrize("divergence", KINDS, ids=str)
@pytest.mark.parametrize("chunk", [0, 7, 64])
def test_values_and_gradients_are_trls_on_whole_logits(
    divergence: Divergence, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    hidden, weight, others, student, teacher = case(cap=4.0)
    factors = torch.linspace(-1, 2, N)  # each row has its own
    found = chunked_divergence(hidden, student, others, teacher, divergence, chunk=chunk)
    grads = torch.autograd.grad((found * factors).sum(), [hidden, weight])
    whole = trl_losses(student.logits(hidden), teacher.logits(others), divergence)
    expected = torch.autograd.grad((whole * factors).sum(), [hidden, weight])
    assert found.shape == (N,) and found.dtype == torch.float32
    torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-6)


def test_closed_forms() -> None:
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    forward = 0.9 * torch.log(torch.tensor(0.9 / 0.5)) + 0.1 * torch.log(torch.tensor(0.1 / 0.5))
    backward = -0.5 * torch.log(torch.tensor(0.9 * 0.1 / 0.25))
    assert float(Divergence("forward_kl")(student, teacher)) == pytest.approx(float(forward))
    assert float(Divergence("reverse_kl")(student, teacher)) == pytest.approx(float(backward))
    b = 0.3
    mix = (0.7 * 0.5 + b * 0.9, 0.7 * 0.5 + b * 0.1)
    log = lambda x: float(torch.log(torch.tensor(x)))  # noqa: E731
    jsd = b * (0.9 * log(0.9 / mix[0]) + 0.1 * log(0.1 / mix[1]))
    jsd += (1 - b) * 0.5 * (log(0.5 / mix[0]) + log(0.5 / mix[1]))
    assert float(Divergence("jsd", 1.0, b)(student, teacher)) == pytest.approx(jsd)


@pytest.mark.parametrize("vocabularies", [(V, V), (V + 14, V), (V, V + 9)])
def test_padding_rows_of_one_head_are_in_neither_distribution(vocabularies: Any) -> None:
    """The cross-entropy beside it is over the student's own rows, as objective sft's."""
    hidden, weight, others, student, teacher = case(vocabularies)
    targets = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))
    targets[8:24] = -100  # a whole chunk and more
    divergence = Divergence("forward_kl", 2.0)
    found = chunked_losses(hidden, student, others, teacher, targets, divergence, chunk=8)
    logits, other = student.logits(hidden), teacher.logits(others)
    soft = divergence(logits[:, :V], other[:, :V])
    hard = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    expected = torch.stack((soft, hard), dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    weights = torch.tensor([0.3, 0.7])
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), [hidden, weight]),
        torch.autograd.grad((expected * weights).sum(), [hidden, weight]),
        rtol=1e-5, atol=1e-6,
    )  # fmt: skip
    assert float(found[8:24, 1].detach().abs().sum()) == 0


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.most = max(self.most, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return out


@pytest.mark.parametrize("divergence", KINDS, ids=str)
def test_no_tensor_of_all_rows_by_the_vocabulary_is_ever_made(divergence: Divergence) -> None:
    rows, size, chunk = 256, 4096, 8
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 4, generator=generator).requires_grad_()
    weight = torch.randn(size, 4, generator=generator).requires_grad_()
    head = Head(lambda x: x @ weight.T, (weight,), Scaling(), size)
    frozen = weight.detach().flip(0)
    teacher = Head(lambda x: x @ frozen.T, (), Scaling(), size)
    targets = torch.zeros(rows, dtype=torch.int64)
    with Largest() as watch:
        args = hidden, head, torch.randn(rows, 4, generator=generator), teacher
        chunked_divergence(*args, divergence, chunk=chunk).sum().backward()
        chunked_losses(*args, targets, divergence, chunk=chunk).sum().backward()
    # The weight itself and its gradient are 4 x size.
    assert watch.most == chunk * size
    with Largest() as watch:
        chunked_divergence(*args, divergence, chunk=0).sum().backward()
    assert watch.most == rows * size  # so that the watch sees what it looks for


def test_rows_at_once_go_by_the_vocabulary() -> None:
    size = 1 << 17
    seen = []

    def run(x: Any) -> Any:
        seen.append(len(x))
        return x.new_zeros(len(x), 2)

    head = Head(run, (), Scaling(), size)
    x = torch.zeros(200, 4)
    chunked_divergence(x, head, x, head, Divergence())
    assert max(seen) == max(64, chunk_rows(size) // 2) and sum(seen) == 400


def models() -> dict[str, Any]:
    from peft import LoraConfig, get_peft_model

    def lora(target: list[str]) -> Any:
        torch.manual_seed(1)
        model = get_peft_model(a.small("llama"), LoraConfig(r=2, target_modules=target))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
        return model

    return {
        "untied": a.small("llama"),
        "tied": a.small("llama", tie_word_embeddings=True),
        "lora": lora(["q_proj"]),
        "lora_on_head": lora(["q_proj", "lm_head"]),
        "softcap": a.small("gemma3_text", final_logit_softcapping=3.0),
        "gpt_neox": a.small("gpt_neox"),
    }


@pytest.mark.parametrize("kind", models())
def test_through_a_models_own_head(kind: str) -> None:
    """The hidden states that come by a head, and the head apart, give what the model's logits do:
    scaling, cap, tied weights and adapters included.
    """
    ids = a.ids(2, 20)
    model = models()[kind]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    other = copy.deepcopy(base).requires_grad_(False).eval()
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    divergence = Divergence("jsd", 1.5, 0.4)
    with torch.no_grad():
        target = other(ids).logits
    expected = divergence(model(ids).logits.flatten(0, 1), target.flatten(0, 1))
    expected.sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    seen: list[Any] = []
    with torch.no_grad(), at_head(other, seen.append):
        other(ids)
    found = []

    def compare(hidden: Any) -> None:
        rows, others = hidden.flatten(0, 1), seen[0].flatten(0, 1)
        args = rows, head_of(base), others, head_of(other)
        found.append(chunked_divergence(*args, divergence, chunk=7))

    with at_head(base, compare):
        assert model(ids).logits.shape == (2, 20, 1)
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-6)
    found[0].sum().backward()
    a.close({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, grads, 3e-6)
    assert model(ids).logits.shape == (2, 20, 96)  # asked for logits, it gives them again
