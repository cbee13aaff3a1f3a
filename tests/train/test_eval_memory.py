"""`mnemic eval memory`: on a real run folder, its export and files; and what it refuses."""

import json
import shutil

import pytest
from support import mnemic, write_jsonl

from mnemic.models.memory.episode import MemoryConfig
from mnemic.train.cli import parser
from mnemic.train.data.memory.kvstream import KvStream
from mnemic.train.errors import UserError
from mnemic.train.eval_memory import FIRST_SEED, check, rows_of
from mnemic.train.eval_target import answerer_of, open_target, with_settings

SMALL = ("loop.steps=3", "model.layers=1", "data.size=50", "evaluation=null")


@pytest.fixture(scope="module")
def runs(fork_server, tmp_path_factory):
    """A folder with runs/memory_sft_tiny, three steps old."""
    folder = tmp_path_factory.mktemp("eval")
    status, text = fork_server.run("train", "memory_sft_tiny", *SMALL, cwd=folder)
    assert status == 0, text
    return folder


def ask(fork_server, folder, *args):
    return fork_server.run("eval", "memory", *args, cwd=folder)


def test_a_run_beside_its_baselines(fork_server, runs):
    pytest.importorskip("matplotlib")
    status, text = ask(
        fork_server, runs, "runs/memory_sft_tiny", "--episodes", 6, "--seeds", 2, "--lengths",
        "1,2", "--json", "a.json", "--plot", "a.png", "--set", "memory.max_new_tokens=8",
        "data.stream.n_chunks=3",
    )  # fmt: skip
    assert status == 0, text
    report = json.loads((runs / "a.json").read_text())
    assert set(report) == {"rows", "ratios", "env"}
    rows = {row["name"]: row for row in report["rows"]}
    names = ["manager", "empty", "insert-all", "bm25", "oracle"]
    assert list(rows) == names + [f"{name} x2" for name in names]
    own = rows["manager"]
    assert own["episodes"] == 12 and len(own["accuracy_by_seed"]) == 2
    assert 0 < own["generated_tokens_per_chunk"] <= 8 and own["seconds_per_chunk"] > 0
    assert rows["oracle"]["accuracy"] == rows["oracle x2"]["accuracy"] == 1.0
    assert rows["bm25"]["entries"] == 3 and rows["bm25 x2"]["entries"] == 6
    assert report["ratios"]["accuracy_vs_oracle"] == own["accuracy"]
    assert report["env"]["seeds"] == [FIRST_SEED, FIRST_SEED + 1]
    assert "insert-all" in text and "r1 by length" in text and "full: to the rule reader" in text
    assert (runs / "a.png").read_bytes().startswith(b"\x89PNG")


