"""Runs that train a bank of experts: each row by its own, and what comes out is plain PEFT."""

import json
from functools import partial

import pytest
import torch
from bank_support import EXTRACT, GENERATE, UPDATE, bank_of
from support import merge, rows_of, same_weights, sft_rows, train_here, write_jsonl

from mnemic.train.data.collate import chunks_of, collate
from mnemic.train.data.rows import BadRows
from mnemic.train.data.stream import Stage
from mnemic.train.data.tokenize import IGNORE, Example
from mnemic.train.errors import UserError
from mnemic.train.export import load_run
from mnemic.train.objectives.tokens import TokenObjective, token_loss
from mnemic.train.recipe.load import build_recipe

OPS = [EXTRACT, UPDATE, GENERATE]
MODEL = {"kind": "tiny", "hidden_size": 32, "layers": 1, "heads": 2, "max_position": 1024}


def bank_tree(folder, operations=tuple(OPS), **changes):
    folder.mkdir(exist_ok=True)
    tree = {
        "name": "bank",
        "run_dir": str(folder / "run"),
        "model": MODEL,
        "adapters": {"kind": "bank", "operations": list(operations), "r": 4, "alpha": 8},
        "data": {"kind": "operations", "operations": list(operations), "size": 8},
        "objective": {"kind": "sft", "max_length": 1024},
        "optimizer": {"kind": "adamw", "lr": 3e-3},
        "loop": {"steps": 4, "batch_size": 6, "save_every": 2, "schedule": "constant"},
    }
    return merge(tree, changes)


def experts_of(run_dir, name="final"):
    from safetensors.torch import load_file

    found = (run_dir / name).glob("mem_*/adapter_model.safetensors")
    return {
        f"{path.parent.name}/{key}": value
        for path in found
        for key, value in load_file(path).items()
    }


def example(operation, length, seed):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, 123, (length,), generator=draw).tolist()
    return Example(ids, [IGNORE] * 3 + ids[3:], (length,), length, operation)


class Rows(Stage):
    def __init__(self, rows):
        self.rows = iter(rows)

    def __next__(self):
        return next(self.rows)


def objective(rows, micro=6, rank=0, world=1):
    return TokenObjective(
        Rows(rows), batch_size=len(rows), micro_batch_size=micro, pad_id=257, packed=False,
        bad=BadRows("stop"), rank=rank, world=world,
    )  # fmt: skip


def test_each_rows_gradient_goes_to_its_expert_and_is_that_of_the_row_alone():
    bank = bank_of()
    bank.train_only(*OPS)
    rows = [example(OPS[i % 2], 8 + i, i) for i in range(6)]  # none for mem_generate
    for batch in objective(rows, micro=2).microbatches(1):
        loss, _ = objective(rows).loss(bank.model, batch)
        loss.backward()
    for operation in OPS:
        found = [p.grad for p in bank.parameters_of(operation)]
        if operation == GENERATE:
            assert found and all(grad is None for grad in found)
            continue
        own = [row for row in rows if row.operation == operation]
        with bank.use(operation):
            loss = token_loss(bank.model, collate(own, pad_id=257, packed=False))
            expected = torch.autograd.grad(loss, bank.parameters_of(operation))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("micro", [1, 2, 3, 6])
def test_ranks_have_as_many_batches_of_one_operation_each_and_every_row_once(world, micro):
    rows = [example(op, 5 + i, i) for i, op in enumerate([EXTRACT] * 4 + [UPDATE, GENERATE])]
    chunks = chunks_of(rows, micro, world, lambda row: row.operation)
    assert len(chunks) % world == 0
    assert all(len({row.operation for row in chunk}) == 1 and chunk for chunk in chunks)
    assert max(map(len, chunks)) <= micro
    assert sorted(id(row) for chunk in chunks for row in chunk) == sorted(map(id, rows))


