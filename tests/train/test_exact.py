"""Exact savings in whole runs: the losses and weights of the run without them."""

import copy

import pytest
import torch
from support import lm_tree, rows_of, sft_tree, train_here, weights_of

from mnemic.models.exact.tiles import auto_tile, tile_mlps
from mnemic.models.lora import add_lora
from mnemic.train.callbacks.tokens import SavedBytes
from mnemic.train.errors import RecipeError, UserError
from mnemic.train.recipe.load import build_recipe

LAYERS = {"layers": 3, "max_position": 64}
LORA = {"kind": "lora", "r": 4, "dropout": 0.2}


def run(folder, tree, **changes):
    folder.mkdir()
    train_here(tree(folder, **changes))
    return rows_of(folder / "run"), weights_of(folder / "run" / "final")


WAYS = {
    "every second layer": {"gradient_checkpointing": True, "checkpoint_every": 2},
    "sequence chunks": {"sequence_chunk": 16},
    "tiles": {"mlp_tile": 24},
    "chunked loss": {"loss": "chunked"},
    "all": {"sequence_chunk": 16, "mlp_tile": 16, "loss": "chunked"},
}


KINDS = ["sft, packed, lora", "in_backward", "micro-batches"]


@pytest.mark.parametrize(
    ("way", "kind"), [*((way, "lm") for way in WAYS), *(("all", kind) for kind in KINDS)]
)
def test_the_same_run(tmp_path, way, kind):
    loop = {"micro_batch_size": 4} if kind == "micro-batches" else {}
    changes = {"model": LAYERS, "loop": {"steps": 4, **loop}}
    tree = lm_tree
    if kind == "sft, packed, lora":
        tree = sft_tree
        changes |= {"objective": {"packing": True}, "adapters": {**LORA, "dropout": 0.0}}
    if kind == "in_backward":
        changes["update"] = "in_backward"
    rows, weights = run(tmp_path / "plain", tree, **changes)
    changed = copy.deepcopy(changes)
    changed["loop"] |= WAYS[way]
    others, found = run(tmp_path / "saving", tree, **changed)
    for row, other in zip(rows, others, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5)


def test_streamed_layers_in_chunks_are_the_same_run(tmp_path):
    changes = {"model": LAYERS, "update": "streamed", "offload": "ssd", "loop": {"steps": 3}}
    rows, weights = run(tmp_path / "whole", lm_tree, **copy.deepcopy(changes))
    changes["loop"] |= {"sequence_chunk": 16, "mlp_tile": 16}
    others, found = run(tmp_path / "chunks", lm_tree, **changes)
    assert [r["loss"] for r in others] == pytest.approx([r["loss"] for r in rows], rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-5)


def lora_model(**settings):
    import architectures as a

    model = a.small("llama", num_hidden_layers=2).bfloat16()
    for name, buffer in model.named_buffers():
        if "inv_freq" in name:
            buffer.data = buffer.data.float()
    return add_lora(
        model, r=4, alpha=8, dropout=0.0, target_modules="all-linear", rslora=False, dora=False,
        quantized=False, seed=0, **settings,
    ).train()  # fmt: skip


def saved(model):
    import architectures as a

    counter = SavedBytes(model)
    with counter():
        loss = model(a.ids(2, 64)).logits.float().logsumexp(-1).sum()
    loss.backward()
    return counter.take(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_adapters_compute_in_the_bases_type_and_keep_fp32_weights():
    """peft's default keeps an fp32 copy of each adapted layer's input."""
    theirs, grads = saved(lora_model(compute="fp32"))
    model = lora_model(compute="model")
    ours, others = saved(model)
    assert ours < 0.75 * theirs
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    x, y = (torch.cat([g.flatten() for g in each.values()]) for each in (grads, others))
    assert float(torch.nn.functional.cosine_similarity(x, y, 0)) > 0.999
    assert all(g.dtype == torch.float32 for g in others.values())


def test_lora_fa_keeps_no_inputs_and_leaves_a_as_it_was(tmp_path):
    whole, _ = saved(lora_model())
    less, grads = saved(lora_model(freeze_a=True))
    assert less < 0.9 * whole
    assert grads and all("lora_B" in name for name in grads)
    rows, weights = run(
        tmp_path / "fa", sft_tree, adapters={"kind": "lora", "r": 4, "freeze_a": True}
    )
    before, _ = run(
        tmp_path / "still",
        sft_tree,
        adapters={"kind": "lora", "r": 4, "freeze_a": True},
        loop={"steps": 1},
        optimizer={"kind": "adamw", "lr": 1e-12},
    )
    still = weights_of(tmp_path / "still" / "run" / "final")
    assert rows[-1]["loss"] < before[0]["loss"]
    for name, value in weights.items():
        assert torch.equal(value, still[name]) == ("lora_A" in name)


def test_automatic_tiles_have_a_floor():
    """Short rows whole; long ones in even tiles of 4096 tokens and more."""
    assert auto_tile(2048) == 2048 and auto_tile(8192) == 8192
    for tokens in (8193, 20000, 131072):
        tile = auto_tile(tokens)
        assert 4096 <= tile < 8192 and -(-tokens // tile) * tile - tokens < tile
    import architectures as a

    with pytest.raises(ValueError, match="no MLP module"):
        tile_mlps(a.small("opt"), 16)


SENTENCES = {
    "checkpoint_every alone": ({"loop": {"checkpoint_every": 2}}, "has no effect without"),
    "two recomputations": (
        {"loop": {"checkpoint_every": 2, "gradient_checkpointing": True, "sequence_chunk": 32}},
        "sequence_chunk=32 recomputes every layer",
    ),
    "a chunk of nothing": ({"loop": {"sequence_chunk": 0}}, "loop.sequence_chunk: 0"),
    "a tile of a word": ({"loop": {"mlp_tile": "big"}}, "loop.mlp_tile"),
}


@pytest.mark.parametrize("case", SENTENCES)
def test_sentences(tmp_path, case):
    changes, words = SENTENCES[case]
    with pytest.raises(RecipeError) as caught:
        build_recipe(lm_tree(tmp_path, **changes))
    assert any(words in problem for problem in caught.value.problems)


def test_deepspeed_keeps_its_logits(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    from mnemic.models.tiny import byte_tokenizer
    from mnemic.train.build import build_model

    recipe = build_recipe(lm_tree(tmp_path, loop={"loss": "chunked"}))
    with pytest.raises(UserError, match=r"loop.loss=chunked .* set it to auto"):
        build_model(recipe, byte_tokenizer())
