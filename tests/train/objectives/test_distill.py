"""Objective `distill`: TRL's loss, one gradient however rows are split, samples that are a function
of (seed, step, row), and runs that learn, stop and come back to the same bits.
"""

from types import SimpleNamespace

import pytest
import torch
from support import merge, rows_of, same_weights, sft_tree, train_here, weights_of

import mnemic.models.exact.divergence as module
from mnemic.models.exact.divergence import Divergence
from mnemic.models.exact.loss import loss_head
from mnemic.models.exact.recompute import in_rows
from mnemic.models.tiny import byte_tokenizer, tiny_llama
from mnemic.train.data.collate import Batch, collate
from mnemic.train.data.rows import BadRows
from mnemic.train.data.stream import Stage
from mnemic.train.data.tokenize import IGNORE, Example
from mnemic.train.errors import UserError
from mnemic.train.objectives.distill import SAMPLED, DistillationObjective, Sampler
from mnemic.train.objectives.teacher import check_heads, check_tokens
from mnemic.train.objectives.tokens import token_loss
from mnemic.train.recipe.load import build_recipe

TOKENIZER = byte_tokenizer(256)


FORWARD = Divergence("forward_kl")


def llama(seed, width=32, scale=15):
    """Of random weights with opinions: those of the start give all tokens one probability, and
    divergences that are round-off.
    """
    model = tiny_llama(TOKENIZER, hidden_size=width, layers=2, heads=4, max_position=256, seed=seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
    return model.train()


def examples(count):
    draw = torch.Generator().manual_seed(5)
    found = []
    for i in range(count):
        ids = torch.randint(97, 123, (6 + i % 5 + 2 * (i % 3),), generator=draw).tolist()
        first = 3 + i % 3
        labels = [IGNORE] * first + ids[first:]
        found.append(Example(ids, labels, (len(ids),), len(ids)))
    return found


class Rows(Stage):
    def __init__(self, rows):
        self.rows, self.at = rows, 0

    def __next__(self):
        self.at += 1
        return self.rows[(self.at - 1) % len(self.rows)]


def objective(divergence=FORWARD, *, share=0.0, student=None, micro=8, rank=0, world=1, **kw):
    sampler = None
    if share:
        sampler = Sampler(student, TOKENIZER, share, 9, 12, seed=3)
    return DistillationObjective(
        Rows(examples(8)), llama(7, 48), divergence, sampler=sampler, batch_size=8,
        micro_batch_size=micro, pad_id=257, packed=False, bad=BadRows("stop"), rank=rank,
        world=world, **kw,
    )  # fmt: skip


def gradients(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def close(found, expected, relative=2e-6):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert float((found[name] - value).norm() / value.norm()) < relative, name


@pytest.mark.parametrize("mode", ["logits", "chunked"])
@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0), ("reverse_kl", 1), ("jsd", 0.3)])
def test_the_loss_and_its_gradient_are_trls(monkeypatch, kind, beta, mode):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer").GKDTrainer
    ours, model = objective(Divergence(kind, beta=beta or 0.5)), llama(0)
    loss_head(model, mode)
    chunks = []
    monkeypatch.setattr(
        module, "in_rows", lambda *a, **kw: chunks.append(kw["rows"]) or in_rows(*a, **kw)
    )
    (batch,) = ours.microbatches(1)
    total, sums = ours.loss(model, batch)
    loss = total / batch.weight
    loss.backward()
    mine = gradients(model)
    me = SimpleNamespace(
        teacher_model=ours.teacher, beta=beta, generalized_jsd_loss=gkd.generalized_jsd_loss
    )
    theirs = gkd.compute_loss(me, model, batch.tensors, num_items_in_batch=batch.weight)
    theirs.backward()
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    assert sums == {"distill/divergence_sum": float(total.detach())}
    assert bool(chunks) == (mode == "chunked")
    close(mine, gradients(model))
    assert all(p.grad is None and not p.requires_grad for p in ours.teacher.parameters())


def test_hard_weight_mixes_in_the_loss_of_sft():
    model, divergence = llama(0), Divergence("jsd", 2.0)
    soft, mixed = objective(divergence), objective(divergence, hard_weight=0.25)
    (batch,) = soft.microbatches(1)
    expected = 0.75 * soft.loss(model, batch)[0] + 0.25 * token_loss(model, batch)
    expected.backward()
    grads = gradients(model)
    found, sums = mixed.loss(model, batch)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    close(gradients(model), grads)
    assert sums.keys() == {"distill/divergence_sum", "distill/cross_entropy_sum"}


def test_a_copy_of_the_student_has_nothing_to_teach():
    model, ours = llama(7, 48), objective()
    (batch,) = ours.microbatches(1)
    loss, _ = ours.loss(model, batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-4)
    assert max(float(g.abs().max()) for g in gradients(model).values()) < 1e-5


