"""What a memory can be searched with past a small store: one protocol, `Index`, and three of them
beside bm25.py, which is the default.

`FastBM25` gives BM25's own answers sooner in a store of thousands, by bm25s (PyPI, MIT, optional).
`DenseIndex` compares mean-pooled vectors of any sentence encoder, by plain transformers. `Hybrid`
fuses rankings by reciprocal rank (Cormack et al. 2009). All are updated in place by `Memory`; what
is costly waits for the next search.
"""

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from mnemic.models.memory.bm25 import BM25, words

if TYPE_CHECKING:
    from torch import Tensor


class Index(Protocol):
    """Texts by key. Ties are decided the same way every time."""

    def put(self, key: str, text: str) -> None:
        """Add a text, or replace it."""
        ...

    def remove(self, key: str) -> None:
        """Forget a text; nothing where there is none."""
        ...

    def search(self, query: str, k: int) -> list[str]:
        """At most `k` keys, best first."""
        ...

    def __len__(self) -> int: ...


class FastBM25(BM25):
    """BM25 that from `threshold` documents on asks bm25s which could be the best, and scores only
    those itself: the same answers, ties included.

    bm25s cannot be changed in place, so it is built when `patience` searches have followed each
    other with no change between them; until then, and without bm25s, it is BM25 itself. Measured
    with 14-word texts on one core, BM25 against this, and the searches that repay building: 500
    texts 0.2 / 0.15 ms (289), 2,000 1.0 / 0.2 ms (84), 20,000 20 / 0.3 ms (27).
    """

    def __init__(
        self, k1: float = 1.2, b: float = 0.75, *, threshold: int = 2000, patience: int = 32
    ) -> None:
        super().__init__(k1, b)
        self.threshold, self.patience = threshold, patience
        self._fast: Any = None
        self._keys: list[str] = []
        self._searches = 0

    def remove(self, key: str) -> None:
        """Also part of `put`, which so comes here too."""
        super().remove(key)
        self._fast, self._searches = None, 0

    def search(self, query: str, k: int, only: Any = None) -> list[str]:
        if only is None and 0 < k < len(self) and len(self) >= self.threshold:
            self._searches += 1
            if self._fast is None and self._searches > self.patience:
                self._build()
            if self._fast is not None:
                only = self._candidates(query, k)
        return super().search(query, k, only)

    def _build(self) -> None:
        bm25s = _import_bm25s()
        if bm25s is None:
            return
        self._keys = list(self._documents)
        corpus = [list(counts.elements()) for counts in self._documents.values()]
        self._fast = bm25s.BM25(k1=self.k1, b=self.b, method="lucene", dtype="float64")
        self._fast.index(corpus, show_progress=False)

    def _candidates(self, query: str, k: int) -> list[str]:
        import numpy as np

        known = [w for w in dict.fromkeys(words(query)) if w in self._holders]
        if not known:
            return []
        scores = self._fast.get_scores(known)
        # Sums in another order differ in the last bits: what is that near the k-th may be better.
        bound = np.partition(scores, -k)[-k] * (1 - 1e-6)
        return [self._keys[i] for i in np.flatnonzero(scores >= max(bound, 1e-12))]


@lru_cache(maxsize=1)
def _import_bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        warnings.warn(
            "bm25s is not installed (pip install bm25s): large memories are searched with the "
            "slower BM25 of this package",
            stacklevel=5,
        )
        return None
    return bm25s


