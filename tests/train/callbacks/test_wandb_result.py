"""What an offline wandb run holds besides its rows, decoded: plan, page, tables, artifact."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from support import lm_tree, rows_of, sft_tree, train_here, write_recipe

pytest.importorskip("wandb")

from mnemic.train.callbacks.wandb import offline_records


def tree(folder, **track):
    return sft_tree(
        folder,
        adapters={"kind": "lora", "r": 4},
        evaluation={"holdout": 0.2, "every": 4, "exact_match": True, "max_new_tokens": 2},
        track={"kind": "wandb", "mode": "offline", "plan": False, **track},
    )


def train(recipe):
    """A session in this process. wandb names its folder by the second: two within one would share
    it, as those of real processes, which import for seconds, cannot.
    """
    time.sleep(1.1)
    return train_here(recipe)


def sessions(run_dir):
    """Of each offline session: (summary, steps whose row has report/ keys, artifacts)."""
    found = []
    for path in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        summary, reported, artifacts = {}, {}, []
        for record in offline_records(path):
            kind = record.WhichOneof("record_type")
            if kind == "summary":
                for item in record.summary.update:
                    key = item.key or "/".join(item.nested_key)
                    summary[key] = json.loads(item.value_json)
            elif kind == "history":
                items = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
                if keys := {k for k in items if k.startswith("report/")}:
                    # report/page/path is the field of a medium: its name is report/page.
                    names = {"/".join(key.split("/")[:2]) for key in keys}
                    reported[json.loads(items["step"])] = (names, items)
            elif kind == "artifact":
                artifacts.append(record.artifact)
        found.append((summary, reported, artifacts))
    return found


def of_type(artifacts, kind):
    return [a for a in artifacts if a.type == kind]


def test_the_adapter_is_an_artifact_once_and_again_when_it_changed(tmp_path, fork_server):
    path = write_recipe(tmp_path / "r.yaml", tree(tmp_path))
    run = tmp_path / "run"
    for overrides in ([], [], ["loop.steps=10"]):
        status, output = fork_server.run("train", path, *overrides, cwd=tmp_path)
        assert status == 0, output
    first, again, longer = (of_type(a, "adapter") for _, _, a in sessions(run))
    assert len(first) == 1 and not again and len(longer) == 1
    assert first[0].name == longer[0].name == f"tiny-{(run / '.wandb_id').read_text()}"
    assert first[0].digest != longer[0].digest
    assert "step-8" in first[0].aliases and "step-10" in longer[0].aliases
    staged = {c.path: Path(c.local_path) for c in longer[0].manifest.contents}
    assert staged.keys() == {p.name for p in (run / "final").iterdir()}
    for name, copy in staged.items():
        # The copies go with the run folder, and are what was trained.
        assert copy.is_relative_to(run / "wandb") and "WANDB_DATA_DIR" not in os.environ
        assert copy.read_bytes() == (run / "final" / name).read_bytes()


def test_the_page_and_the_samples_stand_in_the_last_row_alone(tmp_path, fork_server):
    path = write_recipe(tmp_path / "r.yaml", tree(tmp_path))
    status, output = fork_server.run("train", path, cwd=tmp_path)
    assert status == 0, output
    run = tmp_path / "run"
    ((summary, reported, artifacts),) = sessions(run)
    assert reported.keys() == {8}
    names, items = reported[8]
    assert names == {"report/page", "report/samples"}
    folder = next((run / "wandb").glob("offline-run-*"))
    page = (folder / "files" / json.loads(items["report/page/path"])).read_text()
    assert "held-out loss" in page and "<script" not in page
    table = json.loads((folder / "files" / json.loads(items["report/samples/path"])).read_text())
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    last = [s for s in samples if s["step"] == 8]
    assert table["data"] == [[8, s["prompt"], s["generated"], s["reference"]] for s in last]
    home = Path("~/.local/share/wandb").expanduser()
    for artifact in artifacts:
        assert all(not c.local_path.startswith(str(home)) for c in artifact.manifest.contents)
    rows = rows_of(run, perf=True)
    peak = max(row.get("perf/host_peak_bytes", 0) for row in rows)
    assert summary["measured/host_peak_bytes"] >= peak > 0
    assert summary["first/eval/loss"] == rows[0]["eval/loss"]
    assert not any(key.startswith("plan/") for key in summary) and not (run / "plan.json").exists()


def test_the_plan_is_in_the_summary_before_training_and_made_once(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "mnemic")
    base = tree(tmp_path, plan=True)
    train(base)
    run = tmp_path / "run"
    ((summary, reported, _),) = sessions(run)
    planned = json.loads((run / "plan.json").read_text())
    assert summary["plan/host_bytes"] == sum(planned["host"].values()) > 100 << 20
    assert summary["plan/host/optimizer_state"] == planned["host"]["optimizer state"] > 0
    over = summary["plan/host_bytes"] / summary["measured/host_peak_bytes"]
    assert summary["plan/host_over_measured"] == pytest.approx(over)
    assert "report/plan" in reported[8][0]
    assert sum("planning the run" in r.getMessage() for r in caplog.records) == 1
    # Longer is the same plan; twice the rows at once is another.
    train({**base, "loop": {**base["loop"], "steps": 9}})
    assert sum("planning the run" in r.getMessage() for r in caplog.records) == 1
    assert sessions(run)[1][0]["plan/host_bytes"] == summary["plan/host_bytes"]
    train({**base, "loop": {**base["loop"], "steps": 10, "micro_batch_size": 4}})
    assert sum("planning the run" in r.getMessage() for r in caplog.records) == 2


@pytest.mark.parametrize(
    ("artifacts", "adapters", "expected"),
    [("adapters", "none", {}), ("all", "none", {"model": 1}), ("all", "lora", {"adapter": 1}),
     ("none", "lora", {})],
)  # fmt: skip
def test_which_results_become_artifacts(tmp_path, artifacts, adapters, expected):
    recipe = tree(tmp_path, artifacts=artifacts)
    recipe["adapters"] = {"kind": adapters}
    train(recipe)
    ((_, _, logged),) = sessions(tmp_path / "run")
    kinds = [a.type for a in logged if a.type != "run_table"]
    assert {kind: kinds.count(kind) for kind in kinds} == expected


def test_a_result_above_the_limit_is_not_copied_and_is_logged_when_the_limit_is_raised(
    tmp_path, caplog
):
    small = tree(tmp_path, artifact_limit="1KiB")
    train(small)
    assert [r for r in caplog.records if "track.artifact_limit" in r.getMessage()]
    train(tree(tmp_path))
    before, after = (of_type(a, "adapter") for _, _, a in sessions(tmp_path / "run"))
    assert not before and len(after) == 1


def test_a_failed_export_leaves_the_last_row_to_the_run_that_goes_on(tmp_path, monkeypatch):
    """Killed between the last checkpoint and the export, the page must still come, and once."""
    from mnemic.train import export

    def broken(*args, **kwargs):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(export, "export_model", broken)
        with pytest.raises(OSError, match="no space"):
            train(tree(tmp_path))
    train(tree(tmp_path))
    run = tmp_path / "run"
    (_, first, _), (_, second, logged) = sessions(run)
    assert not first and second.keys() == {8} and len(of_type(logged, "adapter")) == 1


def test_a_trial_of_a_sweep_is_the_agents_run(tmp_path, fork_server):
    """Command and environment as `wandb agent` makes them; the agent itself needs a server."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    path = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path))
    command = ["train", str(path), "track={kind: wandb, mode: offline, plan: false}"]
    command = create_sweep_command([*command, "${args_no_hyphens}"])
    for run_id, lr in (("aaaa1111", 0.001), ("bbbb2222", 1e-05)):
        args = create_sweep_command_args({"args": {"optimizer.lr": {"value": lr}}})
        given = [*command[:-1], *args["args_no_hyphens"]]
        env = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": run_id}
        status, output = fork_server.run(*given, cwd=tmp_path, env=env)
        assert status == 0, output
        folder = tmp_path / f"run-{run_id}"
        assert rows_of(folder)[1]["lr"] == pytest.approx(lr, rel=0.1)
        assert list((folder / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    shutil.rmtree(tmp_path / "run-aaaa1111")
    env = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "aaaa1111"}
    status, output = fork_server.run("train", path, "loop.steps=1", cwd=tmp_path, env=env)
    assert status == 0 and "set track=wandb" in output
