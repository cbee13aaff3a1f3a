"""Offline wandb runs, decoded: the rows of metrics.jsonl, one id for life, no step twice."""

import json
import signal
import sys

import pytest
import yaml
from support import lm_tree, rows_of, train_here, write_recipe

wandb = pytest.importorskip("wandb")

from mnemic.train.callbacks.wandb import offline_records, resolve_mode  # noqa: E402


def tree(folder, **changes):
    base = lm_tree(
        folder,
        track={"kind": "wandb", "mode": "offline", "plan": False},
        evaluation={"holdout": 0.2, "every": 4, "max_rows": 8},
        loop={"steps": 20, "save_every": 5},
    )
    base.update(changes)
    return base


def decode(run_dir):
    """(run ids, history rows in order, config) of all offline folders of a run."""
    ids, rows, config = [], [], {}
    for path in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        ids.append(path.stem.removeprefix("run-"))
        for record in offline_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = {
                    (i.key or "/".join(i.nested_key)): json.loads(i.value_json)
                    for i in record.history.item
                }
                # `report/`: tables and the page, in the last row beside its metrics.
                hidden = ("_", "report/")
                rows.append({k: v for k, v in items.items() if not k.startswith(hidden)})
            updates = []
            if kind == "run":
                updates = record.run.config.update
            elif kind == "config":
                updates = record.config.update
            for item in updates:
                key = item.key or "/".join(item.nested_key)
                config[key] = json.loads(item.value_json)
    return ids, rows, config


def test_every_row_and_the_recipe_are_in_the_offline_run(tmp_path, fork_server):
    path = write_recipe(tmp_path / "r.yaml", tree(tmp_path))
    status, output = fork_server.run("train", path, cwd=tmp_path)
    assert status == 0, output
    ids, rows, config = decode(tmp_path / "run")
    assert len(ids) == 1
    assert rows == rows_of(tmp_path / "run", perf=True) and len(rows) == 21
    config.pop("_wandb", None)
    assert config == yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_resumed_run_keeps_its_id_and_repeats_no_step(tmp_path, fork_server, number):
    path = write_recipe(tmp_path / "r.yaml", tree(tmp_path, loop={
        "steps": 2000, "batch_size": 8, "save_every": 5}))  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    for lines in (33, 77):
        status, output = fork_server.run(
            "train",
            path,
            cwd=tmp_path,
            kill_when=lambda lines=lines: (
                metrics.exists() and metrics.read_bytes().count(b"\n") > lines
            ),
            kill_signal=number,
        )
        assert status == (0 if number == signal.SIGTERM else -signal.SIGKILL), output
    step = rows_of(tmp_path / "run")[-1]["step"]
    status, output = fork_server.run("train", path, f"loop.steps={step + 7}", cwd=tmp_path)
    assert status == 0, output
    ids, rows, _ = decode(tmp_path / "run")
    assert len(ids) == 3 and len(set(ids)) == 1
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps))
    in_file = rows_of(tmp_path / "run", perf=True)
    assert rows == in_file and in_file[-1]["step"] == step + 7


def test_a_tracker_that_fails_does_not_stop_training(tmp_path, monkeypatch, caplog):
    def broken(**kwargs):
        raise OSError("read-only file system")

    monkeypatch.setattr(wandb, "init", broken)
    assert train_here(tree(tmp_path))["steps"] == 20
    assert len(rows_of(tmp_path / "run")) == 21
    warnings = [r for r in caplog.records if "wandb failed" in r.getMessage()]
    assert len(warnings) == 1 and "read-only" in warnings[0].getMessage()


def test_a_log_that_fails_midway_does_not_stop_training(tmp_path, monkeypatch, caplog):
    real = wandb.sdk.wandb_run.Run.log
    calls = []

    def fails_later(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("gone")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", fails_later)
    assert train_here(tree(tmp_path))["steps"] == 20
    assert len([r for r in caplog.records if "wandb failed" in r.getMessage()]) == 1


def test_disabled_leaves_no_trace(tmp_path, fork_server):
    config = tree(tmp_path, track={"kind": "wandb", "mode": "disabled"})
    path = write_recipe(tmp_path / "r.yaml", config)
    status, output = fork_server.run("train", path, cwd=tmp_path)
    assert status == 0, output
    assert not (tmp_path / "run" / "wandb").exists() and not (tmp_path / "wandb").exists()


def test_core_never_imports_wandb(tmp_path):
    from support import mnemic

    code = "import sys; sys.modules['wandb'] = None; from mnemic.train.cli import main; main()"
    import subprocess

    path = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code, "train", path], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert mnemic("validate", path, "track=wandb", cwd=tmp_path).returncode == 0


def test_auto_is_offline_without_a_key(monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert resolve_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert resolve_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_mode("auto") == "disabled" and resolve_mode("offline") == "offline"
