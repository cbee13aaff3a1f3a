"""APOLLO and APOLLO-Mini (arXiv 2412.05270): AdamW's quality from a low-rank state.

The state of an m x n matrix (m <= n) is two fp32 moments of rank x n, one norm and one step number:
4 * (2 n rank + 2) bytes; Mini's is 4 * (2 n + 2). The projection is a function of (seed, parameter
name, interval) and never stored. Where this differs from the paper and from apollo-torch 1.0.3:

- `scale` is alpha itself; "auto" is sqrt(min(m, n) / rank), which the paper derives (Thm. A.4), so
  the learning rate means what it means for AdamW; `scale_sq` is apollo-torch's `scale`, alpha
  squared;
- the projection is sparse unless `proj="gaussian"` (projection.py);
- the limiter cannot jam (limiter.py), and a tensor whose gradient is not finite is left as it was;
- moments are fp32 whatever the weights are, and bf16 weights are rounded stochastically (write.py);
- experts (3-D parameters) have state, scale and limiter each of their own;
- rows sharded by FSDP2 give the result of one process (shards.py).

`reference=True` is the published code's arithmetic to the last rounding, its jam included.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mnemic.optim.adamw import adamw_step, new_state
from mnemic.optim.int8 import Int8Weight
from mnemic.optim.limiter import limit, limit_as_published
from mnemic.optim.lowrank import Layout, adam_direction_, bias_correction, square_sums
from mnemic.optim.projection import Projection
from mnemic.optim.random import stream_key
from mnemic.optim.rules import DEFAULTS, alpha_of, check_group, rank_of, rule_of, wants_noise
from mnemic.optim.shards import Shard, local, shard_of, sum_over
from mnemic.optim.write import Noise, rounding_noise, write

# Projected gradients held at a time, bytes: tensors of one shape share the small operations.
_BUCKET = 16 << 20


@dataclass
class Item:
    """One tensor of a step: local data, its place in the whole, its state."""

    param: Tensor
    name: str
    weight: Tensor
    grad: Tensor
    shard: Shard
    state: dict[str, Any]
    step: int


class Apollo(torch.optim.Optimizer):
    """APOLLO for matrices and stacks of matrices, AdamW for everything else.

    `params`: parameters, named parameters or groups, as for any torch optimizer. A group may set
    any key below for itself, and `rule`: "apollo", "adamw" or "adamw8bit" (embeddings and head
    belong there: `mnemic.optim.select` builds such groups from a model).

    `rank`: a number, or a share of min(m, n). `update_proj_gap`: steps between new projections.
    `scale_type`: one scale for each "channel" or for the whole "tensor". `gamma`: growth limit,
    None for none. `rounding` of bf16 weights. `seed` of projections and rounding.
    `cache_projection` keeps dense projections between steps (faster, m * rank more numbers).
    `skip_nonfinite` leaves a tensor alone whose gradient holds inf or nan; on an accelerator, which
    cannot look without waiting, such elements count as 0. `compile`: the pass over the weights by
    torch.compile.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rank: int | float = 0.25,
        scale: float | str = "auto",
        scale_sq: float | None = None,
        scale_type: str = "channel",
        update_proj_gap: int = 200,
        proj: str = "sparse",
        proj_entries: int = 1,
        gamma: float | None = 1.01,
        rounding: str = "stochastic",
        reference: bool = False,
        rule: str = "apollo",
        seed: int = 0,
        cache_projection: bool = False,
        skip_nonfinite: bool = True,
        compile: bool = False,
    ) -> None:
        given = locals()
        self.seed, self.cache_projection = seed, cache_projection
        self.skip_nonfinite, self.compile = skip_nonfinite, compile
        self._projections: dict[str, tuple[Any, Projection]] = {}
        defaults = {key: given[key] for key in DEFAULTS}
        check_group(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        filled = {**self.defaults, **param_group}
        check_group(filled)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        # Names key the random streams. Our own key: torch wants `param_names` in all groups or
        # none.
        number = len(self.param_groups) - 1
        group["names"] = list(
            group.get("param_names") or (f"{number}.{i}" for i in range(len(group["params"])))
        )

    def projection(self, group: dict[str, Any], name: str, param: Tensor, step: int) -> Projection:
        """The projection of `param` at `step` (from 1), or of this rank's rows of it."""
        shard, rank = shard_of(param), rank_of(group, param)
        interval = (step - 1) // group["update_proj_gap"]
        smaller = min(param.shape[-2:])
        by_rows = param.ndim == 2 and param.shape[0] < param.shape[1]
        start, count = (shard.first_row, local(param).shape[0]) if by_rows else (0, smaller)
        grad = param.grad if param.grad is not None else param
        setting = (interval, group["proj"], rank, group["proj_entries"], start, count, grad.dtype)
        known = self._projections.get(name)
        if known is not None and known[0] == setting:
            return known[1]
        found = Projection(
            group["proj"], stream_key(self.seed, name, interval), rank, start, count,
            param.device, grad.dtype, group["proj_entries"],
        )  # fmt: skip
        # What is no larger than two rows or columns of the gradient is not worth drawing again.
        if self.cache_projection or found.numel <= 2 * max(param.shape[-2:]):
            self._projections[name] = (setting, found)
        return found

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            buckets: dict[Any, list[Item]] = {}
            for param, name in zip(group["params"], group["names"], strict=True):
                if param.grad is None:
                    continue
                item = self._item(group, param, name)
                if rule_of(group, param) != "apollo":
                    self._step_elementwise(group, item)
                    continue
                key = (param.shape, param.dtype, item.grad.dtype, param.device, item.step)
                bucket = buckets.setdefault(key, [])
                bucket.append(item)
                low = item.state["exp_avg"]
                if len(bucket) * low.numel() * low.element_size() >= _BUCKET:
                    self._step_bucket(group, buckets.pop(key))
            for bucket in buckets.values():
                self._step_bucket(group, bucket)
        return loss

    def _item(self, group: dict[str, Any], param: Tensor, name: str) -> Item:
        grad = param.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise ValueError(f"{name}: Apollo takes dense gradients, this one is {grad.layout}")
        if param.is_complex():
            raise ValueError(f"{name}: Apollo takes real parameters, this one is {param.dtype}")
        shard, weight, state = shard_of(param), local(param), self.state[param]
        if not state:
            # Not before the first gradient: whoever shards or moves parameters does it earlier.
            state |= self.new_state(group, param)
        return Item(
            param, name, weight.detach(), local(grad), shard,
            {k: local(v) for k, v in state.items()}, int(state["step"].item()) + 1,
        )  # fmt: skip

    def new_state(self, group: dict[str, Any], param: Tensor) -> dict[str, Tensor]:
        """The state of `param` before its first step."""
        shard, weight = shard_of(param), local(param)
        state = {"step": torch.zeros((), dtype=torch.float32)}
        if rule_of(group, param) == "apollo":
            return state | self._low_rank_state(group, param, weight, shard)
        fresh = new_state(weight, eight_bit=rule_of(group, param) == "adamw8bit")
        whole = "exp_avg_scale" not in fresh
        return state | {k: shard.wrap(v) if whole else v for k, v in fresh.items()}

    def _low_rank_state(
        self, group: dict[str, Any], param: Tensor, weight: Tensor, shard: Shard
    ) -> dict[str, Tensor]:
        layout = Layout(tuple(param.shape), rank_of(group, param), group["scale_type"])
        by_rows = param.ndim == 2 and layout.side == "left"
        # Rows of R are rows of G, or experts: sharded as G is. Projected rows leave R whole.
        shape = layout.low_shape(weight.shape)
        keep = (lambda x: x) if by_rows else shard.wrap
        exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
        norm = weight.new_zeros(weight.shape[:-2], dtype=exact)
        return {
            "exp_avg": keep(weight.new_zeros(shape, dtype=exact)),
            "exp_avg_sq": keep(weight.new_zeros(shape, dtype=exact)),
            "prev_norm": shard.wrap(norm) if param.ndim == 3 else norm,
        }

    def _noise(self, group: dict[str, Any], item: Item) -> Noise | None:
        if not wants_noise(group, item.weight):
            return None
        per_row = item.weight[0].numel() // item.weight.shape[-1] if item.weight.ndim > 1 else 1
        key = stream_key(self.seed, "rounding", item.name, item.step)
        return rounding_noise(key, item.weight, item.shard.first_row * per_row)

    def _step_elementwise(self, group: dict[str, Any], item: Item) -> None:
        if self.skip_nonfinite:
            if item.weight.device.type == "cpu" and item.shard.group is None:
                if not item.grad.sum().isfinite():
                    return
            else:
                item.grad.nan_to_num_(0.0, 0.0, 0.0)
        self.state[item.param]["step"].fill_(item.step)
        weight = item.weight
        if isinstance(weight, Int8Weight):
            # AdamW's kernel writes fp32 weights itself; those below fp32 are written by `write`.
            weight = weight.as_dtype(torch.bfloat16)
        adamw_step(
            weight, item.grad, item.state, step=item.step, lr=float(group["lr"]),
            weight_decay=group["weight_decay"], betas=group["betas"], eps=group["eps"],
            noise=self._noise(group, item),
        )  # fmt: skip

    def _step_bucket(self, group: dict[str, Any], items: list[Item]) -> None:
        """One step of tensors of one shape, dtype, device and step number."""
        first = items[0]
        layout = Layout(tuple(first.param.shape), rank_of(group, first.param), group["scale_type"])
        axes, per_tensor = layout.reduce, group["scale_type"] == "tensor"
        # Experts are sharded whole; of matrices, ranks hold rows: channels ("right") or not.
        ranks = first.shard.group if len(layout.shape) == 2 else None
        of_parts = ranks if layout.side == "left" else None
        of_channels = ranks if layout.side == "right" else None
        if self.skip_nonfinite and first.weight.device.type != "cpu":
            for item in items:
                item.grad.nan_to_num_(0.0, 0.0, 0.0)

        lows, sums, low_sums = [], [], []
        for item in items:
            # The norm first: it streams from memory, the product does better from cache.
            sums.append(square_sums(item.grad, axes))
            project = self.projection(group, item.name, item.param, item.step)
            (low,) = sum_over(of_parts, [project(item.grad, layout.side)])
            lows.append(low)
            low_sums.append(square_sums(low, axes))
        squares, before = torch.stack(sums), torch.stack(low_sums)
        (squares,) = sum_over(of_parts, [squares])
        if per_tensor:
            squares, before = sum_over(of_channels, [squares, before])
        if self.skip_nonfinite and first.weight.device.type == "cpu":
            totals = squares.flatten(1).sum(1)
            if not per_tensor:
                (totals,) = sum_over(of_channels, [totals])
            if not totals.sum().isfinite():
                fine = totals.isfinite().nonzero().flatten().tolist()
                items, lows = [items[i] for i in fine], [lows[i] for i in fine]
                squares, before = squares[fine], before[fine]
                if not items:
                    return

        factor = self.factors(group, items, layout, lows, squares, before, of_channels)
        del lows
        keep = 1 - float(group["lr"]) * group["weight_decay"]
        if group["reference"]:
            # Decay after the update, on the updated weight.
            factor *= keep
        for item, one in zip(items, factor, strict=True):
            self.state[item.param]["step"].fill_(item.step)
            noise = self._noise(group, item)
            write(item.weight, item.grad, one, keep, noise, compiled=self.compile)

    def factors(
        self, group: dict[str, Any], items: list[Item], layout: Layout, lows: list[Tensor],
        squares: Tensor, before: Tensor, of_channels: Any = None,
    ) -> Tensor:  # fmt: skip
        """Update the moments with the projected gradients `lows` (destroyed), and return what each
        channel of each gradient is multiplied with, sign and limiter included.

        `squares`, `before`: squared norms of the gradients' and the projections' channels.
        """
        axes, per_tensor = layout.reduce, group["scale_type"] == "tensor"
        first = items[0]
        adam_direction_(
            lows, [i.state["exp_avg"] for i in items], [i.state["exp_avg_sq"] for i in items],
            group["betas"], group["eps"],
        )  # fmt: skip
        after = torch.stack([square_sums(x, axes) for x in lows])
        if per_tensor:
            (after,) = sum_over(of_channels, [after])
        before, after = before.sqrt_(), after.sqrt_()
        if group["reference"]:
            scale = after / (before + 1e-8)
        else:
            scale = torch.where(before > 0, after / before, 0.0)
        energy = (scale.square() * squares).sum((-2, -1), keepdim=True)
        if not per_tensor:
            (energy,) = sum_over(of_channels, [energy])

        lr, step = float(group["lr"]), first.step
        rate = lr * alpha_of(group, first.param) * bias_correction(step, group["betas"])
        factor = scale * -rate
        if group["gamma"] is not None:
            previous = torch.stack([i.state["prev_norm"] for i in items]).view(energy.shape)
            if group["reference"]:
                found = limit_as_published(energy.sqrt(), previous, group["gamma"], step == 1)
            else:
                found = limit(energy.sqrt(), previous, group["gamma"], layout.low_size)
            factor /= found[0]
            for item, norm in zip(items, found[1], strict=True):
                item.state["prev_norm"].copy_(norm.view(item.state["prev_norm"].shape))
        return factor

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but state keeps its dtype: torch would cast fp32 moments to bf16 weights'."""
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, param in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if key == "step":
                    self.state[param][key] = value.detach().clone().cpu()
                elif isinstance(value, Tensor):
                    moved = value.detach().to(param.device)
                    self.state[param][key] = moved.clone() if moved is value else moved
        self._projections.clear()


class ApolloMini(Apollo):
    """APOLLO-Mini: rank 1, one scale for the whole tensor, as little state as SGD."""

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **settings: Any) -> None:
        super().__init__(params, lr, **{"rank": 1, "scale_type": "tensor", **settings})
