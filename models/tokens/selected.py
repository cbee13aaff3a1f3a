"""Exact forward, gradients through selected tokens (after TokenTune, EMNLP 2024, arXiv 2501.18824).

A layer runs densely and keeps its input, no graph. In the backward it runs again for the selected
tokens only, whose queries attend to all keys before them; keys and values of the others are
constants. So loss and logits are the dense model's, the backward is as much shorter as there are
fewer tokens, and it is known by then what the forward attended to. TokenTune draws the tokens, and
draws them before.

The attention of the selected rows is computed some queries at a time and again in its backward:
TokenTune's own code keeps a mask of selected x all positions for each layer, which is most of what
it saves at 8K.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from mnemic.models.exact.attention import (
    attend_rows,
    attending,
    attention_of,
    by_name,
    capture,
    plain_forward,
    visible,
)
from mnemic.models.exact.recompute import Replay
from mnemic.models.tokens.kernels import scatter_rows_
from mnemic.models.tokens.rows import cut_angles, take

_QUERIES = 256
"""Queries at once."""
_KEPT = 128 << 20
"""Bytes that one layer's attention may save where its backward follows at once."""


class _Rows:
    """Attention of queries at `index` (B, T) over whole keys and values, with the model's mask."""

    def __init__(self, module: nn.Module, index: Tensor, mask: Tensor | None, kw: Any) -> None:
        self.module, self.index, self.mask, self.kw = module, index, mask, kw

    def parts(self, length: int) -> Iterator[tuple[int, slice, int]]:
        """(row of the batch, slice of queries, number of the `length` keys that they see)."""
        rows, count = self.index.shape
        slices = [slice(s, min(s + _QUERIES, count)) for s in range(0, count, _QUERIES)]
        last = [part.stop - 1 for part in slices]
        if isinstance(self.index, FakeTensor):
            # Shapes without content (mnemic plan): tokens at even distances.
            ends = [[-(-length * (i + 1) // count) for i in last]] * rows
        else:
            ends = (self.index[:, last] + 1).tolist()
        for row in range(rows):
            for part, end in zip(slices, ends[row], strict=True):
                yield row, part, end

    def __call__(self, row: int, part: slice, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        places, mask = self.index[row, part], self.mask
        if mask is not None and len(mask) > 1:
            mask = mask[row : row + 1]
        shown = visible(places, key.shape[2], mask, places)
        out, _ = attend_rows(self.module, query, key, value, shown, **self.kw)
        return out


Part = tuple[int, slice, int, list[Tensor], Tensor]
"""(row of the batch, slice of queries, number of keys, [queries, keys, values], output)."""


class _Attention(torch.autograd.Function):
    """`query`, `key`, `value`: the selected tokens' (B, h, T, D); `keys`, `values`: of all tokens,
    in which the selected ones' are replaced. `keep`: with graphs of the parts until the backward,
    so that there is no second computation.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: _Rows, keep: bool, query: Tensor, key: Tensor, value: Tensor,
        keys: Tensor, values: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.rows, ctx.replay, ctx.parts = rows, Replay(query.device), None
        wholes = _insert(keys, rows.index, key), _insert(values, rows.index, value)
        if not keep:
            ctx.save_for_backward(query, key, value, keys, values)
            return _attend(rows, query, *wholes)
        ctx.groups = _groups(rows.module, query, keys)
        ctx.shape, ctx.dtype = keys.shape, key.dtype
        wholes = [_ungroup(w, ctx.groups) for w in wholes]
        with _ungrouped(rows.module, ctx.groups):
            ctx.parts = list(_with_graphs(rows, query, *wholes))
        found = [
            torch.cat([out for row, *_, out in ctx.parts if row == one], 1)
            for one in range(len(query))
        ]
        return torch.cat(found).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), rows = grads, ctx.rows
        if ctx.parts is None:
            query, key, value, keys, values = ctx.saved_tensors
            wholes = _insert(keys, rows.index, key), _insert(values, rows.index, value)
            parts, groups = _with_graphs(rows, query, *wholes), 1
            shape, dtype = keys.shape, key.dtype
        else:
            parts, groups, shape, dtype = ctx.parts, ctx.groups, ctx.shape, ctx.dtype
        batch, heads, length, size = shape
        sums = [grad.new_zeros(batch, heads * groups, length, size, dtype=torch.float32)]
        sums.append(torch.zeros_like(sums[0]))
        # Of the queries (B, T, Hq, D), as the output is.
        dquery = torch.empty_like(grad)
        with ctx.replay():
            for row, part, end, leaves, out in parts:
                found = torch.autograd.grad(out, leaves, grad[row : row + 1, part])
                dquery[row, part] = found[0][0].transpose(0, 1)
                for total, own in zip(sums, found[1:], strict=True):
                    total[row, :, :end] += own[0]
        ctx.parts = None
        sums = [s.unflatten(1, (heads, groups)).sum(2) if groups > 1 else s for s in sums]
        dkey, dvalue = (_pick(s, rows.index).to(dtype) for s in sums)
        dwholes: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[5]:
            # The selected rows' own came in the place of these.
            places = rows.index[:, None, :, None].expand_as(dkey)
            dwholes = [s.scatter_(2, places, 0).to(dtype) for s in sums]
        return None, None, dquery.transpose(1, 2), dkey, dvalue, *dwholes


def _with_graphs(rows: _Rows, query: Tensor, keys: Tensor, values: Tensor) -> Iterator[Part]:
    """Every part's attention, with a graph from its own queries, keys and values."""
    for row, part, end in rows.parts(keys.shape[2]):
        with torch.enable_grad():
            leaves = [query[row : row + 1, :, part].detach().requires_grad_()]
            leaves += [t[row : row + 1, :, :end].detach().requires_grad_() for t in (keys, values)]
            out = rows(row, part, *leaves)
        yield row, part, end, leaves, out


def _groups(module: nn.Module, query: Tensor, keys: Tensor) -> int:
    """Query heads that share keys, where the module's attention copies keys for each."""
    groups = query.shape[1] // keys.shape[1]
    return groups if getattr(module, "num_key_value_groups", 1) == groups else 1


def _ungroup(whole: Tensor, groups: int) -> Tensor:
    """Keys or values (B, h, S, D) for each query head: parts share what each would copy."""
    return whole.repeat_interleave(groups, 1) if groups > 1 else whole


@contextmanager
def _ungrouped(module: Any, groups: int) -> Iterator[None]:
    """Inside, the module's attention takes keys and values for each query head."""
    if groups == 1:
        yield
        return
    module.num_key_value_groups = 1
    try:
        yield
    finally:
        module.num_key_value_groups = groups


def _kept_bytes(rows: _Rows, query: Tensor, length: int) -> int:
    """What graphs of all parts hold: keys and values for each query head, queries and outputs,
    and a mask of each part.
    """
    batch, heads, count, size = query.shape
    masks = sum(end * (part.stop - part.start) for _, part, end in rows.parts(length))
    return query.element_size() * (2 * batch * heads * size * (length + count) + masks)


@torch.no_grad()
def _attend(rows: _Rows, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    found: Any = None
    for row, part, end in rows.parts(keys.shape[2]):
        own = (t[row : row + 1, :, :end] for t in (keys, values))
        out = rows(row, part, query[row : row + 1, :, part], *own)
        if found is None:
            found = out.new_empty(query.shape[0], query.shape[2], *out.shape[2:])
        found[row, part] = out[0]
    return found


def _pick(whole: Tensor, index: Tensor) -> Tensor:
    """Rows of (B, h, S, D) at `index` (B, T)."""
    return take(whole.transpose(1, 2), index).transpose(1, 2)


def _insert(whole: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    places = index[:, None, :, None].expand_as(rows)
    return whole.scatter(2, places, rows.to(whole.dtype))


def attend_from(
    layer: nn.Module, hidden: Tensor, index: Tensor, named: dict[str, Any], keys: Tensor,
    values: Tensor, *, once: bool = False,
) -> Tensor:  # fmt: skip
    """`layer` on the rows `hidden` (B, T, H) at `index` of a sequence whose keys and values
    (B, h, S, D) are given; those of the rows themselves are made anew, with gradients. `named`:
    the call of the whole sequence. `once`: the backward follows at once, so what the attention
    saves may be kept for it, up to 128 MiB.
    """
    mask = named.get("attention_mask")
    kwargs = cut_call(named, index)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **kw: Any):
        rows = _Rows(module, index, mask, kw)
        if torch.is_grad_enabled():
            keep = once and _kept_bytes(rows, query, keys.shape[2]) <= _KEPT
            return _Attention.apply(rows, keep, query, key, value, keys, values), None
        own = (_insert(t, index, part) for t, part in ((keys, key), (values, value)))
        return _attend(rows, query, *own), None

    with attending(attention_of(layer), attend):
        out = plain_forward(layer)(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def cut_call(named: dict[str, Any], index: Tensor) -> dict[str, Any]:
    """A call's keywords for the rows at `index`, whose mask the attention knows."""
    kwargs = {**named, "attention_mask": None}
    if "position_ids" in kwargs:
        kwargs["position_ids"] = None
    if kwargs.get("position_embeddings") is not None:
        kwargs["position_embeddings"] = cut_angles(kwargs["position_embeddings"], index)
    return kwargs


class Chosen(Protocol):
    """What a forward knows of its tokens."""

    def attended(self, query: Tensor, key: Tensor, scaling: float, mask: Any) -> None:
        """Called in each layer with queries and keys as its attention gets them."""

    def selected(self) -> Tensor:
        """The tokens (B, K) that gradients go through; asked for when the forward is done."""
        ...


@torch.no_grad()
def run_observed(layer: nn.Module, named: dict[str, Any], chosen: Chosen, hidden: Tensor) -> Tensor:
    """`layer` on all of `hidden` (B, S, H), without a graph; `chosen` sees what it attends to."""
    module = attention_of(layer)

    def attend(_: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any):
        scale = kw.get("scaling")
        chosen.attended(query, key, query.shape[-1] ** -0.5 if scale is None else scale, mask)
        return attend_rows(module, query, key, value, mask, **kw)

    with attending(module, attend):
        out = plain_forward(layer)(hidden, **named)
    return out[0] if isinstance(out, tuple) else out


def run_selected(
    layer: nn.Module, named: dict[str, Any], index: Tensor, hidden: Tensor, *, needed: bool
) -> tuple[Tensor, Tensor]:
    """The tokens at `index` (B, K) of `hidden` (B, S, H) as a leaf, which wants a gradient if
    `needed`, and what `layer` makes of them, with the graph from there: for a backward that follows
    at once. Keys and values of the other tokens are made again, as constants.
    """
    hidden = hidden.detach()
    with torch.no_grad():
        _, keys, values, _ = capture(layer, plain_forward(layer), hidden, **named)
    with torch.enable_grad():
        rows = take(hidden, index).requires_grad_(needed)
        return rows, attend_from(layer, rows, index, named, keys, values, once=True)


def spread(grad: Tensor, index: Tensor, hidden: Tensor) -> Tensor:
    """The gradient of `hidden` (B, S, H) from that of its tokens at `index`."""
    return scatter_rows_(torch.zeros_like(hidden), index, grad.contiguous())


class _Selected(torch.autograd.Function):
    """A whole layer without a graph, and the backward of some of its rows."""

    @staticmethod
    def forward(
        ctx: Any, layer: nn.Module, named: dict[str, Any], chosen: Chosen, hidden: Tensor,
        *params: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.layer, ctx.named, ctx.chosen = layer, named, chosen
        ctx.replay = Replay(hidden.device)
        ctx.save_for_backward(hidden, *params)
        return run_observed(layer, named, chosen, hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (hidden, *params) = grads, ctx.saved_tensors
        index = ctx.chosen.selected()
        wanted = [p for p, need in zip(params, ctx.needs_input_grad[4:], strict=True) if need]
        with ctx.replay():
            rows, out = run_selected(
                ctx.layer, ctx.named, index, hidden, needed=ctx.needs_input_grad[3]
            )
        sources = [*([rows] if rows.requires_grad else []), *wanted]
        found = list(torch.autograd.grad(out, sources, take(grad, index), allow_unused=True))
        dhidden = spread(found.pop(0), index, hidden) if rows.requires_grad else None
        results = iter(found)
        needs = ctx.needs_input_grad[4:]
        return None, None, None, dhidden, *(next(results) if need else None for need in needs)


class SelectedForward:
    """A layer's forward. `look(layer, hidden, named)` gives what this forward knows of its tokens,
    or None for a dense one.
    """

    def __init__(self, layer: nn.Module, look: Callable[..., Chosen | None]) -> None:
        self.layer, self.own, self.look = layer, layer.forward, look

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        named = by_name(self.layer, args, kwargs)
        chosen = self.look(self.layer, hidden_states, named)
        params = [p for p in self.layer.parameters() if p.requires_grad]
        if chosen is None or not (hidden_states.requires_grad or params):
            return self.own(hidden_states, *args, **kwargs)
        return _Selected.apply(self.layer, named, chosen, hidden_states, *params)


def left_out(index: Tensor, length: int) -> Tensor:
    """The tokens (B, S - K) that `index` (B, K) leaves out, sorted."""
    chosen = torch.zeros(len(index), length, dtype=torch.int8, device=index.device)
    chosen.scatter_(1, index, 1)
    # Not nonzero(), whose shape depends on the content.
    return chosen.argsort(dim=1, stable=True)[:, : length - index.shape[1]]
