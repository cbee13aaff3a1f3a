"""Figures of played episodes: a perfect writer earns everything, silence what nothing earns."""

import pytest

from mnemic.models.generation import Generated
from mnemic.models.memory.episode import MemoryConfig, MemoryEpisode
from mnemic.models.memory.rule_reader import RuleReader
from mnemic.models.tiny import byte_tokenizer
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.data.memory.kvstream import KvStream, episode
from mnemic.train.errors import UserError
from mnemic.train.rollout.baselines import oracle_text, read_baseline
from mnemic.train.rollout.suite import (
    Manager,
    Reading,
    figures,
    interval,
    net,
    operation_scores,
    read_all,
)

CONFIG = MemoryConfig(store="flat", syntax="lines", form="text")
# Of few facts, so that in long streams facts change in the chunk that brought them.
STREAM = KvStream(
    n_chunks=12,
    events_per_chunk=4,
    n_entities=2,
    n_attributes=2,
    p_update=0.35,
    p_delete=0.2,
    gap=0,
)
ROWS = [episode(STREAM, "heldout", index, 7) for index in range(12)]


TOKENIZER = byte_tokenizer()


class Scripted:
    """Writes what `say(row number, turn number)` gives, in the order `play` asks."""

    def __init__(self, count, say):
        self.count, self.say, self.turn = count, say, 0

    def prepare(self):
        self.turn = 0

    def __call__(self, prompts, seeds):
        assert seeds is None and len(prompts) == self.count
        texts = [self.say(i, self.turn) for i in range(self.count)]
        self.turn += 1
        return [Generated([*TOKENIZER(t).input_ids, TOKENIZER.eos_token_id], False) for t in texts]


def read(say, rows=ROWS, **settings):
    manager = Manager(CONFIG, TOKENIZER, Scripted(len(rows), say), **settings)
    return read_all(rows, manager, RuleReader())


def oracle():
    """The oracle's texts, played on memories of its own."""
    played = [MemoryEpisode(row.chunks, [], CONFIG) for row in ROWS]
    golds = [net(row.gold) for row in ROWS]

    def say(i, turn):
        text = oracle_text(played[i], golds[i][turn])
        played[i].step(text)
        return text

    return say


def test_the_oracles_operations_earn_everything():
    readings, cost = read(oracle())
    found = figures([readings[:6], readings[6:]], cost)
    assert found["accuracy"] == found["r1"] == found["em"] == found["f1"] == 1.0
    assert found["op_precision"] == found["op_recall"] == 1.0
    assert found["stale"] == found["errors_per_chunk"] == found["unsupported_writes"] == 0.0
    assert found["accuracy_by_seed"] == [1.0, 1.0] and found["accuracy_low"] == 1.0
    assert set(found["by_type"]) == {q.type for row in ROWS for q in row.questions}
    assert sum(one["questions"] for one in found["by_type"].values()) == found["questions"]
    assert {"insert", "update", "delete"} <= set(found["operations_per_chunk"])
    assert found["entries"] == sum(one.entries for one in readings) / 12
    written = sum(len(turn.text) + 1 for one in readings for turn in one.turns)
    assert found["generated_tokens_per_chunk"] == written / (12 * 12)
    assert cost.seconds >= 0 and found["seconds_per_chunk"] == cost.seconds / 144


def test_silence_is_an_empty_memory():
    readings, _ = read(lambda i, turn: "noop")
    mine = figures([readings])
    empty = figures([read_baseline("empty", ROWS, CONFIG, RuleReader())[0]])
    assert empty["accuracy"] < 0.6
    assert {key: mine[key] for key in empty} == empty
    assert mine["operations_per_chunk"] == {"noop": 1.0}
    assert mine["op_precision"] is None and mine["op_recall"] == 0.0
    assert mine["unsupported_writes"] is None


GOLD = EpisodeRow(
    "a", "test", ("anna city rome\nthe bus was late", "anna city now oslo", "anna city gone"),
    (Question("anna city?", ("none",), "abstain", (2,), ("rome", "oslo")),), "em",
    (
        ({"op": "insert", "key": "anna city", "content": "anna city rome"}, {"op": "noise"}),
        ({"op": "update", "key": "anna city", "content": "anna city oslo"},),
        ({"op": "delete", "key": "anna city"},),
    ),
)  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "counts"),
    [
        # done, right, gold, met, written, unsupported
        (("+ anna city rome", "= m0 anna city oslo", "- m0"), (3, 3, 3, 3, 2, 0)),
        # Small talk kept, and a fact made up.
        (("+ the bus was late\n+ bob pet cat", "noop", "noop"), (2, 0, 3, 0, 2, 1)),
        # Beside the superseded entry: no update. Only the first deletion has the key's last entry.
        (("+ anna city rome", "+ anna city oslo", "- m0\n- m1"), (4, 3, 3, 2, 2, 0)),
        # Nothing was held, so the insert is right; a wrong value is not.
        (("+ anna city paris", "noop", "- m0"), (2, 1, 3, 1, 1, 1)),
        (("noop", "+ anna city oslo", "noop"), (1, 1, 3, 1, 1, 0)),
        # Another's entry overwritten, and a call that is refused.
        (("+ the bus was late", "= m0 anna city oslo\n- m9", "noop"), (2, 0, 3, 0, 2, 0)),
    ],
)
def test_operations_against_gold(texts, counts):
    readings, _ = read(lambda i, turn: texts[turn], rows=[GOLD])
    assert tuple(vars(operation_scores(readings[0])).values()) == counts


def test_only_what_a_chunk_comes_to_is_wanted():
    insert = {"op": "insert", "key": "a b", "content": "a b 1"}
    update = {"op": "update", "key": "a b", "content": "a b 2"}
    back = {"op": "update", "key": "a b", "content": "a b 1"}
    gone, noise = {"op": "delete", "key": "a b"}, {"op": "noise", "content": "x"}
    assert net([[insert, update]]) == [{"a b": "a b 2"}]
    assert net([[insert, gone]]) == [{}]
    assert net([[insert], [update, back], [gone, insert], [noise], [update, gone]]) == [
        {"a b": "a b 1"}, {}, {}, {}, {"a b": None},
    ]  # fmt: skip


def test_the_interval_draws_episodes_and_repeats_itself():
    scores = [[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [1.0, 1.0]] * 8
    low, high = interval(scores)
    assert low is not None and high is not None and low < 0.625 < high
    assert interval(scores) == (low, high)
    # One by one, questions would seem twice as many and the interval too narrow.
    alone = interval([[s] for own in scores for s in own])
    assert high - low > alone[1] - alone[0]
    assert interval([[1.0, 0.0]]) == (None, None)


def test_a_stale_answer_counts_by_question():
    row = EpisodeRow(
        "a", "t", ("x",), tuple(Question(q, ("oslo",), "t", (), ("rome",)) for q in "abcd")
    )
    found = figures([[Reading(row, ["rome", "oslo", "paris", "rome"], 3, 4, 1)]])
    assert found["stale"] == 0.5 and found["accuracy"] == 0.25 and found["compression"] == 0.25


def test_a_prompt_beyond_the_context_is_refused():
    with pytest.raises(UserError, match=r"context of 100; lower memory\.view_tokens"):
        read(lambda i, turn: "noop", context=100)
