"""How each command of the tutorials is run by the tests: what makes it smaller, and what it shows.

A command is looked up by its whole text as printed. One that stands in neither table fails the
test, and so does a line of a table that no page prints any more.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Run:
    """`swaps`: (printed, run instead), each of which must apply. `shows`: patterns that are found
    in the page's text block below the command and in what the command writes. `writes`: patterns
    found in the latter alone. `makes`: files that are there afterwards. `compare`: asserts, given
    either text. `kill_at`: (file, pattern): SIGKILL when it is in that file, then the same again.
    """

    swaps: tuple[tuple[str, str], ...] = ()
    shows: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    compare: Callable[[str], None] | None = None
    kill_at: tuple[str, str] | None = None


def equal_losses(text: str) -> None:
    """Two runs' last rows: training and held-out loss equal to seven digits, as the page says."""
    for key in (r'"loss"', r'"eval/loss"'):
        one, two = (float(found) for found in re.findall(rf"{key}: ([\d.]+)", text))
        assert abs(one - two) < 5e-7 * one, (key, one, two)


def one_run(text: str) -> None:
    """Two sessions of one wandb run: one id, no step twice, an artifact version for each result."""
    found = re.findall(
        r"run-(\w+) steps (\d+) to (\d+) pretrain_tiny-(\w+) \['latest', 'step-(\d+)'\]", text
    )
    (run, start, end, name, step), (run_2, start_2, end_2, name_2, step_2) = found
    assert run == run_2 == name == name_2
    assert (int(start), int(start_2)) == (0, int(end) + 1)
    assert (end, end_2) == (step, step_2)
    for planned, measured in re.findall(r"planned (\d+) measured (\d+)", text):
        assert 0.5 < int(planned) / int(measured) < 2


TEXT = Run(swaps=(("docs/*.md", "docs/tutorial-*.md"),), makes=("text.txt",))
FINISHED = r"step (\d+)/\1  loss \d"
HELD_OUT = r"evaluation at step \d+: loss \d"
FINAL = ("config.json", "model.safetensors", "tokenizer.json")


def final(folder: str) -> tuple[str, ...]:
    return tuple(f"{folder}/final/{name}" for name in FINAL)


ACCELERATE = {
    "cat docs/*.md > text.txt": TEXT,
    "accelerate launch --cpu --config_file recipes/accelerate/single.yaml -m mnemic.train.cli "
    "train pretrain_tiny data.path=text.txt loop.steps=20 loop.batch_size=8 run_dir=runs/one": Run(
        swaps=(("loop.steps=20", "loop.steps=4"),),
        shows=(FINISHED, HELD_OUT),
        makes=final("runs/one"),
    ),
    "torchrun --nproc_per_node 2 -m mnemic.train.cli train pretrain_tiny data.path=text.txt "
    "loop.steps=20 loop.batch_size=8 run_dir=runs/two loop.device=cpu": Run(
        swaps=(("loop.steps=20", "loop.steps=4"),),
        writes=(FINISHED,),
        makes=(*final("runs/two"), "runs/two/checkpoints/step-00000004"),
    ),
    "tail -qn 1 runs/one/metrics.jsonl runs/two/metrics.jsonl": Run(compare=equal_losses),
    "mnemic train pretrain_tiny data.path=text.txt loop.steps=24 loop.batch_size=8 "
    "run_dir=runs/two loop.device=cpu": Run(
        swaps=(("loop.steps=24", "loop.steps=6"),),
        shows=(r"resuming from runs/two/checkpoints/step-(\d+) \(step \d+ of \d+\)",),
        writes=(r"step 6/6  loss",),
    ),
    "mnemic report runs/one runs/two --out ranks.html --no-plan": Run(makes=("ranks.html",)),
}

CPU_TESTS = {"pytest -q test_training.py": Run(shows=(r"\.\.\.\.  +\[100%\]\s+4 passed in",))}

