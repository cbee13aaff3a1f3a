"""Memory episodes: the row contract, and what each loader makes of its published format."""

import json
import subprocess
import sys
from collections import Counter

import pytest
from support import write_jsonl

from mnemic.models.memory.metrics import score
from mnemic.train.data.formats import FormatError
from mnemic.train.data.memory import reading
from mnemic.train.data.memory.episode import EpisodeRow, Question, as_episode, to_row
from mnemic.train.data.memory.sources import (
    LOADERS,
    jsonl,
    locomo,
    longmemeval,
    memoryagentbench,
    squad,
    ttl,
)
from mnemic.train.errors import UserError


def row(**changes):
    question = {"q": "Where?", "answers": ["Oslo"], "evidence": [1], "stale": ["Rome"]}
    base = {"id": "a", "source": "mine", "chunks": ["In Rome.", "In Oslo."], "metric": "f1"}
    return {
        **base,
        "questions": [question],
        "gold": [[{"op": "noise", "content": "x"}], []],
        **changes,
    }


def asking(**changes):
    return row(questions=[{"q": "x", "answers": ["y"]}, {"q": "z", "answers": ["w"], **changes}])


def write(path, value):
    path.write_text(json.dumps(value))
    return path


def sound(episodes):
    """The episodes as a list, each checked to be a row of the contract that survives JSON."""
    episodes = list(episodes)
    for episode in episodes:
        assert as_episode(json.loads(json.dumps(to_row(episode)))) == episode
    return episodes


def test_a_row_becomes_an_episode_and_the_same_row_again(tmp_path):
    episode = as_episode(row())
    asked = Question("Where?", ("Oslo",), "current", (1,), ("Rome",))
    gold = (({"op": "noise", "content": "x"},), ())
    assert episode == EpisodeRow("a", "mine", ("In Rome.", "In Oslo."), (asked,), "f1", gold)
    assert as_episode(to_row(episode)) == episode
    bare = as_episode({"id": "a", "source": "s", "chunks": ["c"],
                       "questions": [{"q": "q", "answers": ["none"]}]})  # fmt: skip
    assert bare.metric == "em" and bare.questions[0].type == "current"
    assert to_row(bare)["questions"] == [{"q": "q", "answers": ["none"], "type": "current"}]
    assert "gold" not in to_row(bare)
    assert as_episode(asking(evidence=[1, 0, 1])).questions[1].evidence == (0, 1)
    path = write_jsonl(tmp_path / "rows.jsonl", [row(), row(id="b")])
    assert [e.id for e in sound(jsonl(path))] == ["a", "b"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (row(chunks="In Rome."), "chunks: str 'In Rome.'; needs a list"),
        (row(chunks=["In Rome.", " "]), r"chunks\[1\].*not blank"),
        (row(questions=[]), "questions: list"),
        (row(metric="sub-em"), r"'sub-em' is none of em.*did you mean 'sub_em'"),
        (row(extra=1), "unknown key 'extra'; allowed are id, source"),
        ({"id": "a"}, r"no 'source'; needs id.*has id"),
        (row(gold=[[]]), "gold: 1 lists of operations for 2 chunks"),
        (row(gold=[[], ["x"]]), r"gold\[1\]"),
        (asking(answers="w"), r"questions\[1\].answers: str 'w'; needs a list"),
        (asking(answers=[2022]), r"questions\[1\].answers\[0\]: int 2022; needs text"),
        (asking(answers=[]), r"questions\[1\].answers"),
        (asking(evidence=[0, 2]), r"questions\[1\].evidence: 2 is no chunk; allowed are 0 to 1"),
        (asking(evidence=[True]), "True is no chunk"),
        (asking(evidences=[1]), r"questions\[1\]: unknown key 'evidences'; allowed are q, answers"),
        (asking(stale=["W"]), "'W' is one of the answers too"),
        (asking(type=None), r"questions\[1\].type: null"),
    ],
)
def test_a_bad_row_is_refused_with_what_where_and_what_is_allowed(tmp_path, fields, words):
    with pytest.raises(FormatError, match=words):
        as_episode(fields)
    path = write_jsonl(tmp_path / "rows.jsonl", [row(), {**row(), **fields}])
    if fields.keys() >= {"source"}:
        with pytest.raises(FormatError, match=rf"rows.jsonl:2: .*{words}"):
            list(jsonl(path))


