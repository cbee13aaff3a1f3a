"""What running one layer of a streamed model takes beside its weights, on fake tensors; and what
the vocabulary's tiles take, by formula.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mnemic.models.exact.attention import by_name
from mnemic.models.tokens.selected import run_selected, spread
from mnemic.train.offload.skeleton import Anatomy, set_forward
from mnemic.train.offload.vocabulary import _LOGITS as LOGITS
from mnemic.train.plan.live import Fake
from mnemic.train.plan.shapes import Shape


class _Arrived(Exception):
    """The model's own forward has come to the layer that is wanted."""


@dataclass(frozen=True)
class Layer:
    """Bytes. `input`: a micro-batch's hidden states, kept for each layer. `front`: masks and rotary
    angles, kept for each micro-batch. `forward`, `backward`: the most beside weights and input; in
    `backward` each gradient goes as soon as it is there, and `gradient` of it are gradients.
    """

    input: int
    front: int
    forward: int
    backward: int
    gradient: int


def layer(fake: Fake, anatomy: Anatomy, index: int, shape: Shape, kept: int | None = None) -> Layer:
    """Run layer `index` once without and once with gradients, through `kept` tokens of each row
    (None: all).
    """
    fake.packed = shape.packed
    fake.model.train()
    found: list[tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = []

    def passing(number: int) -> Any:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if number < index:
                return hidden_states
            found.append((hidden_states, args, kwargs))
            raise _Arrived

        return forward

    with fake.mode() as live:
        own = [set_forward(part, passing(i)) for i, part in enumerate(anatomy.layers)]
        batch = shape.batch(fake.device).tensors
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "logit_columns")}
        try:
            with torch.no_grad(), fake.autocast(cache=False):
                anatomy.base(**inputs, use_cache=False)
        except _Arrived:
            pass
        finally:
            for part, forward in zip(anatomy.layers, own, strict=True):
                part.forward = forward
        hidden, args, kwargs = found.pop()
        inside = anatomy.layers[index]
        front = live.live - hidden.untyped_storage().nbytes()

        def run(given: Tensor) -> Tensor:
            with fake.autocast(cache=False):
                out = inside(given, *args, **kwargs)
            return out[0] if isinstance(out, tuple) else out

        live.restart()
        with torch.no_grad():
            run(hidden)
        forward_most = live.freed.total - front - hidden.nbytes
        live.restart()

        def ready(param: Tensor) -> None:
            assert param.grad is not None
            live.is_gradient(param.grad)
            live.use(param)

        hooks = [
            p.register_post_accumulate_grad_hook(ready)
            for p in inside.parameters() if p.requires_grad
        ]  # fmt: skip
        if kept is None:
            leaf = hidden.detach().requires_grad_()
            out = run(leaf)
        else:
            chosen = torch.zeros(len(hidden), kept, dtype=torch.int64, device=hidden.device)
            named = by_name(inside, args, kwargs)
            with fake.autocast(cache=False):
                leaf, out = run_selected(inside, named, chosen, hidden, needed=True)
        torch.autograd.backward([out], [torch.empty_like(out)])
        if kept is not None:
            spread(torch.empty_like(leaf), chosen, hidden)
        for hook in hooks:
            hook.remove()
        peak = live.freed.peak
    return Layer(
        hidden.nbytes, max(0, front), max(0, forward_most),
        max(0, peak.total - front - hidden.nbytes), peak.gradients,
    )  # fmt: skip


def head_bytes(anatomy: Anatomy, rows: int, tokens: int) -> int:
    """Of the two sweeps over the head, with tiles of `rows` rows, for `tokens` tokens whose logits
    are wanted: a tile of logits in fp32 with its temporaries, hidden states, gradients.
    """
    weight = anatomy.head.get_parameter("weight")
    size, cols = weight.dtype.itemsize, weight.shape[1]
    at_once = min(tokens, max(1, LOGITS // rows)) * rows
    single = rows >= weight.shape[0]
    # Logits, their fp32 form, softmax and gradient; in one tile torch's own softmax makes copies.
    logits = at_once * (16 + size if single else 12)
    tile = rows * cols * (4 + size)
    return logits + tile + tokens * cols * (2 * size + 4)


def step_bytes(elements: int, *, eight_bit: bool) -> int:
    """Of an AdamW step of so many elements: fp32 copies of gradient, weight and moments; with
    moments of one byte also what they are made of and into.
    """
    return elements * (32 if eight_bit else 16)