LOW_MEMORY = {
    "cat docs/*.md > text.txt": TEXT,
    "python scripts/random_model.py M --hidden 768 --inner 2048 --layers 12 --heads 12 --kv 12 "
    "--vocabulary 512": Run(makes=("M/config.json", "M/*.safetensors")),
    "mnemic plan big.yaml": Run(
        shows=(
            r"85,740,288 parameters, all trained; rows of 128 tokens",
            r"plain \* +in_backward +streamed host +streamed ssd",
            r"weights +164 MiB +164 MiB +- +-",
            r"optimizer state +327 MiB",
            r"memory +~1\.\d+ GiB +~1\.\d+ GiB +~1\.\d+ GiB +~\d{3} MiB",
            r"disk: store +- +- +- +2\.24 GiB",
        )
    ),
    "mnemic plan big.yaml --low-memory 700MiB": Run(
        shows=(
            r"chosen +~\d{3} MiB +[\d.]+x  rounds +update\.kind=streamed offload\.kind=ssd",
            r"as it is +>1\.\d+ GiB +1\.00x  exact +\(none\)",
            r"not +[>~]\d+ MiB +1\.00x  exact +update\.kind=in_backward",
            r"not +>\d{3} MiB +1\.00x  another method optimizer\.kind=apollo_mini",
        )
    ),
    # Killed in the middle, as the page says it may be, and given again.
    "mnemic train big.yaml --low-memory 700MiB": Run(
        swaps=(("700MiB", "700MiB loop.steps=4"),),
        # The row of step 2 is written when step 1 is committed.
        kill_at=("runs/big/metrics.jsonl", r'"step": 2\b'),
        shows=(
            r"chosen for 700 MiB of memory: update\.kind=streamed offload\.kind=ssd",
            r"predicted: \d{3} MiB at the peak, [\d.]+ x the recipe's step; rounds",
            r"in memory: layers 27\.0 MiB, vocabulary tiles",
            FINISHED,
            r"big: (\d+) of \1 steps in \d+:\d\d",
            r"peak memory: [3-6]\d\d MiB host",
        ),
        writes=(r"resuming from .*step [123] of 4",),
        makes=("runs/big/recipe.yaml", "runs/big/offload"),
    ),
    "mnemic export runs/big model": Run(
        shows=(r"model: written; from_pretrained loads it",),
        makes=("model/config.json", "model/*.safetensors"),
    ),
    'mnemic generate runs/big "The disk" --max-new-tokens 8': Run(),
    'python -c "from transformers import AutoModelForCausalLM; '
    "print(AutoModelForCausalLM.from_pretrained('model').num_parameters())\"": Run(
        shows=(r"(?m)^85740288$",)
    ),
    # SmolLM2 takes a download and a minute: here its streamed APOLLO-Mini on a tiny model.
    "mnemic train lowmem_full data.path=text.txt loop.steps=5 objective.seq_len=128 "
    "loop.batch_size=1 evaluation=null": Run(
        swaps=(("loop.steps=5", "loop.steps=2 'model={kind: tiny, dtype: bf16}'"),),
        shows=(FINISHED, r"peak memory: \d+ MiB host"),
        makes=("runs/lowmem_full/recipe.yaml",),
    ),
    'mnemic generate runs/lowmem_full "The memory of a language model" --max-new-tokens 12': Run(),
}

MEMORY = {
    "mnemic train memory_sft_tiny loop.steps=500 loop.batch_size=16 evaluation.every=500 "
    "data.size=8000 evaluation.data.size=16 evaluation.play=8": Run(
        swaps=(
            ("loop.steps=500", "loop.steps=120"),
            ("evaluation.every=500", "evaluation.every=120"),
            ("data.size=8000", "data.size=2000"),
        ),
        writes=(FINISHED,),
        makes=(*final("runs/memory_sft_tiny"), "runs/memory_sft_tiny/final/memory.json"),
    ),
    "mnemic eval memory runs/memory_sft_tiny --episodes 16 --seeds 1": Run(
        swaps=(("--episodes 16", "--episodes 8"),),
        shows=(
            r"accuracy +95 % +F1 +EM +stale +tokens +compression +entries",
            *(rf"{name} +[01]\.\d+ +" for name in ("manager", "empty", "insert-all")),
            r"oracle +1\.000 +1\.000-1\.000 +1\.000",
        ),
    ),
    "mnemic memory show runs/memory_sft_tiny --list": Run(writes=(r"r1",)),
    "mnemic memory show runs/memory_sft_tiny --episode 0": Run(
        shows=(
            r"chunk 1 of 4  \(valid [01]\.\d\d, supported [01]\.\d\d, memory \d+ tokens\)",
            r"calls:",
        )
    ),
    "mnemic train memory_sft_tiny run_dir=runs/warm": Run(
        swaps=(
            (
                "run_dir=runs/warm",
                "run_dir=runs/warm loop.steps=30 loop.batch_size=16 data.size=500 "
                "evaluation.data.size=8 evaluation.play=4",
            ),
        ),
        makes=final("runs/warm"),
    ),
    "mnemic train memory_grpo_tiny model.path=runs/warm/final": Run(
        swaps=(
            (
                "model.path=runs/warm/final",
                "model.path=runs/warm/final loop.steps=2 loop.batch_size=8 evaluation.data.size=8",
            ),
        ),
        makes=final("runs/memory_grpo_tiny"),
    ),
    "mnemic eval memory runs/memory_grpo_tiny --lengths 1,3,13": Run(
        swaps=(("1,3,13", "1,3 --episodes 2 --seeds 1"),), writes=(r"manager +[01]\.\d+",)
    ),
    "python agent.py": Run(
        shows=(r"(?m)^\[.*\]$", r"(?m)^\d+ calls could not be carried out$"),
        makes=("memory.sqlite",),
    ),
    "mnemic train memlora_all 'model={kind: tiny, max_position: 1024}' objective.max_length=1000 "
    "data.size=40 loop.steps=6 loop.batch_size=8 evaluation=null": Run(
        swaps=(("loop.steps=6", "loop.steps=2"),), makes=("runs/memlora_all/final/bank.json",)
    ),
    "ls runs/memlora_all/final": Run(
        shows=tuple(
            rf"{name}\b"
            for name in (
                r"bank\.json", "mem_extract", "mem_generate", "mem_update", r"tokenizer\.json"
            )
        )
    ),
    "python experts.py": Run(writes=(r"(?m)^\[.*\]$",)),
}  # fmt: skip

