"""The MLP a tile of tokens at a time (mini-s, arXiv 2407.15892; ALST, arXiv 2506.13996): the three
intermediate activations of a tile are all there is of them, and they are made again in the
backward. Exact, for one more MLP forward.

A tile has its price in small products: axolotl #3666 found ceil(S / H) tiles three times slower
than ceil(S / 32768), ms-swift #7090 found tiling to cost memory at 2K tokens. So `auto` tiles what
is longer than 8192 tokens, at least 4096 to a tile.
"""

import math
from typing import Any

from torch import Tensor, nn

from mnemic.models.exact.attention import decoder_layers
from mnemic.models.exact.recompute import in_rows

FLOOR = 4096
"""Fewest tokens in an automatic tile."""


def auto_tile(tokens: int) -> int:
    """Tokens in a tile, of so many in a forward: all up to 8192, then even parts of 4096 or
    more.
    """
    return math.ceil(tokens / max(1, tokens // FLOOR)) if tokens > 2 * FLOOR else tokens


def tile_mlps(model: Any, tile: int | None) -> int:
    """Let each layer's MLP run in tiles of `tile` tokens (None: `auto_tile`). The number of MLPs;
    ValueError where a layer has none of its own (OPT), or experts.
    """
    layers = decoder_layers(model)
    for layer in layers:
        mlp = getattr(layer, "mlp", None)
        if mlp is None or not type(mlp).__name__.endswith("MLP"):
            what = "no MLP module" if mlp is None else f"a {type(mlp).__name__}"
            raise ValueError(f"{type(layer).__name__} has {what}, which is not tiled")
        mlp.forward = _Forward(mlp, tile)  # type: ignore[method-assign]
    return len(layers)


class _Forward:
    """An MLP's forward in tiles. An object, so that a copied model runs its own copy."""

    def __init__(self, mlp: nn.Module, tile: int | None) -> None:
        self.mlp, self.own, self.tile = mlp, mlp.forward, tile

    def __call__(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        rows = self.tile or auto_tile(len(flat))
        if rows >= len(flat):
            return self.own(x)
        params = [p for p in self.mlp.parameters() if p.requires_grad]
        return in_rows(self.own, flat, rows=rows, params=params).view(x.shape)
