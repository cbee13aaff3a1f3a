"""Evaluation: numbers equal to a by-hand pass, early stop, the best checkpoint exported."""

import json
import mmap
import re

import pytest
import torch
from support import lm_tree, rows_of, same_weights, sft_tree, train_here, weights_of


def test_held_out_loss_is_the_mean_over_the_held_out_tokens(tmp_path):
    from mnemic.models.tiny import byte_tokenizer
    from mnemic.train.build import build_model
    from mnemic.train.recipe.load import build_recipe

    tree = lm_tree(tmp_path, evaluation={"holdout": 0.25, "every": 100, "batch_size": 3})
    train_here(tree)
    text = (tmp_path / "text.txt").read_bytes()
    cut = text.index(b"\n", int(0.75 * len(text)) - 1) + 1
    tokenizer = byte_tokenizer()
    ids = [*tokenizer(text[cut:].decode()).input_ids, tokenizer.eos_token_id]
    model = build_model(build_recipe(tree), tokenizer).eval()
    loss, count = 0.0, 0
    for i in range(0, len(ids), 32):
        row = torch.tensor([ids[i : i + 32]])
        if row.shape[1] > 1:
            with torch.no_grad():
                loss += model(input_ids=row, labels=row).loss.item() * (row.shape[1] - 1)
            count += row.shape[1] - 1
    assert rows_of(tmp_path / "run")[0]["eval/loss"] == pytest.approx(loss / count, rel=1e-5)


def test_exact_match_counts_equal_texts(tmp_path):
    """A model trained on one answer: every held-out row with that answer matches, no other does."""
    rows = [{"prompt": f"q{i}:", "completion": "yes" if i % 4 else "no"} for i in range(40)]
    path = tmp_path / "yes.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows if r["completion"] == "yes"))
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(r) + "\n" for r in rows))
    tree = sft_tree(
        tmp_path,
        data={"path": str(path)},
        optimizer={"lr": 1e-2},
        loop={"steps": 80},
        evaluation={
            "data": {"kind": "jsonl", "path": str(held)}, "every": 80, "exact_match": True,
            "max_new_tokens": 6,
        },
    )  # fmt: skip
    summary = train_here(tree)
    assert summary["evaluation_first"]["eval/exact_match"] == 0
    assert summary["evaluation_last"]["eval/exact_match"] == 0.75
    samples = [json.loads(s) for s in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {0, 80}
    assert {s["generated"] for s in samples if s["step"] == 80} == {"yes"}
    assert {s["reference"] for s in samples} == {"yes", "no"}


def overfitting(folder, **evaluation):
    """Constant far too high a rate: the held-out loss rises soon."""
    return lm_tree(
        folder,
        optimizer={"lr": 0.3},
        loop={"steps": 40, "save_every": 100, "schedule": "constant", "keep_checkpoints": 1},
        evaluation={"holdout": 0.2, "every": 2, "max_rows": 8, **evaluation},
    )


def test_patience_stops_and_the_best_checkpoint_is_kept_and_exported(tmp_path):
    summary = train_here(overfitting(tmp_path, patience=3, export_best=True))
    assert summary["steps"] < 40 and "did not improve in 3 evaluations" in summary["stopped"]
    losses = {r["step"]: r["eval/loss"] for r in rows_of(tmp_path / "run") if "eval/loss" in r}
    best = min(losses, key=losses.get)
    assert 0 < best == summary["best_step"] == summary["steps"] - 6
    from safetensors.torch import load_file

    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == [f"step-{best:08d}", f"step-{summary['steps']:08d}"]
    best_weights = load_file(tmp_path / "run" / "checkpoints" / kept[0] / "model.safetensors")
    assert same_weights(weights_of(tmp_path / "run" / "final"), best_weights)
    # Starting again does not train on.
    again = train_here(overfitting(tmp_path, patience=3, export_best=True))
    assert (
        again["steps"] == summary["steps"] and len(rows_of(tmp_path / "run")) == again["steps"] + 1
    )


def test_evaluating_does_not_touch_training(tmp_path):
    for name, evaluation in (("often", 1), ("never", 100)):
        tree = lm_tree(
            tmp_path,
            run_dir=str(tmp_path / name),
            adapters={"kind": "lora", "r": 4, "dropout": 0.5},
            evaluation={"holdout": 0.2, "every": evaluation, "max_rows": 4},
        )
        train_here(tree)
    often, never = ([r["loss"] for r in rows_of(tmp_path / n)[1:]] for n in ("often", "never"))
    assert often == never


def test_memory_of_each_step_is_measured(tmp_path):
    train_here(lm_tree(tmp_path))
    rows = rows_of(tmp_path / "run", perf=True)
    peaks = [row["perf/host_peak_bytes"] for row in rows]
    assert all(50 << 20 < peak < 20 << 30 for peak in peaks)


def test_a_steps_memory_is_its_own(tmp_path):
    """A large allocation raises the peak of its step and of no later one."""
    from mnemic.train.callbacks.memory import host_peak_bytes, reset_host_peak

    if not reset_host_peak():
        pytest.skip("this system cannot reset a process's peak")
    before = host_peak_bytes()
    # Pages straight from the system: a tensor might get some this process already holds.
    block = mmap.mmap(-1, 256 << 20)
    for _ in range(256):
        block.write(b"x" * (1 << 20))
    assert host_peak_bytes() >= before + (250 << 20)
    block.close()
    reset_host_peak()
    assert host_peak_bytes() < before + (100 << 20)


@pytest.mark.parametrize(("every", "words"), [(8, ""), (4, r"at step 4 \d\.\d{4}, ")])
def test_the_summary_calls_no_later_evaluation_before(tmp_path, every, words):
    """Without one of the untrained model the first is not `before`, and the only one is `after`."""
    from mnemic.train.recipe.load import build_recipe
    from mnemic.train.summary import lines

    held = {"holdout": 0.25, "at_start": False, "every": every}
    tree = lm_tree(tmp_path, evaluation=held)
    found = lines(train_here(tree), build_recipe(tree))
    line = next(text for text in found if "held-out loss" in text)
    assert re.fullmatch(rf"  held-out loss: {words}after \d\.\d{{4}}", line)