def contents(batches):
    """Rows as (ids, labels, sampled), sorted."""
    found = []
    for batch in batches:
        own = batch.tensors[SAMPLED].tolist()
        mask = batch.tensors.get("attention_mask", torch.ones_like(batch.tensors["input_ids"]))
        for i, flag in enumerate(own):
            kept = mask[i].bool()
            ids, labels = batch.tensors["input_ids"][i], batch.tensors["labels"][i]
            found.append((tuple(ids[kept].tolist()), tuple(labels[kept].tolist()), flag))
    return sorted(found)


def test_samples_are_the_students_own_and_depend_on_seed_step_and_row_alone():
    model = llama(0, scale=1)  # samples of a model with opinions repeat themselves
    whole = objective(share=0.6, student=model).microbatches(4)
    rows = contents(whole)
    own = [row for row in rows if row[2]]
    assert 0 < len(own) < 8 and whole[0].counts["distill/sampled_rows"] == len(own)
    given = {tuple(e.input_ids): tuple(e.labels) for e in examples(8)}
    prompts = {ids[: labels.count(IGNORE)] for ids, labels in given.items()}
    for ids, labels, flag in rows:
        if not flag:
            assert given[ids] == labels
            continue
        first = labels.count(IGNORE)
        assert ids[:first] in prompts and labels[first:] == ids[first:]
        assert len(ids) - first in range(1, 10) and len(ids) <= 12
    assert sum(b.weight for b in whole) == sum(len(r[0]) - r[1].count(IGNORE) for r in rows)
    for micro in (2, 4):
        again = objective(share=0.6, student=model, micro=micro).microbatches(4)
        assert len(again) == 8 // micro and contents(again) == rows
    ranks = [
        objective(share=0.6, student=model, micro=2, rank=r, world=2).microbatches(4)
        for r in (0, 1)
    ]
    assert len(ranks[0]) == len(ranks[1]) == 2 and contents(ranks[0] + ranks[1]) == rows
    every = contents(objective(share=1.0, student=model).microbatches(4))
    assert all(flag for *_, flag in every) and set(own) < set(every)
    # Another step draws other rows, and other completions for all of them.
    assert contents(objective(share=0.6, student=model).microbatches(5)) != rows
    assert not set(every) & set(contents(objective(share=1.0, student=model).microbatches(5)))
    assert model.training  # generation gave its mode back


def test_two_micro_batch_sizes_give_one_gradient():
    model = llama(0)

    def run(micro):
        ours = objective(share=0.5, student=model, micro=micro, hard_weight=0.3)
        batches = ours.microbatches(1)
        total = sum(batch.weight for batch in batches)
        for batch in batches:
            (ours.loss(model, batch)[0] / total).backward()
        return gradients(model)

    close(run(2), run(8))


