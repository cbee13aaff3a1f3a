"""A decoder layer in chunks of the sequence, forward and backward (after StreamBP, arXiv
2506.03077, and FlexLLM's token-level windows, arXiv 2402.18789).

Forward: chunk after chunk, each attending to the keys before it; kept is the layer's input only.
Backward: keys and values again, then the last chunk first. When a chunk's turn comes, all later
queries have left their gradients at its keys and values, so one backward over (its output, its
keys, its values) is complete. Memory is that of one chunk's layer, plus the keys and values of the
sequence and their gradients; with checkpointing alone it is that of the whole layer.

Exact: only the order in which terms are added differs. Any architecture whose attention goes
through transformers' table, with its own masks; gradients of weights are summed in fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnemic.models.exact.attention import (
    attend_rows,
    attending,
    attention_of,
    by_name,
    capture,
    check_masks,
    decoder_layers,
    plain_forward,
    visible,
)
from mnemic.models.exact.recompute import Replay, Sums

_CACHES = ("past_key_values", "cache", "layer_past")


@dataclass
class _Call:
    """A layer's call: its own forward, what came beside the hidden states, and the full mask."""

    layer: nn.Module
    run: Callable[..., Any]
    kwargs: dict[str, Any]
    chunk: int

    def part(self, chunk: slice) -> dict[str, Any]:
        """The keywords for some rows: rotary angles cut, no mask (the attention knows it), and no
        positions: gaps in them are read as documents.
        """
        kwargs = dict(self.kwargs)
        angles = kwargs.get("position_embeddings")
        if angles is not None:
            kwargs["position_embeddings"] = tuple(t[:, chunk] for t in angles)
        if "position_ids" in kwargs:
            kwargs["position_ids"] = None
        kwargs["attention_mask"] = None
        return kwargs

    @property
    def mask(self) -> Tensor | None:
        return self.kwargs.get("attention_mask")

    def chunks(self, length: int) -> list[slice]:
        return [slice(s, min(s + self.chunk, length)) for s in range(0, length, self.chunk)]

    def attention(self, chunk: slice, keys: Tensor, values: Tensor, seen: list[Tensor]) -> Any:
        """Attention of a chunk's queries over `keys`, `values` (B, Hk, start, D) before it and its
        own, which are left in `seen`.
        """
        mask = self.mask

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **kw: Any):
            seen[:] = key, value
            if chunk.start:
                key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
            shown = None
            if chunk.start or mask is not None:
                places = torch.arange(chunk.start, chunk.stop, device=query.device)
                shown = visible(places, chunk.stop, mask, chunk)
            return attend_rows(module, query, key, value, shown, **kw)

        return attending(attention_of(self.layer), attend)

    def __call__(self, hidden: Tensor, chunk: slice, keys: Any, values: Any) -> Any:
        """(output, keys, values) of the chunk whose hidden states are given."""
        seen: list[Tensor] = []
        with self.attention(chunk, keys, values, seen):
            out = self.run(hidden, **self.part(chunk))
        return (out[0] if isinstance(out, tuple) else out), *seen


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, hidden: Tensor, *params: Tensor) -> Tensor:
        ctx.call, ctx.replays = call, []
        ctx.save_for_backward(hidden, *params)
        return _forward(call, hidden, ctx.replays)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        call: _Call = ctx.call
        hidden, *params = ctx.saved_tensors
        length = hidden.shape[1]
        chunks = call.chunks(length)
        keys, values = _keys_and_values(call, hidden, chunks, ctx.replays)
        dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
        wanted = [p for p, needed in zip(params, ctx.needs_input_grad[2:], strict=True) if needed]
        sums = Sums(wanted)
        dhidden = torch.empty_like(hidden) if ctx.needs_input_grad[1] else None
        for chunk, replay in reversed(list(zip(chunks, ctx.replays, strict=True))):
            start = chunk.start
            with torch.enable_grad(), replay():
                leaf = hidden[:, chunk].detach().requires_grad_(dhidden is not None)
                before = [t[:, :, :start].detach().requires_grad_() for t in (keys, values)]
                out, key, value = call(leaf, chunk, *before)
            roots, given = [out], [grad[:, chunk]]
            for tensor, later in ((key, dkeys), (value, dvalues)):
                if tensor.requires_grad:
                    roots.append(tensor)
                    given.append(later[:, :, chunk])
            sources = [
                *([leaf] if dhidden is not None else []),
                *(before if start else []),
                *wanted,
            ]
            found = list(torch.autograd.grad(roots, sources, given, allow_unused=True))
            if dhidden is not None:
                dhidden[:, chunk] = found.pop(0)
            if start:
                for total in (dkeys, dvalues):
                    earlier = found.pop(0)
                    if earlier is not None:
                        total[:, :, :start] += earlier
            sums.add(found)
            del out, key, value, roots
        results, summed = [], iter(sums.results())
        for needed in ctx.needs_input_grad[2:]:
            results.append(next(summed) if needed else None)
        return None, dhidden, *results


