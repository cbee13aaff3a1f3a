"""The loop: the same numbers however a batch is split, closed forms, and what it refuses."""

import json
import signal

import pytest
import torch
from support import lm_tree, rows_of, same_weights, sft_tree, train_here, weights_of

from mnemic.optim.schedules import lr_factor
from mnemic.train.errors import UserError
from mnemic.train.recipe.load import build_recipe


def losses(folder):
    return [row["loss"] for row in rows_of(folder) if "loss" in row]


@pytest.mark.parametrize("make", [lm_tree, sft_tree])
def test_accumulation_4x2_equals_1x8(tmp_path, make):
    runs = {}
    for micro in (8, 2):
        tree = make(tmp_path, run_dir=str(tmp_path / f"m{micro}"))
        tree["loop"] |= {"micro_batch_size": micro, "steps": 6}
        train_here(tree)
        runs[micro] = tmp_path / f"m{micro}"
    assert losses(runs[2]) == pytest.approx(losses(runs[8]), rel=1e-6)
    one, four = weights_of(runs[8] / "final"), weights_of(runs[2] / "final")
    for name in one:
        torch.testing.assert_close(four[name], one[name], rtol=1e-4, atol=1e-6)


def test_accumulation_is_exact_where_rows_differ_in_length(tmp_path):
    """The mean over all tokens, not the mean of micro-batch means: one SGD step, gradients
    compared.
    """
    rows = [{"prompt": "x", "completion": "y" * n} for n in (1, 2, 3, 40)]
    path = tmp_path / "uneven.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    weights = {}
    for micro in (4, 1):
        tree = sft_tree(
            tmp_path,
            run_dir=str(tmp_path / f"m{micro}"),
            data={"path": str(path)},
            optimizer={"kind": "sgd", "lr": 1.0},
            update={"kind": "plain", "max_grad_norm": None},
            loop={"steps": 1, "batch_size": 4, "micro_batch_size": micro, "schedule": "constant"},
        )
        train_here(tree)
        weights[micro] = weights_of(tmp_path / f"m{micro}" / "final")
    for name in weights[4]:
        torch.testing.assert_close(weights[1][name], weights[4][name], rtol=1e-5, atol=1e-7)


def test_one_sgd_step_is_the_closed_form(tmp_path):
    """w - lr * grad of the mean token loss, from plain PyTorch on the same batch; clipping
    included.
    """
    from mnemic.models.tiny import byte_tokenizer
    from mnemic.train.build import build_model
    from mnemic.train.data.stream import take
    from mnemic.train.objectives.build import train_stream

    tree = lm_tree(
        tmp_path,
        optimizer={"kind": "sgd", "lr": 0.5},
        update={"max_grad_norm": 0.1},
        loop={"steps": 1, "schedule": "constant"},
    )
    train_here(tree)
    recipe = build_recipe(tree)
    model = build_model(recipe, byte_tokenizer())
    rows = sorted(take(train_stream(recipe, byte_tokenizer()).stream, 8), key=lambda e: e.lengths)
    ids = torch.tensor([row.input_ids for row in rows])
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    (row,) = [r for r in rows_of(tmp_path / "run") if r["step"] == 1]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    saved = weights_of(tmp_path / "run" / "final")
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - 0.5 * parameter.grad
        torch.testing.assert_close(saved[name], expected, rtol=1e-5, atol=1e-7)


def test_same_seed_same_bits_other_seed_other_bits(tmp_path):
    found = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tree = lm_tree(tmp_path, run_dir=str(tmp_path / name), loop={"seed": seed, "steps": 4})
        train_here(tree)
        found.append((rows_of(tmp_path / name), weights_of(tmp_path / name / "final")))
    assert found[0][0] == found[1][0] and same_weights(found[0][1], found[1][1])
    assert found[0][0] != found[2][0]


def test_training_learns(tmp_path):
    tree = lm_tree(tmp_path, loop={"steps": 60}, evaluation={"holdout": 0.1, "every": 60})
    summary = train_here(tree)
    first, last = summary["evaluation_first"]["eval/loss"], summary["evaluation_last"]["eval/loss"]
    assert last < 0.7 * first


