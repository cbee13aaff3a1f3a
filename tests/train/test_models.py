"""Models from folders: full training, QLoRA, and what is refused."""

import pytest
from support import lm_tree, rows_of, train_here

from mnemic.models.tiny import byte_tokenizer, tiny_llama
from mnemic.train.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A folder save_pretrained wrote: a model of ours as a user's own."""
    tokenizer = byte_tokenizer()
    model = tiny_llama(tokenizer, hidden_size=64, layers=2, heads=2, max_position=128, seed=3)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def tree(tmp_path, folder, **changes):
    return lm_tree(tmp_path, model={"kind": "pretrained", "path": str(folder)}, **changes)


def test_a_local_folder_trains_in_bf16_and_exports_what_from_pretrained_loads(tmp_path, folder):
    import torch
    from transformers import AutoModelForCausalLM

    train_here(tree(tmp_path, folder))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_qlora_trains_adapters_over_a_4_bit_base(tmp_path, folder):
    pytest.importorskip("bitsandbytes")
    from mnemic.train.build import build_model
    from mnemic.train.recipe.load import build_recipe

    config = tree(tmp_path, folder, adapters={"kind": "qlora", "r": 4}, optimizer={"lr": 1e-2})
    config["loop"]["steps"] = 10
    base = build_model(build_recipe(config), byte_tokenizer())
    import bitsandbytes

    four_bit = [m for m in base.modules() if type(m) is bitsandbytes.nn.Linear4bit]
    assert len(four_bit) == 14 and four_bit[0].weight.dtype.itemsize == 1
    assert all("lora_" in n for n, p in base.named_parameters() if p.requires_grad)
    train_here(config)
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_rows_longer_than_the_models_positions_are_refused(tmp_path, folder):
    with pytest.raises(UserError, match=r"seq_len=129 is longer than the model's 128 positions"):
        train_here(tree(tmp_path, folder, objective={"seq_len": 129}))


def test_a_target_that_matches_no_layer_names_those_that_exist(tmp_path):
    with pytest.raises(UserError, match=r"matches no layer; take all-linear, or from .*q_proj"):
        train_here(lm_tree(tmp_path, adapters={"kind": "lora", "target_modules": ["query"]}))


def test_tiny_tokenizer_round_trips_every_byte():
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, range(0x250))) + "\u20ac\U0001f600\n\t "
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
