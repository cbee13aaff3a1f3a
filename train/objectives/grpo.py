"""Objective `grpo`: reinforcement learning of a memory manager by the outcome of whole episodes.

Each step draws episodes, plays each `num_generations` times by the present policy, has the
questions answered from the memories that resulted, turns rewards into advantages within each group,
and trains on every chunk's prompt and completion as a row of its own: the contexts the policy
really acts in. Rank r plays rollouts r, r + world, ...; rewards are shared, so groups are whole.
What a rollout samples depends on (seed, step, rollout, turn) alone.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mnemic.models.lora import adapters_off
from mnemic.models.memory.answer import Answerer
from mnemic.models.memory.episode import MemoryConfig, MemoryEpisode
from mnemic.train.data.collate import Batch
from mnemic.train.data.memory.episode import EpisodeRow
from mnemic.train.data.stream import Stage, take
from mnemic.train.objectives.base import Objective, TokenBatch
from mnemic.train.objectives.policy import PREFIX, PolicyRow, policy_batch, policy_loss
from mnemic.train.objectives.tokens import token_batch, token_logprobs
from mnemic.train.recipe.memory import GrpoObjective, Rewards
from mnemic.train.rollout.credit import advantages
from mnemic.train.rollout.curriculum import Curriculum, Priority
from mnemic.train.rollout.play import Generator, TurnRow, ask_all, play
from mnemic.train.rollout.rewards import Outcome, correct, gate_compression, outcome

_TRIES = 3
"""Rollouts drawn anew where no group of a step differs in reward."""


@dataclass(frozen=True)
class Ranks:
    """How rewards are shared: `gather` gives every rank's object to all, in rank order."""

    rank: int = 0
    world: int = 1
    gather: Callable[[Any], list[Any]] = lambda own: [own]