def test_an_export_reads_a_file(fork_server, runs):
    """Without checkpoints the result of a run is evaluated; it says what its export says."""
    rows = [
        {"id": str(i), "source": "mine", "chunks": ["anna city rome", "bye"], "metric": "f1",
         "questions": [{"q": "anna city?", "answers": ["rome"], "type": "one\u001b[31m"}]}
        for i in range(3)
    ]  # fmt: skip
    write_jsonl(runs / "mine.jsonl", rows)
    cleared = runs / "cleared"
    shutil.copytree(runs / "runs/memory_sft_tiny", cleared)
    shutil.rmtree(cleared / "checkpoints")
    texts = []
    for target in (cleared / "final", cleared):
        status, text = ask(
            fork_server, runs, target, "--suite", "jsonl", "--path", "mine.jsonl", "--baselines",
            "insert-all", "--json", "b.json", "--seeds", 4, "--episodes", 2,
        )  # fmt: skip
        assert status == 0, text
        assert "--seeds has no effect" in text and "\x1b" not in text
        texts.append(json.loads((runs / "b.json").read_text())["rows"])
    (own, other), same = texts
    assert other["name"] == "insert-all" and other["accuracy"] == 1.0 and other["episodes"] == 2
    assert own["op_recall"] is None
    assert {**own, "seconds_per_chunk": 0} == {**same[0], "seconds_per_chunk": 0}


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["--suite", "locomo"], "--suite locomo: needs its file; add --path FILE"),
        (["--suite", "locmo"], "did you mean 'locomo'?"),
        (["--path", "x"], "--path: kvstream is generated"),
        (["--baselines", "empty,oracel"], "did you mean 'oracle'?"),
        (["--conversations", "1"], "--conversations: is for --suite locomo"),
        (["--suite", "squad", "--path", "x", "--lengths", "2"], "--lengths: a file has the length"),
        (["--lengths", "1,x"], "--lengths: '1,x' is not a list of numbers"),
        (["--episodes", "0"], "--episodes: must be 1 or more"),
        (["--answerer", "rul"], "did you mean 'rule'?"),
        (["--answerer", "http://x/v1"], "add --answerer-model NAME"),
        (["--answerer-model", "m"], "--answerer-model: is for"),
    ],
)
def test_a_wrong_argument_is_one_sentence(args, sentence):
    found = parser().parse_args(["eval", "memory", "memory_sft_tiny", *args])
    with pytest.raises(UserError) as error:
        check(found)
        answerer_of(found.answerer, found.answerer_model)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_target_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"has no memory\.json"):
        open_target(str(tmp_path), [])
    with pytest.raises(UserError, match="did you mean 'memory_sft_tiny'"):
        open_target("memory_sft_tny", [])
    with pytest.raises(UserError, match="no memory, so it trains no memory manager"):
        open_target("quickstart", [])
    (tmp_path / "memory.json").write_text('{"stor": "flat"}')
    with pytest.raises(UserError, match="unknown key 'stor'"):
        open_target(str(tmp_path), [])


def test_settings_of_a_trained_model():
    memory, stream = with_settings(
        MemoryConfig(store="flat"), KvStream(n_chunks=7), ["memory.view_tokens=64"]
    )
    assert (memory.store, memory.view_tokens, stream.n_chunks) == ("flat", 64, 7)
    with pytest.raises(UserError, match=r"model\.layers: has no effect on a trained model"):
        with_settings(memory, stream, ["model.layers=2"])
    with pytest.raises(UserError, match=r"memory\.view_token: .*did you mean 'view_tokens'"):
        with_settings(memory, stream, ["memory.view_token=2"])


def test_seeds_draw_other_held_out_episodes():
    request, _ = check(parser().parse_args(["eval", "memory", "x", "--seeds", "2"]))
    first, second = (rows_of(request, KvStream(), seed, 5) for seed in request.seeds)
    assert all("heldout" in row.id for row in first)
    assert not {row.chunks for row in first} & {row.chunks for row in second}


def test_a_missing_or_foreign_file_is_the_options(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n')
    for name, sentence in (("nope", "--path: .*nope"), ("x.jsonl", "--path: .*x.jsonl")):
        args = ["eval", "memory", "x", "--suite", "jsonl", "--path", str(tmp_path / name)]
        request, _ = check(parser().parse_args(args))
        with pytest.raises(UserError, match=sentence):
            rows_of(request, KvStream(), 0, 5)


def test_help_is_there(tmp_path):
    found = mnemic("eval", "memory", "--help", cwd=tmp_path)
    assert found.returncode == 0 and "--baselines" in found.stdout


def test_fewer_questions_are_the_same_ones_for_every_reader(tmp_path):
    questions = [{"q": f"q{i}", "answers": ["a"]} for i in range(20)]
    row = {"id": "x", "source": "t", "chunks": ["c"], "questions": questions}
    path = write_jsonl(tmp_path / "rows.jsonl", [row])
    args = ["eval", "memory", "R", "--suite", "jsonl", "--path", str(path), "--questions", "4"]
    request, _ = check(parser().parse_args(args))
    found = [rows_of(request, KvStream(), seed, 5)[0].questions for seed in (0, 1)]
    assert len(found[0]) == 4 and found[0] == found[1]
    assert {q.q for q in found[0]} < {f"q{i}" for i in range(20)}
    with pytest.raises(UserError, match="--chunk: is for locomo, longmemeval, memoryagentbench"):
        check(parser().parse_args([*args, "--chunk", "300"]))