WANDB = {
    "cat docs/*.md > text.txt": TEXT,
    "mnemic train pretrain_tiny data.path=text.txt loop.steps=20 loop.batch_size=4 "
    "track='{kind: wandb, mode: offline, artifacts: all}'": Run(
        swaps=(("loop.steps=20", "loop.steps=4"),),
        shows=(r"track\.plan: planning the run", FINISHED, HELD_OUT),
        makes=("runs/pretrain_tiny/wandb/offline-run-*/*.wandb", *final("runs/pretrain_tiny")),
    ),
    "mnemic train pretrain_tiny data.path=text.txt loop.steps=30 loop.batch_size=4 "
    "track='{kind: wandb, mode: offline, artifacts: all}'": Run(
        swaps=(("loop.steps=30", "loop.steps=6"),), writes=(r"resuming from .*step 4 of 6",)
    ),
    "python sessions.py": Run(compare=one_run),
    # Mode `auto` where no API key is: offline.
    "mnemic train pretrain_tiny data.path=text.txt name=online "
    "track='{kind: wandb, project: mine, tags: [first]}'": Run(
        swaps=(("name=online", "name=online loop.steps=2 loop.batch_size=2"),),
        makes=("runs/online/wandb/offline-run-*/*.wandb",),
    ),
    "mnemic compare pretrain_tiny --vary optimizer=adamw,apollo --out grid --no-plan "
    "data.path=text.txt loop.steps=10 loop.batch_size=4 "
    "track='{kind: wandb, mode: offline, plan: false}'": Run(
        swaps=(("loop.steps=10", "loop.steps=2"),),
        shows=(
            r"cell +state +steps +eval loss first +last",
            r"optimizer-adamw +finished +\d+ +\d",
            r"optimizer-apollo +finished +\d+ +\d",
        ),
        makes=("grid/*.html",),
    ),
}

RUNS: dict[str, dict[str, Run]] = {
    "tutorial-accelerate.md": ACCELERATE,
    "tutorial-cpu-tests.md": CPU_TESTS,
    "tutorial-low-memory.md": LOW_MEMORY,
    "tutorial-memory.md": MEMORY,
    "tutorial-wandb.md": WANDB,
}

_LAUNCH = "accelerate launch --config_file recipes/accelerate/{} -m mnemic.train.cli train "
_TINY = "pretrain_tiny data.path=text.txt"

ELSEWHERE = {
    _LAUNCH.format("ddp.yaml") + _TINY: "needs two GPUs",
    _LAUNCH.format("fsdp2.yaml") + _TINY + " optimizer=apollo_mini": "needs two GPUs",
    _LAUNCH.format("zero3.yaml") + _TINY: "needs two GPUs and DeepSpeed",
    _LAUNCH.format("zero3_cpu.yaml") + _TINY: "needs two GPUs and DeepSpeed",
    _LAUNCH.format("zero3_nvme.yaml") + _TINY + " loop.precision=bf16": "needs GPUs and DeepSpeed",
    "wandb login": "asks for an account's key",
    "wandb sync runs/pretrain_tiny/wandb/offline-run-*": "uploads to an account",
    "wandb sweep sweep.yaml": "registers the sweep with an account",
    "wandb agent ENTITY/PROJECT/SWEEP_ID": "asks wandb's server for values",
    "wandb artifact get ENTITY/PROJECT/pretrain_tiny-RUN_ID:latest --root model": "downloads",
}