class SentenceEncoder:
    """Texts to unit vectors of float32: the mean of the last hidden states over a text's tokens.

    `model` is a folder (or a name in the local hub cache) or a loaded encoder, then with its
    `tokenizer`. Text past `max_length` tokens is cut. The last `remember` vectors are kept, because
    copies of a memory ask for the same texts again.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_length: int = 256,
        batch_size: int = 32,
        remember: int = 16384,
    ) -> None:
        if isinstance(model, str) or hasattr(model, "__fspath__"):
            model, loaded = _load(str(model))
            tokenizer = tokenizer or loaded
        elif tokenizer is None:
            raise ValueError("an encoder given as a model needs its tokenizer too")
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.batch_size, self.remember = max_length, batch_size, remember
        self._known: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, texts: Sequence[str]) -> "Tensor":
        """Unit vectors, [len(texts), hidden], on the CPU."""
        import torch

        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        fresh: dict[str, Tensor] = {}
        for start in range(0, len(new), self.batch_size):
            batch = new[start : start + self.batch_size]
            fresh.update(zip(batch, self._encode(batch), strict=True))
        found = torch.stack([fresh[t] if t in fresh else self._known[t] for t in texts])
        for text in texts:
            self._known[text] = fresh[text] if text in fresh else self._known[text]
            self._known.move_to_end(text)
        while len(self._known) > self.remember:
            self._known.popitem(last=False)
        return found

    def _encode(self, texts: list[str]) -> "Tensor":
        import torch

        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                batch = self.tokenizer(
                    texts, padding=True, truncation=True, max_length=self.max_length,
                    return_tensors="pt",
                ).to(self.model.device)  # fmt: skip
                hidden = self.model(**batch).last_hidden_state.float()  # [B, T, hidden]
        finally:
            self.model.train(training)
        mask = batch["attention_mask"].unsqueeze(-1).float()  # [B, T, 1]
        mean = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu()


@lru_cache(maxsize=2)
def _load(path: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    return AutoModel.from_pretrained(path), AutoTokenizer.from_pretrained(path)


class DenseIndex:
    """Nearest texts by cosine; every text is found, however far. `path_or_model` as in
    `SentenceEncoder`, or one that several indexes share: `lambda: DenseIndex(encoder)`.

    New texts are encoded in batches at the next search. Rankings are those of float32: two texts
    closer than its rounding may change places with the batch they were encoded in.
    """

    def __init__(self, path_or_model: Any, tokenizer: Any = None, **options: Any) -> None:
        shared = isinstance(path_or_model, SentenceEncoder)
        self.encoder = (
            path_or_model if shared else SentenceEncoder(path_or_model, tokenizer, **options)
        )
        self._texts: dict[str, str] = {}
        self._vectors: dict[str, Tensor] = {}
        self._matrix: Tensor | None = None

    def __len__(self) -> int:
        return len(self._texts)

    def put(self, key: str, text: str) -> None:
        if self._texts.get(key) != text:
            self._texts[key] = text
            self._vectors.pop(key, None)
            self._matrix = None

    def remove(self, key: str) -> None:
        if self._texts.pop(key, None) is not None:
            self._vectors.pop(key, None)
            self._matrix = None

    def search(self, query: str, k: int) -> list[str]:
        import torch

        if not self._texts or k <= 0:
            return []
        missing = [key for key in self._texts if key not in self._vectors]
        if missing:
            rows = self.encoder.encode([self._texts[key] for key in missing])
            self._vectors.update(zip(missing, rows, strict=True))
        if self._matrix is None:
            self._matrix = torch.stack([self._vectors[key] for key in self._texts])
        scores = self._matrix @ self.encoder.encode([query])[0]
        order = torch.argsort(scores, descending=True, stable=True)[:k].tolist()
        keys = list(self._texts)
        return [keys[i] for i in order]


class Hybrid:
    """Reciprocal-rank fusion: a text scores the sum of 1 / (c + rank) over the indexes that find it
    among their first `depth`. Of equals, the one that an earlier index put first.
    """

    def __init__(self, *indexes: Index, c: float = 60.0, depth: int = 100) -> None:
        if not indexes:
            raise ValueError("a hybrid index needs at least one index")
        self.indexes, self.c, self.depth = indexes, c, depth

    def __len__(self) -> int:
        return len(self.indexes[0])

    def put(self, key: str, text: str) -> None:
        for index in self.indexes:
            index.put(key, text)

    def remove(self, key: str) -> None:
        for index in self.indexes:
            index.remove(key)

    def search(self, query: str, k: int) -> list[str]:
        found: dict[str, float] = {}
        for index in self.indexes:
            for rank, key in enumerate(index.search(query, max(k, self.depth)), 1):
                found[key] = found.get(key, 0.0) + 1 / (self.c + rank)
        return sorted(found, key=lambda key: -found[key])[:k]