def test_a_run_trains_resumes_to_the_same_bits_and_loads_in_plain_peft(tmp_path):
    from peft import PeftModel

    whole, parts = bank_tree(tmp_path / "whole"), bank_tree(tmp_path / "parts")
    held = {"kind": "operations", "split": "heldout", "size": 2}
    for tree in (whole, parts):
        tree["evaluation"] = {
            "data": held, "every": 2, "exact_match": True, "max_new_tokens": 3, "batch_size": 4,
        }  # fmt: skip
    summary = train_here(whole)
    parts["loop"]["steps"] = 2
    train_here(parts)
    parts["loop"]["steps"] = 4
    train_here(parts)
    found = experts_of(tmp_path / "whole" / "run")
    assert {name.split("/")[0] for name in found} == {*OPS}
    assert same_weights(found, experts_of(tmp_path / "parts" / "run"))
    assert all(w.abs().sum() > 0 for name, w in found.items() if "lora_B" in name)
    last = rows_of(tmp_path / "whole" / "run")[-1]
    assert {f"eval/exact_match/{op}" for op in OPS} <= last.keys()
    budget = summary["memory_bytes"]
    assert budget["adapters"] == sum(w.numel() * 4 for w in found.values())
    # AdamW: two numbers a weight, and a step count for each tensor.
    assert budget["optimizer"] == 2 * budget["adapters"] + 4 * len(found)
    assert budget["total"] == budget["adapters"] + budget["optimizer"]

    model, tokenizer, recipe = load_run(whole["run_dir"])
    ids = torch.tensor([tokenizer("Which facts?").input_ids])
    with torch.no_grad():
        ours = {}
        for operation in OPS:
            with model.expert_bank.use(operation):
                ours[operation] = model(input_ids=ids).logits
    from mnemic.train.build import build_model

    plain = recipe.model_copy(update={"adapters": type(recipe).model_fields["adapters"].default})
    for operation in OPS:
        base = build_model(plain, tokenizer).eval()
        alone = PeftModel.from_pretrained(base, f"{whole['run_dir']}/final/{operation}")
        with torch.no_grad():
            assert torch.equal(alone(input_ids=ids).logits, ours[operation])
    card = json.loads((tmp_path / "whole/run/final/mem_update/card.json").read_text())
    assert card["data"] == "operations train size 8 seed 0" and len(card["base_hash"]) == 16


@pytest.mark.parametrize(
    "changes",
    [
        {"loop": {"gradient_checkpointing": True}},
        {"loop": {"loss": "chunked"}},
        {"loop": {"sequence_chunk": 64}},
        {"update": {"kind": "in_backward", "clip": "none"}},
        {"offload": {"kind": "none", "activations": "ssd"}},
        {"loop": {"micro_batch_size": 1}},
    ],
    ids=str,
)
def test_what_saves_memory_trains_the_same_experts(tmp_path, changes):
    """Each backward runs by the expert of its forward, however late the forward is made again."""
    plain = bank_tree(tmp_path / "plain", update={"kind": "plain", "max_grad_norm": None})
    other = bank_tree(
        tmp_path / "other", **{"update": {"kind": "plain", "max_grad_norm": None}, **changes}
    )
    for tree in (plain, other):
        train_here(tree)
    found = experts_of(tmp_path / "other" / "run")
    for name, weight in experts_of(tmp_path / "plain" / "run").items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=1e-4)


def test_one_operation_alone_is_plain_lora_of_its_rows(tmp_path, fork_server):
    """The paper's way: one expert in a run. Plain, streamed from disk, and by APOLLO."""
    alone = bank_tree(tmp_path / "alone", [UPDATE])
    streamed = bank_tree(
        tmp_path / "streamed", [UPDATE], update="streamed", offload={"kind": "ssd"}
    )
    apollo = bank_tree(tmp_path / "apollo", [UPDATE], optimizer={"kind": "apollo", "lr": 3e-3})
    for tree in (alone, streamed, apollo):
        tree["update"] = {"kind": tree.get("update", "plain"), "max_grad_norm": 1.0}
        if tree["update"]["kind"] == "streamed":
            tree["update"]["clip"] = "exact_spill"
        train_here(tree)
    plain = experts_of(tmp_path / "alone" / "run")
    found = experts_of(tmp_path / "streamed" / "run")
    assert same_weights(plain, found)
    cards = [
        json.loads((tmp_path / name / "run/final/mem_update/card.json").read_text())
        for name in ("alone", "streamed", "apollo")
    ]
    assert len({card["base_hash"] for card in cards}) == 1 and cards[0]["base_hash"]
    assert not same_weights(plain, experts_of(tmp_path / "apollo" / "run"))
    status, told = fork_server.run("export", streamed["run_dir"], "out", cwd=tmp_path)
    assert status == 0, told
    assert same_weights(plain, experts_of(tmp_path, "out"))
    card = json.loads((tmp_path / "out/mem_update/card.json").read_text())
    assert card["base_hash"] == cards[0]["base_hash"]