@pytest.mark.parametrize("packing", [False, True])
def test_epochs_are_counted_as_training_sees_them(tmp_path, packing):
    tree = sft_tree(
        tmp_path,
        objective={"packing": packing, "max_length": 64},
        loop={"steps": None, "epochs": 2, "batch_size": 7},
    )
    summary = train_here(tree)
    rows = 120 if not packing else sum(r["rows"] for r in rows_of(tmp_path / "run"))
    assert summary["steps"] == -(-rows // 7)
    if packing:
        assert rows < 50


def test_a_packed_run_trains_the_same_tokens_to_the_same_loss(tmp_path):
    """All 60 rows in one step: packing must change nothing but the layout."""
    found = {}
    for packing in (False, True):
        tree = sft_tree(
            tmp_path,
            run_dir=str(tmp_path / f"p{packing}"),
            objective={"packing": packing},
            loop={"steps": None, "epochs": 1, "batch_size": 100 if packing else 60},
        )
        if packing:
            from mnemic.models.tiny import byte_tokenizer
            from mnemic.train.data.stream import count_pass
            from mnemic.train.objectives.build import train_stream

            count = count_pass(train_stream(build_recipe(tree), byte_tokenizer()).stream)
            tree["loop"]["batch_size"] = count
        train_here(tree)
        found[packing] = rows_of(tmp_path / f"p{packing}")[0]
    assert found[True]["trained_tokens"] == found[False]["trained_tokens"]
    assert found[True]["rows"] < found[False]["rows"] / 3
    assert found[True]["loss"] == pytest.approx(found[False]["loss"], rel=1e-6)
    assert found[True]["grad_norm"] == pytest.approx(found[False]["grad_norm"], rel=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    for name, on in (("off", False), ("on", True)):
        tree = lm_tree(tmp_path, run_dir=str(tmp_path / name))
        tree["loop"] |= {"steps": 3, "gradient_checkpointing": on}
        train_here(tree)
    assert rows_of(tmp_path / "on") == rows_of(tmp_path / "off")


def test_bf16_precision_stays_near_fp32(tmp_path):
    for precision in ("fp32", "bf16"):
        tree = lm_tree(tmp_path, run_dir=str(tmp_path / precision), loop={"precision": precision})
        train_here(tree)
    exact, rounded = losses(tmp_path / "fp32"), losses(tmp_path / "bf16")
    assert rounded != exact and rounded == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_train_and_leave_the_base_alone(tmp_path, kind):
    tree = lm_tree(tmp_path, adapters={"kind": kind, "r": 4, "dropout": 0.1})
    summary = train_here(tree)
    assert 0 < summary["trained_parameters"] < summary["parameters"] / 2
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "run" / "checkpoints" / "step-00000008" / "model.safetensors")
    assert saved and all("lora_" in name for name in saved)
    assert any(bool(t.any()) for name, t in saved.items() if "lora_B" in name)


def test_a_diverging_run_stops_with_a_sentence_and_keeps_its_checkpoint(tmp_path):
    tree = lm_tree(
        tmp_path,
        optimizer={"kind": "sgd", "lr": 1e30},
        update={"max_grad_norm": None},
        loop={"schedule": "constant", "save_every": 1, "steps": 50},
    )
    with pytest.raises(UserError, match=r"the weights were left as they were; lower optimizer\.lr"):
        train_here(tree)
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_out_of_memory_says_what_to_change(tmp_path, monkeypatch):
    from mnemic.train.objectives import tokens

    def exhausted(model, batch):
        # The real allocator's own error: more bytes than any machine has.
        return torch.empty(1 << 60)

    monkeypatch.setattr(tokens, "token_loss", exhausted)
    with pytest.raises(UserError, match=r"out of memory on cpu with 8 rows.*micro_batch_size=4"):
        train_here(lm_tree(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_the_rest_equals_the_unbroken_run(
    tmp_path, number, monkeypatch
):
    from mnemic.train.callbacks.metrics import MetricsFile

    whole = lm_tree(tmp_path, run_dir=str(tmp_path / "whole"), loop={"save_every": 100})
    train_here(whole)
    broken = lm_tree(tmp_path, run_dir=str(tmp_path / "broken"), loop={"save_every": 100})
    on_row = MetricsFile.on_row

    def interrupt(self, trainer, row):
        on_row(self, trainer, row)
        if row["step"] == 3:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "on_row", interrupt)
        summary = train_here(broken)
    assert summary["steps"] == 4 and "signal" in summary["stopped"]
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    assert train_here(broken)["steps"] == 8
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "whole")
    assert same_weights(
        weights_of(tmp_path / "broken" / "final"), weights_of(tmp_path / "whole" / "final")
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7, 0]),
        ("wsd", [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 1, 0]),
    ],
)
def test_schedules_closed_form(kind, expected):
    found = [lr_factor(step, 10, kind=kind, warmup=2) for step in range(10)]
    assert found == pytest.approx(expected)


def test_cosine_ends_at_the_minimum():
    found = [lr_factor(s, 9, kind="cosine", warmup=0, min_ratio=0.1) for s in range(9)]
    assert found[0] == 1 and found[4] == pytest.approx(0.55) and found[8] == pytest.approx(0.1)
    assert found == sorted(found, reverse=True)
