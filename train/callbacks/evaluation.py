"""Held-out loss and exact match during the run; early stop and the best checkpoint go by them."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mnemic.models.adapter_budget import bytes_of_store
from mnemic.train.callbacks.base import Callback, MetricsRow
from mnemic.train.checkpoint import write_atomic
from mnemic.train.data.collate import by_operation, chunks_of, collate
from mnemic.train.data.tokenize import Example
from mnemic.train.generate import generate_greedy
from mnemic.train.objectives.base import Objective
from mnemic.train.rollout.evaluate import Player, sums

if TYPE_CHECKING:
    from mnemic.train.trainer import Trainer

log = logging.getLogger("mnemic")


@dataclass(frozen=True, slots=True)
class Probe:
    """A prompt to generate from and the text a good model answers."""

    prompt: list[int]
    reference: str
    operation: str | None = None
    """The expert of an adapter bank that answers."""


class EvaluationCallback(Callback):
    """Adds `eval/loss` (mean over held-out trained tokens), with probes `eval/exact_match`, and
    with a player `eval/r1` and what was done to memories; each where it has something to measure.
    With a bank of adapters also `eval/exact_match/<operation>`.

    Exact match compares whole texts, white space at both ends aside. Rows are shared out over the
    ranks. Episodes played go to episodes.jsonl beside the samples, those of the last evaluation.
    """

    name = "evaluation"

    def __init__(
        self,
        objective: Objective,
        examples: Sequence[Example],
        probes: Sequence[Probe],
        *,
        tokenizer: Any,
        every: int,
        at_start: bool,
        batch_size: int,
        max_new_tokens: int,
        metric: str,
        patience: int | None,
        samples: Path,
        player: Player | None = None,
    ) -> None:
        self.objective, self.examples, self.probes = objective, examples, probes
        self.tokenizer, self.every, self.at_start = tokenizer, every, at_start
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.metric, self.patience, self.samples = metric, patience, samples
        self.player = player
        self.store_bytes = 0
        """The largest memory of the last episodes played."""
        self.best: float | None = None
        self.best_step = 0
        self.without_gain = 0
        self.first: dict[str, float] = {}
        self.latest: dict[str, float] = {}

    def on_start(self, trainer: "Trainer") -> None:
        if self.patience and self.without_gain >= self.patience:
            trainer.stop(self._reason())

    def on_step(self, trainer: "Trainer", row: MetricsRow) -> None:
        step = row["step"]
        if not (
            self.at_start if step == 0 else step % self.every == 0 or step == trainer.total_steps
        ):
            return
        found = self.evaluate(trainer, step)
        row.update(found)
        self.latest = {k: v for k, v in found.items() if not k.startswith("perf/")}
        self.first = self.first or {"step": step, **self.latest}
        self._judge(trainer, step)

    def _judge(self, trainer: "Trainer", step: int) -> None:
        value = self.latest[self.metric]
        gain = (
            value < self.best
            if self.best is not None and self.metric == "eval/loss"
            else (self.best is None or value > self.best)
        )
        if gain:
            self.best, self.best_step, self.without_gain = value, step, 0
            if step:
                trainer.protected_steps = {step}
                trainer.save_requested = True
        elif self.patience:
            self.without_gain += 1
            if self.without_gain >= self.patience:
                trainer.stop(self._reason())

    def _reason(self) -> str:
        best = f"best at step {self.best_step}"
        return f"{self.metric} did not improve in {self.patience} evaluations ({best})"

    @torch.no_grad()
    def evaluate(self, trainer: "Trainer", step: int) -> dict[str, float]:
        """Metrics of the present model; also used outside the loop."""
        start = time.perf_counter()
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        model = trainer.module
        model.eval()
        pad_id = self.tokenizer.pad_token_id
        loss = weight = 0.0
        for chunk, counts in self._batches(trainer, rank, world):
            batch = collate(chunk, pad_id=pad_id, packed=False)
            with trainer.autocast():
                value, _ = self.objective.loss(model, batch.to(trainer.accelerator.device))
            loss, weight = loss + counts * float(value), weight + counts * batch.weight
        # A model in shards writes on all ranks together: all ask the same, and the first counts.
        mine = list(self.probes) if trainer.sharded else list(self.probes)[rank::world]
        texts = self._answers(trainer, model, mine)
        counts = trainer.is_main or not trainer.sharded
        right = [
            counts and t.strip() == p.reference.strip() for t, p in zip(texts, mine, strict=True)
        ]
        named = sorted({probe.operation for probe in self.probes if probe.operation is not None})
        own = [
            float(sum(hit for hit, p in zip(right, mine, strict=True) if p.operation == operation))
            for operation in named
        ]
        loss, weight, matches, *own = trainer.sum_over_ranks(
            [loss, weight, float(sum(right)), *own]
        )
        found = {"eval/loss": loss / weight} if self.examples else {}
        if self.player:
            found |= self._play(trainer, self.player, step)
        model.train()
        if self.probes:
            found["eval/exact_match"] = matches / len(self.probes)
            for operation, hits in zip(named, own, strict=True):
                count = sum(probe.operation == operation for probe in self.probes)
                found[f"eval/exact_match/{operation}"] = hits / count
            if trainer.is_main:
                self._write_samples(step, mine, texts)
        found["perf/eval_seconds"] = time.perf_counter() - start
        return found

    def _batches(
        self, trainer: "Trainer", rank: int, world: int
    ) -> list[tuple[list[Example], bool]]:
        """This rank's rows in batches, and whether they count. Each forward of a model in shards
        gathers weights from all ranks, so one with fewer batches runs another that does not count.
        """
        rows = sorted(self.examples, key=lambda e: len(e.input_ids))
        shares = [
            chunks_of(rows[r::world], self.batch_size, 1, lambda row: row.operation)
            for r in range(world)
        ]
        own = [(chunk, True) for chunk in shares[rank]]
        if trainer.sharded and shares[0]:
            most = max(len(share) for share in shares)
            own += [(shares[0][0], False)] * (most - len(own))
        return own

    def _answers(self, trainer: "Trainer", model: Any, probes: list[Probe]) -> list[str]:
        """Greedy, in the order of `probes`; those of an operation by its expert."""
        texts = [""] * len(probes)
        for operation, own in by_operation(list(enumerate(probes)), lambda p: p[1].operation):
            if operation is not None:
                model.expert_bank.activate(operation)
            with trainer.autocast():
                found = generate_greedy(
                    model, self.tokenizer, [probe.prompt for _, probe in own],
                    max_new_tokens=self.max_new_tokens, batch_size=self.batch_size,
                )  # fmt: skip
            for (index, _), text in zip(own, found, strict=True):
                texts[index] = text
        return texts

    def _play(self, trainer: "Trainer", player: Player, step: int) -> dict[str, float]:
        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        with trainer.autocast():
            played = player.play(rank, world)
        self.store_bytes = max((bytes_of_store(p.episode.store) for p in played), default=0)
        names = list(sums(played))
        total = dict(zip(names, trainer.sum_over_ranks(list(sums(played).values())), strict=True))
        if trainer.is_main:
            lines = [json.dumps({"step": step, **p.trace()}, ensure_ascii=False) for p in played]
            path = self.samples.with_name("episodes.jsonl")
            write_atomic(path, "".join(line + "\n" for line in lines[:64]).encode())
        episodes = total.pop("episodes")
        return {f"eval/{key}": value / episodes for key, value in total.items()}

    def _write_samples(self, step: int, probes: list[Probe], texts: list[str]) -> None:
        with self.samples.open("a", encoding="utf-8") as file:
            for probe, text in zip(probes[:8], texts, strict=False):
                prompt = self.tokenizer.decode(probe.prompt, skip_special_tokens=False)
                sample = {
                    "step": step,
                    "prompt": prompt,
                    "reference": probe.reference,
                    "generated": text,
                }
                file.write(json.dumps(sample, ensure_ascii=False) + "\n")

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_step": self.best_step,
            "without_gain": self.without_gain,
            "first": self.first,
            "latest": self.latest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self.without_gain, self.first, self.latest = (
            state["without_gain"],
            state["first"],
            state["latest"],
        )
