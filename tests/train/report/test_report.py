"""`mnemic report`: the page holds what the runs hold, is whole, loads nothing, and survives torn
files.
"""

import json
import math
import shutil

import pytest
from page_support import Reader
from support import lm_tree, rows_of, sft_tree, train_here, write_jsonl

from mnemic.train.callbacks.console import size
from mnemic.train.cli import main
from mnemic.train.report.charts import Line, axis, chart, thin
from mnemic.train.report.diff import ABSENT, differing
from mnemic.train.report.page import page
from mnemic.train.report.read import read_run, read_runs

EVIL = "<script>alert(1)</script></pre>"
HELD = {"holdout": 0.2, "every": 4}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs: text with AdamW, and prompts with SGD whose samples are answered."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("lm", "sft"):
        (folder / name).mkdir()
    train_here(lm_tree(folder / "lm", name="first", evaluation=dict(HELD)))
    held = {**HELD, "exact_match": True, "max_new_tokens": 2}
    tree = sft_tree(folder / "sft", name="second", evaluation=held)
    train_here({**tree, "optimizer": {"kind": "sgd", "lr": 0.1}})
    return [folder / "lm" / "run", folder / "sft" / "run"]


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the second one, to be harmed."""
    return shutil.copytree(runs[1], tmp_path / "copy")


def report(capsys, *args):
    status = main(["report", *map(str, args)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_page_of_one_run(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert report(capsys, runs[1], "--out", out)[0] == 0
    text = out.read_text("utf-8")
    assert "http:" not in text and "https:" not in text and "<script" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    shown = Reader(text)
    rows = rows_of(runs[1], perf=True)
    peak = max(row["perf/host_peak_bytes"] for row in rows[1:])
    summary = json.loads((runs[1] / "summary.json").read_text())
    first, last = rows[0]["eval/loss"], rows[-1]["eval/loss"]
    for words in (
        "second", "finished; 8 of 8 steps", f"{first:.4f} \u2192 {last:.4f}", "kind: sgd",
        size(max(peak, summary["host_peak_bytes"])), "Plan against measured", "activations",
    ):  # fmt: skip
        assert words in shown.text, words
    # Every point of a curve this short is there with its value.
    for row in rows[1:]:
        assert f"second: {row['loss']:.6g} at {row['step']}\n" in shown.text
    for title in ("training loss", "held-out loss", "learning rate", "gradient norm",
                  "held-out exact match",
                  # In a process that has grown, as under a whole suite, it is told in GiB.
                  f"host memory, peak of a step, {size(peak)[-3:]}",
                  "tokens a second"):  # fmt: skip
        assert title in shown.figures
    samples = [json.loads(line) for line in (runs[1] / "samples.jsonl").read_text().splitlines()]
    assert all(s["prompt"] in shown.text for s in samples if s["step"] == 8)


def test_several_runs_are_laid_over_each_other(runs, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert report(capsys, *runs, runs[0], "--out", out, "--no-plan")[0] == 0
    shown = Reader(out.read_text("utf-8"))
    assert shown.text.count("recipe.yaml") == 2  # the run that was named twice stands once
    assert shown.figures.count("training loss") == 1
    for name, folder in (("first", runs[0]), ("second", runs[1])):
        assert f"{name}: {rows_of(folder)[-1]['loss']:.6g} at 8" in shown.text
    differences = shown.text[shown.text.index("What differs") : shown.text.index("Loss and held")]
    for words in ("optimizer.kind", "adamw", "sgd", "optimizer.beta1", "data.path"):
        assert words in differences
    assert "loop.steps" not in differences and "run_dir" not in differences
    assert "Plan against" not in shown.text


def test_a_run_that_was_evaluated_once_has_no_before(run, tmp_path, capsys):
    metrics = run / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    early = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows[:-1]]
    write_jsonl(metrics, [*early, rows[-1]])
    out = tmp_path / "page.html"
    assert report(capsys, run, "--out", out, "--no-plan")[0] == 0
    text = Reader(out.read_text("utf-8")).text
    assert f"{rows[-1]['eval/loss']:.4f}" in text and "\u2192" not in text


def test_a_torn_file_costs_its_lines_only(run, tmp_path, capsys, caplog):
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines()
    harmed = [*lines[:3], b'{"step": 3, "lo', *lines[4:6], b"[1]", *lines[7:8], lines[8][:40]]
    metrics.write_bytes(b"\n".join(harmed))
    (run / "summary.json").write_text('{"name": "sec')
    out = tmp_path / "page.html"
    assert report(capsys, run, "--out", out, "--no-plan")[0] == 0
    shown = Reader(out.read_text("utf-8"))
    for words in (
        "metrics.jsonl: lines 4, 7, 9 are torn and left out",
        "metrics.jsonl: rows of 2 steps are missing, the first of 3",
        "summary.json: cannot be read",
    ):
        assert words in shown.text and words in caplog.text, words
    assert "unfinished; 7 of 8 steps" in shown.text
    metrics.unlink()
    assert report(capsys, run, "--out", out, "--no-plan")[0] == 0
    assert "metrics.jsonl: not there" in Reader(out.read_text("utf-8")).text


def test_states(run):
    def state(**changes):
        (run / "summary.json").write_text(json.dumps({**summary, **changes}))
        return read_run(run).state

    summary = json.loads((run / "summary.json").read_text())
    assert state() == "finished"
    assert state(stopped="signal SIGTERM", exported=None) == "stopped: signal SIGTERM"
    assert state(stopped="eval/loss did not improve") == "finished: eval/loss did not improve"
    # A later session's rows are past what the summary tells of.
    assert state(steps=5, stopped="signal SIGTERM", exported=None) == "unfinished"
    (run / "summary.json").unlink()
    assert read_run(run).state == "unfinished"


def test_texts_are_escaped(run):
    rows = [{"step": 8, "prompt": f"\u202e{EVIL}\x1b[31m", "generated": EVIL, "reference": "&amp;"}]
    write_jsonl(run / "samples.jsonl", rows)
    made = read_run(run)
    made.label = EVIL
    made.recipe["name"] = EVIL
    text = page([made, read_run(run)])
    shown = Reader(text)
    assert "<script" not in text and "\u202e" not in text and "\x1b" not in text
    assert f"\\u202e{EVIL}\\x1b[31m" in shown.text and "&amp;amp;" in text


def test_keys_of_memory_and_tokens_have_charts(run, tmp_path):
    rows = [
        {"step": i, "loss": 1.0, "tokens/kept": 0.5, "tokens/kept_layer_1": 0.25 * i,
         "reward/valid": 0.1 * i, "eval/r1": 0.2, "eval/exact_match/mem_update": 0.5,
         "perf/device_peak_bytes": 3 << 30, "policy/ratio": float("nan") if i == 1 else i}
        for i in (1, 2)
    ]  # fmt: skip
    write_jsonl(run / "metrics.jsonl", rows)
    summary = json.loads((run / "summary.json").read_text())
    summary["memory_bytes"] = {"adapters": 5 << 20, "store": 2048}
    (run / "summary.json").write_text(json.dumps(summary))
    shown = Reader(page([read_run(run)]))
    assert {"kept tokens, share", "kept tokens by layer, share, mean of the run", "reward/valid",
            "held-out r1 (questions right from the memory)", "eval/exact_match/mem_update",
            "device memory, peak of a step, GiB", "policy/ratio"} <= set(shown.figures)  # fmt: skip
    assert "5 MiB" in shown.text and "2 KiB" in shown.text and "3.00 GiB" in shown.text
    assert "second: 0.375 at 1" in shown.text  # of 0.25 and 0.5
    assert "second: 2 at 2" in shown.text  # what is no number is left out


def test_png_files(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out, folder = tmp_path / "p.html", tmp_path / "png"
    assert report(capsys, *runs, "--out", out, "--no-plan", "--png", folder)[0] == 0
    drawn = {path.name for path in folder.iterdir()}
    assert {"loss.png", "eval_loss.png", "perf_host_peak_bytes.png"} <= drawn
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in folder.iterdir())


def test_what_is_no_run_is_refused(runs, tmp_path, capsys):
    status, _, errors = report(capsys, tmp_path, "--out", tmp_path / "p.html")
    assert status == 1 and "not a run folder (no recipe.yaml)" in errors
    status, _, errors = report(capsys, runs[0], "--out", tmp_path / "none" / "p.html")
    assert status == 1 and "its folder is not there" in errors


def test_a_model_that_is_not_here_is_not_fetched_to_be_planned(run, tmp_path, capsys):
    recipe = (run / "recipe.yaml").read_text()
    head, _, rest = recipe.partition("model:\n")
    body = rest[rest.index("adapters:") :]
    (run / "recipe.yaml").write_text(f"{head}model: {{kind: pretrained, path: some/name}}\n{body}")
    out = tmp_path / "p.html"
    assert report(capsys, run, "--out", out)[0] == 0
    shown = Reader(out.read_text("utf-8")).text
    assert "not planned: some/name is not a folder of this machine" in shown


def test_runs_of_one_name_are_told_apart(runs, run):
    first, second = read_runs([runs[1], run])
    assert first.label != second.label and str(run) in second.label


def test_axes_and_thinning():
    for values in ([3.0, 3.0], [0.0], [1e-9, 2e-9], [-5, 12345678.0], [0.1, 0.30001]):
        made = axis(values)
        assert made.low <= min(values) and made.high >= max(values)
        assert 2 <= len(made.ticks) <= 9
        assert len({made.text(tick) for tick in made.ticks}) == len(made.ticks)
    points = [(float(i), math.sin(i / 500)) for i in range(10_000)]
    points[4321] = (4321.0, 99.0)
    kept = thin(points)
    assert len(kept) <= 400 and points[4321] in kept
    assert kept[0] == points[0] and kept[-1] == points[-1] and kept == sorted(kept)
    assert chart("nothing", [Line("a", [])]) == ""


def test_differences_of_recipes():
    found = differing([{"name": "a", "x": {"y": 1, "z": 2}}, {"name": "b", "x": {"y": True}}])
    assert found == {"x.y": [1, True], "x.z": [2, ABSENT]}
