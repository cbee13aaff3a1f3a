"""Forced tokens for `rollout_worker.py`: scripts in the place of samples, and what they cost."""

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mnemic.models.memory.operations import Insert
from mnemic.models.memory.syntax import make_syntax

MARK, LAST = "new:\n", "end"
CALL = '<tool_call>{"name": "next_chunk", "arguments": {}}</tool_call>'


class Force:
    """A logits processor that leaves one token of each row: `forced` (B, T) int64."""

    def __init__(self, forced: torch.Tensor, start: int) -> None:
        self.forced, self.start = forced, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        column = self.forced[:, input_ids.shape[1] - self.start, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, column, 0.0)


class Script:
    """Stands in for `model.generate`: the same call, with one more logits processor at the end."""

    def __init__(self, model: Any, tokenizer: Any, args: argparse.Namespace) -> None:
        self.tokenizer, self.size, self.real = tokenizer, args.new_tokens, model.generate
        self.lines = args.arm == "mnemic lines"
        self.syntax = make_syntax("lines" if self.lines else "tools")
        self.tail = CALL if args.arm == "trl" else ""
        (self.filler,) = tokenizer(".").input_ids
        self.seen: Counter[str] = Counter()
        self.spent = 0.0
        self.generated = self.prefilled = 0
        model.generate = self

    def __call__(self, *args: Any, logits_processor: Any = None, **kwargs: Any) -> Any:
        begun = time.process_time()
        prompts = kwargs["input_ids"]
        made = [self.ids(row.tolist()) for row in prompts]
        start, eos = prompts.shape[1], self.tokenizer.eos_token_id
        # One column past the end: rows that ended are asked again while others go on.
        forced = torch.full((len(made), max(map(len, made)) + 1), eos)
        for row, ids in zip(forced, made, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        self.generated += sum(map(len, made))
        self.prefilled += int(kwargs["attention_mask"].sum())

        self.spent += time.process_time() - begun
        processors = [*(logits_processor or []), Force(forced, start)]
        return self.real(*args, logits_processor=processors, **kwargs)

    def ids(self, prompt: list[int]) -> list[int]:
        """The completion of one prompt."""
        text = self.tokenizer.decode(prompt, skip_special_tokens=False)
        end = [self.tokenizer.eos_token_id]
        chunk = text.rpartition(MARK)[2].partition("<|end|>")[0].partition("\nops:")[0]
        if text.endswith(f"{LAST}<|end|>\n<|assistant|>\n"):
            return end  # the closing turn of a finished conversation
        self.seen[chunk] += 1
        draw = random.Random(f"{chunk}/{self.seen[chunk]}")
        lines = chunk.splitlines()
        chosen = sorted(draw.sample(range(len(lines)), 2))
        calls = self.syntax.write([Insert(content=lines[i]) for i in chosen])
        ids = self.tokenizer(f"{calls}\n{self.tail}" if self.tail else calls).input_ids
        if self.lines:
            return ids + end
        room = self.size - 1 - len(ids)
        if room < 0:
            raise SystemExit(f"--new-tokens {self.size}: a script takes {len(ids) + 1}")
        return ids + [self.filler] * room + end


@dataclass
class Meter:
    """CPU seconds and tokens of each step; `rollout` is called around what makes the rows."""

    script: Script
    steps: list[dict[str, float]] = field(default_factory=list)
    now: dict[str, float] = field(default_factory=dict)
    last: tuple[float, float, float, float] | None = None

    def mark(self) -> tuple[float, float, float, float]:
        seen = self.script
        return time.process_time(), seen.spent, seen.generated, seen.prefilled

    def rollout(self, run: Callable[..., Any], *args: Any) -> Any:
        if self.last is None:
            self.last = self.mark()
        before = self.mark()
        found = run(*args)
        after = self.mark()
        self.now["rollout"] = after[0] - before[0] - (after[1] - before[1])
        return found

    def end(self) -> None:
        """A step is over; what lies between two steps belongs to the later one."""
        assert self.last is not None
        now = self.mark()
        seconds, spent, generated, prefilled = (b - a for a, b in zip(self.last, now, strict=True))
        self.steps.append({
            **self.now, "seconds": seconds - spent, "generated": generated, "prefilled": prefilled,
        })  # fmt: skip
        self.last, self.now = now, {}
