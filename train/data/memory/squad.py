"""SQuAD as a stream: paragraphs that have nothing to do with each other, one a chunk, and all their
questions at the end. Any file of SQuAD's form will do (SQuAD 1.1 and 2.0, XQuAD, MLQA).
"""

import random
from collections.abc import Iterator
from typing import Any

from mnemic.models.memory.metrics import NONE
from mnemic.train.data.formats import FormatError
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.data.memory.reading import Paths, answer_text, check_split, get, part, records
from mnemic.train.errors import UserError


def squad(
    path: Paths,
    paragraphs: int = 10,
    questions: int | None = None,
    split: str = "train",
    heldout: float = 0.1,
    seed: int = 0,
) -> Iterator[EpisodeRow]:
    """Episodes of `paragraphs` paragraphs; each paragraph of the split is in exactly one.

    The last episode may be shorter. The same arguments give the same episodes; the split depends
    on the paragraphs' text alone, so that no seed mixes the two sides. Questions without an answer
    in SQuAD 2.0 have type `abstention` and the gold `none`.

    Args:
        questions: the most questions of an episode, drawn by the seed; None for all.
        split: "train" or "heldout".
        heldout: share of the paragraphs held out, at least one.

    Raises:
        UserError: a missing or foreign file.
        FormatError: a damaged paragraph or question; the whole file is read at the call.
        ValueError: an argument out of its range.
    """
    check_split(split)
    if paragraphs < 1 or (questions is not None and questions < 1) or not 0 < heldout < 1:
        raise ValueError(
            "paragraphs and questions must be at least 1 and heldout between 0 and 1, got "
            f"{paragraphs}, {questions} and {heldout}"
        )
    asked: dict[str, list[Question]] = {}
    for where, record in records(path, "SQuAD", ("data",)):
        for number, article in enumerate(get(record, "data", list, where)):
            place = f"{where}, article {number}"
            for index, paragraph in enumerate(get(article, "paragraphs", list, place)):
                _read(paragraph, f"{place}, paragraph {index}", asked)
    # An episode asks about each of its chunks.
    contexts = part([text for text in asked if asked[text]], split, heldout)
    if not contexts:
        raise UserError(
            f"data.path: {path} has no paragraph with questions in the {split} split; give a file "
            "with two such paragraphs or more"
        )
    name = f"squad-{split}-{seed}"
    random.Random(name).shuffle(contexts)
    return _episodes(contexts, asked, paragraphs, questions, name)


def _read(paragraph: Any, where: str, asked: dict[str, list[Question]]) -> None:
    # A paragraph that occurs twice keeps all its questions, and is one chunk.
    context = get(paragraph, "context", str, where).strip()
    if not context:
        raise FormatError(f"{where}: the context is blank")
    found = asked.setdefault(context, [])
    for index, qa in enumerate(get(paragraph, "qas", list, where)):
        place = f"{where}, question {index}"
        text = get(qa, "question", str, place).strip()
        golds = dict.fromkeys(
            answer_text(get(answer, "text", str, place), place)
            for answer in get(qa, "answers", list, place)
        )
        if qa.get("is_impossible"):
            found.append(Question(text, (NONE,), type="abstention"))
        elif golds and text:
            found.append(Question(text, tuple(golds), type="single_hop"))
        else:
            raise FormatError(f"{place}: needs a question and an answer, or is_impossible: true")


def _episodes(
    contexts: list[str],
    asked: dict[str, list[Question]],
    paragraphs: int,
    most: int | None,
    name: str,
) -> Iterator[EpisodeRow]:
    for start in range(0, len(contexts), paragraphs):
        chunks = contexts[start : start + paragraphs]
        questions = [
            # An unanswerable question has no chunk that answers it.
            Question(q.q, q.answers, q.type, () if q.type == "abstention" else (index,))
            for index, context in enumerate(chunks)
            for q in asked[context]
        ]
        row_id = f"{name}-{start // paragraphs}"
        rng = random.Random(row_id)
        # Else the order of the questions would tell the chunk.
        rng.shuffle(questions)
        yield EpisodeRow(row_id, "squad", tuple(chunks), tuple(questions[:most]), metric="sub_em")
