"""Whole runs with `update: streamed`: rows and weights of the plain run, export, resume."""

import json

import pytest
import torch
from support import lm_tree, mnemic, rows_of, same_weights, sft_tree, train_here, weights_of

from mnemic.train.errors import RecipeError, UserError
from mnemic.train.recipe.load import build_recipe

MODEL = {"layers": 3}
STREAMED = {"update": "streamed", "offload": {"kind": "ssd"}}
PLAIN = {"update": {"kind": "plain", "max_grad_norm": None}}
LOOP = {"steps": 5, "batch_size": 4, "micro_batch_size": 2, "save_every": 2}


def tree_of(make, folder, **changes):
    folder.mkdir()
    return make(folder, model=MODEL, loop=LOOP, evaluation={"holdout": 0.2, "every": 2}, **changes)


def close(a, b):
    """Rows equal but for the rounding of sums over the vocabulary."""
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        assert all(one[key] == pytest.approx(other[key], rel=1e-5) for key in one)


@pytest.mark.parametrize("make", [lm_tree, sft_tree])
@pytest.mark.parametrize("kind", ["ssd", "host"])
def test_a_streamed_run_is_the_plain_run(make, kind, tmp_path):
    changes = {"objective": {"packing": True}} if make is sft_tree else {}
    plain, streamed = (
        tree_of(make, tmp_path / "a", **PLAIN),
        tree_of(make, tmp_path / "b", **{**STREAMED, "offload": {"kind": kind}}),
    )
    for tree in (plain, streamed):
        tree["objective"] |= changes.get("objective", {})
        train_here(tree)
    close(rows_of(plain["run_dir"]), rows_of(streamed["run_dir"]))
    found, expected = (weights_of(f"{t['run_dir']}/final") for t in (streamed, plain))
    expected.pop("lm_head.weight", None)
    assert same_weights(found, expected)


def test_adapters_over_a_streamed_base(tmp_path):
    """LoRA with dropout off: rows and adapters of the plain run; the base is never written."""
    adapters = {"kind": "lora", "r": 4, "target_modules": ["q_proj", "down_proj"]}
    plain = tree_of(sft_tree, tmp_path / "a", adapters=adapters,
                    update={"kind": "plain", "max_grad_norm": 0.5})  # fmt: skip
    update = {"kind": "streamed", "clip": "exact_spill", "max_grad_norm": 0.5}
    streamed = tree_of(sft_tree, tmp_path / "b", adapters=adapters,
                       **{**STREAMED, "update": update})  # fmt: skip
    for tree in (plain, streamed):
        train_here(tree)
    close(rows_of(plain["run_dir"]), rows_of(streamed["run_dir"]))
    assert same_weights(*(weights_of(f"{t['run_dir']}/final") for t in (plain, streamed)))
    names = ("data.bin", "commit", "lock", "owner")
    folder = tmp_path / "b" / "run" / "offload"
    assert {path.name for path in folder.iterdir()} == set(names)
    before = (folder / "data.bin").read_bytes()
    streamed["loop"]["steps"] = 7
    train_here(streamed)
    assert (folder / "data.bin").read_bytes() == before
    assert rows_of(streamed["run_dir"])[-1]["step"] == 7


def test_resume_needs_no_checkpoint(tmp_path):
    """Every step is committed: a run that is stopped between checkpoints goes on from its last
    step, also with another budget; a checkpoint can be gone back to.
    """
    constant = {"loop": {**LOOP, "schedule": {"kind": "constant"}}}
    train_here(tree_of(lm_tree, tmp_path / "c", **STREAMED) | constant)
    parts = tree_of(lm_tree, tmp_path / "b", **STREAMED) | constant
    parts["loop"]["steps"] = 3
    train_here(parts)
    parts["loop"]["steps"] = 5
    parts["offload"]["ram_budget"] = "32MiB"
    train_here(parts)
    rows = rows_of(tmp_path / "c" / "run")
    final = weights_of(tmp_path / "c" / "run" / "final")
    shared = [row for row in rows_of(parts["run_dir"]) if row["step"] != 3]
    assert shared == [row for row in rows if row["step"] != 3]
    assert same_weights(weights_of(f"{parts['run_dir']}/final"), final)
    # Back to an earlier step by its checkpoint, then on again.
    kept = sorted((tmp_path / "b" / "run" / "checkpoints").glob("step-*"))
    assert kept[0].name < "step-00000005"
    parts["loop"]["resume"] = str(kept[0])
    train_here(parts)
    assert same_weights(weights_of(f"{parts['run_dir']}/final"), final)


def test_generate_and_export_read_the_stream(tmp_path):
    """Greedy text of the streamed model is that of its export in memory; so is a checkpoint's."""
    from transformers import AutoModelForCausalLM

    from mnemic.train.export import export_run, load_run
    from mnemic.train.generate import generate_greedy

    tree = tree_of(lm_tree, tmp_path / "a", **STREAMED)
    train_here(tree)
    run = tree["run_dir"]
    prompts = [[10, 20, 30], [40, 50]]
    model, tokenizer, _ = load_run(run)
    found = generate_greedy(model, tokenizer, prompts, max_new_tokens=8)
    exported = AutoModelForCausalLM.from_pretrained(f"{run}/final")
    assert found == generate_greedy(exported, tokenizer, prompts, max_new_tokens=8)
    model.streamed.stack.close()
    export_run(run, str(tmp_path / "out"), checkpoint=None, merge=False)
    assert same_weights(weights_of(tmp_path / "out"), weights_of(f"{run}/final"))
    old = f"{run}/checkpoints/step-00000002"
    export_run(run, str(tmp_path / "old"), checkpoint=old, merge=False)
    assert not same_weights(weights_of(tmp_path / "old"), weights_of(f"{run}/final"))
    with pytest.raises(UserError, match="there are no adapters to merge"):
        export_run(run, str(tmp_path / "no"), checkpoint=None, merge=True)


