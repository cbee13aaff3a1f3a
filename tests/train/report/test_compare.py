"""`mnemic compare`: a grid trains whole whatever kills it, no cell twice; what cannot run is
said and stops nothing else.
"""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from page_support import Reader
from support import ForkServer, lm_tree, rows_of, sft_tree, write_recipe

from mnemic.train.cli import main
from mnemic.train.errors import RecipeError
from mnemic.train.report.grid import make_cells, parse_grid, parse_vary
from mnemic.train.report.results import Result, cells_of


class Server(ForkServer):
    """Its `mnemic compare` forks the processes of its cells, where a user's starts Python anew:
    only the seconds of import are saved.
    """

    CODE = ForkServer.CODE.replace(
        'print("ready"',
        """
from mnemic.train.report import compare

class Forked:
    def __init__(self, args, output):
        self.pid = os.fork()
        if self.pid == 0:
            compare.die_with_parent()
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1); os.dup2(file, 2)
            code = 70
            try:
                code = main(args)
            finally:
                sys.stdout.flush(); sys.stderr.flush(); os._exit(code)

    def wait(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

compare.start_cell = Forked
print("ready\"""",
    )


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    made.close()


def grid(server, folder, *args, **how):
    return server.run("compare", *args, "--no-plan", cwd=folder, **how)


def test_a_killed_grid_goes_on_and_no_cell_runs_twice(server, tmp_path):
    held = {"holdout": 0.2, "every": 20}
    tree = lm_tree(tmp_path, evaluation=held, loop={"steps": 40, "save_every": 4})
    recipe = write_recipe(tmp_path / "r.yaml", tree)
    args = (recipe, "--vary", "optimizer=adamw,sgd", "--vary", "objective.seq_len=16,32", "--out",
            "grid", "track=none")  # fmt: skip
    out = tmp_path / "grid"
    names = [f"optimizer-{o}_seq_len-{n}" for o in ("adamw", "sgd") for n in (16, 32)]
    second = out / names[1]

    def midway():
        return any((second / "checkpoints").glob("step-0*"))

    status, text = grid(server, tmp_path, *args, kill_when=midway)
    assert status == -9 and not (second / "summary.json").exists()
    assert f"[1/4] {names[0]}: finished" in text
    first = (out / names[0] / "summary.json").stat().st_mtime_ns
    status, text = grid(server, tmp_path, *args)
    assert status == 0, text
    assert f"[1/4] {names[0]}: finished before" in text and f"[2/4] {names[1]}: goes on" in text
    assert (out / names[0] / "summary.json").stat().st_mtime_ns == first
    assert (out / f"{names[0]}.log").read_text().count("training ") == 1
    assert (out / f"{names[1]}.log").read_text().count("resuming from") == 1
    cells = json.loads((out / "compare.json").read_text())["cells"]
    assert [c["cell"] for c in cells] == names
    assert {c["state"] for c in cells} == {"finished"} and {c["steps"] for c in cells} == {40}
    for cell in cells:
        rows = rows_of(out / cell["cell"])
        assert [row["step"] for row in rows] == list(range(41))
        assert cell["eval_loss_first"] == rows[0]["eval/loss"]
        assert cell["eval_loss_last"] == rows[-1]["eval/loss"]
        assert f"{cell['eval_loss_last']:.4f}" in text
    assert cells[0]["eval_loss_last"] != cells[2]["eval_loss_last"]
    shown = Reader((out / "report.html").read_text("utf-8"))
    assert all(shown.text.count(name) > 3 for name in names)
    assert "Cells of the grid" in shown.text and "objective.seq_len" in shown.text
    # The same folder takes no other grid.
    status, text = grid(server, tmp_path, *args, "loop.batch_size=4")
    assert status == 1 and "--out grid: holds another grid (other overrides)" in text


def test_refused_and_failing_cells_are_told_and_the_rest_runs(server, tmp_path):
    held = {"holdout": 0.2, "every": 5, "exact_match": True, "max_new_tokens": 2}
    recipe = write_recipe(tmp_path / "r.yaml", sft_tree(tmp_path, evaluation=held))
    args = (recipe, "--vary", "optimizer.lr=1e38,-1,0.003", "--seeds", 2, "--out", "grid")
    status, text = grid(server, tmp_path, *args)
    assert status == 1
    before = text[: text.index("[1/4]")]
    for seed in (0, 1):
        assert f"lr--1_s{seed}: refused: r.yaml: optimizer.lr: -1 " in before
        assert re.search(rf"lr-1e38_s{seed}: failed after .*step \d: the loss is", text)
    cells = json.loads((tmp_path / "grid" / "compare.json").read_text())["cells"]
    states = ["failed"] * 2 + ["refused"] * 2 + ["finished"] * 2
    assert [c["state"] for c in cells] == states
    assert cells[4]["exact_match"] is not None and cells[4]["peak_bytes"] > 1 << 20
    assert cells[4]["eval_loss_last"] != cells[5]["eval_loss_last"]
    assert [c["seed"] for c in cells] == [0, 1, None, None, 0, 1]
    assert re.search(r"mean of optimizer.lr=0.003 +2 seeds .*\d \u00b1 0\.\d", text)
    assert not re.search("mean of optimizer.lr=(-1|1e38)", text)
    shown = Reader((tmp_path / "grid" / "report.html").read_text("utf-8"))
    assert "lr--1_s0: refused: r.yaml: optimizer.lr: -1" in shown.text
    status, text = grid(server, tmp_path, recipe, "--vary", "optimizer.lr=-1", "--out", "none")
    assert status == 2 and "no cell of the grid can run" in text
    assert not (tmp_path / "none" / "compare.json").exists()


