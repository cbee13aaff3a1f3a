"""Collecting: gold as the data knows it, and starts that go on where others ended."""

import json
import time

import pytest
from distill_support import (
    clean_keys,
    collect_gold,
    distill,
    gold_arguments,
    good_and_bad,
    http_arguments,
    lines_of,
    prompt_of,
    rules_of,
)

from mnemic.models.memory.op_prompts import EXTRACT, GENERATE, OPERATIONS, UPDATE
from mnemic.train.data.memory.kvstream import episode
from mnemic.train.data.memory.operations_rows import STREAM, operation_rows
from mnemic.train.distill.journal import CollectFolder

LOCOMO = {
    "sample_id": "conv-1",
    "conversation": {
        "session_1_date_time": "1:00 pm on 8 May, 2023",
        "session_1": [
            {"speaker": "Ann", "dia_id": "D1:1", "text": "I bought a red canoe in Bergen."},
            {"speaker": "Bob", "dia_id": "D1:2", "text": "My dog Rex is ill."},
        ],
        "session_2_date_time": "2:00 pm on 9 June, 2023",
        "session_2": [{"speaker": "Ann", "dia_id": "D2:1", "text": "The canoe is great."}],
        "session_3_date_time": "2:00 pm on 1 July, 2023",
        "session_3": [{"speaker": "Bob", "dia_id": "D3:1", "text": "Hello there!"}],
    },
    "observation": {
        "session_1_observation": {
            "Ann": [["Ann bought a red canoe in Bergen.", "D1:1"]],
            "Bob": [["Bob's dog Rex is ill.", "D1:2"]],
        },
        "session_2_observation": {
            "Ann": [["Ann bought the red canoe in Bergen", "D2:1"], ["Ann loves it.", "D2:1"]]
        },
    },
    "qa": [
        {"question": "Where did Ann buy the canoe?", "answer": "Bergen", "evidence": ["D1:1"],
         "category": 4},
        {"question": "Who is the vet of Rex?", "adversarial_answer": "Tim", "evidence": ["D1:2"],
         "category": 5},
        {"question": "When was Bob in Peru?", "answer": "1999", "evidence": ["D3:1"],
         "category": 2},
    ],
}  # fmt: skip


def test_gold_of_kvstream_is_that_of_the_rows_experts_learn_from(tmp_path, capsys):
    assert collect_gold(tmp_path / "out", 6) == 0
    assert distill("clean", tmp_path / "out", "--no-dedupe") == 0
    for op in OPERATIONS:
        want = [
            row
            for index in range(6)
            for row in operation_rows(episode(STREAM, "train", index, 0), op, vary=False)
        ]
        rows = lines_of(tmp_path / "out" / "clean" / f"{op}.jsonl")
        assert [{k: row[k] for k in ("prompt", "completion", "operation")} for row in rows] == want
        assert {row["target_source"] for row in rows} == {"gold"}
        assert {row["split_key"] for row in rows} == {f"kvstream-train-0-{i}" for i in range(6)}
    assert (tmp_path / "out" / "clean" / "dropped.jsonl").read_text() == ""
    capsys.readouterr()
    assert collect_gold(tmp_path / "out", 6) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()[1:4]] == ["0"] * 3


