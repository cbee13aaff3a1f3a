"""The scripts do what their first lines say."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from support import TEXT, lm_tree, rows_of, train_here

from mnemic.train.recipe.load import dump_recipe, load_recipe

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


def load(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_flat_loop_and_the_trainer_have_equal_losses(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 4)
    recipe, _ = load_recipe("pretrain_tiny", [f"data.path={path}", "loop.steps=24"])
    tree = dump_recipe(recipe) | {"run_dir": str(tmp_path / "run")}
    tree["evaluation"] |= {"max_rows": 2, "at_start": False}
    train_here(tree)
    flat = load("loop_minimal").train(str(path), 24, log=lambda line: None)
    assert flat == [row["loss"] for row in rows_of(tmp_path / "run")]


def quick(name, tmp_path):
    """The report of `scripts/NAME.py --quick`."""
    out = tmp_path / "bench.json"
    subprocess.run([sys.executable, SCRIPTS / f"{name}.py", "--quick", "--json", out], check=True)
    return json.loads(out.read_text())


@pytest.mark.slow
def test_bench_loop_writes_its_ratios(tmp_path):
    report = quick("bench_loop", tmp_path)
    assert {"loop_overhead", "help_seconds_over_python"} <= report["ratios"].keys()
    assert [row["name"] for row in report["rows"]] == ["bare PyTorch loop", "mnemic loop"]
    assert all(row["ms_per_step"] > 0 for row in report["rows"])


@pytest.mark.slow
def test_bench_optimizer_writes_its_ratios(tmp_path):
    report = quick("bench_optimizer", tmp_path)
    # Those against apollo-torch only where it is installed.
    assert {
        "mini_vs_fused_bf16", "mini_sr_vs_fused_bf16", "mini_vs_fused_fp32",
        "mini_passes", "apollo_passes", "apollo_sparse_passes",
    } <= report["ratios"].keys()  # fmt: skip
    assert all(value > 0 for value in report["ratios"].values())
    assert {"SGD fused", "AdamW fused", "mnemic Mini"} <= {row["name"] for row in report["rows"]}
    assert {row["dtype"] for row in report["rows"]} == {"fp32", "bf16"}
    assert all(row["min_ms"] > 0 and row["first_ms"] > 0 for row in report["rows"])
    assert report["env"]["threads"] == 1


@pytest.mark.slow
def test_bench_quality_goes_on_and_writes_its_ratios(tmp_path):
    text = tmp_path / "words.txt"
    text.write_text(TEXT * 20)
    command = [
        sys.executable, SCRIPTS / "bench_quality.py", "--quick", "--data", text,
        "--runs", tmp_path / "runs.jsonl", "--json", tmp_path / "bench.json",
    ]  # fmt: skip
    subprocess.run([*command, "--methods", "adamw", "apollo-mini"], check=True)
    first = (tmp_path / "runs.jsonl").read_text().splitlines()
    subprocess.run([*command, "--methods", "adamw", "apollo sparse 1/4", "apollo-mini"], check=True)
    assert (tmp_path / "runs.jsonl").read_text().splitlines()[:2] == first
    report = json.loads((tmp_path / "bench.json").read_text())
    assert 0.5 < report["ratios"]["apollo_vs_adamw_loss"] < 2
    assert 0.5 < report["ratios"]["mini_vs_adamw_loss"] < 2
    sizes = {row["name"]: row["state_bytes"] for row in report["rows"]}
    assert sizes["words: apollo-mini"] < sizes["words: apollo sparse 1/4"] < sizes["words: adamw"]


@pytest.mark.slow
def test_bench_memory_writes_its_ratios(tmp_path):
    report = quick("bench_memory", tmp_path)
    assert [row["name"] for row in report["rows"]] == ["adamw, plain", "apollo-mini, plain"]
    assert all(row["step_peak_over_imports"] > 0 for row in report["rows"])


def test_a_timeline_of_a_streamed_random_model(tmp_path):
    """random_model.py makes a folder, a traced run streams it, plot_timeline.py draws it."""
    folder = tmp_path / "model"
    shape = ["--hidden", "64", "--inner", "96", "--layers", "3", "--heads", "4", "--kv", "2",
             "--vocabulary", "300"]  # fmt: skip
    subprocess.run([sys.executable, SCRIPTS / "random_model.py", folder, *shape], check=True)
    tree = lm_tree(
        tmp_path, update="streamed", offload={"kind": "ssd", "trace": True},
        model={"kind": "pretrained", "path": str(folder)}, loop={"steps": 2},
    )  # fmt: skip
    train_here(tree)
    first = rows_of(tree["run_dir"])[0]["loss"]
    assert abs(first - math.log(300)) < 0.3, "not a random model's loss"
    picture, report = tmp_path / "t.png", tmp_path / "t.json"
    subprocess.run(
        [sys.executable, SCRIPTS / "plot_timeline.py", tmp_path / "run" / "timeline.json", picture,
         "--disk", tmp_path, "--json", report],
        check=True,
    )  # fmt: skip
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(report.read_text())
    assert found["read_bytes"] > 0 and found["written_bytes"] > found["read_bytes"] / 100
    assert 0 <= found["transfers_beside_compute"] <= 1 and found["share_of_disk_speed"] > 0


def test_spans_of_a_timeline():
    """Compute is the time of steps in which nothing was waited for; overlap is what both share."""
    plot = load("plot_timeline")
    rows = [
        {"lane": "step", "name": "1", "start": 0.0, "end": 10.0, "bytes": 0},
        {"lane": "wait", "name": "block/0", "start": 2.0, "end": 4.0, "bytes": 0},
        {"lane": "wait", "name": "commit", "start": 11.0, "end": 12.0, "bytes": 0},
        {"lane": "read", "name": "block/0", "start": 1.0, "end": 4.0, "bytes": 300},
        {"lane": "write", "name": "block/0", "start": 9.0, "end": 12.0, "bytes": 100},
    ]
    rows = [row for row in plot.with_compute(rows) if row["lane"] in plot.LANES]
    spans = [(r["start"], r["end"]) for r in rows if r["lane"] == "compute"]
    assert spans == [(0.0, 2.0), (4.0, 10.0)]
    found = plot.summary(rows, {"read_bytes_per_second": 100, "write_bytes_per_second": 20})
    assert found["seconds"] == 12 and found["bytes_per_second"] == pytest.approx(400 / 12)
    # One second of the read and one of the write lie beside computation, of six of transfers.
    assert found["transfers_beside_compute"] == pytest.approx(2 / 6)
    assert found["share_of_disk_speed"] == pytest.approx((3 + 5) / 12)


@pytest.mark.slow
def test_bench_offload_writes_its_ratios(tmp_path):
    report = quick("bench_offload", tmp_path)
    table = {row["name"]: row for row in report["rows"]}
    ours, ram = table["1M ours_adamw"], table["1M adamw_ram"]
    assert ours["first_loss"] == pytest.approx(ram["first_loss"], abs=1e-2)
    assert ours["last_loss"] == pytest.approx(ram["last_loss"], abs=2e-2)
    assert table["1M ours_mini"]["written_per_step"] < ours["written_per_step"]


def test_the_picture_of_kept_tokens_is_that_of_the_run(tmp_path, monkeypatch, capsys):
    """One strip, its columns those that the layers kept; text escaped; supervised underlined."""
    import re

    from support import write_jsonl

    rows = [{"prompt": f"<b>{TEXT[i : i + 50]}</b>", "completion": "yes"} for i in range(8)]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "name: plot\nmodel: {kind: tiny, layers: 4}\noptimizer: {kind: adamw, lr: 1e-3}\n"
        f"data: {{kind: jsonl, path: {write_jsonl(tmp_path / 'rows.jsonl', rows)}}}\n"
        "objective: {kind: sft}\nloop: {steps: 1, batch_size: 1}\n"
        "tokens: {kind: drop, block: 4}\n"
    )
    out = tmp_path / "tokens.html"
    plot = load("plot_tokens")
    monkeypatch.setattr(sys, "argv", ["plot", str(recipe), "--out", str(out), "tokens.keep=0.6"])
    plot.main()
    page = out.read_text()
    assert "&lt;" in page and "<b>" not in page
    assert "layers 1 to 3" in page and 'class="s"' in page
    bars = [int(width) for width in re.findall(r'<rect x="\d+" width="(\d+)"', page)]
    tokens = page.count("<span")
    assert page.count('title="kept by') == sum(bars) and 0.5 < sum(bars) / tokens < 0.8
    assert f"{tokens} tokens, {sum(bars) / tokens:.0%} kept by 3 layers" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["plot", str(recipe), "--out", str(out), "tokens=protect"])
    plot.main()
    assert "layers 0 to 3" in out.read_text()
    monkeypatch.setattr(sys, "argv", ["plot", str(recipe), "tokens=none"])
    with pytest.raises(SystemExit, match="add tokens=protect"):
        plot.main()


def test_long_rows_hold_the_passage_of_their_question(tmp_path, monkeypatch):
    article = {
        "paragraphs": [
            {"context": f"Passage {i}. " + "word " * 30,
             "qas": [{"question": f"Which is {i}?", "answers": [{"text": f"Passage {i}"}]}]}
            for i in range(5)
        ]
    }  # fmt: skip
    squad, out = tmp_path / "squad.json", tmp_path / "rows.jsonl"
    squad.write_text(json.dumps({"data": [article]}))
    argv = ["long_rows", str(squad), str(out), "--characters", "1000", "--rows", "4"]
    monkeypatch.setattr(sys, "argv", argv)
    load("long_rows").main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 4 and all(len(row["prompt"]) > 1000 for row in rows)
    assert all(row["completion"].strip() in row["prompt"] for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bench_together_writes_its_ratios(tmp_path):
    report = quick("bench_together", tmp_path)
    peaks = {row["name"]: row["peak_over_imports"] for row in report["rows"]}
    assert peaks.keys() == {"AdamW, plain", "all, every token", "all"}
    assert report["ratios"]["all vs AdamW, plain"] == peaks["all"] / peaks["AdamW, plain"]
    losses = {round(row["first_loss"], 3) for row in report["rows"]}
    assert len(losses) == 1, "the forward of every arm is the same"


@pytest.mark.slow
def test_bench_plan_writes_its_ratios(tmp_path):
    report = quick("bench_plan", tmp_path)
    (row,) = report["rows"]
    assert report["ratios"] == {"memory_sft_tiny": row["planned"] / row["measured"]}
    assert sum(row["host"].values()) == row["planned"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bench_tokens_writes_its_ratios(tmp_path):
    report = quick("bench_tokens", tmp_path)
    assert report["ratios"].keys() == {
        "exact_saved_vs_dense", "protect_speed_vs_exact", "lemo_memory_vs_dense",
        "lemo_speed_vs_dense",
    }  # fmt: skip
    assert report["ratios"]["exact_saved_vs_dense"] > 10
    assert all(row["saved_bytes"] > 0 and row["cpu_seconds"] > 0 for row in report["rows"])
    dropped = {row["name"]: row["supervised_dropped"] for row in report["rows"]}
    assert dropped["protect"] == 0 < dropped["lemo, no checkpoint"]
