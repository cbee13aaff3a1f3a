"""Every command as a user types it."""

import json

import yaml
from support import lm_tree, mnemic, sft_tree, train_here, weights_of, write_recipe


def test_help_names_every_command(tmp_path):
    done = mnemic("--help", cwd=tmp_path)
    assert done.returncode == 0
    commands = (
        "train", "validate", "recipes", "schema", "export", "generate", "report", "compare",
        "doctor",
    )  # fmt: skip
    assert all(f"    {name}" in done.stdout for name in commands)
    assert mnemic(cwd=tmp_path).returncode == 2


def test_recipes_ls_and_cp(tmp_path):
    done = mnemic("recipes", "ls", cwd=tmp_path)
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert {"quickstart", "pretrain_tiny"} <= {name.strip() for name in lines}
    assert all(len(text.strip()) > 20 for text in lines.values())
    assert mnemic("recipes", "cp", "pretrain_tiny", "mine.yaml", cwd=tmp_path).returncode == 0
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["name"] == "pretrain_tiny"
    again = mnemic("recipes", "cp", "pretrain_tiny", "mine.yaml", cwd=tmp_path)
    assert again.returncode == 1 and "exists already" in again.stderr


def test_validate_shows_the_resolved_recipe_and_says_what_a_switch_drops(tmp_path):
    path = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path, optimizer={"beta2": 0.9}))
    done = mnemic("validate", path, "optimizer.kind=sgd", "--show", cwd=tmp_path)
    assert done.returncode == 0
    assert "optimizer.beta2 of the recipe no longer applies" in done.stderr
    shown = yaml.safe_load(done.stdout.rsplit("\n", 2)[0])
    assert shown["optimizer"] == {"kind": "sgd", "lr": 3e-3, "momentum": 0.0, "weight_decay": 0.0}


def test_schema_validates_the_shipped_recipes(tmp_path):
    import jsonschema

    from mnemic.train.recipe.load import dump_recipe, load_recipe, shipped_recipes

    done = mnemic("schema", "--out", "schema.json", cwd=tmp_path)
    assert done.returncode == 0 and "yaml-language-server" in done.stdout
    schema = json.loads((tmp_path / "schema.json").read_text())
    for name in shipped_recipes():
        jsonschema.validate(dump_recipe(load_recipe(name, [])[0]), schema)


def test_export_and_generate(tmp_path, fork_server):
    """A LoRA run: the adapter loads in peft, the merged model in transformers, same logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mnemic.models.tiny import byte_tokenizer
    from mnemic.train.build import build_model
    from mnemic.train.recipe.load import build_recipe

    tree = sft_tree(tmp_path, adapters={"kind": "lora", "r": 4}, loop={"steps": 60})
    tree["optimizer"]["lr"] = 3e-2
    train_here(tree)
    status, output = fork_server.run("export", "run", "merged", "--merge", cwd=tmp_path)
    assert status == 0, output
    base = build_model(build_recipe(tree | {"adapters": "none"}), byte_tokenizer())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        untrained = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "run" / "final"))(
            input_ids=ids
        ).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - untrained).abs().max() > 0.05
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.decode(tokenizer("häll😀o\n").input_ids) == "häll😀o\n"

    status, output = fork_server.run("export", "run", "adapter", cwd=tmp_path)
    assert status == 0, output
    assert weights_of(tmp_path / "adapter").keys() == weights_of(tmp_path / "run" / "final").keys()
    status, output = fork_server.run("export", "run", "adapter", cwd=tmp_path)
    assert status == 1 and "exists already" in output

    # The command answers as the models do here, rows of this run being plain text.
    from mnemic.train.export import load_run
    from mnemic.train.generate import generate_greedy

    prompts = ["abc", "3 plus 4 is"]
    ids = [byte_tokenizer()(prompt).input_ids for prompt in prompts]
    model, tokenizer, _ = load_run(str(tmp_path / "run"))
    trained = generate_greedy(model, tokenizer, ids, max_new_tokens=8)
    with model.disable_adapter():
        plain = generate_greedy(model, tokenizer, ids, max_new_tokens=8)
    assert trained != plain
    limit = ["--max-new-tokens", 8]
    for expected, flags in ((trained, []), (plain, ["--base"])):
        done = mnemic("generate", "run", *prompts, *limit, *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "".join(text.strip() + "\n" for text in expected)


def test_a_finished_run_has_nothing_left_to_do_and_says_what_it_reached(tmp_path, fork_server):
    path = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path, evaluation={"holdout": 0.2}))
    status, first = fork_server.run("train", path, cwd=tmp_path)
    assert status == 0 and "held-out loss: before" in first
    files = {p: p.read_bytes() for p in (tmp_path / "run" / "final").iterdir()}
    status, second = fork_server.run("train", path, cwd=tmp_path)
    assert status == 0
    reached = [
        line for line in first.splitlines() if "held-out loss" in line or "of 8 steps" in line
    ]
    assert len(reached) == 2 and all(line in second for line in reached)
    assert {p: p.read_bytes() for p in (tmp_path / "run" / "final").iterdir()} == files


def test_progress_is_plain_lines_off_a_terminal(tmp_path, fork_server):
    path = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path))
    _, output = fork_server.run("train", path, cwd=tmp_path)
    assert "\x1b" not in output and "\r" not in output
    assert "step 1/8  loss " in output and "step 8/8  loss " in output
    assert "tok/s  peak " in output and " left" in output


def test_progress_is_a_bar_on_a_terminal(tmp_path):
    """Under a real pseudo-terminal."""
    import os
    import pty
    import subprocess
    import sys

    path = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path, loop={"steps": 60}))
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "mnemic.train.cli", "train", path],
        stdout=slave, stderr=slave, cwd=tmp_path, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    seen = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    assert process.wait() == 0
    assert b"\x1b[" in seen and "━".encode() in seen and b"/60" in seen


def test_doctor_reports_versions_disk_and_remarks(tmp_path):
    done = mnemic("doctor", ".", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    import torch

    assert report["packages"]["torch"] == torch.__version__
    assert report["disk"]["write_bytes_per_second"] > 0 < report["disk"]["read_bytes_per_second"]
    assert isinstance(report["disk"]["o_direct"], bool)
    assert any("works: training" in remark for remark in report["remarks"])
    assert list(tmp_path.iterdir()) == []
    text = mnemic("doctor", cwd=tmp_path)
    assert text.returncode == 0 and "sequential read" in text.stdout