def test_gold_of_locomo(tmp_path):
    (tmp_path / "l.json").write_text(json.dumps([LOCOMO]))
    out = tmp_path / "out"
    arguments = ["--teacher", "gold", "--suite", "locomo", "--path", tmp_path / "l.json"]
    assert distill("collect", out, *arguments) == 0
    assert distill("clean", out) == 0
    rows = {op: lines_of(out / "clean" / f"{op}.jsonl") for op in OPERATIONS}
    targets = {op: [r["completion"][0]["content"] for r in rows[op]] for op in OPERATIONS}
    assert targets[EXTRACT][0] == '["Ann bought a red canoe in Bergen.", "Bob\'s dog Rex is ill."]'
    # What only the speaker's name bears out is taken out of the fact list, "Ann loves it."
    assert targets[EXTRACT][1:] == ['["Ann bought the red canoe in Bergen"]', "[]"]
    assert "Date: 1:00 pm on 8 May, 2023\nText:\nAnn: I bought" in prompt_of(rows[EXTRACT][0])
    assert targets[UPDATE][0] == "+ Ann bought a red canoe in Bergen.\n+ Bob's dog Rex is ill."
    assert targets[UPDATE][1] == "+ Ann loves it."
    assert "m0 [1:00 pm on 8 May, 2023] Ann bought a red canoe" in prompt_of(rows[UPDATE][1])
    assert targets[GENERATE] == ["Bergen", "none"]
    assert rules_of(out) == {"locomo/conv-1/mem_generate/0002": "unborne"}


def test_a_fact_that_changes_one_word_in_ten_is_another_fact():
    from mnemic.train.distill.support import same_fact

    assert same_fact("Ann bought a red canoe.", "ann bought the red canoe")
    long = "Ann and Bob went to the lake in the north with Tim and his old dog in {}"
    assert not same_fact("Ann has two dogs", "Ann has three dogs")
    assert same_fact(long.format("May"), long.format("May") + ".")
    assert not same_fact(long.format("May").replace(" in the north", ""), long.format("June"))


def test_a_teacher_that_is_gone_stops_the_run_and_loses_nothing(tmp_path, server, capsys):
    collect_gold(tmp_path / "gold", 4)
    gold = lines_of(tmp_path / "gold" / "raw.jsonl")
    known = good_and_bad(gold, {})
    teacher = server(lambda prompt: 503 if len(teacher.asked) > 20 else known(prompt))
    arguments = [*http_arguments(teacher.url, 4), "--concurrency", 2]
    assert distill("collect", tmp_path / "out", *arguments) == 1
    assert "8 requests in a row failed" in capsys.readouterr().err
    kept = lines_of(tmp_path / "out" / "raw.jsonl")
    assert len(kept) == 20 and not any("error" in record for record in kept)
    teacher.reply = known
    assert distill("collect", tmp_path / "out", *arguments) == 0
    replies = [(r["key"], r["reply"]) for r in lines_of(tmp_path / "out" / "raw.jsonl")]
    assert replies == [(r["key"], r["reply"]) for r in gold]


def test_a_rate_is_kept(tmp_path, server):
    teacher = server(lambda prompt: "[]")
    arguments = [*http_arguments(teacher.url, 1), "--operations", "mem_extract"]
    start = time.perf_counter()
    assert distill("collect", tmp_path / "out", *arguments, "--rate", 600) == 0
    assert len(teacher.asked) == 6 and time.perf_counter() - start > 0.5


def test_other_settings_and_other_users_are_refused(tmp_path, capsys):
    out = tmp_path / "out"
    assert collect_gold(out, 2) == 0
    assert collect_gold(out, 2, "--seed", 5) == 1
    assert "other settings (seed 0 -> 5)" in capsys.readouterr().err
    assert collect_gold(out, 3) == 0  # more episodes are more of the same
    with CollectFolder(out).claimed():
        assert collect_gold(out, 2) == 1
        assert "in use by another mnemic process" in capsys.readouterr().err
    (out / "collect.json").unlink()
    assert collect_gold(out, 2) == 1
    assert "no collect.json" in capsys.readouterr().err
    assert distill("clean", out) == 1


def test_an_edited_file_is_another_collection(tmp_path, capsys):
    file = tmp_path / "l.json"
    file.write_text(json.dumps([LOCOMO]))
    arguments = ["--teacher", "gold", "--suite", "locomo", "--path", file]
    assert distill("collect", tmp_path / "out", *arguments) == 0
    file.write_text(json.dumps([LOCOMO], indent=1))
    assert distill("collect", tmp_path / "out", *arguments) == 1
    assert "data" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "zeros", "whole"])
