"""Token sparsity on a transformers decoder, by hooks that stand outside a layer's checkpoint.

Layers that follow one another and share a keep set are a run: the first one's hook takes the kept
tokens out, with their own rotary angles and masks; the layers work on the short sequence; the last
one's hook puts the rows back, and dropped tokens ride the residual. Because hooks stand outside
the checkpoint, a checkpointed layer saves the short sequence, and a recomputed one sees the same
tokens. With `scope="attention"` the layer stays whole and its attention module is short.

Never passed on are gathered `position_ids`: transformers reads gaps in them as packed documents,
flash attention as well, and masks silently.

What differs from LeMo's artifact: any batch size, packing, padding, any number of layers; keep sets
shared by layers; supervised tokens protected; loss on what was kept.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mnemic.models.exact.attention import attention_of, by_name, check_masks, decoder_layers
from mnemic.models.tokens.config import TokensConfig
from mnemic.models.tokens.forward import Attended, Forward
from mnemic.models.tokens.neurons import prune_backward
from mnemic.models.tokens.rows import (
    cut_angles,
    cut_mask,
    documents,
    gather_rows,
    recount,
    scatter_rows,
)
from mnemic.models.tokens.scores import SCORES, Look, Score, attention_score
from mnemic.models.tokens.select import Row, choose
from mnemic.models.tokens.selected import SelectedForward, left_out
from mnemic.models.tokens.visible import Seen, VisibleForward

log = logging.getLogger("mnemic")


class TokenSparsity:
    """Installs itself on `model` (peft's wrapper or not). `begin` before each forward says what its
    rows are. `progress`: share of the run that is done. `score` overrides `config.score`.

    `apart`: somebody else runs the layers one by one (a streamed model's engine), asks `look` in
    the forward and `chosen` in the backward; wants `grad="selected"`. Nothing is installed then.
    """

    def __init__(
        self, model: Any, config: TokensConfig, *, score: Score | None = None, seed: int = 0,
        apart: bool = False,
    ) -> None:  # fmt: skip
        self.config, self.seed = config, seed
        self.layers = decoder_layers(model)
        self.sparse = [i for i in config.layer_range(len(self.layers)) if self._can(i)]
        if not self.sparse:
            raise ValueError("no layer can be sparse")
        self.runs = _runs(self.sparse, config.share)
        self._run_of = {index: number for number, run in enumerate(self.runs) for index in run}
        self.score: Score = score or SCORES[config.score]
        self.progress, self.paused = 0.0, False
        self.forward: Forward | None = None
        self.active = False
        self._count = 0
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        inner.__dict__["token_sparsity"] = self
        self._flash = "flash" in str(inner.config.get_text_config()._attn_implementation)
        self._hooks: list[Any] = []
        if config.mlp_backward_keep is not None:
            prune_backward(model, self.sparse, config.mlp_backward_keep, self._prunes)
        if config.grad == "selected" or (config.scope == "layer" and config.attend == "all"):
            check_masks(inner)
        if apart:
            if config.grad != "selected":
                raise ValueError("layers that are run one by one need grad=selected")
        elif config.grad == "selected":
            for index in self.sparse:
                layer, choose = self.layers[index], partial(self._selected, index)
                layer.forward = SelectedForward(layer, choose)  # type: ignore[method-assign]
        else:
            self._install()

    # Before a forward ------------------------------------------------------------------------

    def begin(self, inputs: Mapping[str, Tensor], predicting: Tensor) -> bool:
        """Get ready for a forward of `inputs`; `predicting` (B, S) bool: positions with a target.
        Whether tokens will be dropped: not in evaluation, nor when the schedule is dense.
        """
        keep = self.config.keep_at(self.progress)
        training = self.layers.training and torch.is_grad_enabled() and not self.paused
        self.active = training and (keep < 1.0 or self.config.keep == 1.0)
        if training and not self.active:
            self.forward = None  # a dense step, and reported as one
        if not self.active:
            return False
        supervised = predicting | torch.nn.functional.pad(predicting, (1, 0))[:, :-1]
        mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
        row = Row(supervised, None if mask is None else mask.bool(), positions)
        row.require(self.config)
        # The trainer seeds torch anew for each step: the same step draws the same tokens, whatever
        # was run before it.
        if self._last_seed != torch.initial_seed():
            self._last_seed, self._count = torch.initial_seed(), 0
        generator = torch.Generator().manual_seed(hash((self.seed, self._last_seed, self._count)))
        self._count += 1
        self.forward = Forward(row, keep, generator, predicting)
        prepare = getattr(self.score, "prepare", None)
        if prepare is not None:
            self.forward.prepared = prepare(inputs, row)
        return True

    _last_seed: int | None = None

    # After it --------------------------------------------------------------------------------

    def selected(self, forward: Forward, number: int) -> Tensor:
        """The tokens (B, K) of a forward that is done."""
        if number not in forward.index:
            assert forward.mass is not None
            with torch.no_grad():
                forward.index[number] = choose(
                    forward.mass, forward.row, self.config, forward.keep, self.runs[number][0]
                )
        return forward.index[number]

    @property
    def kept(self) -> Tensor:
        """Tokens (B, S), bool, that all sparse layers kept."""
        assert self.forward is not None
        if self.config.grad == "selected":
            self.selected(self.forward, 0)
        supervised = self.forward.row.supervised
        found = torch.ones_like(supervised)
        for index in self.forward.index.values():
            found &= torch.zeros_like(supervised).scatter_(1, index, True)
        return found

    def loss_dropped(self) -> Tensor | None:
        """Positions (B, S), bool, whose targets do not count; None where all do."""
        return None if self.config.loss == "all" or self.config.protect else ~self.kept

    @property
    def loss_factor(self) -> Tensor | float:
        """What makes the loss over kept targets stand for all of them."""
        if self.config.loss == "all" or self.config.protect:
            return 1.0
        assert self.forward is not None
        wanted = self.forward.predicting
        return wanted.sum() / (wanted & self.kept).sum().clamp_min(1)

    def report(self) -> dict[str, float]:
        """Of the last forward: share of tokens kept, over all layers and by sparse layer, and
        supervised tokens dropped.
        """
        if self.forward is None:
            return {"tokens/kept": 1.0, "tokens/supervised_dropped": 0.0}
        row = self.forward.row
        total = float(row.supervised.numel() if row.valid is None else row.valid.sum())
        shares = {}
        for number, run in enumerate(self.runs):
            index = self.forward.index.get(number)
            kept = total if index is None else float(self._real(index))
            shares |= {layer: kept / total for layer in run}
        dense = len(self.layers) - len(shares)
        found = {"tokens/kept": (sum(shares.values()) + dense) / len(self.layers)}
        found |= {f"tokens/kept_layer_{layer}": share for layer, share in shares.items()}
        found["tokens/supervised_dropped"] = float((row.supervised & ~self.kept).sum())
        return found

    def _real(self, index: Tensor) -> Tensor | int:
        valid = self.forward.row.valid if self.forward else None
        return index.numel() if valid is None else valid.gather(1, index).sum()

    # Hooks -----------------------------------------------------------------------------------

    def _can(self, index: int) -> bool:
        """A sliding window on flash attention would count kept tokens only, and widen."""
        module = attention_of(self.layers[index])
        name = str(getattr(module.config, "_attn_implementation", ""))
        window = getattr(module, "sliding_window", None)
        if "flash" in name and window:
            log.warning("tokens: layer %d has a sliding window on flash attention: dense", index)
            return False
        return True

    def _install(self) -> None:
        whole = self.config.scope == "layer"
        if whole and self.config.attend == "all":
            for number, run in enumerate(self.runs):
                for index in run:
                    layer, look = self.layers[index], partial(self._seen, number, index)
                    layer.forward = VisibleForward(layer, look)  # type: ignore[method-assign]
        for number, run in enumerate(self.runs):
            for index in run:
                layer = self.layers[index]
                first, last = index == run[0], index == run[-1]
                before = self._layer_hook(number, index, first and whole, whole, first)
                self._hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
                if whole and last:
                    after = self._put_back(number)
                    self._hooks.append(layer.register_forward_hook(after, with_kwargs=True))
                if not whole:
                    module = attention_of(layer)
                    inside = self._attention_hook(number)
                    self._hooks.append(module.register_forward_pre_hook(inside, with_kwargs=True))
                    outside = self._attention_back(number)
                    self._hooks.append(module.register_forward_hook(outside, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self.active = False

    def _layer_hook(
        self, number: int, index: int, gather: bool, cut: bool, first: bool
    ) -> Callable[..., Any]:
        def before(layer: nn.Module, args: Any, kwargs: Any) -> Any:
            if not self.active:
                return None
            assert self.forward is not None
            hidden, rest = _hidden(args, kwargs)
            named = by_name(layer, rest, kwargs)
            if first:
                chosen = self._choose(self.forward, layer, index, hidden, named)
                self.forward.index[number] = chosen
            if not cut:
                return None
            chosen = self.forward.index[number]
            if gather:
                self.forward.whole = hidden
                if self.config.attend == "all":
                    others = left_out(chosen, hidden.shape[1])
                    self.forward.left[number] = others, gather_rows(hidden, others)
                hidden = gather_rows(hidden, chosen)
            self.forward.calls[index] = named
            if self.config.attend == "all":
                return (hidden,), named  # cut by who knows the mask
            return (hidden,), self._cut(named, number, hidden.dtype)

        return before

    def _seen(self, number: int, index: int) -> Seen | None:
        """What `VisibleForward` needs of this forward."""
        if not self.active or self.forward is None or self._choosing:
            return None
        others, left = self.forward.left[number]
        if not others.shape[1]:
            return None
        return Seen(self.forward.index[number], others, left, self.forward.calls[index])

    def _put_back(self, number: int) -> Callable[..., Any]:
        def after(layer: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            if not self.active:
                return None
            assert self.forward is not None and self.forward.whole is not None
            rows = out[0] if isinstance(out, tuple) else out
            whole = scatter_rows(self.forward.whole, self.forward.index[number], rows)
            self.forward.whole = None
            return (whole, *out[1:]) if isinstance(out, tuple) else whole

        return after

    def _prunes(self) -> bool:
        """Whether MLPs have a pruned backward: in a forward with gradients, or recomputed."""
        return self.active and torch.is_grad_enabled()

    def _selected(
        self, index: int, layer: nn.Module, hidden: Tensor, named: dict[str, Any]
    ) -> Attended | None:
        """What a layer with selected gradients needs of this forward."""
        if not self.active or not torch.is_grad_enabled():
            return None
        assert self.forward is not None
        return self.look(self.forward, index, layer, hidden, named)

    def look(
        self, forward: Forward, index: int, layer: nn.Module, hidden: Tensor, named: dict[str, Any]
    ) -> Attended | None:
        """What layer `index` needs of `forward` when it runs, None for a dense one. All scores but
        `attention` choose before the first of the layers.
        """
        number = self._run_of.get(index)
        if number is None:
            return None
        if self.score is not attention_score and number not in forward.index:
            forward.index[number] = self._choose(forward, layer, index, hidden, named)
        return Attended(self.selected, forward, number, 4 * index >= len(self.layers))

    def chosen(self, forward: Forward, index: int) -> Tensor | None:
        """The tokens (B, K) that gradients of layer `index` go through, None for all; asked for
        when the forward is done.
        """
        number = self._run_of.get(index)
        return None if number is None else self.selected(forward, number)

    def new_step(self) -> None:
        """The step begins, or begins again: the same tokens are drawn."""
        self._last_seed = None

    def _attention_hook(self, number: int) -> Callable[..., Any]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if not self.active or self.forward is None or self._choosing:
                return None
            hidden, rest = _hidden(args, kwargs)
            named = by_name(module, rest, kwargs)
            rows = gather_rows(hidden, self.forward.index[number])
            return (rows,), self._cut(named, number, hidden.dtype)

        return before

    def _attention_back(self, number: int) -> Callable[..., Any]:
        def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> Any:
            if not self.active or self.forward is None or self._choosing:
                return None
            rows = out[0] if isinstance(out, tuple) else out
            index = self.forward.index[number]
            shape = (rows.shape[0], self.forward.row.supervised.shape[1], rows.shape[-1])
            whole = scatter_rows(rows.new_zeros(shape), index, rows)
            return (whole, *out[1:]) if isinstance(out, tuple) else whole

        return after

    _choosing = False

    @torch.no_grad()
    def _choose(
        self, forward: Forward, layer: nn.Module, index: int, hidden: Tensor, named: Any
    ) -> Tensor:
        config, row = self.config, forward.row
        look = Look(layer, index, hidden.detach(), named, row, forward.generator, config.block)
        self._choosing = True
        try:
            score = self.score(look) if forward.prepared is None else forward.prepared
        finally:
            self._choosing = False
        return choose(score, row, config, forward.keep, index)

    def _cut(self, named: dict[str, Any], number: int, dtype: torch.dtype) -> dict[str, Any]:
        """A call's keywords for the kept tokens."""
        assert self.forward is not None
        index = self.forward.index[number]
        found = dict(named)
        if "position_ids" in found:
            found["position_ids"] = None
        angles = found.get("position_embeddings")
        if angles is not None:
            found["position_embeddings"] = self._once(
                number, angles[0], lambda: cut_angles(angles, index)
            )
        mask = found.get("attention_mask")
        if isinstance(mask, Tensor):
            found["attention_mask"] = self._once(number, mask, lambda: cut_mask(mask, index, dtype))
        if self._flash:
            self._recount(found, index)
        return found

    def _once(self, number: int, key: Tensor, make: Callable[[], Any]) -> Any:
        """Made by the first layer of a run that asks; all of its layers share it."""
        assert self.forward is not None
        known = self.forward.masks.get((number, id(key)))
        if known is None:
            known = self.forward.masks[number, id(key)] = (key, make())
        return known[1]

    def _recount(self, found: dict[str, Any], index: Tensor) -> None:
        """Flash attention's documents, which it would else look for in the positions."""
        assert self.forward is not None
        cumulative = found.get("cu_seq_lens_q")
        positions = self.forward.row.positions
        if cumulative is None and positions is not None and len(positions) == 1:
            cumulative = documents(positions)
        if cumulative is not None:
            lengths, longest = recount(cumulative, index)
            found |= {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
            found |= {"max_length_q": longest, "max_length_k": longest}


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...]]:
    """Hidden states, and the positional rest of a call; by name they leave `kwargs`."""
    if args:
        return args[0], args[1:]
    return kwargs.pop("hidden_states"), ()


def _runs(layers: list[int], share: int | None) -> list[list[int]]:
    """Layers that follow one another, at most `share` together."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1 and (share is None or len(runs[-1]) < share):
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return runs
