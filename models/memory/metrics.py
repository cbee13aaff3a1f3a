"""How an answer is scored against its golds: exact match, F1, substring, keywords, numbers,
ROUGE-L, METEOR and LoCoMo's F1. Standard library only; every score lies in 0 to 1.

Texts are compared in SQuAD's normal form (lower case, no punctuation, no articles). Three things
differ from the usual scripts:

- A gold that normalises to nothing ("A", "?") is compared as it is written; the usual scripts give
  an empty answer a full score there.
- The gold `none` means that nothing can be known: an answer that abstains is right, by every
  metric, and a wordy answer that merely contains "unknown" is not (LoCoMo's own rule aside), so
  that a hedge behind each answer earns nothing.
- LoCoMo's reference stems words with NLTK's Porter stemmer before F1. Here words are compared
  whole, so "painted" does not match "painting" and scores come out slightly lower.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

Metric = Callable[[str, Sequence[str]], float]

NONE = "none"
"""The gold of a question that the stream does not answer."""

# Whole answers in normal form. "No" is none of them: it answers a question.
_ABSTENTION = re.compile(
    r"none|nothing|null|na|unanswerable|unknown|(it )?cannot be answered"
    r"|(there is )?no (answer|information)( is)?( available)?"
    r"|((it|this|that) is )?not (known|mentioned|specified|stated|available)"
    r"|(i )?(dont|do not) know"
)
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_LOCOMO_ARTICLES = re.compile(r"\b(a|an|the|and)\b")
_BOXED = re.compile(r"\\boxed\s*\{([^{}]*)\}")
# Neither a part of a word or of a longer number ("m3", "3rd", "2.5.1"), nor a date's inner dash.
_NUMBER = re.compile(r"(?<![\w.])-?(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?!\w|\.\d)", re.ASCII)


def normalize(text: str, articles: re.Pattern[str] = _ARTICLES) -> str:
    """SQuAD's normal form: lower case, without punctuation, articles and spare white space."""
    return " ".join(articles.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def abstains(prediction: str) -> bool:
    """Whether the whole answer says that there is none: empty, "none", "not mentioned", ..."""
    # Not the empty normal form: "A" is an answer.
    blank = not any(map(str.isalnum, prediction))
    return blank or _ABSTENTION.fullmatch(normalize(prediction)) is not None


def exact_match(prediction: str, golds: Sequence[str]) -> float:
    """1 if the normalised answer equals a gold, or abstains where the gold is `none`."""
    return _best(_equal, prediction, golds)


def f1(prediction: str, golds: Sequence[str]) -> float:
    """SQuAD's F1 over the words that answer and gold share, counted with repeats."""
    return _best(lambda answer, gold: _overlap(*_words(answer, gold)), prediction, golds)


def sub_em(prediction: str, golds: Sequence[str]) -> float:
    """1 if a gold stands in the answer as whole words ("Rome" in "In Rome.", not in "Romeo")."""
    return _best(lambda answer, gold: _holds(*_words(answer, gold)), prediction, golds)


def keyword_hit(prediction: str, golds: Sequence[str]) -> float:
    """Share of a gold's `;`-separated keywords that the answer contains as whole words."""

    def share(answer: str, gold: str) -> float:
        keywords = [word for word in gold.split(";") if word.strip()]
        return sum(_holds(*_words(answer, word)) for word in keywords) / max(len(keywords), 1)

    return _best(share, prediction, golds)


def number_match(prediction: str, golds: Sequence[str]) -> float:
    r"""1 if the answer holds exactly one number and it equals the gold's: "Label 7.", "7.0".

    With `\boxed{...}` in the answer only what the last box holds counts.
    """

    def same(answer: str, gold: str) -> float:
        boxes = _BOXED.findall(answer)
        said, wanted = _numbers(boxes[-1] if boxes else answer), _numbers(gold)
        return float(len(said) == 1 and said == wanted)

    return _best(same, prediction, golds)


def rouge_l(prediction: str, golds: Sequence[str]) -> float:
    """ROUGE-L's F measure (beta 1) over lower-case words, without stemming."""

    def measure(answer: str, gold: str) -> float:
        said, wanted = re.findall(r"\w+", answer.lower()), re.findall(r"\w+", gold.lower())
        # 2PR / (P + R) with P = lcs / |said| and R = lcs / |wanted|.
        return 2 * lcs(said, wanted) / max(len(said) + len(wanted), 1)

    return _best(measure, prediction, golds)


def meteor(prediction: str, golds: Sequence[str]) -> float:
    """METEOR (Banerjee and Lavie 2005) over lower-case words, without its stems and synonyms.

    With m matched words in c chunks (runs in the same order on both sides), P = m / |said| and
    R = m / |wanted|: 10PR / (R + 9P) * (1 - 0.5 (c / m)^3). The right answer of one word thus
    scores 0.5, one of three words 0.98. The fewest chunks are looked for by taking the longest run
    first, which seldom finds one more than there need be.
    """

    def measure(answer: str, gold: str) -> float:
        said, wanted = re.findall(r"\w+", answer.lower()), re.findall(r"\w+", gold.lower())
        matches, chunks = _runs(said, wanted)
        if not matches:
            return 0.0
        precision, recall = matches / len(said), matches / len(wanted)
        mean = 10 * precision * recall / (recall + 9 * precision)
        return mean * (1 - 0.5 * (chunks / matches) ** 3)

    return _best(measure, prediction, golds)


def locomo(prediction: str, golds: Sequence[str], type: str = "") -> float:
    """LoCoMo's F1 for one question of the given type (snap-research/locomo, evaluation.py).

    `multi_hop` averages, over the gold's comma-separated parts, each part's best F1 with a part of
    the answer; `open_domain` keeps the gold up to its first ";"; `adversarial`, and the gold
    `none`, want an answer with "no information available" or "not mentioned" in it, or one that
    abstains. Any other type is the plain F1. Words are not stemmed (see the module).
    """
    if type == "adversarial" or any(_is_none(gold) for gold in golds):
        said = prediction.lower()
        hit = "no information available" in said or "not mentioned" in said
        return float(hit or abstains(prediction))
    if type == "open_domain":
        golds = [gold.split(";")[0] for gold in golds]
    part = _locomo_parts if type == "multi_hop" else _locomo_f1
    return max((part(prediction, gold) for gold in golds), default=0.0)


METRICS: dict[str, Metric] = {
    "em": exact_match,
    "f1": f1,
    "sub_em": sub_em,
    "keyword_hit": keyword_hit,
    "number": number_match,
    "rouge_l": rouge_l,
    "meteor": meteor,
    "locomo": locomo,
}
"""What `metric` of an episode may be. Each takes the answer and all golds; the best gold counts."""


def score(metric: str, prediction: str, golds: Sequence[str], type: str = "") -> float:
    """The score of an answer, 0 to 1; `type` is the question's, and only `locomo` looks at it.

    Raises:
        ValueError: no such metric.
    """
    if metric == "locomo":
        return locomo(prediction, golds, type)
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    return METRICS[metric](prediction, golds)


def lcs(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    Bit-parallel (Hyyro 2004): a row of the usual table is one integer, so two summaries of a
    thousand words take a millisecond instead of a second.
    """
    places: dict[str, int] = {}
    for index, word in enumerate(right):
        places[word] = places.get(word, 0) | 1 << index
    full = (1 << len(right)) - 1
    row = full
    for word in left:
        both = row & places.get(word, 0)
        row = (row + both | row - both) & full
    return len(right) - row.bit_count()


def _runs(left: Sequence[str], right: Sequence[str]) -> tuple[int, int]:
    """(words, runs) of a one-to-one alignment of equal words: as many words as there are."""
    free_left, free_right = [True] * len(left), [True] * len(right)
    matches = runs = 0
    while True:
        best, at = 0, (0, 0)
        # row[j]: length of the common run of free words that ends before left[i] and right[j].
        row = [0] * (len(right) + 1)
        for i, word in enumerate(left):
            new = [0] * (len(right) + 1)
            for j, other in enumerate(right):
                if word == other and free_left[i] and free_right[j]:
                    new[j + 1] = row[j] + 1
                    if new[j + 1] > best:
                        best, at = new[j + 1], (i + 1, j + 1)
            row = new
        if not best:
            return matches, runs
        for back in range(1, best + 1):
            free_left[at[0] - back] = free_right[at[1] - back] = False
        matches, runs = matches + best, runs + 1


def _best(one: Callable[[str, str], float], prediction: str, golds: Sequence[str]) -> float:
    return max(
        (float(abstains(prediction) if _is_none(g) else one(prediction, g)) for g in golds),
        default=0.0,
    )


def _is_none(gold: str) -> bool:
    return normalize(gold) == NONE


def _words(prediction: str, gold: str) -> tuple[list[str], list[str]]:
    wanted = normalize(gold).split()
    if wanted:
        return normalize(prediction).split(), wanted
    return prediction.casefold().split(), gold.casefold().split()


def _equal(prediction: str, gold: str) -> float:
    said, wanted = _words(prediction, gold)
    return float(said == wanted)


def _holds(said: list[str], wanted: list[str]) -> float:
    return float(bool(wanted) and f" {' '.join(wanted)} " in f" {' '.join(said)} ")


def _overlap(said: list[str], wanted: list[str]) -> float:
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0


def _numbers(text: str) -> list[Decimal]:
    return [Decimal(found.replace(",", "")) for found in _NUMBER.findall(text)]


def _locomo_f1(prediction: str, gold: str) -> float:
    said, wanted = (normalize(text, _LOCOMO_ARTICLES).split() for text in (prediction, gold))
    return _overlap(said, wanted)


def _locomo_parts(prediction: str, gold: str) -> float:
    said, wanted = prediction.split(","), gold.split(",")
    return sum(max(_locomo_f1(s, w) for s in said) for w in wanted) / len(wanted)
