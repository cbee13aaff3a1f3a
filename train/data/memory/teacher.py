"""Gold operations turned into a warm start: what a teacher with known weaknesses would write.

The teacher reads each chunk as a manager does, with a view of its own memory, and writes the gold
operations of that memory, some worse than it could. Reinforcement learning starts from its pupil:
it teaches neither copying nor the form of operations, which the warm start must.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mnemic.models.memory.bm25 import words
from mnemic.models.memory.episode import MemoryConfig, MemoryEpisode
from mnemic.models.memory.operations import Delete, Insert, Noop, Operation, Update, apply
from mnemic.models.memory.prompt import messages, text_prompt
from mnemic.models.memory.store import Entry, OperationError
from mnemic.train.data.memory.episode import EpisodeRow


@dataclass(frozen=True)
class Weaknesses:
    """How often the teacher leaves a new fact out, inserts where it should update, lets what ended
    stand, and keeps small talk.
    """

    drop: float = 0.0
    insert_for_update: float = 0.0
    skip_delete: float = 0.0
    keep_noise: float = 0.0
    first_id: int = 0
    """The first entry's number is drawn up to this."""


def net(gold: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, str | None]]:
    """What the gold steps of each chunk come to: key -> its content behind the chunk, None for
    gone. Without keys that are behind it what they were before, such as one that came and went.
    """
    found = []
    truth: dict[str, str] = {}
    for steps in gold:
        before, touched = dict(truth), {}
        for step in steps:
            if step["op"] in ("insert", "update"):
                truth[step["key"]] = step["content"]
            elif step["op"] == "delete":
                truth.pop(step["key"], None)
            else:
                continue
            touched[step["key"]] = truth.get(step["key"])
        found.append({k: v for k, v in touched.items() if v != before.get(k)})
    return found


def net_steps(gold: Sequence[Sequence[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """Gold steps by chunk, each key once and as what it comes to: what a chunk says and takes back
    needs no operation. Small talk stays, repetitions go.
    """
    found = []
    held: set[str] = set()
    for steps, wanted in zip(gold, net(gold), strict=True):
        last = {step["key"]: n for n, step in enumerate(steps) if "key" in step}
        kept: list[dict[str, Any]] = []
        for n, step in enumerate(steps):
            key = step.get("key")
            if step["op"] == "noise":
                kept.append(step)
            elif key in wanted and last[key] == n:
                content = wanted[key]
                op = "delete" if content is None else "update" if key in held else "insert"
                kept.append({"op": op, "key": key, "content": content})
        found.append(kept)
        held = (held | {k for k, v in wanted.items() if v is not None}) - {
            k for k, v in wanted.items() if v is None
        }
    return found


def turns(
    row: EpisodeRow, config: MemoryConfig, weaknesses: Weaknesses, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """One SFT row a chunk: `prompt` as a manager is shown it, `completion` as the teacher writes
    it. `row.gold` must be there.
    """
    draw = random.Random(f"teacher {seed} {row.id}")
    store = config.make_store()
    store.number_from(draw.randint(0, weaknesses.first_id))
    episode = MemoryEpisode(row.chunks, [], config, store=store)
    for steps in net_steps(row.gold):
        view = episode.view()
        operations = teach(episode, steps, weaknesses, draw)
        text = episode.syntax.write(operations)
        chunk = row.chunks[len(episode.turns)]
        if config.form == "text":
            yield {"prompt": text_prompt(view.text, chunk), "completion": text}
        else:
            yield {
                "prompt": messages(episode.syntax, episode.store, view.text, chunk),
                "completion": [{"role": "assistant", "content": text}],
            }
        result = episode.step(text)
        assert not result.errors, (result.errors, text)


def teach(
    episode: MemoryEpisode, steps: list[dict[str, Any]], weak: Weaknesses, draw: random.Random
) -> list[Operation]:
    """The teacher's operations for the next chunk of `episode`."""
    visible = episode.view().ids
    held = {e.id: e for e in episode.store.entries() if e.id in visible}
    texts = {e.content for e in episode.store.entries()}
    found: list[Operation] = []
    for step in steps:
        kind = step["op"]
        if kind == "noise":
            if draw.random() < weak.keep_noise and step["content"] not in texts:
                found.append(Insert(content=step["content"]))
                texts.add(step["content"])
        elif kind == "delete":
            if draw.random() >= weak.skip_delete:
                for entry in _of(held, step["key"]):
                    found.append(Delete(id=entry.id))
                    del held[entry.id]
        elif kind in ("insert", "update"):
            mine = _of(held, step["key"])
            if kind == "update" and mine and draw.random() >= weak.insert_for_update:
                found.append(Update(id=mine[0].id, content=step["content"]))
                texts.add(step["content"])
            elif draw.random() >= weak.drop and step["content"] not in texts:
                found.append(Insert(content=step["content"]))
                texts.add(step["content"])
    return _writable(found, episode) or [Noop()]


def _of(held: dict[str, Entry], key: str) -> list[Entry]:
    wanted = words(key)
    return [e for e in held.values() if words(e.content)[: len(wanted)] == wanted]


def _writable(operations: list[Operation], episode: MemoryEpisode) -> list[Operation]:
    """Without what the memory would refuse: an update to the same text, what no longer fits."""
    trial = episode.store.empty()
    trial.restore(episode.store.snapshot())
    kept = []
    for operation in operations:
        try:
            apply(trial, operation)
        except OperationError:
            continue
        kept.append(operation)
    return kept
