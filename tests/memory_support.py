"""What tests of memory training share: a small recipe, and a model that writes operations half of
the time, so that rollouts differ.
"""

from pathlib import Path
from typing import Any

from support import merge

STREAM = {
    "n_chunks": 3, "events_per_chunk": 2, "n_entities": 2, "n_attributes": 2, "n_values": 4,
    "p_update": 0.3,
}  # fmt: skip
MEMORY = {
    "store": "flat", "retrieved": 4, "recent": 2, "view_tokens": 64, "syntax": "lines",
    "form": "text", "max_new_tokens": 24,
}  # fmt: skip


def sft_memory_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe that teaches a small model to write operations in a few seconds."""
    return merge(
        {
            "name": "warm",
            "run_dir": str(folder / "run"),
            "model": {
                "kind": "tiny", "hidden_size": 64, "layers": 2, "heads": 4, "max_position": 256,
                "vocab_size": 512,
            },
            "data": {"kind": "kvstream", "size": 400, "stream": STREAM},
            "memory": MEMORY,
            "objective": {"kind": "sft", "max_length": 160},
            "optimizer": {"kind": "adamw", "lr": 5e-3, "beta2": 0.98},
            "loop": {"steps": 80, "batch_size": 16},
        },
        changes,
    )  # fmt: skip


def grpo_tree(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of a few steps of GRPO from the model in the folder `model`."""
    return merge(
        {
            "name": "tiny",
            "run_dir": str(folder / "run"),
            "model": {"kind": "pretrained", "path": str(model), "dtype": "fp32"},
            "data": {"kind": "kvstream", "size": 50, "stream": STREAM},
            "memory": MEMORY,
            "objective": {
                "kind": "grpo", "num_generations": 4, "max_length": 160, "credit": "pooled_turn",
            },
            "optimizer": {"kind": "adamw", "lr": 1e-3},
            "loop": {"steps": 4, "batch_size": 8, "micro_batch_size": 8, "save_every": 2},
        },
        changes,
    )  # fmt: skip
