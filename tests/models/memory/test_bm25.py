"""BM25: its closed formula, the small store where the textbook's idf fails, changes in place; and
the larger indexes of retrieve.py against it."""

import math
import random
import sys
import warnings

import pytest

from mnemic.models.memory import retrieve
from mnemic.models.memory.bm25 import BM25, words
from mnemic.models.memory.retrieve import DenseIndex, FastBM25, Hybrid, SentenceEncoder
from mnemic.models.memory.stores import make_store

SMALL = ["anna city rome", "anna city oslo", "anna pet cat"]


def filled(index, texts):
    for i, text in enumerate(texts):
        index.put(f"m{i}", text)
    return index


def corpus(count, seed=0, vocabulary=40):
    rng = random.Random(seed)
    return [
        " ".join(f"w{int(rng.paretovariate(0.7)) % vocabulary}" for _ in range(rng.randint(1, 9)))
        for _ in range(count)
    ]


def closed_formula(texts, query, k1=1.2, b=0.75):
    documents = [words(t) for t in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = {}
    for i, document in enumerate(documents):
        for word in set(words(query)) & set(document):
            n = sum(word in d for d in documents)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            tf = document.count(word)
            gain = idf * tf / (tf + k1 * (1 - b + b * len(document) / mean))
            scores[f"m{i}"] = scores.get(f"m{i}", 0) + gain
    return scores


def test_scores_are_the_closed_formula():
    texts = [*corpus(30), "w1 w1 w1 w2", ""]
    for query in ("w1", "w1 w2 w3 w1 unknown", "unknown", ""):
        scores = filled(BM25(), texts).scores(query)
        assert scores == pytest.approx(closed_formula(texts, query), rel=1e-12)


def test_a_word_in_every_entry_still_counts():
    """The textbook's idf makes the third, which has one word of two, the best."""
    index = filled(BM25(), SMALL)
    assert index.search("anna city", 3) == ["m0", "m1", "m2"]
    scores = index.scores("anna city")
    assert scores["m0"] > 3 * scores["m2"] > 0


def test_words():
    assert words("Anna's snake_case, Z\u00fcrich\u2019s 3rd!") == [
        "anna", "snake", "case", "z\u00fcrich", "3rd",
    ]  # fmt: skip


@pytest.mark.parametrize("make", [BM25, lambda: FastBM25(threshold=2, patience=0)])
def test_changed_in_place_equals_built_anew(make):
    rng, texts, index = random.Random(1), {}, make()
    for step, text in enumerate(corpus(300, seed=2)):
        key = f"m{rng.randint(0, 60)}"
        if rng.random() < 0.3:
            index.remove(key)
            texts.pop(key, None)
        else:
            index.put(key, text)
            texts[key] = text
        if step % 20 == 0:
            anew = BM25()
            for k, t in texts.items():
                anew.put(k, t)
            assert len(index) == len(texts)
            assert index.scores("w1 w3 w5") == anew.scores("w1 w3 w5")
            assert index.search("w1 w3 w5", 9) == anew.search("w1 w3 w5", 9)


def test_of_equals_the_first_comes_first_even_when_it_was_replaced():
    index = filled(BM25(), ["x a", "x b", "x c"])
    index.put("m0", "x d")
    assert index.search("x", 2) == ["m0", "m1"] and index.search("x", 0) == []


def test_bm25s_gives_the_same_answers():
    pytest.importorskip("bm25s")
    texts = corpus(400, vocabulary=25)
    own, fast = filled(BM25(), texts), filled(FastBM25(threshold=100, patience=2), texts)
    for query in ("w1", "w2 w7", "w3 w3 unknown w9 w11", "unknown", "", "w24"):
        for k in (1, 8, 399, 400, 1000):
            assert fast.search(query, k) == own.search(query, k)
    assert fast._fast is not None
    fast.put("m1", "w1 w1")
    assert fast._fast is None, "an index that is out of date must not answer"
    own.put("m1", "w1 w1")
    assert fast.search("w1", 8) == own.search("w1", 8)


def test_bm25s_is_asked_where_it_pays(monkeypatch):
    class Fails:
        def get_scores(self, known):
            raise InterruptedError

    index = filled(FastBM25(threshold=5, patience=3), corpus(5))
    monkeypatch.setattr(FastBM25, "_build", lambda self: setattr(self, "_fast", Fails()))
    for _ in range(3):
        index.search("w1", 2)
    with pytest.raises(InterruptedError):
        index.search("w1", 2)
    index.remove("m4")
    for _ in range(9):
        index.search("w1", 2)


def test_without_bm25s_our_own_answers_and_one_warning_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    retrieve._import_bm25s.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                index = filled(FastBM25(threshold=2, patience=0), SMALL)
                assert index.search("anna city", 2) == ["m0", "m1"]
        assert len(caught) == 1 and "pip install bm25s" in str(caught[0].message)
    finally:
        retrieve._import_bm25s.cache_clear()


class Letters:
    """A tokenizer of letters, right-padded."""

    def __call__(self, texts, *, max_length, **_):
        import torch
        from transformers import BatchEncoding

        rows = [[1 + ord(c) % 60 for c in text[:max_length]] or [1] for text in texts]
        width = max(map(len, rows))
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        ids = [row + [0] * (width - len(row)) for row in rows]
        return BatchEncoding({"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)})


@pytest.fixture(scope="module")
def encoder():
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=64,
    )  # fmt: skip
    return SentenceEncoder(BertModel(config).train(), Letters(), max_length=32, batch_size=2)


def test_vectors_are_the_mean_over_a_text_s_own_tokens(encoder):
    import torch

    texts = ["anna", "anna lives in rome", "x"]
    vectors = encoder.encode(texts)
    assert encoder.model.training, "the caller's mode is given back"
    encoder.model.eval()
    for text, vector in zip(texts, vectors, strict=True):
        ids = Letters()([text], max_length=32)["input_ids"]
        with torch.no_grad():
            mean = encoder.model(ids).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=0)
    encoder.model.train()
    with pytest.raises(ValueError, match="tokenizer"):
        SentenceEncoder(encoder.model)


def test_dense_finds_the_nearest_and_follows_changes(encoder):
    index = filled(DenseIndex(encoder), ["anna lives in rome", "zzzz", "bob has a cat", "12345"])
    assert index.search("zzzz", 1) == ["m1"] and len(index.search("q", 9)) == len(index) == 4
    index.remove("m1")
    index.remove("m1")
    index.put("m3", "zzzz")
    assert index.search("zzzz", 1) == ["m3"] and len(index) == 3
    assert DenseIndex(encoder).search("x", 3) == []
    small = SentenceEncoder(encoder.model, Letters(), remember=2)
    assert small.encode(["a", "b", "c"]).shape == (3, 16) and len(small._known) == 2


def test_an_encoder_folder_is_loaded_once(encoder, tmp_path):
    from transformers import BertTokenizerFast

    (tmp_path / "v.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nanna\nrome\n")
    BertTokenizerFast(str(tmp_path / "v.txt")).save_pretrained(tmp_path)
    encoder.model.save_pretrained(tmp_path)
    one, two = DenseIndex(tmp_path), DenseIndex(str(tmp_path))
    assert one.encoder.model is two.encoder.model
    assert filled(one, ["anna", "rome"]).search("rome", 1) == ["m1"]


def test_hybrid_adds_reciprocal_ranks(encoder):
    class Fixed:
        def __init__(self, *keys):
            self.keys, self.put, self.remove = list(keys), None, None

        def __len__(self):
            return len(self.keys)

        def search(self, query, k):
            return self.keys[:k]

    hybrid = Hybrid(Fixed("a", "b", "c"), Fixed("c", "b", "d"), c=1)
    # a 1/2; b 1/3 + 1/3; c 1/4 + 1/2; d 1/4.
    assert hybrid.search("", 9) == ["c", "b", "a", "d"] and hybrid.search("", 1) == ["c"]
    with pytest.raises(ValueError, match="at least one"):
        Hybrid()
    store = make_store("typed", index=lambda: Hybrid(BM25(), DenseIndex(encoder)))
    for text in SMALL:
        store.insert(text)
    store.delete("m0")
    assert [e.id for e in store.search("anna city oslo", 3)] == ["m1", "m2"]
    assert [e.id for e in store.without(9).search("anna city oslo", 1)] == ["m1"]
