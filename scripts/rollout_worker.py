"""One arm of `bench_rollout.py`, in a fresh process: GRPO steps on memory episodes with scripted
completions. Prints one JSON line.

The tokens are forced, the work is not: `generate` runs every forward and samples as the arm always
does, and the last logits processor then leaves one token possible. A script is a function of the
chunk that the prompt ends with: two of its three lines, drawn anew each time, are inserted, and
filler follows up to exactly `--new-tokens`, end token included. The seconds of making scripts are
taken out of every figure.
"""

import argparse
import gc
import importlib
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from rollout_script import CALL, LAST, MARK, Meter, Script

from mnemic.models.memory.episode import MemoryConfig, MemoryEpisode
from mnemic.models.memory.operations import Insert, apply, validate
from mnemic.models.memory.prompt import messages
from mnemic.models.memory.rule_reader import RuleReader
from mnemic.models.memory.syntax import make_syntax
from mnemic.train.callbacks.base import Callback
from mnemic.train.callbacks.memory import host_peak_bytes, reset_host_peak
from mnemic.train.data.memory.kvstream import KvStream, episode
from mnemic.train.data.stream import Stage
from mnemic.train.rollout.rewards import correct

STREAM = KvStream(
    n_chunks=4, events_per_chunk=3, n_entities=3, n_attributes=3, p_update=0.35, p_delete=0.15,
    p_noise=0.25,
)  # fmt: skip
LR, CLIP = 1e-5, 1.0
# Rendered like our chat form; tool results stand in one user turn, as in Qwen's template.
TEMPLATE = """
{%- for m in messages -%}
{%- if m.role == 'tool' -%}
{{- '<|user|>\n' if loop.first or messages[loop.index0 - 1].role != 'tool' else '\n' -}}
{{- m.content -}}
{{- '<|end|>\n' if loop.last or messages[loop.index0 + 1].role != 'tool' -}}
{%- else -%}
{{- '<|' + m.role + '|>\n' + (m.content or '') -}}
{%- if m.role == 'system' and tools -%}
{{- '\nTools:' -}}
{%- for tool in tools -%}{{- '\n' + (tool.function | tojson) -}}{%- endfor -%}
{{- '\nAnswer with one or more <tool_call>{"name": ..., "arguments": {...}}</tool_call>.' -}}
{%- endif -%}
{%- for call in m.tool_calls or [] -%}
{{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' -}}
{{- (call.function.arguments | tojson) + '}</tool_call>' -}}
{%- endfor -%}
{{- '<|end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}
"""
RESPONSE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>", "close_pattern": r"</tool_call>\s*", "repeats": True,
            "content": "json", "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|end\|>\s*", "content": "text"},
    },
}  # fmt: skip


def resident_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) * 1024 for x in file if x.startswith("VmRSS:"))


class Episodes(Stage[Any]):
    """kvstream, each episode once."""

    def __init__(self, seed: int) -> None:
        self.seed, self.index = seed, 0

    def __next__(self) -> Any:
        self.index += 1
        return episode(STREAM, "train", self.index - 1, self.seed)


def memory_config(args: argparse.Namespace) -> MemoryConfig:
    return MemoryConfig(
        store="flat", retrieved=6, recent=2, view_tokens=128, max_new_tokens=args.new_tokens,
        syntax="lines" if args.arm == "mnemic lines" else "tools",
        form="text" if args.prompts == "bare" else "chat",
    )  # fmt: skip


def system_text(args: argparse.Namespace) -> str:
    """The instructions of our chat form."""
    config = memory_config(args)
    return messages(make_syntax(config.syntax), config.make_store(), "", "")[0]["content"]


