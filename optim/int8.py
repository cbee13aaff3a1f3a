"""Linear weights that are int8 while they are trained in full: `Int8Weight`.

Q-GaLore (arXiv 2407.08296) trains weights that exist in 8 bits only, and APOLLO (arXiv 2412.05270)
runs in the same way as Q-APOLLO: one byte a weight where bf16 needs two and mixed precision six.
Updates smaller than a step of the codes survive by stochastic rounding. What differs here:

- a group's codes have a real offset, so a group of one sign keeps its full range. Q-APOLLO's
  zero-point is clamped to 0 ... 255, and weights in [1, 2] come back below 1;
- a group's grid always spans its smallest and largest updated weight, so nothing is ever clipped
  and stochastic rounding is unbiased for every weight;
- rounding is a function of (seed, parameter name, step, position): a resumed run has the same bits;
- plain torch on every device; the gradient is an ordinary dense tensor in `.grad`.

A group is `group` neighbours along the input dimension; the last one is shorter where in_features
is no multiple. With groups of 128 a weight takes 1 + 8 / 128 = 1.0625 bytes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils._pytree import tree_map_only

GROUP = 128
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LOW, _HIGH = -128, 127
# Elements worked on at a time: on a CPU the fp32 scratch stays in cache, elsewhere it stays small.
_CHUNK = {"cpu": 1 << 18}
_LARGE_CHUNK = 1 << 24

aten = torch.ops.aten


class Int8Weight(Tensor):
    """A matrix held as int8 that looks like a parameter of its compute dtype.

    `codes`: int8 (m, n). `scale`, `zero`: fp32 (m, ceil(n / group)); weight (i, j) is
    `scale * codes + zero` with the numbers of its row and group. dtype, device, shape and
    `requires_grad` are those of the weight it stands for, fp32, bf16 or fp16.

    `F.linear` saves the codes, not a dense weight, and expands them again in the backward. `copy_`
    rounds to nearest (from an Int8Weight of the same groups: exact), `to` keeps it int8, rows can
    be sliced. Every other operation sees a dense copy; changing that copy, or this in place, is an
    error, for it would be lost.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    group: int

    @staticmethod
    def __new__(
        cls, codes: Tensor, scale: Tensor, zero: Tensor, group: int, dtype: torch.dtype
    ) -> "Int8Weight":
        return Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=dtype, device=codes.device, requires_grad=False
        )

    def __init__(
        self, codes: Tensor, scale: Tensor, zero: Tensor, group: int, dtype: torch.dtype
    ) -> None:
        del dtype
        self.codes, self.scale, self.zero, self.group = codes, scale, zero, group

    @staticmethod
    def quantize(
        weight: Tensor, group: int = GROUP, noise: tuple[Tensor, Tensor] | None = None
    ) -> "Int8Weight":
        """`weight` (m, n) in int8 with its dtype as compute dtype; to nearest, or stochastically
        with `write.rounding_noise`. ValueError for anything but a finite matrix of fp32, bf16 or
        fp16.
        """
        if weight.ndim != 2 or weight.dtype not in _DTYPES:
            raise ValueError(
                f"int8 weights are made of matrices in fp32, bf16 or fp16, not of {weight.dtype} "
                f"of shape {tuple(weight.shape)}"
            )
        if group < 1:
            raise ValueError(f"group={group}: a group has at least 1 weight; 128 is usual")
        shape = (weight.shape[0], -(-weight.shape[1] // group))
        made = Int8Weight(
            torch.empty(weight.shape, dtype=torch.int8, device=weight.device),
            torch.empty(shape, device=weight.device),
            torch.empty(shape, device=weight.device),
            group, weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            made._assign(weight, noise)
        return made

    def _assign(self, weight: Tensor, noise: tuple[Tensor, Tensor] | None = None) -> None:
        if not weight.isfinite().all():
            raise ValueError(
                f"a weight of shape {tuple(weight.shape)} holds inf or nan and has no int8 form"
            )
        for part in self._chunks():
            exact = weight[part].to(self.device, torch.float32, copy=True)
            self._round(exact, part, noise)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """The dense (m, n) weight in `dtype`, by default the compute dtype; outside autograd."""
        with torch.no_grad():
            return _expand(self.codes, self.scale, self.zero, self.group, dtype or self.dtype)

    @torch.no_grad()
    def update_(
        self, grad: Tensor, factor: Tensor, keep: float = 1.0,
        noise: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        """In place `W = keep * W + factor * grad`, computed in fp32, as `write.write` does: `grad`
        (m, n), `factor` fp32 with 1 or the weight's size in each dimension; rounded stochastically
        with `noise`, else to nearest.
        """
        for part in self._chunks():
            exact = _expand(
                self.codes[part], self.scale[part], self.zero[part], self.group, torch.float32
            )
            if keep != 1.0:
                exact.mul_(keep)
            exact.addcmul_(grad[part].float(), factor if factor.shape[0] == 1 else factor[part])
            self._round(exact, part, noise)

    def as_dtype(self, dtype: torch.dtype) -> "Int8Weight":
        """The same codes, shared, under another compute dtype."""
        return Int8Weight(self.codes, self.scale, self.zero, self.group, dtype)

    @property
    def held_bytes(self) -> int:
        """Bytes this really takes; `nbytes` is what the dense weight would."""
        return sum(x.numel() * x.element_size() for x in (self.codes, self.scale, self.zero))

    def _chunks(self) -> Iterator[slice]:
        return _row_chunks(self.codes)

    def _round(self, exact: Tensor, part: slice, noise: tuple[Tensor, Tensor] | None) -> None:
        """Rows `part` from fp32 `exact` (destroyed), on new grids."""
        codes, scale, zero = self.codes[part], self.scale[part], self.zero[part]
        dither = None
        if noise is not None:
            # Between the 2^16 levels, so that the mean over a step is exact.
            dither = (noise[0][part] ^ noise[1]).float().add_(0.5).mul_(2.0**-16)
        for columns, groups, width in _spans(exact.shape[1], self.group):
            x = exact[:, columns].unflatten(1, (-1, width))
            low, high = x.aminmax(dim=-1)
            step = (high - low).div_(_HIGH - _LOW)
            # The weight of code 0. A group of equal weights has step 0 and is its offset.
            offset = low - step * _LOW
            scale[:, groups], zero[:, groups] = step, offset
            x.sub_(offset[..., None]).div_(step.masked_fill(step == 0, 1)[..., None])
            if dither is None:
                x.round_()
            else:
                x.add_(dither[:, columns].unflatten(1, (-1, width))).floor_()
            codes[:, columns].unflatten(1, (-1, width)).copy_(x.clamp_(_LOW, _HIGH))

    def __tensor_flatten__(self) -> tuple[list[str], tuple[int, torch.dtype]]:
        return ["codes", "scale", "zero"], (self.group, self.dtype)

    @staticmethod
    def __tensor_unflatten__(
        parts: dict[str, Tensor], meta: tuple[int, torch.dtype], size: Any, stride: Any
    ) -> "Int8Weight":
        del size, stride
        return Int8Weight(parts["codes"], parts["scale"], parts["zero"], *meta)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Int8Weight":
        if id(self) not in memo:
            made = self.detach().clone()
            if isinstance(self, nn.Parameter):
                made = nn.Parameter(made, self.requires_grad)
            if self.grad is not None:
                made.grad = self.grad.clone()
            memo[id(self)] = made
        return memo[id(self)]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        del tensor_contents
        return (
            f"Int8Weight(shape={tuple(self.shape)}, group={self.group}, dtype={self.dtype}, "
            f"device='{self.device}', requires_grad={self.requires_grad})"
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return _linear(*args, **kwargs)
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            # torch would change shape and dtype and leave the codes.
            raise RuntimeError("the data of an Int8Weight cannot be replaced; use copy_")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = _OPS.get(func)
        if special is not None and isinstance(args[0], Int8Weight):
            found = special(func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        return _on_dense(func, args, kwargs)


class _ReadOnly(Tensor):
    """A view of an Int8Weight: a view of a dense copy, which must not be changed."""

    dense: Tensor

    @staticmethod
    def __new__(cls, dense: Tensor) -> "_ReadOnly":
        return Tensor._make_wrapper_subclass(
            cls, dense.shape, dense.stride(), dense.storage_offset(), dtype=dense.dtype,
            device=dense.device, requires_grad=False,
        )  # fmt: skip

    def __init__(self, dense: Tensor) -> None:
        self.dense = dense

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        del tensor_contents
        return f"view of an Int8Weight, {self.dense!r}"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _on_dense(func, args, kwargs or {})


def _on_dense(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` with dense copies; RuntimeError where it would change one."""
    given = [*args, *kwargs.values()]
    names = [*(a.name for a in func._schema.arguments[: len(args)]), *kwargs]
    written = {
        a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write
    }
    for name, value in zip(names, given, strict=True):
        values = value if isinstance(value, (list, tuple)) else [value]
        if name in written and any(isinstance(v, (Int8Weight, _ReadOnly)) for v in values):
            raise RuntimeError(
                f"{func} cannot change an int8 weight or a view of one in place; use "
                "Int8Weight.update_ or copy_, or work on dequantize()"
            )
    args, kwargs = tree_map_only(Int8Weight, Int8Weight.dequantize, (args, kwargs))
    args, kwargs = tree_map_only(_ReadOnly, lambda x: x.dense, (args, kwargs))
    found = func(*args, **kwargs)
    # What is written is dense already: only pure views are of a copy.
    if not written and any(r.alias_info is not None for r in func._schema.returns):
        return tree_map_only(Tensor, _ReadOnly, found)
    return found


def _alias(func: Any, weight: Int8Weight) -> Int8Weight:
    return weight.as_dtype(weight.dtype)


def _clone(func: Any, weight: Int8Weight, **kwargs: Any) -> Int8Weight:
    codes, scale, zero = (x.clone() for x in (weight.codes, weight.scale, weight.zero))
    return Int8Weight(codes, scale, zero, weight.group, weight.dtype)


def _to_copy(func: Any, weight: Int8Weight, **kwargs: Any) -> Any:
    dtype = kwargs.get("dtype") or weight.dtype
    if dtype not in _DTYPES:
        return NotImplemented
    device, wait = kwargs.get("device") or weight.device, not kwargs.get("non_blocking", False)
    codes, scale, zero = (
        x.to(device, non_blocking=not wait, copy=True)
        for x in (weight.codes, weight.scale, weight.zero)
    )
    return Int8Weight(codes, scale, zero, weight.group, dtype)


def _copy_(func: Any, weight: Int8Weight, source: Tensor, *rest: Any) -> Int8Weight:
    held = isinstance(source, Int8Weight)
    if held and (source.group, source.shape) == (weight.group, weight.shape):
        for name in ("codes", "scale", "zero"):
            getattr(weight, name).copy_(getattr(source, name))
        return weight
    dense = source.dequantize() if held else source
    weight._assign(dense.expand(weight.shape))
    return weight


def _slice(
    func: Any, weight: Int8Weight, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    if dim not in (0, -2) or step != 1:
        return NotImplemented
    rows = slice(start, end)
    codes, scale, zero = (x[rows] for x in (weight.codes, weight.scale, weight.zero))
    return Int8Weight(codes, scale, zero, weight.group, weight.dtype)


def _like(func: Any, weight: Int8Weight, *args: Any, **kwargs: Any) -> Tensor:
    # Shape, dtype and device are all that is read: one number stands for the weight.
    one = torch.zeros((), dtype=weight.dtype, device=weight.device)
    return func(one.expand(weight.shape), *args, **kwargs)


_OPS: dict[Any, Any] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.slice.Tensor: _slice,
    **dict.fromkeys(
        (
            aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default,
            aten.full_like.default, aten.rand_like.default, aten.randn_like.default,
            aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default,
            aten.new_full.default, aten.new_empty_strided.default,
        ),
        _like,
    ),
}  # fmt: skip


class _Int8Linear(torch.autograd.Function):
    """x W^T + b; between forward and backward the weight is its codes."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(x, weight.codes, weight.scale, weight.zero)
        ctx.group, ctx.dtype, ctx.weight_dtype = weight.group, dtype, weight.dtype
        return functional.linear(x, weight.dequantize(dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, codes, scale, zero = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        flat = grad.reshape(-1, grad.shape[-1])
        if ctx.needs_input_grad[0]:
            dense = _expand(codes, scale, zero, ctx.group, ctx.dtype)
            grad_x = (flat @ dense).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = (flat.t() @ x.reshape(-1, x.shape[-1])).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = flat.sum(0)
        return grad_x, grad_weight, grad_bias, None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, Int8Weight):
        dense = input.dequantize() if isinstance(input, Int8Weight) else input
        return functional.linear(dense, weight, bias)
    dtype, kind = weight.dtype, weight.device.type
    if torch.is_autocast_enabled(kind):
        # As autocast does for linear; the gradients are cast back.
        dtype = torch.get_autocast_dtype(kind)
        input, bias = input.to(dtype), None if bias is None else bias.to(dtype)
    return _Int8Linear.apply(input, weight, bias, dtype)  # type: ignore[return-value]


def _expand(
    codes: Tensor, scale: Tensor, zero: Tensor, group: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """`scale * codes + zero` in `dtype`, computed in fp32, two roundings on every device."""
    dense = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for part in _row_chunks(codes):
        exact = dense[part]
        if dtype != torch.float32:
            exact = torch.empty_like(exact, dtype=torch.float32)
        exact.copy_(codes[part])
        for columns, groups, width in _spans(codes.shape[1], group):
            x = exact[:, columns].unflatten(1, (-1, width))
            x.mul_(scale[part, groups, None]).add_(zero[part, groups, None])
        if dtype != torch.float32:
            dense[part].copy_(exact)
    return dense


def _row_chunks(codes: Tensor) -> Iterator[slice]:
    rows, columns = codes.shape
    step = max(1, _CHUNK.get(codes.device.type, _LARGE_CHUNK) // max(1, columns))
    return (slice(first, first + step) for first in range(0, rows, step))


def _spans(columns: int, group: int) -> Iterator[tuple[slice, slice, int]]:
    """Columns, groups and width of the whole groups, then of the shorter last one."""
    whole = columns // group
    if whole:
        yield slice(0, whole * group), slice(0, whole), group
    if columns % group:
        yield slice(whole * group, columns), slice(whole, whole + 1), columns % group