def test_a_folder_is_read_by_the_tile(tmp_path):
    """A pretrained folder, by safetensors and by its index of several files; experts saved one by
    one go through transformers, with a warning.
    """
    from transformers import MixtralConfig, MixtralForCausalLM

    from mnemic.models.tiny import byte_tokenizer, tiny_llama

    tokenizer = byte_tokenizer(256)
    torch.manual_seed(0)
    llama = tiny_llama(tokenizer, hidden_size=32, layers=2, heads=2, max_position=256, seed=1)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, max_position_embeddings=256,
    )  # fmt: skip
    for name, model, shard in (
        ("llama", llama, "5GB"), ("shards", llama, "40KB"),
        ("mixtral", MixtralForCausalLM(config), "5GB"),
    ):  # fmt: skip
        folder = tmp_path / name
        model.save_pretrained(folder, max_shard_size=shard)
        tokenizer.save_pretrained(folder)
        trees = []
        for way, changes in (("plain", PLAIN), ("streamed", STREAMED)):
            (tmp_path / f"{name}-{way}").mkdir()
            tree = lm_tree(
                tmp_path / f"{name}-{way}", loop={"steps": 2, "batch_size": 2}, **changes
            )
            tree["model"] = {"kind": "pretrained", "path": str(folder), "dtype": "fp32"}
            train_here(tree)
            trees.append(tree)
        close(*(rows_of(t["run_dir"]) for t in trees))
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    # What streaming writes, from_pretrained loads: experts included.
    final = MixtralForCausalLM.from_pretrained(tmp_path / "mixtral-streamed" / "run" / "final")
    plain = MixtralForCausalLM.from_pretrained(tmp_path / "mixtral-plain" / "run" / "final")
    assert same_weights(final.state_dict(), plain.state_dict())


def test_the_trace_says_who_was_busy(tmp_path):
    tree = tree_of(lm_tree, tmp_path / "a", **{**STREAMED, "offload": {"kind": "ssd",
                                                                     "trace": True}})  # fmt: skip
    train_here(tree)
    rows = json.loads((tmp_path / "a" / "run" / "timeline.json").read_text())
    assert {row["lane"] for row in rows} == {"read", "write", "layer", "step", "wait"}
    assert all(row["end"] >= row["start"] for row in rows)


REFUSED = [
    ({"offload": "ssd"}, "set update.kind=streamed, or offload.kind=none"),
    ({"update": "streamed"}, "set offload.kind=ssd"),
    ({**STREAMED, "optimizer": {"kind": "muon"}}, "set it to apollo_mini, apollo or adamw"),
    ({**STREAMED, "optimizer": {"kind": "adamw8bit"}}, "adamw and offload.states=8bit"),
    ({**STREAMED, "optimizer": {"kind": "apollo_mini"}, "offload": {"kind": "ssd",
      "states": "8bit"}}, "set optimizer.rest=adamw8bit"),
    ({**STREAMED, "adapters": {"kind": "dora"}}, "set lora"),
    ({**STREAMED, "adapters": {"kind": "qlora"}}, "offload.base=nf4"),
    ({**STREAMED, "offload": {"kind": "ssd", "base": "nf4"}}, "offload.base=full"),
    ({**STREAMED, "offload": {"kind": "ssd", "ram_budget": "many"}}, "write such as 512MiB"),
    ({**STREAMED, "update": {"kind": "streamed", "max_grad_norm": 1.0}}, "speculative"),
    ({**STREAMED, "update": {"kind": "streamed", "clip": "layer"}}, "needs max_grad_norm"),
    ({**STREAMED, "adapters": {"kind": "lora"}, "update": {"kind": "streamed", "clip": "layer",
      "max_grad_norm": 1.0}}, "set update.clip=exact_spill"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "advice"), REFUSED)
def test_what_does_not_go_together_is_said(changes, advice, tmp_path):
    with pytest.raises(RecipeError, match=advice.replace(".", r"\.")):
        build_recipe(lm_tree(tmp_path, **changes))


def test_a_budget_below_the_least_names_the_least(tmp_path):
    tree = lm_tree(tmp_path, **{**STREAMED, "offload": {"kind": "ssd", "ram_budget": 1000}})
    with pytest.raises(UserError, match=r"less than the [\d,]+ that streaming this model takes"):
        train_here(tree)


def test_the_command_line(tmp_path):
    """`mnemic train` with a streamed recipe, then `generate`, as processes."""
    from support import write_recipe

    tree = tree_of(lm_tree, tmp_path / "a", **STREAMED)
    recipe = write_recipe(tmp_path / "r.yaml", tree)
    done = mnemic("train", recipe, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "of weights into" in done.stderr and "in memory: layers" in done.stderr
    answer = mnemic("generate", tree["run_dir"], "Line 1", "--max-new-tokens", 4, cwd=tmp_path)
    assert answer.returncode == 0 and answer.stdout, answer.stderr