def test_loading_needs_nothing_heavy():
    code = "import sys, mnemic.train.data.memory.sources; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "transformers"} & set(run.stdout.split())


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_a_json_list_is_read_object_by_object_whatever_the_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(reading, "_BLOCK", block)
    objects = [{"a": "x" * n, "b": [n, {"ü": ","}]} for n in (0, 3, 40)]
    path = write(tmp_path / "a.json", objects)
    assert [fields for _, fields in reading.records(path, "F", ("a",))] == objects
    path.write_text("\n".join(map(json.dumps, objects)))
    assert [where for where, _ in reading.records(path, "F", ("a",))][-1] == f"{path}: record 3"
    path.write_text(json.dumps(objects)[:-5])
    with pytest.raises(FormatError, match=r"record 3: not valid JSON.*truncated"):
        list(reading.records(path, "F", ("a",)))
    path.write_text(json.dumps([*objects, {"b": 1}]))
    with pytest.raises(FormatError, match="record 4: no 'a'"):
        list(reading.records(path, "F", ("a",)))


def test_text_is_cut_at_the_best_place_and_nothing_is_lost():
    cases = {
        "One. Two three. Four five": ["One. Two three.", "Four five"],
        "aa bb\ncc dd\n\nee ff gg hh": ["aa bb\ncc dd", "ee ff gg hh"],
        "q one\nlabel 1\n\nq\nlabel 2": ["q one\nlabel 1", "q\nlabel 2"],
        "x" * 45: ["x" * 20, "x" * 20, "x" * 5],
        "word " * 9: ["word word word word", "word word word word", "word"],
    }
    for text, pieces in cases.items():
        assert reading.split_text(text, 20) == pieces
        assert "".join("".join(pieces).split()) == "".join(text.split())


def conversation(**changes):
    def turn(dia_id, text, speaker="Ann", **more):
        return {"speaker": speaker, "dia_id": dia_id, "text": text, **more}

    return {
        "sample_id": "conv-1",
        "conversation": {
            "speaker_a": "Ann",
            "session_10_date_time": "3 pm on 9 May, 2023",
            "session_10": [turn("D10:1", "Last one.")],
            "session_2_date_time": "1 pm on 8 May, 2023",
            "session_2": [
                turn("D2:1", "I went " + "on and on " * 20),
                turn("D2:2", "Nice!", "Ben", blip_caption="a red bowl"),
            ],
            "session_3_date_time": "never",
        },
        "qa": [
            {"question": "When?", "answer": 2022, "evidence": ["D2:2"], "category": 2},
            {"question": "Which?", "answer": "a, b", "evidence": ["D2:1; D10:01", "D"],
             "category": 1},
            {"question": "Who?", "adversarial_answer": "Ann", "evidence": ["D99:1"], "category": 5},
            {"question": "Why?", "answer": "Likely; x", "evidence": [], "category": 3},
            {"question": "What?", "answer": "x", "evidence": [], "category": 4},
        ],
        **changes,
    }  # fmt: skip


