"""A frozen base in fewer bytes: matrices of a layer as int8 or NF4 on disk, decoded into the slot.

int8: groups of 128 with one fp32 scale, their largest magnitude over 127: 1.03 bytes a weight. nf4:
the 16 quantiles of QLoRA (arXiv 2305.14314, appendix E), blocks of 64 with one fp32 scale, two
codes a byte: 0.56 bytes a weight. What is computed with has the model's dtype either way. Vectors
and small matrices stay as they are, as do embedding and head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mnemic.train.offload.layout import Spec, pack

LEAST = 4096
"""Smaller tensors are stored as they are."""
_GROUP = {"int8": 128, "nf4": 64}
_CHUNK = 1 << 18
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Packed:
    """A tensor as it is stored (`codes`, and `scales` unless it is stored as it is) and decoded."""

    decoded: Spec
    codes: Spec
    scales: Spec | None


class Codec:
    """Of one block: `specs` is its decoded layout. `nbytes` is what is stored."""

    def __init__(self, kind: str, specs: Sequence[Spec]) -> None:
        self.kind, self.group = kind, _GROUP[kind]
        fields: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        packed = [self._is_packed(spec) for spec in specs]
        for spec, small in zip(specs, packed, strict=True):
            if not small:
                fields.append((spec.name, spec.shape, spec.dtype))
                continue
            count = spec.numel
            codes = (count,) if kind == "int8" else (-(-count // 2),)
            fields.append((spec.name, codes, torch.int8 if kind == "int8" else torch.uint8))
            fields.append((f"{spec.name}:scale", (-(-count // self.group),), torch.float32))
        stored, self.nbytes = pack(fields)
        by_name = {spec.name: spec for spec in stored}
        self.parts = [
            Packed(spec, by_name[spec.name], by_name.get(f"{spec.name}:scale")) for spec in specs
        ]

    def _is_packed(self, spec: Spec) -> bool:
        return len(spec.shape) > 1 and spec.numel >= LEAST

    def encode(self, part: Packed, tensor: Tensor, stored: Tensor) -> None:
        """Write `tensor` into its place in the block's stored bytes."""
        codes = part.codes.view(stored)
        if part.scales is None:
            codes.copy_(tensor)
            return
        flat, scales = tensor.reshape(-1), part.scales.view(stored)
        for first in range(0, flat.numel(), _CHUNK):
            piece = flat[first : first + _CHUNK].float()
            count = piece.numel()
            piece = torch.nn.functional.pad(piece, (0, -count % self.group)).view(-1, self.group)
            scale = piece.abs().amax(1)
            at = first // self.group
            unit = piece / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
            if self.kind == "int8":
                scales[at : at + len(scale)] = scale / 127
                values = (unit * 127).round_().to(torch.int8).view(-1)[:count]
                codes[first : first + count] = values
                continue
            scales[at : at + len(scale)] = scale
            table = torch.tensor(NF4)
            nearest = torch.bucketize(unit.view(-1)[:count], (table[1:] + table[:-1]) / 2)
            nearest = torch.nn.functional.pad(nearest.to(torch.uint8), (0, count % 2)).view(-1, 2)
            packed = nearest[:, 0] * 16 + nearest[:, 1]
            codes[first // 2 : first // 2 + len(packed)] = packed

    def decode(self, stored: Tensor, block: Tensor) -> None:
        """Fill the block (uint8, laid out by the decoded specs) from the stored bytes."""
        for part in self.parts:
            codes, out = part.codes.view(stored), part.decoded.view(block)
            if part.scales is None:
                out.copy_(codes)
                continue
            scales, flat = part.scales.view(stored), out.view(-1)
            for first in range(0, flat.numel(), _CHUNK):
                target = flat[first : first + _CHUNK]
                count = target.numel()
                if self.kind == "int8":
                    values = codes[first : first + count].to(target.device)
                else:
                    raw = codes[first // 2 : first // 2 + -(-count // 2)].to(target.device)
                    values = _pairs(target.device)[raw.int()].view(-1)[:count]
                at = first // self.group
                scale = scales[at : at + -(-count // self.group)].to(target.device)
                if count % self.group:
                    scale = scale.repeat_interleave(self.group)[:count]
                    target.copy_(values * scale)
                else:
                    grouped = values.view(-1, self.group)
                    target.view(-1, self.group).copy_(grouped * scale[:, None])


_tables: dict[torch.device, Tensor] = {}


def _pairs(device: torch.device) -> Tensor:
    """The two values of each byte: fp32 (256, 2)."""
    if device not in _tables:
        table = torch.tensor(NF4)
        pairs = torch.stack([table.repeat_interleave(16), table.repeat(16)], 1)
        _tables[device] = pairs.to(device)
    return _tables[device]
