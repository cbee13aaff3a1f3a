"""Random numbers as a function of (key, position): the same bits on every device, dtype and shard.

torch's own generators are no such function: a CUDA stream depends on the number of multiprocessors,
and a shard cannot draw its part without drawing the whole. Here the i-th 64-bit word of a stream is
SplitMix64's output function (Steele et al., OOPSLA 2014) of `key + i * gamma`, in integer
arithmetic that wraps alike everywhere. Normal numbers come from a table of 2^16 quantiles computed
once on the host, because log and cos differ in the last bit between devices.
"""

import hashlib
from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit number
_MIX1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # 0x94D049BB133111EB


def stream_key(*parts: object) -> int:
    """A 63-bit key from any printable parts, such as (seed, parameter name, interval)."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def words(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """64-bit words `start ... start + count - 1` of the stream `key`: int64, shape (count,)."""
    x = torch.arange(start, start + count, dtype=torch.int64, device=device)
    x.mul_(_GAMMA).add_(key)
    # torch shifts arithmetically: the mask makes the shift logical.
    x.bitwise_xor_((x >> 30).bitwise_and_((1 << 34) - 1)).mul_(_MIX1)
    x.bitwise_xor_((x >> 27).bitwise_and_((1 << 37) - 1)).mul_(_MIX2)
    return x.bitwise_xor_((x >> 31).bitwise_and_((1 << 33) - 1))


def lanes(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers `start ... start + count - 1` of the stream in 0 ... 65535, four to a word: int32."""
    first, last = start // 4, -(-(start + count) // 4)
    # The lanes of a word are its 16-bit quarters, lowest first: all our devices are little-endian.
    flat = words(key, first, last - first, device).view(torch.int16)
    return flat[start - 4 * first :][:count].to(torch.int32).bitwise_and_(0xFFFF)


def signs(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Random +1 and -1: float32, shape (count,)."""
    return (lanes(key, start, count, device) & 1).mul_(2).sub_(1).float()


@lru_cache(maxsize=4)
def _quantiles(device: torch.device) -> Tensor:
    """Normal quantiles at (i + 1/2) / 2^16, scaled to variance 1: float32, 256 KiB."""
    upper = [NormalDist().inv_cdf((i + 0.5) / 65536) for i in range(32768, 65536)]
    table = torch.tensor([-x for x in reversed(upper)] + upper, dtype=torch.float64)
    return (table / table.square().mean().sqrt()).float().to(device)


def normals(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal numbers in 2^16 steps (|x| up to 4.3): float32, shape (count,)."""
    return _quantiles(torch.device(device))[lanes(key, start, count, device)]
