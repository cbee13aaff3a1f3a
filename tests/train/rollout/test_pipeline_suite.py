"""The pipeline's systems: gold answers earn everything and lies nothing, streams side by side are
streams alone, and what reaches a model fits it.
"""

import pytest
from bank_support import bank_of

from mnemic.models.memory import Memory, make_store
from mnemic.models.memory.op_prompts import EXTRACT, GENERATE, OPERATIONS, UPDATE
from mnemic.models.memory.op_writer import ModelWriter, Reply
from mnemic.models.memory.pipeline import MemoryPipeline, retain_many
from mnemic.models.tiny import byte_tokenizer, tiny_llama
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.data.memory.kvstream import KvStream, episode
from mnemic.train.data.memory.operations_rows import operation_rows
from mnemic.train.rollout.judge import judge
from mnemic.train.rollout.pipeline_report import PipelineReport
from mnemic.train.rollout.pipeline_suite import (
    Outcome,
    Settings,
    figures,
    gold_facts,
    play,
    play_full,
    play_rag,
)

STREAM = KvStream(
    n_chunks=6, events_per_chunk=3, n_entities=3, n_attributes=3, n_values=12, p_update=0.3,
    p_delete=0.2, p_noise=0.1, p_repeat=0.1, style="natural", mix={"current": 1, "abstain": 1},
)  # fmt: skip
ROWS = [episode(STREAM, "heldout", index, 5) for index in range(3)]
# All entries are found, so that the rows' prompts are those of the pipeline.
WIDE = Settings(k=20, answer_k=20)


class Gold:
    """Says what the rows of the three operations say to the same prompt."""

    def __init__(self, rows=ROWS):
        self.known, self.batches = {}, []
        for row in rows:
            for op in OPERATIONS:
                for one in operation_rows(row, op, k=20, answer_k=20, vary=False):
                    self.known[one["prompt"][0]["content"]] = one["completion"][0]["content"]

    def write(self, operation, conversations):
        self.batches.append((operation, len(conversations)))
        return [Reply(self.known[m[0]["content"]], False, 7, 2) for m in conversations]

    def room(self, operation, messages):
        return None


class Liar(Gold):
    def write(self, operation, conversations):
        lies = {EXTRACT: '["zed flies mars"]', UPDATE: "+ quux corge grault", GENERATE: "atlantis"}
        return [Reply(lies[operation]) for _ in conversations]


def test_gold_answers_earn_everything():
    writer = Gold()
    outcome = play("experts", ROWS, writer, None, WIDE)
    found = figures(outcome, ROWS)
    assert found["extract"] == {
        "json_valid": 1, "facts_per_chunk": found["extract"]["facts_per_chunk"], "precision": 1,
        "recall": 1, "f1": 1, "soft_f1": 1, "exact_f1": 1, "fabrication": 0, "omission": 0,
    }  # fmt: skip
    wanted = {
        "readable": 1, "refused": 0, "operation_accuracy": 1, "id_accuracy": 1, "all_right": 1,
        "fabrication": 0, "omission": 0,
    }  # fmt: skip
    assert {name: found["update"][name] for name in wanted} == wanted
    assert found["update"]["share_update"] > 0 and found["update"]["share_delete"] > 0
    assert [found[name] for name in ("score", "f1", "rouge_l", "em")] == [1, 1, 1, 1]
    # Abstaining is right in full, and a right answer of one word is half of METEOR.
    words = [q.answers[0] for row in ROWS for q in row.questions]
    assert found["meteor"] == sum(1 if w == "none" else 0.5 for w in words) / len(words)
    assert 0 < found["answerable"]["questions"] < found["questions"] == len(words)
    assert set(found["by_type"]) == {"current", "abstain"}
    # All chunks in one batch, then a round for each chunk, then a batch of each stream's questions.
    assert writer.batches[0] == (EXTRACT, 18)
    assert all(op == UPDATE and n <= 3 for op, n in writer.batches[1:-3])
    assert len(writer.batches) == 1 + 6 + 3 and writer.batches[-1] == (GENERATE, 4)
    assert found["operations"][EXTRACT]["calls"] == 18
    assert found["operations"][EXTRACT]["prompt_tokens"] == 18 * 7


def test_a_liar_makes_all_up_and_leaves_all_out():
    outcome = play("base", ROWS, Liar(), None, WIDE)
    found = figures(outcome, ROWS)
    assert found["extract"]["json_valid"] == 1 and found["extract"]["f1"] == 0
    assert found["extract"]["fabrication"] == found["extract"]["omission"] == 1
    assert found["update"]["fabrication"] == found["update"]["omission"] == 1
    assert found["score"] == found["meteor"] == found["abstained"] == 0
    gold = play("experts", ROWS, Gold(), None, WIDE)
    report = PipelineReport("t", "kvstream", ROWS)
    report.add(gold, {}, {EXTRACT: 9})
    report.add(outcome, {})
    minus = report.rows[1]["experts_minus"]
    assert minus["score"] == minus["extract_f1"] == {"mean": 1, "low": 1, "high": 1}
    assert minus["by_type"]["current"]["mean"] == 1
    assert report.rows[0]["operations"][EXTRACT]["adapter_bytes"] == 9
    assert report.ratios() == {}  # over nothing there is none


