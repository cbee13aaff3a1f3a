"""Gradients into weights, one tensor or one tile at a time, inside the backward.

The optimizer is a real `Apollo` over all trained parameters (AdamW is its rule "adamw"), so groups,
schedule and arithmetic are those of the plain trainer. Its small states live in the arena; AdamW's
states of matrices live in tiles of the store and are streamed through a ring of three buffers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnemic.optim.apollo import Apollo
from mnemic.optim.rules import rule_of
from mnemic.train.in_backward import SingleSteps
from mnemic.train.offload.arena import Arena, Shapes
from mnemic.train.offload.cache import Cache
from mnemic.train.offload.io import Trace
from mnemic.train.offload.layout import Tiling
from mnemic.train.offload.states import state_specs, state_views, tile_step
from mnemic.train.offload.store import Piece, Store

SMALL = 1 << 16
"""Matrices below this many elements keep their state in the arena: a request each costs more."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How a tensor is stepped: by the optimizer itself (`form` None), or in tiles of `form`, whose
    state is in the store or, of a small tensor, in the arena.
    """

    form: str | None
    tiling: Tiling | None
    in_arena: bool


def rule_for(
    group: Mapping[str, Any], name: str, param: Tensor, form: str, vocabulary: bool,
    small: int, elements: int,
) -> Rule:  # fmt: skip
    """`form`: that of AdamW's states. Vocabulary matrices come in tiles whatever their size."""
    rule = rule_of(dict(group), param)
    if rule == "apollo":
        return Rule(None, None, True)
    master = form == "master" and param.dtype == torch.bfloat16
    kind = "8bit" if rule == "adamw8bit" else "fp32" if form == "master" else form
    tiling = Tiling.of(name, param.shape, elements)
    little = param.ndim < 2 or (param.numel() <= small and not vocabulary)
    if little:
        return Rule("master" if master else None, Tiling(name, 1, param.numel(), 1), True)
    return Rule("master" if master else kind, tiling, False)