def test_cross_entropy_counts_on_given_rows_only_and_divergence_wholly_on_sampled_ones():
    model = llama(0)
    ours = objective(hard_weight=0.4)
    rows = examples(3)
    batch = collate(rows, pad_id=257, packed=False)
    batch.tensors[SAMPLED] = torch.tensor([True, False, True])
    found, _ = ours.loss(model, batch)
    soft = objective()
    expected = 0.0
    for i, row in enumerate(rows):
        one = collate([row], pad_id=257, packed=False)
        expected += float((soft if i != 1 else ours).loss(model, one)[0].detach())
    assert float(found.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_streamed_way_to_a_loss_is_refused():
    with pytest.raises(TypeError, match="no function of the targets"):
        objective().tokens(Batch({}, 1.0))


def test_vocabularies_that_differ_are_refused_and_padding_is_not():
    from mnemic.models.tiny import bpe_tokenizer

    check_tokens(TOKENIZER, byte_tokenizer(99))
    other = bpe_tokenizer(["some text " * 20], 300)
    with pytest.raises(UserError, match=r"objective\.teacher: its vocabulary is not the model's"):
        check_tokens(TOKENIZER, other)
    longer, shorter = llama(1), llama(2)
    longer.resize_token_embeddings(320, mean_resizing=False)
    assert check_heads(TOKENIZER, llama(0), longer) == 261
    assert check_heads(TOKENIZER, longer, llama(0)) == 261
    shorter.resize_token_embeddings(255, mean_resizing=False)
    with pytest.raises(UserError, match="have 261 and 255 rows, and the vocabulary 261 tokens"):
        check_heads(TOKENIZER, llama(0), shorter)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A model that has learned the rows, in a folder."""
    folder = tmp_path_factory.mktemp("teacher")
    train_here(sft_tree(folder, optimizer={"lr": 1e-2}, loop={"steps": 30, "schedule": "constant"}))
    return folder / "run" / "final"


def run(folder, teacher, steps=6, **changes):
    folder.mkdir(exist_ok=True)
    tree = sft_tree(folder)
    tree["objective"] = {
        "kind": "distill", "max_length": 64, "divergence": "reverse_kl", "on_policy": 0.5,
        "max_new_tokens": 5, "hard_weight": 0.2, "temperature": 1.5,
        "teacher": {"kind": "pretrained", "path": str(teacher), "dtype": "fp32"},
    }  # fmt: skip
    loop = {"steps": steps, "schedule": "constant", "save_every": 100}
    train_here(merge(merge(tree, {"loop": loop}), changes))
    return rows_of(folder / "run"), weights_of(folder / "run" / "final")


WAYS = {
    "plain": {"update": {"kind": "plain", "max_grad_norm": 1.0}, "loop": {"micro_batch_size": 4}},
    "in_backward": {"update": "in_backward"},
    "lora": {"adapters": {"kind": "lora", "r": 4, "dropout": 0.1}},
    "packed": {
        "objective": {"packing": True, "on_policy": 0.0},
        "loop": {"precision": "bf16", "gradient_checkpointing": True},
    },
}


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_stops_comes_back_to_the_same_bits(tmp_path, teacher, way):
    before = weights_of(teacher)
    rows, weights = run(tmp_path / "straight", teacher, **WAYS[way])
    run(tmp_path / "stopped", teacher, 3, **WAYS[way])
    again, same = run(tmp_path / "stopped", teacher, **WAYS[way])
    assert again == rows and same_weights(weights, same)
    assert any(row.get("distill/sampled_rows") for row in rows) == (way != "packed")
    assert same_weights(before, weights_of(teacher))


def test_in_backward_is_plain_to_the_bit(tmp_path, teacher):
    plain = {"kind": "plain", "max_grad_norm": None}
    rows, weights = run(tmp_path / "plain", teacher, 3, update=plain)
    again, same = run(tmp_path / "inside", teacher, 3, update="in_backward")
    assert again == rows and same_weights(weights, same)


def test_the_student_comes_to_say_what_the_teacher_says(tmp_path, teacher):
    """Loss here is a divergence: its least is 0."""
    rows, _ = run(
        tmp_path, teacher, 40, optimizer={"lr": 1e-2}, evaluation={"holdout": 0.2, "every": 40},
        objective={"hard_weight": 0.0, "on_policy": 0.25, "divergence": "forward_kl"},
    )  # fmt: skip
    first, last = (row["eval/loss"] for row in rows if "eval/loss" in row)
    assert last < 0.25 * first
    assert rows[-1]["loss"] < 0.25 * rows[1]["loss"]


def test_a_teacher_that_does_not_fit_is_refused_before_training(tmp_path, teacher):
    with pytest.raises(UserError, match=r"objective\.teacher: could not be read"):
        run(tmp_path / "a", tmp_path / "missing")
    words = r"objective\.teacher\.adapters: .* has no adapter_config\.json"
    with pytest.raises(UserError, match=words):
        run(tmp_path / "b", teacher, objective={"teacher": {"adapters": str(teacher)}})
    with pytest.raises(UserError, match="its vocabulary is not the model's"):
        run(tmp_path / "c", teacher, model={"vocab_size": 300})


def test_the_plan_counts_the_teacher(tmp_path, teacher):
    from transformers import AutoModelForCausalLM

    from mnemic.train.plan.fits import check_fits, least_bytes
    from mnemic.train.plan.plan import plan

    tree = sft_tree(tmp_path)
    of = {"kind": "pretrained", "path": str(teacher), "dtype": "bf16"}
    recipe = build_recipe({**tree, "objective": {"kind": "distill", "teacher": of}})
    model = AutoModelForCausalLM.from_pretrained(teacher)
    weights = sum(p.numel() * 2 for p in model.parameters())
    found = least_bytes(recipe, TOKENIZER, torch.device("cpu"))["teacher"]
    assert weights <= found < weights + 4096  # and its rotary frequencies
    report = plan(recipe, disk=[tmp_path])
    assert [way.host.get("teacher") for way in report.ways[:2]] == [found, found]
    assert "objective.kind=distill" in report.ways[2].refused
    assert any("the teacher's weights are counted" in note for note in report.notes)
    check_fits(recipe, TOKENIZER, torch.device("cpu"))
    assert least_bytes(build_recipe(tree), TOKENIZER, torch.device("cpu"))["teacher"] == 0


def test_an_adapter_makes_a_teacher(tmp_path, teacher):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mnemic.train.objectives.teacher import build_teacher
    from mnemic.train.recipe.distill import DistillObjective

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(teacher),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    part = DistillObjective(
        max_length=64,
        teacher={"path": str(teacher), "kind": "pretrained", "dtype": "fp32",
                 "adapters": str(tmp_path)},
    )  # fmt: skip
    made = build_teacher(part, tokenizer, AutoModelForCausalLM.from_pretrained(teacher))
    assert isinstance(made, PeftModel) and not made.training
    assert not any(p.requires_grad for p in made.parameters())
    ids = torch.arange(10)[None]
    torch.testing.assert_close(made(ids).logits, adapted.eval()(ids).logits.detach())
