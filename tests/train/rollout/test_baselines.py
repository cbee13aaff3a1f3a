"""Memories made without a manager: each shows its reader what it says, and nothing else."""

from types import SimpleNamespace

import pytest

from mnemic.models.memory.episode import MemoryConfig
from mnemic.models.memory.rule_reader import RuleReader
from mnemic.models.memory.view import show_for
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.data.memory.kvstream import KvStream, episode
from mnemic.train.rollout.baselines import BASELINES, read_baseline
from mnemic.train.rollout.suite import figures

CONFIG = MemoryConfig(store="flat", syntax="lines", form="text")
ROWS = [episode(KvStream(n_chunks=6), "heldout", index, 3) for index in range(24)]
TALK = EpisodeRow(
    "t", "talk",
    ("Anna: hello.\nBen: I live in Rome.", "Anna: fine weather.", "Ben: I have a cat."),
    (
        Question("Where does Ben live?", ("Rome",), "single", (0,)),
        Question("What weather was it?", ("fine",), "single", (1,)),
        Question("How old is Ben?", ("none",), "adversarial"),
    ),
    "f1",
)  # fmt: skip


class Echo:
    """A reader that answers with all that it is shown, and keeps it."""

    def __init__(self, max_memory_tokens=1000):
        self.k, self.max_memory_tokens, self.max_new_tokens = 1, max_memory_tokens, 4
        self.model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=60))
        self.tokenizer = lambda text: SimpleNamespace(input_ids=list(text))

    def answer(self, asks):
        return [show_for(a.memory, a.question, self.k, self.max_memory_tokens) for a in asks]


def answers(name, reader=None, row=TALK):
    (reading,), _ = read_baseline(name, [row], CONFIG, reader or Echo())
    return reading.answers


def test_by_rule_they_stand_in_order():
    found = {}
    for name in BASELINES:
        readings, notes = read_baseline(name, ROWS, CONFIG, RuleReader())
        if name == "full":
            assert readings == [] and "insert-all" in notes[0]
        else:
            found[name] = figures([readings])
    assert found["oracle"]["accuracy"] == found["oracle"]["op_recall"] == 1.0
    assert found["empty"]["accuracy"] < found["insert-all"]["accuracy"] < 1
    assert found["empty"]["by_type"]["abstain"]["accuracy"] == 1.0
    assert found["empty"]["memory_tokens"] == found["empty"]["entries"] == 0
    # Superseded lines stand before those that replace them.
    assert found["insert-all"]["stale"] > 0.1 and found["oracle"]["stale"] == 0
    assert found["bm25"]["entries"] == 6 and found["bm25"]["compression"] == 0
    assert "op_recall" not in found["insert-all"]


def test_a_reader_sees_lines_chunks_or_nothing():
    assert answers("empty") == ["", "", ""]
    assert answers("insert-all")[0].splitlines() == [
        "- Anna: hello.", "- Ben: I live in Rome.", "- Anna: fine weather.", "- Ben: I have a cat.",
    ]  # fmt: skip
    # Whole chunks in their order, line breaks kept, only those with the question's words.
    assert answers("bm25")[0] == "- Anna: hello.\nBen: I live in Rome.\n- Ben: I have a cat."
    assert answers("bm25")[1] == "- Anna: fine weather."


def test_full_context_has_no_bound_but_the_readers_own():
    short = Echo(max_memory_tokens=2)
    whole = "\n".join(f"- {chunk}" for chunk in TALK.chunks)
    (reading,), notes = read_baseline("full", [TALK], CONFIG, short)
    assert reading.answers == [whole] * 3 and short.max_memory_tokens == 2
    assert notes == [
        "full: 1 of 1 streams exceed the reader's context of 60 tokens; of these it is shown the "
        "1 chunks that a question finds"
    ]
    assert answers("insert-all", short)[1] == "- Anna: fine weather."


def test_without_gold_operations_the_oracle_shows_the_evidence():
    (reading,), notes = read_baseline("oracle", [TALK], CONFIG, Echo())
    assert reading.answers == [f"- {TALK.chunks[0]}", f"- {TALK.chunks[1]}", ""]
    assert reading.entries == 2 and "evidence" not in notes[0] and "not known" in notes[0]
    blind = EpisodeRow("b", "x", ("a",), (Question("q", ("a",)),))
    assert read_baseline("oracle", [blind], CONFIG, Echo())[0] == []


def test_a_text_memory_has_an_oracle_too():
    config = MemoryConfig(store="text", syntax="lines", form="text")
    readings, _ = read_baseline("oracle", ROWS[:4], config, RuleReader())
    assert figures([readings])["accuracy"] == 1.0


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="insert-all"):
        read_baseline("all", ROWS, CONFIG, RuleReader())