class Applier:
    """Steps parameters of `optimizer`. `names`: full name of each parameter. `blocks`: which block
    (layer, rest, vocabulary matrix) a parameter's small states are written with.
    """

    def __init__(
        self, optimizer: Apollo, names: Mapping[int, str], blocks: Mapping[str, str],
        rules: Mapping[str, Rule],
    ) -> None:  # fmt: skip
        self.optimizer, self.names, self.blocks, self.rules = optimizer, names, blocks, rules
        self.steps = SingleSteps(optimizer)
        self.trace: Trace | None = None
        self.arena = Arena(self._arena_shapes())
        self.ring: Cache | None = None
        self.resident: Cache | None = None
        self._resident: set[str] = set()
        self._order: dict[str, list[str]] = {}
        self._seen: dict[str, list[str]] = {}
        self._block = ""

    # Layout ----------------------------------------------------------------------------------

    def params(self) -> Iterable[tuple[dict[str, Any], nn.Parameter, str]]:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                yield group, param, self.names[id(param)]

    def _arena_shapes(self) -> Mapping[str, Shapes]:
        shapes: dict[str, dict[str, Any]] = {block: {} for block in self.blocks.values()}
        for group, param, name in self.params():
            rule, into = self.rules[name], shapes[self.blocks[name]]
            if rule.form is None:
                for key, value in self.optimizer.new_state(group, param).items():
                    into[f"{name}:{key}"] = (tuple(value.shape), value.dtype)
                continue
            into[f"{name}:step"] = ((), torch.float32)
            if rule.in_arena:
                specs, _ = state_specs(rule.form, param.numel())
                into |= {f"{name}:{spec.name}": (spec.shape, spec.dtype) for spec in specs}
        return shapes

    def state_pieces(self, copies: int) -> list[Piece]:
        """State tiles in the order the backward uses them."""
        pieces = []
        for _, _, name in reversed(list(self.params())):
            rule = self.rules[name]
            if rule.form is None or rule.in_arena:
                continue
            assert rule.tiling is not None
            for tile in range(len(rule.tiling)):
                _, nbytes = state_specs(rule.form, rule.tiling.numel(tile))
                pieces.append(Piece(f"state/{name}/{tile}", nbytes, copies))
        return pieces

    def attach(
        self, store: Store, ring: int, resident: Iterable[Piece], device: Any,
        apart: bool | None = None,
    ) -> None:  # fmt: skip
        """Allocate: the arena, a ring of `ring` tile buffers, and buffers for tiles that stay."""
        self.arena.allocate(device, bool(apart))
        for group, param, name in self.params():
            if self.rules[name].form is None:
                for key in self.optimizer.new_state(group, param):
                    self.optimizer.state[param][key] = self.arena.view(f"{name}:{key}")
        stays = list(resident)
        self._resident = {piece.name for piece in stays}
        tiles = [p for p in store.plan.pieces.values() if p.name.startswith("state/")]
        largest = max((p.nbytes for p in tiles), default=0)
        if largest:
            self.ring = Cache(store, largest, ring, device, apart)
        if stays:
            self.resident = Cache(store, max(p.nbytes for p in stays), len(stays), device, apart)
        self.store = store

    def load(self) -> None:
        self.arena.load(self.store)

    def forget(self) -> None:
        """After a rollback: states are what the last commit holds."""
        for cache in (self.ring, self.resident):
            if cache is not None:
                cache.drop()
        self.load()

    # Steps -----------------------------------------------------------------------------------

    def begin_block(self, block: str) -> None:
        """Announce that tensors of `block` come next: their first states are read ahead, in the
        order of the step before.
        """
        self._block, self._seen[block] = block, []
        self._read_ahead()

    def end_block(self, block: str) -> None:
        self._order[block] = self._seen[block]
        self.arena.write(block, self.store)

    def _cache(self, piece: str) -> Cache:
        cache = self.resident if piece in self._resident else self.ring
        assert cache is not None
        return cache

    def _read_ahead(self) -> None:
        assert self._block
        done = len(self._seen[self._block])
        for piece in self._order.get(self._block, [])[done : done + 2]:
            self._cache(piece).prefetch(piece)

    def begin_tensor(self, name: str) -> int:
        """Count a step of a tensor that is applied in tiles; the step's number, from 1."""
        counter = self.arena.view(f"{name}:step")
        counter += 1
        return int(counter.item())

    def tile(self, name: str, tile: int, weight: Tensor, grad: Tensor, step: int) -> None:
        """AdamW on tile `tile` of `name`; `weight`, `grad`: (rows, cols)."""
        rule = self.rules[name]
        assert rule.form is not None and rule.tiling is not None
        group = self.steps.group(self._param(name))
        key = (self.optimizer.seed, "rounding", name)
        settings = {"step": step, "group": group, "key": key}
        first_row = rule.tiling.slice(tile).start
        if rule.in_arena:
            specs, _ = state_specs(rule.form, weight.numel())
            state = {spec.name: self.arena.view(f"{name}:{spec.name}") for spec in specs}
            fresh = step == 1
            tile_step(rule.form, weight, grad, state, fresh=fresh, first_row=0, **settings)
            return
        piece = f"state/{name}/{tile}"
        cache = self._cache(piece)
        buffer = cache.acquire(piece)
        cache.settle(piece)
        self._seen[self._block].append(piece)
        self._read_ahead()
        state = state_views(rule.form, weight.numel(), buffer)
        fresh = not self.store.written(piece)
        tile_step(rule.form, weight, grad, state, fresh=fresh, first_row=first_row, **settings)
        cache.write(piece)
        cache.release(piece)

    def _param(self, name: str) -> nn.Parameter:
        return self._by_name[name]

    @property
    def _by_name(self) -> dict[str, nn.Parameter]:
        found = self.__dict__.get("_named")
        if found is None:
            found = self.__dict__["_named"] = {n: p for _, p, n in self.params()}
        return found

    def whole(self, param: nn.Parameter) -> None:
        """Step a parameter that is in memory by its `.grad`, and free that."""
        name = self.names[id(param)]
        rule = self.rules[name]
        assert param.grad is not None
        if rule.form is None:
            self.steps.step(param)
        else:
            assert rule.tiling is not None
            step = self.begin_tensor(name)
            weight = param.data.view(rule.tiling.rows, rule.tiling.cols)
            grad = param.grad.view(weight.shape)
            for tile in range(len(rule.tiling)):
                part = rule.tiling.slice(tile)
                self.tile(name, tile, weight[part], grad[part], step)
        param.grad = None


def total_norm(norms: Iterable[float]) -> float:
    return math.sqrt(math.fsum(norm * norm for norm in norms))