def _forward(call: _Call, hidden: Tensor, replays: list[Replay] | None = None) -> Tensor:
    keys: Any = None
    values: Any = None
    out = torch.empty_like(hidden)
    with torch.no_grad():
        for chunk in call.chunks(hidden.shape[1]):
            if replays is not None:
                replays.append(Replay(hidden.device))
            start = chunk.start
            before = (keys[:, :, :start], values[:, :, :start]) if start else (None, None)
            part, key, value = call(hidden[:, chunk], chunk, *before)
            out = out if part.dtype == out.dtype else out.to(part.dtype)
            out[:, chunk] = part
            if keys is None:
                keys, values = (_room(t, hidden.shape[1]) for t in (key, value))
            keys[:, :, chunk], values[:, :, chunk] = key, value
    return out


def _room(like: Tensor, length: int) -> Tensor:
    return like.new_empty(like.shape[0], like.shape[1], length, like.shape[3])


def _keys_and_values(
    call: _Call, hidden: Tensor, chunks: list[slice], replays: list[Replay]
) -> tuple[Tensor, Tensor]:
    """Of the whole sequence, chunk by chunk, without the attention itself."""
    found: Any = None
    for chunk, replay in zip(chunks, replays, strict=True):
        with torch.no_grad(), replay():
            _, key, value, _ = capture(call.layer, call.run, hidden[:, chunk], **call.part(chunk))
        if found is None:
            found = [_room(t, hidden.shape[1]) for t in (key, value)]
        found[0][:, :, chunk], found[1][:, :, chunk] = key, value
    return found[0], found[1]


def stream_layers(model: Any, chunk: int) -> int:
    """Let every decoder layer of `model` run in chunks of `chunk` tokens. Layers that keep a cache
    (generation) and rows no longer than a chunk run as they are, the latter under checkpointing.
    Returns the number of layers; ValueError where the architecture cannot.
    """
    check_masks(model)
    layers = decoder_layers(model)
    for layer in layers:
        attention_of(layer)
        layer.forward = _Forward(layer, chunk)  # type: ignore[method-assign]
    return len(layers)


class _Forward:
    """A layer's forward in chunks. An object, so that a copied model runs its own copy."""

    def __init__(self, layer: nn.Module, chunk: int) -> None:
        self.layer, self.own, self.chunk = layer, layer.forward, chunk

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        layer, own, chunk = self.layer, self.own, self.chunk
        cached = any(kwargs.get(name) is not None for name in _CACHES)
        if cached or hidden_states.shape[1] <= chunk or kwargs.get("output_attentions"):
            return own(hidden_states, *args, **kwargs)
        params = [p for p in layer.parameters() if p.requires_grad]
        named = by_name(layer, args, kwargs)
        call = _Call(layer, plain_forward(layer, own), named, chunk)
        if torch.is_grad_enabled() and (hidden_states.requires_grad or params):
            return _Streamed.apply(call, hidden_states, *params)
        return _forward(call, hidden_states)
