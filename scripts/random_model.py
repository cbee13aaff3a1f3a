"""A model folder with random weights, written a tile at a time: to try sizes that no machine at
hand holds, without a download.

    python scripts/random_model.py FOLDER [--hidden 2048 --inner 5632 --layers 22 --heads 32 --kv 4]

The default is TinyLlama's shape, 1.1 B parameters. The tokenizer is one token a byte, so any text
trains; loss starts at the logarithm of the vocabulary.
"""

import argparse
from pathlib import Path

import torch

from mnemic.models.tiny import byte_tokenizer
from mnemic.train.offload.layout import TILE, Tiling
from mnemic.train.offload.skeleton import without_weights
from mnemic.train.offload.transfer import SafetensorsWriter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tied", action="store_true")
    args = parser.parse_args()
    from transformers import LlamaConfig

    tokenizer = byte_tokenizer(2048)
    config = LlamaConfig(
        vocab_size=args.vocabulary, hidden_size=args.hidden, intermediate_size=args.inner,
        num_hidden_layers=args.layers, num_attention_heads=args.heads,
        num_key_value_heads=args.kv, max_position_embeddings=2048, tie_word_embeddings=args.tied,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, dtype="bfloat16",
    )  # fmt: skip
    model = without_weights(config, torch.bfloat16)
    named = list(model.named_parameters())
    args.folder.mkdir(parents=True, exist_ok=True)
    writer = SafetensorsWriter(args.folder, [(n, tuple(p.shape), p.dtype) for n, p in named])
    torch.manual_seed(0)
    for name, param in named:
        if param.ndim < 2:
            writer.add(torch.ones(param.shape, dtype=param.dtype))
            continue
        tiling = Tiling.of(name, param.shape, TILE)
        for tile in range(len(tiling)):
            writer.add((torch.randn(tiling.numel(tile)) * 0.02).to(param.dtype))
    writer.close()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    total = sum(param.numel() for _, param in named)
    print(f"{args.folder}: {total:,} parameters in bf16")


if __name__ == "__main__":
    main()