def test_streams_side_by_side_are_streams_alone():
    tokenizer = byte_tokenizer(1024)
    model = tiny_llama(tokenizer, hidden_size=32, layers=1, heads=2, max_position=1024, seed=0)
    bank = bank_of(model=model)
    writer = ModelWriter(bank, tokenizer, max_new_tokens=dict.fromkeys(OPERATIONS, 8))

    class Facts(ModelWriter):
        """Facts that a babbling model would not write, so that updates run too."""

        def write(self, operation, conversations):
            made = super().write(operation, conversations)
            if operation != EXTRACT:
                return made
            return [Reply(f'["fact {len(m[0]["content"])} x"]', False, 1, 1) for m in conversations]

    writer.__class__ = Facts
    streams = [["Anna moved.", "Bob sings a song.", "Hm"], ["Cid has a cat."], []]

    def pipelines():
        return [MemoryPipeline(writer, tokenizer, make_store("flat")) for _ in streams]

    rounds = []
    together, alone = pipelines(), pipelines()
    found = retain_many(together, streams, progress=lambda *now: rounds.append(now))
    assert found == [one.retain(own) for one, own in zip(alone, streams, strict=True)]
    assert rounds == [(1, 3), (2, 3), (3, 3)] and [one.index for one in found[0]] == [0, 1, 2]
    for one, other in zip(together, alone, strict=True):
        assert one.store.snapshot() == other.store.snapshot()
        assert {op: (s.calls, s.errors, s.new_tokens) for op, s in one.stats.items()} == {
            op: (s.calls, s.errors, s.new_tokens) for op, s in other.stats.items()
        }
    assert together[0].stats[EXTRACT].calls == 3 and together[2].stats[EXTRACT].seconds == 0
    with pytest.raises(ValueError, match="one writer"):
        retain_many([*pipelines()[:1], MemoryPipeline(Gold(), None, Memory())], [["a"], ["b"]])
    store = make_store("flat")
    both = [MemoryPipeline(writer, tokenizer, store) for _ in range(2)]
    with pytest.raises(ValueError, match="its own store"):
        retain_many(both, [["a"], ["b"]])


class Watched:
    """Answers "x" and keeps the prompts; `limit` characters fit."""

    def __init__(self, limit=10**9):
        self.asked, self.limit = [], limit

    def write(self, operation, conversations):
        self.asked += [m[0]["content"] for m in conversations]
        return [Reply('["a b"]' if operation == EXTRACT else "x", False, 3, 1)] * len(conversations)

    def room(self, operation, messages):
        return self.limit - len(messages[0]["content"])


class Honest(Watched):
    def write(self, operation, conversations):
        says = {EXTRACT: '["a b"]', UPDATE: "+ a b", GENERATE: "x"}
        return [Reply(says[operation]) for _ in conversations]


DATED = EpisodeRow(
    "d", "t", tuple(f"Date: day {n}\nAnna: word{n} " + "filler " * 20 for n in range(6)),
    (Question("word3?", ("x",)), Question("And what of word1 then?", ("y",))),
    facts=(("a b",),) * 6,
)  # fmt: skip


def test_dates_reach_the_prompt_and_the_entries_and_facts_of_the_data_are_gold():
    writer = Watched()
    outcome = play("base", [DATED], writer, None)
    assert "Date: day 2\nText:\nAnna: word2" in writer.asked[2]
    assert [turn.date for turn in outcome.turns[0]] == [f"day {n}" for n in range(6)]
    assert figures(outcome, [DATED])["extract"]["exact_f1"] == 1
    assert gold_facts(DATED) == [["a b"]] * 6
    # Nothing written could be read: an update without an operation.
    assert figures(outcome, [DATED])["update"]["readable"] == 0
    kept = play("base", [DATED], Honest(), None)
    assert kept.turns[0][1].shown == [("m0", "a b")] and kept.entries == [6]


def test_rag_and_full_answer_from_the_stream_itself():
    writer = Watched()
    outcome = play_rag([DATED], writer, None)
    assert outcome.answers == [["x", "x"]] and outcome.turns == []
    assert "Date: day 3 Anna: word3" in writer.asked[0] and "word0" not in writer.asked[0]
    whole = Watched()
    found = play_full([DATED], whole)
    assert all(f"word{n} " in text for n in range(6) for text in whole.asked)
    assert found.notes == ["full: shows the whole of each stream"]
    narrow = Watched(len(whole.asked[1]) - 2 * len(DATED.chunks[0]))
    cut = play_full([DATED], narrow)
    assert max(map(len, narrow.asked)) <= narrow.limit
    assert "word1 " not in narrow.asked[0] and "word2 " in narrow.asked[0]
    assert cut.notes == ["full: shows 4 of 6 chunks, the last of each stream"]
    assert figures(cut, [DATED])["score"] == 0.5 and "extract" not in figures(cut, [DATED])


def test_a_judge_s_last_word_counts_and_silence_is_wrong():
    class Endpoint:
        def complete(self, asked):
            self.asked = [m[0]["content"] for m in asked]
            return ["CORRECT", "Not CORRECT but wrong.", "incorrect", "hm"]

    end = Endpoint()
    questions = tuple(
        Question(f"q{n}?", ("Oslo", "oslo city") if n else ("none",)) for n in range(4)
    )
    row = EpisodeRow("a", "t", ("x",), questions)
    verdicts, unread = judge(end, [row], [["", "Oslo", "Rome", "In\nOslo"]])
    assert verdicts == [[True, False, False, False]] and unread == 1
    assert "only an answer that says so" in end.asked[0] and "(nothing)" in end.asked[0]
    assert "Right answer: Oslo or oslo city\nAnswer to grade: In Oslo" in end.asked[3]
    outcome = Outcome("base", [["", "Oslo", "Rome", "In\nOslo"]], verdicts=verdicts)
    assert figures(outcome, [row])["judged"] == 0.25