def test_a_cell_runs_in_a_python_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path, loop={"steps": 2}))
    status = main(["compare", str(recipe), "--vary", "optimizer=sgd", "--no-plan"])
    text = capsys.readouterr().out
    assert status == 0 and "[1/1] optimizer-sgd: finished after" in text
    assert rows_of("runs/compare-tiny/optimizer-sgd")[-1]["step"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_cell_dies_with_its_parent(tmp_path):
    sleeper = tmp_path / "sleeper"
    sleeper.write_text("#!/bin/sh\nexec sleep 60\n")
    sleeper.chmod(0o755)
    code = (
        "import pathlib, sys, time\n"
        "from mnemic.train.report.compare import start_cell\n"
        "sys.executable = './sleeper'\n"
        "print(start_cell([], pathlib.Path('out.log')).pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE)
    assert parent.stdout
    cell = Path("/proc") / parent.stdout.readline().decode().strip()
    assert cell.name and cell.exists()
    parent.kill()
    parent.wait()
    for _ in range(200):
        # Gone, or dead and not yet buried.
        if not cell.exists() or "\nState:\tZ" in (cell / "status").read_text():
            return
        time.sleep(0.02)
    raise AssertionError("it lives on")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a=1", ["1"]),
        ("optimizer=adamw, apollo", ["adamw", "apollo"]),
        ("tokens=none,{kind: protect, keep: 0.5},[1, [2,3]]",
         ["none", "{kind: protect, keep: 0.5}", "[1, [2,3]]"]),
        ("""a='x,y',"[",it's,{b: ',}'}""", ["'x,y'", '"["', "it's", "{b: ',}'}"]),
        ("a.b=x=y,null", ["x=y", "null"]),
    ],
)  # fmt: skip
def test_values_of_a_vary(text, values):
    assert parse_vary(text).values == tuple(values)


@pytest.mark.parametrize(
    ("varied", "overrides", "seeds", "words"),
    [
        (["a"], [], 1, "is written KEY=A,B,C"),
        (["a=1,,2"], [], 1, "is written KEY=A,B,C"),
        (["a=[1,2"], [], 1, "is not closed"),
        (["a=1]"], [], 1, "is not closed, or not opened"),
        (["a=1,1"], [], 1, "stands twice"),
        (["a=1", "a=2"], [], 1, "stands twice"),
        (["a=1"], ["a=2"], 1, "is varied and overridden"),
        (["loop.seed=1,2"], [], 2, "loop.seed is varied already"),
        (["name=x"], [], 1, "each cell has its own"),
        (["a=1"], [], 0, "--seeds: must be 1 or more"),
    ],
)
def test_grids_that_make_no_sense(varied, overrides, seeds, words):
    with pytest.raises(RecipeError, match=re.escape(words)):
        parse_grid(varied, overrides, seeds)


def test_overrides_may_stand_behind_options(capsys):
    """argparse alone would refuse them; what is no override still is."""
    for words in (["--bogus"], ["word"], ["--bogus", "a=1"]):
        with pytest.raises(SystemExit):
            main(["compare", "r.yaml", "--vary", "a=1", *words])
        assert f"unrecognized arguments: {words[0]}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["memory", "show", "run", "a=1"])


def test_a_kind_takes_the_keys_that_it_has(tmp_path):
    """As on the command line: what the other kind lacks is dropped with a note, and an override of
    such a key refuses that cell alone.
    """
    recipe = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path, optimizer={"beta2": 0.9}))

    def cells(overrides, *varied):
        return make_cells(str(recipe), parse_grid(varied, overrides, 1), overrides, 1, tmp_path)

    adamw, sgd, own = cells([], "optimizer=adamw,sgd,{kind: apollo, rank: 4}")
    assert adamw.recipe.optimizer.beta2 == 0.9 and adamw.recipe.optimizer.lr == 3e-3
    assert sgd.recipe.optimizer.lr == 3e-3 and "optimizer.beta2" in sgd.notes[0]
    assert own.recipe.optimizer.kind == "apollo" and own.recipe.optimizer.rank == 4
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", own.name)
    adamw, sgd = cells(["optimizer.momentum=0.9"], "optimizer=adamw,sgd")
    assert "optimizer.momentum: unknown key" in adamw.refused
    assert not sgd.refused and sgd.recipe.optimizer.momentum == 0.9
    long = "x" * 60
    a, b = cells([], f"data.path={long}1,{long}2", "objective.seq_len=16", "loop.batch_size=2")
    assert len(a.name) <= 80 and a.name != b.name and "1 not found" in a.refused


def test_means_are_of_finished_seeds_only():
    def one(seed, state, loss):
        return Result(f"c_s{seed}", ["a=1"], seed, state, eval_loss_last=loss)

    *_, mean = cells_of([one(0, "finished", 1.0), one(1, "finished", 2.0), one(2, "failed", 9.0)])
    assert mean[:2] == ["  mean of a=1", "2 seeds"] and mean[4] == "1.5000 \u00b1 0.7071"
