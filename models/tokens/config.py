"""What token sparsity does, in plain values."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TokensConfig:
    """`keep`: share of a row's tokens that sparse layers run on. `layers`: [first, last) or a name.
    `scope`: whole layers, or their attention only. `share`: how many layers have one keep set;
    None: all that follow one another. `block`: tokens chosen together. `sinks`, `recent`: blocks at
    the beginning and at the end that are always kept. `protect`: keep all supervised tokens.
    `attend`: kept tokens attend to all before them, or to kept ones only.
    `loss`: over supervised tokens that were kept, or all. `grad`: through all kept tokens of
    shortened sequences, or an exact forward with gradients through selected tokens (TokenTune).
    `ramp`: share of the run in which `keep` rises to 1; `dense_end`: share that ends it densely.
    `thresholds`: by layer, the block score above which blocks stay, in place of `keep`
    (thresholds.py). `mlp_backward_keep`: share of MLP neurons that have a backward (LeMo).
    """

    keep: float = 0.5
    layers: str | tuple[int, int] = "late"
    scope: str = "layer"
    score: str = "attention"
    share: int | None = None
    block: int = 64
    sinks: int = 1
    recent: int = 1
    protect: bool = True
    attend: str = "all"
    loss: str = "kept"
    grad: str = "all"
    ramp: float = 0.0
    dense_end: float = 0.0
    mlp_backward_keep: float | None = None
    thresholds: dict[int, float] | None = None

    def keep_at(self, progress: float) -> float:
        """`keep` when this share of the run is done."""
        dense = 1.0 - self.dense_end
        if self.dense_end and progress >= dense:
            return 1.0
        start = dense - self.ramp
        if not self.ramp or progress <= start:
            return self.keep
        return min(1.0, self.keep + (1.0 - self.keep) * (progress - start) / self.ramp)

    def layer_range(self, count: int) -> range:
        """The sparse layers of `count`; ValueError if there is none.

        `late`: from the second quarter on; `half`: the second half but the last (LeMo); `middle`:
        all but the first and the last (random-LTD); `all`.
        """
        names = {
            "late": (-(-count // 4), count),
            "half": (count // 2, count - 1),
            "middle": (1, count - 1),
            "all": (0, count),
        }
        first, last = names[self.layers] if isinstance(self.layers, str) else self.layers
        if not 0 <= first < last <= count:
            raise ValueError(f"layers {self.layers} of {count} are none")
        return range(first, last)