def test_an_expert_over_a_base_streamed_from_files_knows_its_base(tmp_path):
    from mnemic.models.adapter_card import base_hash
    from mnemic.models.load import load_causal_lm

    train_here(bank_tree(tmp_path / "base", adapters="none", loop={"steps": 1}))
    path = str(tmp_path / "base/run/final")
    tree = bank_tree(
        tmp_path / "bank", [UPDATE], model={"kind": "pretrained", "path": path},
        update={"kind": "streamed"}, offload={"kind": "ssd", "base": "int8"},
    )  # fmt: skip
    train_here(tree)
    card = json.loads((tmp_path / "bank/run/final/mem_update/card.json").read_text())
    assert card["base_hash"] == base_hash(load_causal_lm(path, dtype="bf16"))


def test_a_bank_learns_from_a_teacher_and_samples_each_row_by_its_expert(tmp_path):
    train_here(bank_tree(tmp_path / "teacher", adapters="none", loop={"steps": 1}))
    teacher = {"kind": "pretrained", "path": str(tmp_path / "teacher/run/final"), "dtype": "fp32"}
    tree = bank_tree(tmp_path / "student", loop={"micro_batch_size": 2})
    tree["objective"] = {
        "kind": "distill", "teacher": teacher, "on_policy": 0.5, "max_new_tokens": 4,
        "max_length": 900,
    }  # fmt: skip
    train_here(tree)
    rows = rows_of(tmp_path / "student" / "run")
    assert sum(row.get("distill/sampled_rows", 0) for row in rows) > 0
    found = experts_of(tmp_path / "student" / "run")
    assert all(w.abs().sum() > 0 for name, w in found.items() if "lora_B" in name)


def test_packed_rows_are_of_one_operation_and_the_expert_may_be_chosen_to_answer(
    tmp_path, fork_server
):
    tree = bank_tree(tmp_path, objective={"packing": True, "max_length": 1000})
    tree["loop"] |= {"batch_size": 2, "micro_batch_size": 1}
    train_here(tree)
    assert rows_of(tmp_path / "run")[-1]["step"] == 4
    run = partial(fork_server.run, cwd=tmp_path)
    status, answer = run(
        "generate", "run", "hi", "--operation", "mem_update", "--max-new-tokens", 2
    )
    assert status == 0, answer
    status, told = run("generate", "run", "hi", "--operation", "mem_vqa")
    assert status == 1 and "mem_extract, mem_update, mem_generate" in told
    status, told = run("export", "run", "out", "--merge")
    assert status == 1 and "one model cannot be all" in told


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"kind": "lm", "seq_len": 32}}, "set objective.kind=sft or distill"),
        ({"update": "streamed", "offload": {"kind": "ssd"}}, "train them one by one"),
        ({"data": {"kind": "facts"}}, "no column 'operation'"),
        ({"adapters": {"operations": [EXTRACT]}}, "mem_generate is none of adapters.operations"),
        ({"adapters": {"operations": ["update"]}}, "a name is 'mem_'"),
        ({"adapters": {"operations": [UPDATE, UPDATE]}}, "names one twice"),
        ({"adapters": {"card": {"owner": "me"}}}, "adapters.card"),
    ],
)
def test_what_a_bank_does_not_go_with(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        build_recipe(bank_tree(tmp_path, **changes))


def test_a_row_that_names_no_expert_is_a_bad_row(tmp_path):
    rows = [{**row, "operation": "mem_update"} for row in sft_rows(6)]
    rows[3]["operation"] = "mem_delete"
    data = {"kind": "jsonl", "path": str(write_jsonl(tmp_path / "rows.jsonl", rows))}
    tree = bank_tree(tmp_path, [UPDATE, EXTRACT], data=data)
    with pytest.raises(UserError, match=r"rows.jsonl:4: operation 'mem_delete'; adapters"):
        train_here(tree)
    tree["data"]["on_bad_row"] = "skip"
    train_here(tree)
    assert rows_of(tmp_path / "run")[-1]["data/bad_rows"] == 1