def test_locomo_has_dated_chunks_in_time_order_and_evidence_by_chunk(tmp_path):
    path = write(tmp_path / "l.json", [conversation(), conversation(sample_id="conv-2")])
    assert [e.id for e in sound(locomo(path))] == ["conv-1", "conv-2"]
    (episode,) = sound(locomo(path, range(1, 2), chunk_chars=200))
    assert episode.id == "conv-2" and episode.metric == "locomo"
    assert all(len(chunk) <= 200 for chunk in episode.chunks)
    dates = [chunk.split("\n")[0] for chunk in episode.chunks]
    assert dates == ["Date: 1 pm on 8 May, 2023"] * 2 + ["Date: 3 pm on 9 May, 2023"]
    assert episode.chunks[1].endswith("\nBen: Nice! [shares a picture: a red bowl]")
    assert episode.chunks[2].endswith("\nAnn: Last one.")
    when, which, who, *rest = episode.questions
    assert (when.type, when.answers, when.evidence) == ("temporal", ("2022",), (1,))
    assert (which.type, which.evidence) == ("multi_hop", (0, 1, 2))
    assert who == Question("Who?", ("none",), "adversarial", (), ("Ann",))
    assert [q.type for q in rest] == ["open_domain", "single_hop"]
    whole = next(locomo(path))
    assert len(whole.chunks) == 2 and whole.questions[1].evidence == (0, 1)
    with pytest.raises(UserError, match=r"no conversation 2; it holds 2.* 0 to 1"):
        list(locomo(path, range(1, 3)))
    with pytest.raises(ValueError, match="at least 200"):
        locomo(path, chunk_chars=10)
    bad = conversation(qa=[{"question": "x", "category": 9}])
    with pytest.raises(FormatError, match=r"record 1 \(conv-1\), question 0: category 9"):
        list(locomo(write(path, [bad])))


def longmemeval_record(**changes):
    def user(text, **more):
        return {"role": "user", "content": text, **more}

    return {
        "question_id": "q1",
        "question_type": "knowledge-update",
        "question": "How fast?",
        "question_date": "2023/06/01 (Thu) 10:00",
        "answer": 25,
        "answer_session_ids": ["s1"],
        "haystack_session_ids": ["s2", "s1"],
        "haystack_dates": ["2023/05/27 (Sat) 09:00", "2023/05/25 (Thu) 18:30"],
        "haystack_sessions": [
            [user("Later.")],
            [user("long " * 50), user(""), user("In 25.", has_answer=True)],
        ],
        **changes,
    }


def test_longmemeval_is_in_time_order_with_marked_turns_as_evidence(tmp_path):
    records = [longmemeval_record(), longmemeval_record(question_id="q1_abs")]
    unmarked = longmemeval_record(haystack_sessions=[[], [{"role": "user", "content": "x"}]])
    path = write(tmp_path / "l.json", [*records, unmarked])
    first, abstain, whole = sound(longmemeval(path, chunk_chars=200))
    assert [c.split("\n")[0][6:16] for c in first.chunks] == ["2023/05/25"] * 2 + ["2023/05/27"]
    (asked,) = first.questions
    assert asked.q == "[2023/06/01 (Thu) 10:00] How fast?" and asked.answers == ("25",)
    assert asked.type == "knowledge-update" and asked.evidence == (1,)
    assert "In 25." in first.chunks[1] and "user:\n" not in first.chunks[1]
    assert abstain.questions[0].answers == ("none",) and abstain.questions[0].type == "abstention"
    assert whole.chunks == ("Date: 2023/05/25 (Thu) 18:30\nuser: x",)
    assert whole.questions[0].evidence == (0,)
    write(path, [records[0], longmemeval_record(haystack_dates=["2023/05/27"])])
    with pytest.raises(FormatError, match=r"record 2 \(q1\): 1 haystack_dates, 2 haystack_ses"):
        list(longmemeval(path))


MAB = [
    {"context": "Doc 1: " + "Fact. " * 60, "questions": ["q0", "q1"],
     "answers": [["France", "FR"], ["10"]], "metadata": {"source": "ruler_qa1_197K"}},
    {"context": "hello\nlabel: 3\n\n", "questions": ["hi"], "answers": [["3"]],
     "metadata": {"source": "icl_nlu_8296shot_balance"}},
    {"context": "chat", "questions": ["q0", "q1"], "answers": [["a"], ["b"]],
     "metadata": {"source": "longmemeval_s*", "question_types": ["multi-session", "x"],
                  "question_ids": ["1", "2_abs"], "question_dates": ["2023/05/30", "2023/05/31"]}},
]  # fmt: skip


