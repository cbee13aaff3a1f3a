"""The tensors of a PEFT folder beside those of an expert that is there."""

from pathlib import Path
from typing import Any


def compare(model: Any, operation: str, path: str | Path) -> dict[str, Any]:
    """The tensors of a PEFT folder. ValueError unless they fit the operation's of `model`."""
    from peft import get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    given = load_peft_weights(str(path), device="cpu")
    own = get_peft_model_state_dict(model, adapter_name=operation, save_embedding_layers=False)
    shapes = [{k: tuple(v.shape) for k, v in tensors.items()} for tensors in (given, own)]
    if shapes[0] != shapes[1]:
        other = min(k for k in {*given, *own} if shapes[0].get(k) != shapes[1].get(k))
        raise ValueError(
            f"{path}: does not fit {operation}: {other} has shape {shapes[0].get(other)} there "
            f"and {shapes[1].get(other)} here; layers and ranks must be the same"
        )
    return given
