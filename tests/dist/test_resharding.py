"""A run goes on with another number of ranks than it was stopped on: DDP and FSDP2, whole runs.

Every case is held to the same run of one process that nobody stopped.
"""

import json
import shutil
import subprocess
import time

import pytest
from ranks import close, command, environment, train
from support import lm_tree, rows_of, sft_tree, train_here, write_recipe

pytestmark = pytest.mark.dist

OPTIMIZERS = ("adamw", "sgd", "apollo", "apollo_mini")


def tree_of(folder, kind, **loop):
    """Vocabulary and matrices of sizes that four ranks do not share evenly, and more held-out
    batches on some ranks than on others.
    """
    return lm_tree(
        folder, model={"kind": "tiny", "hidden_size": 36, "layers": 2, "heads": 2},
        optimizer={"kind": kind, "lr": 3e-3}, update={"kind": "plain", "max_grad_norm": 1.0},
        loop={"schedule": "constant", **loop},
        evaluation={"every": 5, "holdout": 0.4, "batch_size": 1, "max_rows": 7},
    )  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of the run of one process that was not stopped, by optimizer."""
    made = {}

    def run(kind, **loop):
        key = (kind, *loop.items())
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind)
            train_here(tree_of(made[key], kind, **loop))
        return made[key]

    return run


def continued(first, target, kind, ranks, engine, **loop) -> None:
    """A copy of the stopped run in `first`, gone on with in `target`."""
    shutil.copytree(first / "run", target / "run")
    tree = tree_of(target, kind, **loop)
    # The copy lies elsewhere, and its data with it: the run is the same.
    tree["data"]["path"] = str(first / "text.txt")
    write_recipe(target / "recipe.yaml", tree)
    if ranks == 1:
        train_here(tree)
    else:
        train(target, ranks, engine=engine)


def stopped(folder, kind, ranks, engine) -> None:
    if ranks == 1:
        train_here(tree_of(folder, kind, steps=5))
        return
    write_recipe(folder / "recipe.yaml", tree_of(folder, kind))
    train(folder, ranks, "loop.steps=5", engine=engine)


def manifest_of(folder, step):
    path = folder / "run" / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    return json.loads(path.read_text())


def there_and_on(tmp_path, unbroken, kind, engine, begun, then) -> None:
    first = tmp_path / "first"
    first.mkdir()
    stopped(first, kind, begun, engine)
    written = manifest_of(first, 5)
    sharded = engine == "fsdp2" and begun > 1
    assert (written["engine"], written["ranks"]) == ("fsdp2" if sharded else None, begun)
    parts = [name for name in written["files"] if name.endswith(".distcp")]
    assert len(parts) == (begun if sharded else 0), "each rank writes its own rows"
    for ranks in then:
        target = tmp_path / str(ranks)
        target.mkdir()
        continued(first, target, kind, ranks, engine)
        close(target, unbroken(kind))


@pytest.mark.parametrize(("begun", "then"), [(2, (1,)), (1, (2,))])
def test_apollo_in_shards_goes_on_with_another_number_of_ranks(tmp_path, unbroken, begun, then):
    there_and_on(tmp_path, unbroken, "apollo", "fsdp2", begun, then)


@pytest.mark.slow
@pytest.mark.parametrize(("begun", "then"), [(2, (1, 4)), (4, (2,)), (1, (2,))])
@pytest.mark.parametrize(
    ("engine", "kind"), [("ddp", "apollo"), *(("fsdp2", kind) for kind in OPTIMIZERS)]
)
def test_ranks_may_change(tmp_path, unbroken, kind, engine, begun, then):
    there_and_on(tmp_path, unbroken, kind, engine, begun, then)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_killed_run_goes_on_with_one_rank_and_with_four(tmp_path, unbroken, engine):
    import psutil

    first = tmp_path / "first"
    first.mkdir()
    loop = {"steps": 40}
    write_recipe(first / "recipe.yaml", tree_of(first, "apollo", **loop))
    process = subprocess.Popen(
        command(2), cwd=first, env=environment(engine),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    tenth = first / "run" / "checkpoints" / "step-00000012"
    while not tenth.exists():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.kill()
    process.wait()
    assert not (first / "run" / "final").exists()
    for ranks in (1, 4):
        target = tmp_path / str(ranks)
        target.mkdir()
        continued(first, target, "apollo", ranks, engine, **loop)
        close(target, unbroken("apollo", **loop))


@pytest.mark.slow
def test_adapters_in_shards_answer_and_are_read_by_one_process(tmp_path):
    """LoRA under FSDP2: only its weights are saved; exact match, export and generation."""
    from mnemic.train.export import load_run

    folders = {}
    for name in ("one", "two"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        tree = sft_tree(
            folders[name], adapters={"kind": "lora", "r": 4, "dropout": 0.0},
            loop={"schedule": "constant"},
            evaluation={"every": 5, "holdout": 0.3, "batch_size": 4, "exact_match": True,
                        "max_new_tokens": 4},
        )  # fmt: skip
        write_recipe(folders[name] / "recipe.yaml", tree)
    train(folders["one"], 1)
    train(folders["two"], 2, "loop.steps=5", engine="fsdp2")
    train(folders["two"], 2, engine="fsdp2")
    close(folders["two"], folders["one"])
    assert "eval/exact_match" in rows_of(folders["two"] / "run")[0]
    model, _, _ = load_run(str(folders["two"] / "run"))
    other, _, _ = load_run(str(folders["one"] / "run"))
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert mine.shape == theirs.shape
        assert float((mine - theirs).abs().max()) < 1e-4, name
