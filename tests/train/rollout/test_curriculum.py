"""Stages by mastery, and priority to episodes of middling success; both come back from state."""

from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.data.memory.rows import KvSource
from mnemic.train.recipe.data import KvStreamData, Stream
from mnemic.train.rollout.curriculum import Curriculum, Priority

DATA = KvStreamData(stages=[Stream(n_chunks=1), Stream(n_chunks=2)], stream=Stream(n_chunks=5))


def test_a_stage_ends_when_the_mean_of_a_full_window_is_mastery():
    source = KvSource(DATA)
    found = Curriculum(source, mastery=0.8, window=3)
    assert len(source.episode(0).chunks) == 1
    for value in (1.0, 1.0):
        found.observe(value)
    assert source.stage == 0  # the window is not full
    found.observe(0.5)
    assert source.stage == 1 and len(source.episode(0).chunks) == 2
    for value in (1.0, 1.0, 0.3, 1.0):
        found.observe(value)
    assert source.stage == 1
    found.observe(1.0)
    found.observe(1.0)
    assert source.stage == 2 and len(source.episode(0).chunks) == 5
    for _ in range(9):
        found.observe(1.0)
    assert source.stage == 2


def test_a_curriculum_comes_back_where_it_stood():
    source, again = KvSource(DATA), KvSource(DATA)
    one, two = Curriculum(source, 0.8, 3), Curriculum(again, 0.8, 3)
    for value in (1.0, 1.0, 1.0, 0.9):
        one.observe(value)
    two.load_state_dict(one.state_dict())
    assert again.stage == 1
    for value in (0.9, 0.9):
        one.observe(value)
        two.observe(value)
    assert source.stage == again.stage == 2


def rows(*names):
    return [EpisodeRow(n, "t", ("x",), (Question("q", ("a",)),)) for n in names]


def test_priority_takes_the_new_then_the_middling():
    found = Priority(anchor=0.5, pool=2)
    for name, score in (("easy", 1.0), ("hard", 0.0), ("middling", 0.45)):
        found.observe(name, score)
    chosen = found.choose(rows("easy", "new", "hard", "middling"), 2)
    assert [row.id for row in chosen] == ["new", "middling"]
    again = Priority(0.5, 2)
    again.load_state_dict(found.state_dict())
    assert again.choose(rows("easy", "hard", "middling"), 1)[0].id == "middling"


def test_priority_repeats_an_episode_only_where_there_are_too_few():
    found = Priority(0.5, 3)
    assert [r.id for r in found.choose(rows("a", "b", "a", "b"), 2)] == ["a", "b"]
    assert [r.id for r in found.choose(rows("a", "a", "a"), 2)] == ["a", "a"]
