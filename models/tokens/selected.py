"""Exact forward, gradients through selected tokens (TokenTune, EMNLP 2024, arXiv 2501.18824).

Each layer runs twice: without gradients on the tokens that were not selected, with gradients on
the selected ones, whose queries attend to all keys before them; keys and values of the others are
constants. So logits are the dense model's, and what the backward needs is the selected tokens' part
of a layer plus keys and values of the whole row.

The attention is computed some queries at a time and again in the backward: TokenTune's own code
keeps a mask of selected x all positions for each layer, which is most of what it saves at 8K.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

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
from mnemic.models.tokens.rows import cut_angles, gather_rows, scatter_rows, take

_QUERIES = 256
"""Queries at once."""


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


class _Attention(torch.autograd.Function):
    """`query`, `key`, `value`: the selected tokens' (B, h, T, D); `keys`, `values`: of all tokens,
    in which the selected ones' are replaced.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: _Rows, query: Tensor, key: Tensor, value: Tensor, keys: Tensor,
        values: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.rows, ctx.replay = rows, Replay(query.device)
        ctx.save_for_backward(query, key, value, keys, values)
        return _attend(
            rows, query, _insert(keys, rows.index, key), _insert(values, rows.index, value)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), rows = grads, ctx.rows
        query, key, value, keys, values = ctx.saved_tensors
        wholes = _insert(keys, rows.index, key), _insert(values, rows.index, value)
        dquery = torch.empty_like(query)
        sums = [torch.zeros_like(w, dtype=torch.float32) for w in wholes]
        with ctx.replay():
            for row, part, end in rows.parts(keys.shape[2]):
                with torch.enable_grad():
                    leaves = [query[row : row + 1, :, part].detach().requires_grad_()]
                    leaves += [w[row : row + 1, :, :end].detach().requires_grad_() for w in wholes]
                    out = rows(row, part, *leaves)
                found = torch.autograd.grad(out, leaves, grad[row : row + 1, part])
                dquery[row, :, part] = found[0][0]
                for total, own in zip(sums, found[1:], strict=True):
                    total[row, :, :end] += own[0]
        dkey, dvalue = (_pick(s, rows.index).to(key.dtype) for s in sums)
        wholes = [None, None]
        if ctx.needs_input_grad[4]:
            # The selected rows' own came in the place of these.
            places = rows.index[:, None, :, None].expand_as(dkey)
            wholes = [s.scatter_(2, places, 0).to(key.dtype) for s in sums]
        return None, dquery, dkey, dvalue, *wholes


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
    values: Tensor,
) -> Tensor:  # fmt: skip
    """`layer` on the rows `hidden` (B, T, H) at `index` of a sequence whose keys and values
    (B, h, S, D) are given; those of the rows themselves are made anew, with gradients. `named`: the
    call of the whole sequence.
    """
    mask = named.get("attention_mask")
    kwargs = cut_call(named, index)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **kw: Any):
        rows = _Rows(module, index, mask, kw)
        if torch.is_grad_enabled():
            return _Attention.apply(rows, query, key, value, keys, values), None
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


class SelectedForward:
    """A layer's forward. `choose(layer, hidden, named)` gives the selected tokens (B, K) of this
    forward, or None for a dense one.
    """

    def __init__(self, layer: nn.Module, choose: Callable[..., Tensor | None]) -> None:
        self.layer, self.own, self.choose = layer, layer.forward, choose

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        named = by_name(self.layer, args, kwargs)
        chosen = self.choose(self.layer, hidden_states, named)
        if chosen is None:
            return self.own(hidden_states, *args, **kwargs)
        constant = hidden_states.detach()
        with torch.no_grad():
            _, keys, values, _ = capture(self.layer, plain_forward(self.layer), constant, **named)
        others = left_out(chosen, constant.shape[1])
        whole = constant
        if others.shape[1]:
            with torch.no_grad():
                rows = attend_from(self.layer, take(constant, others), others, named, keys, values)
            whole = scatter_rows(constant, others, rows)
        selected = gather_rows(hidden_states, chosen)

        def run(x: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend_from(self.layer, x, chosen, named, k, v)

        if getattr(self.layer, "gradient_checkpointing", False):
            rows = checkpoint(run, selected, keys, values, use_reentrant=False)
        else:
            rows = run(selected, keys, values)
        assert isinstance(rows, Tensor)
        return scatter_rows(whole, chosen, rows)


def left_out(index: Tensor, length: int) -> Tensor:
    """The tokens (B, S - K) that `index` (B, K) leaves out, sorted."""
    chosen = torch.zeros(len(index), length, dtype=torch.int8, device=index.device)
    chosen.scatter_(1, index, 1)
    # Not nonzero(), whose shape depends on the content.
    return chosen.argsort(dim=1, stable=True)[:, : length - index.shape[1]]
