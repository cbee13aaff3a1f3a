"""Recipe part `offload`: where weights, optimizer states and saved activations lie."""

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mnemic.train.recipe.base import KindShorthand, Part

_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?\s*", re.IGNORECASE)


def parse_size(value: Any) -> Any:
    """`512MiB`, `2 GiB`, `1.5G` or a number of bytes, as bytes. Units are powers of 1024."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    if not match:
        raise ValueError(f"{value!r} is not a size; write such as 512MiB, 2GiB or bytes")
    return int(float(match[1]) * _UNITS[match[2].upper()])


Size = Annotated[int, BeforeValidator(parse_size), Field(ge=0)]

Activations = Literal["device", "host", "ssd"]


class NoOffload(Part):
    """Weights and states stay with the model."""

    kind: Literal["none"] = "none"
    activations: Activations = "device"
    """Where what the backward needs waits for it: with the model, in host memory (accelerators), or
    in a file."""
    path: str | None = None
    """Folder for `activations: ssd`; null takes the run folder."""


class _Offload(Part):
    ram_budget: Size | None = None
    """Bytes for weights and states that may stay in memory, such as `2GiB`: weights first, then
    states. null: the least that works. Never changes the result."""
    states: Literal["fp32", "bf16", "8bit"] = "fp32"
    """AdamW's state: fp32 moments, and for bf16 weights an fp32 master (12 bytes a weight, 8 for
    fp32 weights); bf16 moments (4); or one byte each (2). Without a master bf16 weights are rounded
    stochastically. APOLLO brings its own."""
    activations: Activations = "device"
    """Where layer inputs wait for the backward: with the model, in host memory (accelerators), or
    past `ram_budget` in a file."""
    trace: bool = False
    """Write timeline.json: who read, wrote and computed when (scripts/plot_timeline.py)."""


class HostOffload(_Offload):
    """Weights and states in host memory, a layer at a time on the device; for accelerators."""

    kind: Literal["host"] = "host"
    path: str | None = None
    """Folder for `activations: ssd`; null takes the run folder."""


class SsdOffload(_Offload):
    """Weights and states in files; every step is committed."""

    kind: Literal["ssd"] = "ssd"
    path: str | list[str] | None = None
    """Folder on a fast disk, or several on several disks, which are striped; null takes the run
    folder."""
    direct: bool = True
    """Bypass the page cache (O_DIRECT) where the file system can."""
    base: Literal["full", "int8", "nf4"] = "full"
    """How a frozen base (adapters) is stored: as it is, or in 8 or 4 bits, so that fewer bytes are
    read; it computes in `model.dtype`."""


def _none_unless_said(value: Any) -> Any:
    short = isinstance(value, dict) and value.keys() <= {"activations", "path"}
    return {"kind": "none", **value} if short else value


Offload = Annotated[
    NoOffload | HostOffload | SsdOffload,
    Field(discriminator="kind"),
    # `offload: {activations: ssd}` leaves the weights where they are.
    BeforeValidator(_none_unless_said),
    KindShorthand,
]