def ours(model: Any, tokenizer: Any, args: argparse.Namespace) -> tuple[Meter, float]:
    """`Trainer.fit` with the objective, the update and the reward of `mnemic train`."""
    from accelerate import Accelerator

    from mnemic.train.objectives.grpo import PolicyObjective
    from mnemic.train.recipe.memory import GrpoObjective
    from mnemic.train.rollout.play import ModelGenerator
    from mnemic.train.trainer import Trainer
    from mnemic.train.update import PlainUpdate

    meter = Meter(Script(model, tokenizer, args))
    size = args.groups * args.generations
    objective = PolicyObjective(
        Episodes(args.seed), GrpoObjective(num_generations=args.generations, max_length=4096),
        memory_config(args), model=model, reference=None,
        generator=ModelGenerator(
            model, tokenizer, max_new_tokens=args.new_tokens, batch_size=size
        ),
        answerer=RuleReader(), tokenizer=tokenizer, batch_size=size,
        micro_batch_size=args.micro * STREAM.n_chunks, seed=args.seed,
    )  # fmt: skip
    rewards: list[float] = []

    class End(Callback):
        def on_step(self, trainer: Any, row: dict[str, Any]) -> None:
            if row["step"]:
                meter.end()
                rewards.append(row["reward/correct"])

    real = objective.microbatches

    def rollout(step: int) -> Any:
        batches = meter.rollout(real, step)
        rows = objective.rows
        meter.now["trained"] = sum(len(row.completion) for row in rows)
        meter.now["updated"] = sum(len(row.prompt) + len(row.completion) for row in rows)
        return batches

    objective.microbatches = rollout  # type: ignore[method-assign]
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    Trainer(
        accelerator=accelerator, model=model, optimizer=optimizer, objective=objective,
        update=PlainUpdate(accelerator, model, optimizer, CLIP), lr_at=lambda step: 1.0,
        total_steps=args.steps, checkpoints=Path(args.work), callbacks=[End()], seed=args.seed,
        save_every=10**9,
    ).fit()  # fmt: skip
    return meter, statistics.fmean(rewards)


class MemoryEnv:
    """The episode as TRL's environment: chunks arrive as tool results in one growing context."""

    args: argparse.Namespace

    def reset(self, index: int, **_: Any) -> str:
        self._row = episode(STREAM, "train", index, self.args.seed)
        asked = [q.q for q in self._row.questions]
        self._episode = MemoryEpisode(self._row.chunks, asked, memory_config(self.args))
        self._number, self._finished = 0, False
        return MARK + self._row.chunks[0]

    def insert(self, content: str) -> str:
        """Remember something new.

        Args:
            content: One fact.
        """
        return self._apply("insert", content=content)

    def update(self, id: str, content: str) -> str:
        """Put new content in the place of an entry's.

        Args:
            id: The entry.
            content: Its new text.
        """
        return self._apply("update", id=id, content=content)

    def delete(self, id: str) -> str:
        """Remove an entry that no longer holds.

        Args:
            id: The entry.
        """
        return self._apply("delete", id=id)

    def next_chunk(self) -> str:
        """Go on to the next text."""
        self._number += 1
        if self._number >= len(self._row.chunks):
            self._finished = True
            return LAST
        return MARK + self._row.chunks[self._number]

    def get_reward(self) -> float:
        if not self._finished:
            raise RuntimeError("an episode ended before its last chunk")
        answers = RuleReader().answer(self._episode.asks())
        return statistics.fmean(correct(self._row, range(len(answers)), answers))

    def _apply(self, name: str, **arguments: str) -> str:
        self._episode.store.turn = self._number
        return str(apply(self._episode.store, validate(name, arguments)))


