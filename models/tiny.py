"""A small Llama with random weights and a byte tokenizer, made in process: tests and first runs
need no download.

Both are ordinary transformers objects: what they save, `from_pretrained` loads.
"""

from collections.abc import Iterable
from typing import Any

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SPECIAL = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]


def byte_tokenizer(max_length: int = 2048) -> Any:
    """One token for each of the 256 bytes (ids 0-255), then `SPECIAL`; any text survives the round
    trip.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    # GPT-2's printable stand-ins for bytes, in byte order, so that id == byte.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_in = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        stand_in.setdefault(byte, chr(256 + sum(b not in printable for b in range(byte))))
    vocab = {stand_in[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer, max_length)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int = 2048) -> Any:
    """A byte-level BPE of `vocab_size` tokens, `SPECIAL` included, learned from `texts`: the same
    for the same texts. Any text survives the round trip.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE

    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return _fast(tokenizer, max_length)


def _fast(tokenizer: Any, max_length: int) -> Any:
    from transformers import PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[2:],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(
    tokenizer: Any, *, hidden_size: int, layers: int, heads: int, max_position: int
) -> Any:
    """The LlamaConfig of `tiny_llama`."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 8 // 3 // 8 * 8 + 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=max_position,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_llama(
    tokenizer: Any, *, hidden_size: int, layers: int, heads: int, max_position: int, seed: int
) -> Any:
    """fp32 LlamaForCausalLM; weights are a function of `seed` and leave the global generator as it
    was.
    """
    import torch
    from transformers import LlamaForCausalLM

    config = tiny_config(
        tokenizer, hidden_size=hidden_size, layers=layers, heads=heads, max_position=max_position
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    # Greedy by default, and no warning about settings that only sampling reads.
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