def test_a_torn_last_line_is_made_again(tmp_path, damage):
    out = tmp_path / "out"
    collect_gold(out, 3)
    raw = out / "raw.jsonl"
    whole = raw.read_bytes()
    start = whole.rfind(b"\n", 0, -1) + 1
    torn = {"cut": whole[:-40], "zeros": whole[:start] + b"\0" * 50, "whole": whole[:-1]}
    raw.write_bytes(torn[damage])
    assert collect_gold(out, 3) == 0
    assert raw.read_bytes() == whole


def test_a_damaged_line_in_the_middle_is_named(tmp_path, capsys):
    out = tmp_path / "out"
    collect_gold(out, 1)
    raw = out / "raw.jsonl"
    lines = raw.read_bytes().splitlines(keepends=True)
    raw.write_bytes(b"".join([lines[0], b"oops\n", *lines[1:]]))
    assert collect_gold(out, 1) == 1
    assert "line 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--teacher", "gould", "--suite", "kvstream"], "did you mean 'gold'"),
        (["--teacher", "http://x", "--suite", "kvstream"], "--teacher-model"),
        (["--teacher", "gold", "--teacher-model", "x", "--suite", "kvstream"], "http address"),
        (["--teacher", "gold", "--suite", "locomo"], "add --path FILE"),
        (["--teacher", "gold", "--suite", "kvstream", "--path", "x"], "is generated"),
        (["--teacher", "gold", "--suite", "kvstream", "--chunk", "500"], "for --suite locomo"),
        ([*gold_arguments(0)], "--episodes: must be 1 or more"),
        ([*gold_arguments(1), "--operations", "mem_extrac"], "mem_extract"),
        ([*gold_arguments(1), "--rate", "0"], "--rate: must be above 0"),
    ],
)
def test_a_wrong_request_is_told_before_anything_is_made(tmp_path, capsys, arguments, says):
    assert distill("collect", tmp_path / "out", *arguments) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gold_needs_data_that_knows(tmp_path, capsys):
    row = {"id": "a", "source": "s", "chunks": ["x"], "questions": [{"q": "q", "answers": ["x"]}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ["--teacher", "gold", "--suite", "jsonl", "--path", tmp_path / "rows.jsonl"]
    assert distill("collect", tmp_path / "out", *arguments) == 1
    assert "neither gold operations nor facts" in capsys.readouterr().err


def test_a_local_model_teaches_and_what_it_cannot_read_is_told(tmp_path, capsys):
    from mnemic.models.tiny import byte_tokenizer, tiny_llama

    tokenizer = byte_tokenizer(2048)
    model = tiny_llama(tokenizer, hidden_size=16, layers=1, heads=2, max_position=2048, seed=0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    arguments = ["--teacher", tmp_path / "model", "--suite", "kvstream", "--episodes", 1]
    assert distill("collect", tmp_path / "out", *arguments, "--operations", EXTRACT) == 0
    records = lines_of(tmp_path / "out" / "raw.jsonl")
    assert len(records) == 6 and {r["teacher"] for r in records} == {str(tmp_path / "model")}
    # Random weights: not one of its replies is fit.
    assert distill("clean", tmp_path / "out") == 0
    assert not clean_keys(tmp_path / "out") and len(rules_of(tmp_path / "out")) == 6

    text = [{"speaker": "Ann", "dia_id": f"D1:{n}", "text": "word " * 300} for n in range(9)]
    long = {**LOCOMO, "conversation": {"session_1_date_time": "May", "session_1": text}}
    (tmp_path / "l.json").write_text(json.dumps([long]))
    arguments[2:] = ["--suite", "locomo", "--path", tmp_path / "l.json"]
    capsys.readouterr()
    assert distill("collect", tmp_path / "long", *arguments) == 1
    assert "longer than the model's context" in capsys.readouterr().err