def trl(model: Any, tokenizer: Any, args: argparse.Namespace) -> tuple[Meter, float]:
    """The stock GRPOTrainer; two of its methods are wrapped to be timed and read."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    meter = Meter(Script(model, tokenizer, args))
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSE
    MemoryEnv.args = args
    prompt = [{"role": "user", "content": ""}]
    if args.prompts == "chat":
        # Our first line; the template adds the tools. Without a system turn it names none.
        task = system_text(args).splitlines()[0]
        prompt = [{"role": "system", "content": task}, *prompt]
    rows = [{"prompt": prompt, "index": i} for i in range(args.steps * args.groups)]
    size = args.groups * args.generations
    rewards: list[float] = []

    class End(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.end()

    trainer = GRPOTrainer(
        model=model, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        environment_factory=MemoryEnv, callbacks=[End()],
        args=GRPOConfig(
            output_dir=args.work, per_device_train_batch_size=args.micro,
            gradient_accumulation_steps=size // args.micro, num_generations=args.generations,
            max_completion_length=1800, learning_rate=LR, lr_scheduler_type="constant",
            weight_decay=0.0, max_grad_norm=CLIP, optim="adamw_torch_fused", beta=0.0,
            max_steps=args.steps, seed=args.seed, shuffle_dataset=False, use_cpu=True, bf16=False,
            gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
            logging_steps=10**6,
        ),
    )  # fmt: skip
    real, score = trainer._generate_and_score_completions, trainer._calculate_rewards

    def rollout(inputs: Any) -> Any:
        found = meter.rollout(real, inputs)
        mask = found["completion_mask"]
        meter.now["trained"] = int((mask * found.get("tool_mask", 1)).sum())
        meter.now["updated"] = int(mask.sum() + found["prompt_mask"].sum())
        return found

    def scored(*values: Any) -> Any:
        found = score(*values)
        rewards.append(float(found.mean()))
        return found

    trainer._generate_and_score_completions = rollout
    trainer._calculate_rewards = scored
    trainer.train()
    return meter, statistics.fmean(rewards)


def build(folder: str) -> None:
    """The model of every arm: about 0.6 M parameters, and a vocabulary of what it reads."""
    from mnemic.models.tiny import bpe_tokenizer, tiny_llama

    texts = []
    tools, lines = make_syntax("tools"), make_syntax("lines")
    for index in range(200):
        for chunk in episode(STREAM, "heldout", index).chunks:
            calls = [Insert(content=line) for line in chunk.splitlines()]
            texts += [MARK + chunk, tools.write(calls), lines.write(calls), CALL]
    texts += [system_text(argparse.Namespace(arm="trl", prompts="chat", new_tokens=1))] * 20
    tokenizer = bpe_tokenizer(texts, 1024, 4096)
    model = tiny_llama(
        tokenizer, hidden_size=128, layers=3, heads=4, max_position=4096, seed=0
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="One arm of bench_rollout.py.")
    parser.add_argument("arm", choices=["build", "trl", "mnemic", "mnemic lines"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--work", default="")
    parser.add_argument("--prompts", choices=["bare", "chat"], default="bare")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--micro", type=int, default=16, help="episodes in one backward")
    parser.add_argument("--new-tokens", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.arm == "build":
        return build(args.model)
    torch.set_num_threads(1)
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from mnemic.models.load import load_causal_lm, load_tokenizer

    # What either arm imports later is no part of its peak.
    names = ["datasets", "trl.trainer.grpo_trainer"]
    if args.arm != "trl":
        names = ["accelerate", "mnemic.train.objectives.grpo", "mnemic.train.trainer"]
    for name in ["transformers.models.llama.modeling_llama", *names]:
        importlib.import_module(name)
    tokenizer = load_tokenizer(args.model)
    gc.collect()
    base = resident_bytes()
    reset_host_peak()
    model = load_causal_lm(args.model, dtype="fp32")
    meter, reward = (trl if args.arm == "trl" else ours)(model, tokenizer, args)
    peak = host_peak_bytes() - base
    late = meter.steps[1:] or meter.steps
    middle = {k: statistics.median(s[k] for s in late) for k in late[0]}
    episodes = args.groups * args.generations
    print(json.dumps({
        "seconds_per_step": [s["seconds"] for s in late],
        "rollout_seconds": [s["rollout"] for s in late],
        **{f"{k}_tokens_per_episode": middle[k] / episodes
           for k in ("generated", "prefilled", "trained", "updated")},
        "reward_correct": reward, "peak_bytes": peak, "episodes_per_step": episodes,
        "parameters": sum(p.numel() for p in model.parameters()),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
