"""What an adapter is and which base it belongs to: card.json beside its PEFT files.

After MemOS's MemCube (content with provenance and version, arXiv 2507.03724). The base is known by
a hash rather than by a name: an adapter over other weights loads without an error and answers
wrongly.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

CARD_FILE = "card.json"
SAMPLES = 64
"""Values of each base tensor that the hash reads."""


@dataclass(frozen=True)
class AdapterCard:
    """`teacher`, `data`, `version` and `licence` are the owner's words; the rest is filled in on
    saving. `bytes` are those of the weights, `created` is UTC in ISO 8601.
    """

    operation: str
    base_model: str = ""
    base_hash: str = ""
    teacher: str = ""
    data: str = ""
    version: str = "1"
    licence: str = ""
    bytes: int = 0
    created: str = ""

    def write(self, folder: Path) -> None:
        (folder / CARD_FILE).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "AdapterCard | None":
        """The card in an adapter's folder, None where there is none; unknown keys are left to
        newer versions. ValueError where it is not one.
        """
        file = folder / CARD_FILE
        if not file.is_file():
            return None
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
            known = {f.name: raw[f.name] for f in fields(cls) if f.name in raw}
            card = cls(**known)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: is not an adapter's card: {error}") from None
        for key, value in asdict(card).items():
            wanted = int if key == "bytes" else str
            if type(value) is not wanted:
                raise ValueError(f"{file}: {key}: {value!r} must be of type {wanted.__name__}")
        return card


def base_hash(
    model: Any, adapters: Iterable[str] = (), read: Callable[[str], Any] | None = None
) -> str:
    """16 hex digits over the base's weights: of each tensor, in the order of names, its name, its
    shape and `SAMPLES` values at even distances (all of a smaller one), rounded to bf16.

    The rounding gives a checkpoint the same hash in fp32 and bf16; a base in 8 or 4 bits has
    another. Adapters named in `adapters` do not count, nor do peft's wrappers. `read` gives the
    tensors of a model that is not in memory, by name. Not a proof: values between the samples are
    not read.
    """
    import torch

    own = set(adapters)
    digest = hashlib.sha256()
    found = {}
    for name, tensor in model.named_parameters():
        parts = name.split(".")
        if not own.intersection(parts):
            found[_plain_name(name)] = tensor
    for name in sorted(found):
        tensor = (found[name] if read is None else read(name)).detach()
        if tensor.is_meta:
            raise ValueError(f"{name}: has no values (meta device), so the base has no hash")
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        flat = tensor.reshape(-1)
        # Integer arithmetic: a float's linspace ends beside the last index of a large tensor.
        count = min(SAMPLES, flat.numel())
        last = max(count - 1, 1)
        at = [i * (flat.numel() - 1) // last for i in range(count)]
        values = flat[torch.tensor(at, dtype=torch.int64, device=flat.device)]
        digest.update(values.to(torch.bfloat16).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain_name(name: str) -> str:
    """A parameter's name in the base alone."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")