@pytest.mark.parametrize("kind", ["json", "jsonl", "parquet"])
def test_memoryagentbench_has_the_metric_of_its_source(tmp_path, kind):
    path = tmp_path / f"mab.{kind}"
    if kind == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(MAB), path)
    else:
        write_jsonl(path, MAB) if kind == "jsonl" else write(path, MAB)
    ruler, icl, chat = sound(memoryagentbench(path, chunk_chars=200))
    assert [e.metric for e in (ruler, icl, chat)] == ["sub_em", "number", "sub_em"]
    assert len(ruler.chunks) == 2 and all(len(c) <= 200 and c[-1] == "." for c in ruler.chunks)
    assert ruler.questions[0].answers == ("France", "FR")
    assert ruler.questions[0].type == "accurate_retrieval"
    assert icl.id == "icl_nlu_8296shot_balance-1" and icl.questions[0].type == "test_time_learning"
    assert [q.type for q in chat.questions] == ["multi-session", "abstention"]
    assert chat.questions[0].q == "[2023/05/30] q0" and chat.questions[1].answers == ("none",)
    assert [e.source for e in memoryagentbench(path, ["icl_"])] == [icl.source]
    with pytest.raises(UserError, match=r"starts with zzz; it has ruler_qa1_197K, icl"):
        list(memoryagentbench(path, ["zzz"]))


def test_memoryagentbench_refuses_what_it_cannot_score_or_match(tmp_path):
    films = {**MAB[0], "metadata": {"source": "recsys_redial_full"}}
    with pytest.raises(FormatError, match=r"recsys_redial_full\): no metric.*sources="):
        list(memoryagentbench(write(tmp_path / "m.json", [films])))
    with pytest.raises(FormatError, match=r"2 questions and 1 answers"):
        list(memoryagentbench(write(tmp_path / "m.json", [{**MAB[0], "answers": [["x"]]}])))


def squad_file(path, count=30):
    paragraphs = [
        {"context": f"Town {n} has {n * 7} trees.", "qas": [
            {"question": f"Trees of {n}?", "answers": [{"text": f"{n * 7}", "answer_start": 0}] * 2,
             "id": str(n)},
            {"question": f"Cats of {n}?", "answers": [], "is_impossible": True, "id": f"c{n}"},
        ]} for n in range(count)
    ]  # fmt: skip
    return write(path, {"version": "1", "data": [{"title": "T", "paragraphs": paragraphs}]})


def test_squad_stuffs_each_paragraph_into_one_episode_of_one_split(tmp_path):
    path = squad_file(tmp_path / "s.json")
    train, held = (sound(squad(path, 4, split=split)) for split in ("train", "heldout"))
    chunks = [[chunk for e in side for chunk in e.chunks] for side in (train, held)]
    assert [len(side) for side in chunks] == [27, 3] and len({*chunks[0], *chunks[1]}) == 30
    assert [len(e.chunks) for e in train] == [4] * 6 + [3]
    for episode in train:
        answered = [q for q in episode.questions if q.type == "single_hop"]
        assert len(answered) == len(episode.chunks) == len(episode.questions) / 2
        for q in answered:
            assert f" {q.answers[0]} trees" in episode.chunks[q.evidence[0]]
            assert score(episode.metric, f"It has {q.answers[0]}.", q.answers) == 1
        rest = {(q.answers, q.evidence) for q in episode.questions if q.type == "abstention"}
        assert rest == {(("none",), ())}
    order = [[q.evidence for q in e.questions if q.evidence] for e in train]
    assert any(evidence != sorted(evidence) for evidence in order)
    assert train == list(squad(path, 4)) != list(squad(path, 4, seed=1))
    assert set(chunks[1]) == {c for e in squad(path, 4, split="heldout", seed=1) for c in e.chunks}
    assert all(len(e.questions) == 3 for e in squad(path, 4, questions=3))
    with pytest.raises(UserError, match="no paragraph with questions in the heldout split"):
        squad(squad_file(path, 1), split="heldout")
    with pytest.raises(ValueError, match="train or heldout"):
        squad(path, split="test")


