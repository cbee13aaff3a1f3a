"""What the low-memory recipes take of models from 1 B to 70 B parameters: the figures of `mnemic
plan` as the table in recipes/README.md. Nothing is downloaded, allocated or trained.

    python scripts/plan_table.py            # prints the table
    python scripts/plan_table.py --write    # puts it between the markers in recipes/README.md
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

README = Path(__file__).parent.parent / "recipes" / "README.md"
BEGIN, END = "<!-- plan_table.py: begin -->", "<!-- plan_table.py: end -->"
LENGTH = 2048

_LLAMA = {"vocab_size": 128_256, "num_key_value_heads": 8, "head_dim": 64}
_QWEN3 = {"vocab_size": 151_936, "num_key_value_heads": 8, "head_dim": 128}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.2-1B": ("LlamaConfig", _LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "tie_word_embeddings": True,
    }),
    "Qwen3-4B": ("Qwen3Config", _QWEN3 | {
        "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "tie_word_embeddings": True,
    }),
    "Qwen3-8B": ("Qwen3Config", _QWEN3 | {
        "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
        "num_attention_heads": 32, "tie_word_embeddings": False,
    }),
    "Qwen3-32B": ("Qwen3Config", _QWEN3 | {
        "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
        "num_attention_heads": 64, "tie_word_embeddings": False,
    }),
    "Llama-3.1-70B": ("LlamaConfig", _LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "head_dim": 128, "tie_word_embeddings": False,
    }),
}  # fmt: skip
"""Name -> configuration class of transformers and what differs from its defaults."""

_ROW = ["loop.batch_size=1", "evaluation=null", "loop.device=cpu", f"objective.seq_len={LENGTH}"]
WAYS: dict[str, tuple[str, list[str]]] = {
    "AdamW, for comparison": ("finetune_apollo_mini", [
        *_ROW, "model.dtype=fp32", "optimizer={kind: adamw, lr: 1e-5}", "update=plain",
    ]),
    "`finetune_apollo_mini`": ("finetune_apollo_mini", _ROW),
    "`lowmem_full`": ("lowmem_full", _ROW),
    "`lowmem_lora`": ("lowmem_lora", [
        *_ROW[:-1], f"objective.max_length={LENGTH}",
    ]),
}  # fmt: skip
"""Name in the table -> recipe and overrides, on rows of `LENGTH` tokens, one at a time."""

_MEMORIES = (2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""GB that machines and GPUs come with."""


@dataclass(frozen=True)
class Row:
    """Bytes. `memory`: the most at a time, without what a process takes to begin; `disk`: the files
    of the run at their largest; `written`: in a step."""

    model: str
    parameters: int
    way: str
    memory: int
    disk: int
    written: int
    update: str


def rows(model: str, ways: list[str] | None = None) -> Iterator[Row]:
    """The planned figures of a shape by some of the ways, or all."""
    import torch
    import transformers

    from mnemic.models.tiny import byte_tokenizer
    from mnemic.train.plan.plan import Planner, Way
    from mnemic.train.plan.shapes import shapes_of
    from mnemic.train.recipe.load import load_recipe

    kind, fields = SHAPES[model]
    with tempfile.TemporaryDirectory() as folder:
        config = getattr(transformers, kind)(**fields, max_position_embeddings=40_960)
        config.architectures = [kind.removesuffix("Config") + "ForCausalLM"]
        config.save_pretrained(folder)
        for name in ways or list(WAYS):
            recipe, overrides = WAYS[name]
            given = [*overrides, "model.kind=pretrained", f"model.path={folder}"]
            made, _ = load_recipe(recipe, [*given, f"run_dir={folder}/run"])
            planner = Planner(made, byte_tokenizer(), torch.device("cpu"), 0)
            way = Way(name, [])
            planner.fill(way, made, shapes_of(made, None))
            assert not way.device, "planned for the CPU, where all of it lies in one memory"
            yield Row(
                model, planner.parameters, name, way.host_bytes, sum(way.disk.values()),
                way.written, made.update.kind,
            )  # fmt: skip


def gib(size: int) -> str:
    value = size / 2**30
    return "-" if not size else f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def wants(row: Row) -> str:
    """Memory and disk of sizes that are sold, with a tenth and 1 GiB to spare."""
    need = (row.memory * 1.1 + 2**30) / 1e9
    memory = next(size for size in _MEMORIES if size >= need)
    disk = f"{max(10, -(-int(row.disk * 1.1 / 1e9) // 10) * 10)} GB of SSD"
    if row.update == "streamed":
        return f"{memory} GB of RAM, {disk}"
    if memory <= 141:
        return f"a GPU of {memory} GB, or as much RAM; {disk}"
    if row.update == "in_backward":  # which does not go with shards
        return f"{memory} GB of RAM; {disk}"
    return f"{memory} GB of RAM, or GPUs that hold as much together; {disk}"


def table(found: list[Row]) -> str:
    lines = [
        "| model | how | memory, GiB | disk, GiB | written a step, GiB | wants |",
        "|---|---|---|---|---|---|",
    ]
    for row in found:
        model = f"{row.model} ({row.parameters / 1e9:.1f} B)"
        figures = [gib(row.memory), gib(row.disk), gib(row.written)]
        lines.append("| " + " | ".join([model, row.way, *figures, wants(row)]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into recipes/README.md")
    args = parser.parse_args()
    text = table([row for model in SHAPES for row in rows(model)])
    if not args.write:
        print(text)
        return
    before, rest = README.read_text("utf-8").split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