class PolicyObjective(Objective):
    """GRPO on memory episodes. `model` is the one that is trained, without wrappers; `reference`
    gives its KL reference in a context (adapters off), or is another model.
    """

    def __init__(
        self,
        stream: Stage[EpisodeRow],
        part: GrpoObjective,
        memory: MemoryConfig,
        *,
        model: Any,
        reference: Any,
        generator: Generator,
        answerer: Answerer,
        tokenizer: Any,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
        device: Any = "cpu",
        autocast: Callable[[], Any] = nullcontext,
        ranks: Ranks | None = None,
        curriculum: Curriculum | None = None,
    ) -> None:
        self.stream, self.part, self.memory = stream, part, memory
        self.model, self.reference = model, reference
        self.generator, self.answerer, self.tokenizer = generator, answerer, tokenizer
        self.batch_size, self.micro = batch_size, micro_batch_size
        self.seed, self.device, self.autocast = seed, device, autocast
        self.ranks = ranks or Ranks()
        self.rows: list[PolicyRow] = []
        self.uses = 0
        self._metrics: dict[str, float] = {}
        self.curriculum = curriculum
        self.priority = Priority(**part.priority.model_dump()) if part.priority else None

    def microbatches(self, step: int) -> list[Batch]:
        if self.uses == 0:
            self._collect(step)
        self.uses = (self.uses + 1) % self.part.reuse
        return self._batches()

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return self.loss_of(token_logprobs(model, self.tokens(batch)), batch)

    def tokens(self, batch: Batch) -> TokenBatch:
        own = {k: v for k, v in batch.tensors.items() if not k.startswith(PREFIX)}
        return token_batch(Batch(own, batch.weight))

    def loss_of(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        part = self.part
        return policy_loss(
            logprobs, batch, clip_low=part.clip_low, clip_high=part.clip_high, beta=part.beta
        )

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        held = [asdict(row) for row in self.rows] if self.uses else []
        return {
            "stream": self.stream.state_dict(), "rows": held, "uses": self.uses,
            "metrics": dict(self._metrics),
            "curriculum": self.curriculum.state_dict() if self.curriculum else {},
            "priority": self.priority.state_dict() if self.priority else {},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])
        self.rows = [PolicyRow(**row) for row in state["rows"]]
        self.uses, self._metrics = state["uses"], dict(state["metrics"])
        if self.curriculum:
            self.curriculum.load_state_dict(state["curriculum"])
        if self.priority:
            self.priority.load_state_dict(state["priority"])

    def _collect(self, step: int) -> None:
        """Rollouts with their advantages into `self.rows`, drawn anew where nothing differed."""
        self.generator.prepare()
        for attempt in range(_TRIES):
            self.rows = self._rollout(step, attempt)
            (any_rows,) = self._sum([float(len(self.rows))])
            if any_rows:
                break
        self._metrics["rollout/tries"] = float(attempt + 1)
        if self.part.reuse > 1:
            self._annotate("old")
        if self.part.beta:
            self._annotate("reference")

    def _rollout(self, step: int, attempt: int) -> list[PolicyRow]:
        part, ranks = self.part, self.ranks
        size = part.num_generations
        groups = self.batch_size // size
        if self.priority:
            drawn = self.priority.choose(take(self.stream, groups * self.priority.pool), groups)
        else:
            drawn = take(self.stream, groups)
        asked = [self._questions(row, step, i) for i, row in enumerate(drawn)]
        mine = range(ranks.rank, self.batch_size, ranks.world)
        episodes = [
            MemoryEpisode(drawn[n // size].chunks, [q.q for q in drawn[n // size].questions],
                          self.memory)
            for n in mine
        ]  # fmt: skip
        with self.autocast():
            turns = play(
                episodes, self.generator, self.tokenizer,
                max_length=part.max_length, max_new_tokens=self.memory.max_new_tokens,
                seeds=[f"{self.seed}/{step}/{attempt}/{n}" for n in mine],
            )  # fmt: skip
            chosen = [asked[n // size] for n in mine]
            answers = ask_all(episodes, chosen, self.answerer)
            outcomes = [
                outcome(e, drawn[n // size], questions, said, budget=part.rewards.budget)
                for e, n, questions, said in zip(episodes, mine, chosen, answers, strict=True)
            ]
            if part.rewards.counterfactual:
                self._counterfactual(episodes, drawn, list(mine), chosen, outcomes)
        stats = [_figures(e) for e in episodes]
        every = self._share(list(zip(mine, outcomes, stats, strict=True)))
        results = [o for _, o, _ in every]
        self._report(results, [figures for *_, figures in every])
        if self.priority:
            for i, row in enumerate(drawn):
                group = results[i * size : (i + 1) * size]
                self.priority.observe(row.id, sum(o.correct for o in group) / size)
        return self._credit(turns, list(mine), results)

    def _questions(self, row: EpisodeRow, step: int, index: int) -> list[int]:
        count = len(row.questions)
        if count <= self.part.max_questions:
            return list(range(count))
        draw = random.Random(f"{self.seed}/{step}/{index}")
        return sorted(draw.sample(range(count), self.part.max_questions))

    def _counterfactual(
        self, episodes: list[MemoryEpisode], drawn: list[EpisodeRow], mine: list[int],
        chosen: list[list[int]], outcomes: list[Outcome],
    ) -> None:  # fmt: skip
        """r7: answers from each memory as if one turn had written nothing."""
        asks, owners = [], []
        for number, (episode, questions) in enumerate(zip(episodes, chosen, strict=True)):
            for t, turn in enumerate(episode.turns):
                if turn.result.changes:
                    every = episode.asks(episode.store.without(t))
                    asks += [every[i] for i in questions]
                    owners.append((number, t))
            outcomes[number].counterfactual = [0.0] * len(episode.turns)
        answers = iter(self.answerer.answer(asks))
        for number, t in owners:
            row, questions = drawn[mine[number] // self.part.num_generations], chosen[number]
            said = [next(answers) for _ in questions]
            scores = correct(row, questions, said)
            without = sum(scores) / max(1, len(scores))
            outcomes[number].counterfactual[t] = outcomes[number].correct - without

    def _credit(
        self, turns: Sequence[TurnRow], mine: list[int], outcomes: list[Outcome]
    ) -> list[PolicyRow]:
        """Training rows of this rank; those of groups without any difference are left out."""
        part, size = self.part, self.part.num_generations
        found: list[list[float]] = []
        for first in range(0, self.batch_size, size):
            found += group_advantages(outcomes[first : first + size], part)
        rows = []
        for turn in turns:
            number = mine[turn.episode]
            advantage = found[number][turn.turn]
            first = number // size * size
            idle = not any(any(row) for row in found[first : first + size])
            if idle or (advantage == 0.0 and not part.beta):
                continue
            factor = 1.0 / len(found[number]) if part.equal_episodes else 1.0
            rows.append(PolicyRow(turn.prompt, turn.completion, advantage, factor))
        return rows

    def _batches(self) -> list[Batch]:
        """Micro-batches of rows of like length; as many on every rank, the last ones of no weight
        where a rank has fewer rows.
        """
        rows = sorted(self.rows, key=lambda r: len(r.prompt) + len(r.completion))
        chunks = [rows[i : i + self.micro] for i in range(0, len(rows), self.micro)]
        most = max(self.ranks.gather(len(chunks)))
        batches = [self._batch(chunk) for chunk in chunks]
        eos = self.tokenizer.eos_token_id
        while len(batches) < max(1, most):
            spare = self._batch([PolicyRow([eos], [eos], 0.0, 0.0, [0.0], [0.0])])
            batches.append(spare)
        if most == 0:
            # No group of any rank differed: a step that changes nothing but the schedule.
            batches[0].weight = 1.0 / self.ranks.world
        return batches

    def _batch(self, rows: list[PolicyRow]) -> Batch:
        return policy_batch(
            rows, loss=self.part.loss, constant=self.memory.max_new_tokens,
            pad_id=self.tokenizer.pad_token_id,
        )  # fmt: skip

    @torch.no_grad()
    def _annotate(self, key: str) -> None:
        """Log-probabilities of the rows under the present policy (`old`) or the reference."""
        model, context = self.model, nullcontext()
        if key == "reference":
            if self.reference is None:
                context = adapters_off(model)
            else:
                model = self.reference
        was = model.training
        model.eval()
        rows = sorted(self.rows, key=lambda r: len(r.prompt) + len(r.completion))
        with context, self.autocast():
            for i in range(0, len(rows), self.micro):
                chunk = rows[i : i + self.micro]
                batch = self._batch(chunk).to(self.device)
                values = iter(token_logprobs(model, self.tokens(batch)).float().tolist())
                for row in chunk:
                    setattr(row, key, [next(values) for _ in row.completion])
        model.train(was)

    def _share(self, own: list[Any]) -> list[Any]:
        """All ranks' (number, ...) tuples, in the order of rollouts."""
        return sorted((x for part in self.ranks.gather(own) for x in part), key=lambda x: x[0])

    def _sum(self, values: list[float]) -> list[float]:
        return [sum(column) for column in zip(*self.ranks.gather(values), strict=True)]

    def _report(self, outcomes: list[Outcome], figures: list[dict[str, float]]) -> None:
        mean = lambda values: sum(values) / max(1, len(values))  # noqa: E731
        flat = lambda key: [v for o in outcomes for v in getattr(o, key)]  # noqa: E731
        self._metrics = {
            "reward/correct": mean([o.correct for o in outcomes]),
            "reward/compression": mean([o.compression for o in outcomes]),
            "reward/valid": mean(flat("valid")),
            "reward/supported": mean(flat("supported")),
            "reward/stale": mean([o.stale for o in outcomes]),
        }
        if self.part.rewards.overrun:
            self._metrics["reward/overrun"] = mean([o.overrun for o in outcomes])
        if self.part.rewards.counterfactual:
            self._metrics["reward/counterfactual"] = mean(flat("counterfactual"))
        for key in figures[0]:
            self._metrics[f"memory/{key}"] = mean([f[key] for f in figures])
        if self.curriculum:
            self._metrics["rollout/stage"] = float(self.curriculum.source.stage)
            self.curriculum.observe(self._metrics["reward/correct"])


def group_advantages(outcomes: Sequence[Outcome], part: GrpoObjective) -> list[list[float]]:
    """Advantages by rollout and turn of one group's outcomes, under the recipe's weights."""
    weights = part.rewards
    paid = gate_compression([o.correct for o in outcomes], [o.compression for o in outcomes])
    whole = [
        weights.correct * o.correct + weights.compression * c
        + weights.overrun * o.overrun + weights.stale * o.stale
        for o, c in zip(outcomes, paid, strict=True)
    ]  # fmt: skip
    turns = [_turn_rewards(o, weights) for o in outcomes]
    return advantages(part.credit, whole, turns, scale=part.scale)


def _turn_rewards(found: Outcome, weights: Rewards) -> list[float]:
    extra = found.counterfactual or [0.0] * len(found.valid)
    return [
        weights.valid * v + weights.supported * s + weights.counterfactual * c
        for v, s, c in zip(found.valid, found.supported, extra, strict=True)
    ]


def _figures(episode: MemoryEpisode) -> dict[str, float]:
    """What the memory came to, and what was done, of one rollout."""
    calls = [one for turn in episode.turns for one in turn.result.applied]
    done = [one.operation.name for one in calls if one.ok and one.operation is not None]
    return {
        "tokens": float(episode.store.tokens()),
        "entries": float(len(episode.store.entries())),
        "inserts": float(done.count("insert")),
        "updates": float(done.count("update")),
        "deletes": float(done.count("delete")),
        "errors": float(sum(not one.ok for one in calls)),
    }