def labelled(folder, kind):
    pairs = [(f"{w} {n} ?", w) for n in range(30) for w in ("HUM", "LOC", "NUM")]
    pairs.append(("both ways", "HUM"))
    if kind == "csv":
        path = folder / "b.csv"
        lines = ["text,category", *(f'"{t}",{y}' for t, y in pairs), "both ways,LOC"]
        path.write_text("\n".join(lines))
    else:
        path = folder / "t.label"
        lines = [*(f"{y}:x {t}" for t, y in pairs), "LOC:y both ways", "NUM:x NUM caf\xe9 ?"]
        path.write_text("\n".join(lines), encoding="latin-1")
    return path


@pytest.mark.parametrize("kind", ["csv", "label"])
def test_ttl_asks_the_number_of_unseen_texts_by_labels_that_were_shown(tmp_path, kind):
    path = labelled(tmp_path, kind)
    options = {"chunks": 4, "examples": 3, "questions": 5}
    episodes = sound(ttl(path, 20, labels=2, **options))
    assert len(episodes) == 20
    seen, numbers = set(), Counter()
    for episode in episodes:
        pairs = [line.split(" -> label ") for c in episode.chunks for line in c.split("\n")]
        rule = {text.split()[0]: number for text, number in pairs}
        assert len(pairs) == 12 and len(episode.chunks) == 4 and sorted(rule.values()) == ["0", "1"]
        assert all(rule[text.split()[0]] == number for text, number in pairs)
        for q in episode.questions:
            text = q.q.split(": ")[1]
            assert text not in dict(pairs) and q.answers == (rule[text.split()[0]],)
            label = text.split()[0]
            assert q.evidence == tuple(i for i, c in enumerate(episode.chunks) if label in c)
            assert score(episode.metric, rf"\boxed{{{q.answers[0]}}}", q.answers) == 1
            seen.add(text)
        seen |= dict(pairs).keys()
        numbers.update(rule.items())
    assert len(numbers) == 6, "a label must not keep its number"
    assert "both ways" not in seen
    assert kind == "csv" or "NUM caf\xe9 ?" in seen
    for episode in ttl(path, 5, 1, 3, 1):
        assert {line.split()[0] for line in episode.chunks[0].split("\n")} == {"HUM", "LOC", "NUM"}
    held = sound(ttl(path, 3, 2, 3, 2, split="heldout"))
    other = {line.split(" -> ")[0] for e in held for c in e.chunks for line in c.split("\n")}
    assert not seen & other
    assert episodes[:7] == list(ttl(path, 7, labels=2, **options))
    assert episodes != list(ttl(path, 20, labels=2, seed=1, **options))


def test_ttl_says_what_a_file_cannot_give(tmp_path):
    path = labelled(tmp_path, "label")
    with pytest.raises(UserError, match=r"has 3 labels .* needs 9; lower labels"):
        ttl(path, labels=9)
    with pytest.raises(UserError, match="cannot show each of 3 labels"):
        ttl(path, chunks=1, examples=2)
    with pytest.raises(UserError, match="500 to show and 20 to ask; lower chunks"):
        list(ttl(path, chunks=50, examples=10))
    with pytest.raises(ValueError, match="chunks must be at least 1, got 0"):
        ttl(path, chunks=0)
    # 3 + 1 fine labels, but "LOC:y" has lost its only text.
    with pytest.raises(UserError, match="has 3 labels"):
        ttl(path, labels=9, fine=True)
    path.write_text("HUM:x Who ?\nnonsense\n")
    with pytest.raises(FormatError, match=r"t.label:2: no line such as"):
        ttl(path)


@pytest.mark.parametrize("name", LOADERS)
def test_missing_and_foreign_files_are_refused_at_the_call(tmp_path, name):
    with pytest.raises(UserError, match="not found"):
        LOADERS[name](tmp_path / "none.json")
    for file, text in (("f.json", '[{"k": 1}]'), ("g.csv", "a,b\n1,2\n"), ("h.json", "PK\x03")):
        (tmp_path / file).write_text(text)
        with pytest.raises(UserError, match=rf"{file}.*(a record of|begins with)"):
            LOADERS[name](tmp_path / file)
