"""Activations of one forward and backward, counted on fake tensors: what is saved, by component,
and the peak.

LeMo's own log of Llama-2-7B (LoRA, 8,192 tokens) saves 49.14 GiB; this counts 49.30 for the same
model (tests/train/test_plan_activations.py, with figures counted on real tensors beside it).
"""

import gc
from dataclasses import dataclass

from mnemic.train.plan.flops import Flops
from mnemic.train.plan.live import Fake
from mnemic.train.plan.saved import counting
from mnemic.train.plan.shapes import Shape


@dataclass(frozen=True)
class Activations:
    """Bytes. `saved`: unique storages held between forward and backward, less weights and buffers.
    `peak`: the most of all that is live but weights and gradients. `held`, `freed`: the most with
    gradients, all kept or each gone when it is there. `flops`: of matrix products and attention.
    """

    saved: int
    by_component: dict[str, int]
    peak: int
    held: int
    freed: int
    flops: int


def count_activations(fake: Fake, shape: Shape) -> Activations:
    """Run the loss of one batch of `shape`, and its backward. Recomputation runs to its end, where
    a real one stops at the last tensor it needs.
    """
    from mnemic.train.objectives.tokens import token_loss

    gc.collect()  # cycles of an earlier count would be live in this one
    model, flops = fake.model, Flops()
    fake.packed = shape.packed
    model.train()
    trained = [param for param in model.parameters() if param.requires_grad]
    with fake.mode() as live, flops:

        def ready(param: object) -> None:
            live.is_gradient(param.grad)  # type: ignore[attr-defined]
            live.use(param)  # type: ignore[arg-type]

        hooks = [param.register_post_accumulate_grad_hook(ready) for param in trained]
        batch = shape.batch(fake.device)
        with fake.autocast(), counting(model) as saved:
            loss = token_loss(model, batch)
        split = saved.by_component()
        (loss * 1.0).backward()
        del loss
        for hook in hooks:
            hook.remove()
    for param in trained:
        param.grad = None
    return Activations(
        sum(split.values()), split, live.freed.others, live.held.total, live.freed.total,
        flops.total,
    )  # fmt: skip
