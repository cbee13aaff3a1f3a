"""The bridge in the real trainers: transformers' Trainer, TRL's SFTTrainer and GRPOTrainer."""

import math
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support import same_weights, sft_rows

from mnemic.models.tiny import byte_tokenizer, tiny_llama
from mnemic.train.errors import UserError
from mnemic.train.hf import optimizer_cls_and_kwargs, optimizers

COMMON = {
    "use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "save_steps": 2,
    "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.1,
    "warmup_steps": 1, "bf16": False,
}  # fmt: skip


def tiny():
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 32, "layers": 1, "heads": 2, "max_position": 256}
    return tiny_llama(tokenizer, **sizes, seed=0), tokenizer


def with_trainer(folder, kind, **settings):
    from transformers import Trainer, TrainingArguments

    model, tokenizer = tiny()
    args = TrainingArguments(str(folder), **COMMON)
    rows = [tokenizer(f"{i} plus {i} is {2 * i}; {'ab' * 9}")["input_ids"][:24] for i in range(40)]
    data = Dataset.from_list([{"input_ids": r, "labels": r} for r in rows])
    return Trainer(
        model, args, train_dataset=data,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, kind, **settings),
    )  # fmt: skip


def with_sft(folder, kind, lora=False, **settings):
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    model, tokenizer = tiny()
    args = SFTConfig(str(folder), max_length=64, **COMMON)
    return SFTTrainer(
        model, args, train_dataset=Dataset.from_list(sft_rows(40)), processing_class=tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear") if lora else None,
        optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, kind, **settings),
    )  # fmt: skip


def with_grpo(folder, kind, **settings):
    from trl import GRPOConfig, GRPOTrainer

    def vowels(completions, **_):
        return [float(sum(c in "aeiou" for c in text)) + len(text) / 10 for text in completions]

    model, tokenizer = tiny()
    args = GRPOConfig(str(folder), num_generations=4, max_completion_length=8, **COMMON)
    return GRPOTrainer(
        model, vowels, args, train_dataset=Dataset.from_list([{"prompt": "Say a"}] * 20),
        processing_class=tokenizer, optimizers=optimizers(model, args, kind, **settings),
    )  # fmt: skip


def inner(trainer):
    """The optimizer without accelerate's wrapper."""
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def states(trainer):
    names = {id(p): n for n, p in trainer.model.named_parameters()}
    return {names[id(p)]: state for p, state in inner(trainer).state.items()}


def saved(folder):
    """Weights, and the optimizer state as the trainers read it."""
    from safetensors.torch import load_file

    path = Path(folder) / "checkpoint-4"
    weights = next(path / n for n in ("model.safetensors", "adapter_model.safetensors")
                   if (path / n).exists())  # fmt: skip
    return load_file(weights), torch.load(path / "optimizer.pt", weights_only=True)


def check_resume(make, folder, kind, **settings):
    """Four steps straight, and four with a new process's objects from the second on."""
    straight = make(folder / "straight", kind, **settings)
    start = {n: p.detach().clone() for n, p in straight.model.named_parameters()}
    straight.train()
    again = make(folder / "again", kind, **settings)
    again.train(resume_from_checkpoint=str(folder / "straight" / "checkpoint-2"))
    weights, optimizer = saved(folder / "straight")
    resumed_weights, resumed = saved(folder / "again")
    assert same_weights(weights, resumed_weights)
    assert optimizer["state"].keys() == resumed["state"].keys() and optimizer["state"]
    for key, state in optimizer["state"].items():
        assert state.keys() == resumed["state"][key].keys()
        for name, value in state.items():
            theirs = resumed["state"][key][name]
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs)), name
    assert optimizer["param_groups"] == resumed["param_groups"]
    return straight, start


def test_the_snippets_of_the_documentation_run(tmp_path, monkeypatch):
    text = (Path(__file__).parents[2] / "docs" / "recipe.md").read_text()
    section = text.split("## In the HF Trainer and TRL")[1].split("\n## ")[0]
    snippets = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(snippets) == 2
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        model, tokenizer = tiny()
        names = {
            "model": model, "tokenizer": tokenizer, "rows": Dataset.from_list(sft_rows(8)),
            "prompts": Dataset.from_list([{"prompt": "Say a"}] * 8),
            "reward": lambda completions, **_: [float(len(set(text))) for text in completions],
        }  # fmt: skip
        # Only what a laptop needs is added; names and calls are the document's.
        short = '"out", use_cpu=True, bf16=False, report_to=[], max_steps=1, disable_tqdm=True,'
        short += " per_device_train_batch_size=4,"
        exec(snippet.replace('"out",', short), names)
        names["trainer"].train()
        assert "prev_norm" in states(names["trainer"])["model.layers.0.mlp.up_proj.weight"]


MAKERS = {"Trainer": with_trainer, "SFTTrainer": with_sft, "GRPOTrainer": with_grpo}


@pytest.mark.parametrize("name", list(MAKERS))
@pytest.mark.parametrize("kind", ["apollo", "apollo_mini"])
def test_matrices_are_low_rank_and_a_resumed_run_has_the_same_bits(tmp_path, name, kind):
    trainer, start = check_resume(MAKERS[name], tmp_path, kind)
    state = states(trainer)
    for param_name, param in trainer.model.named_parameters():
        low = "_proj" in param_name
        rank = min(param.shape) // 4 if kind == "apollo" else 1
        shape = (max(param.shape), rank) if low else tuple(param.shape)
        held = state[param_name]["exp_avg"].shape
        assert sorted(held) == sorted(shape), param_name
        assert not torch.equal(param, start[param_name]), f"{param_name} did not move"
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 4 and all(map(math.isfinite, logged))


@pytest.mark.parametrize("kind", ["galore", "muon", "adamw8bit", "adafactor"])
def test_the_other_kinds_resume_too(tmp_path, kind):
    if kind == "adamw8bit":  # bitsandbytes nests its state: the weights say enough
        with_trainer(tmp_path / "a", kind).train()
        with_trainer(tmp_path / "b", kind).train(str(tmp_path / "a" / "checkpoint-2"))
        assert same_weights(saved(tmp_path / "a")[0], saved(tmp_path / "b")[0])
    else:
        check_resume(with_trainer, tmp_path, kind)


def test_lora_a_moves_from_its_zero_first_gradient(tmp_path):
    """The published limiter remembers that first norm and freezes A for 1,850 steps."""
    trainer, start = check_resume(with_sft, tmp_path, "apollo", lora=True)
    state, seen = states(trainer), 0
    for name, param in trainer.model.named_parameters():
        if not param.requires_grad:
            assert name not in state
        elif "lora_A" in name:
            seen += 1
            assert sorted(state[name]["exp_avg"].shape) == sorted((max(param.shape), 2))
            moved = (param.detach() - start[name]).norm() / start[name].norm()
            assert float(moved) > 1e-3, name
    assert seen == 7


def test_rate_decay_and_the_rest_come_from_the_arguments_unless_given(tmp_path):
    trainer = with_trainer(tmp_path, "apollo", rest_lr=1e-3, beta1=0.8)
    trainer.args.warmup_steps = 0
    trainer.create_optimizer_and_scheduler(4)
    groups = inner(trainer).param_groups
    found = {(g["rule"], g["params"][0].ndim): g for g in groups}
    low, embedding, norms = found["apollo", 2], found["adamw", 2], found["adamw", 1]
    assert [g["lr"] for g in (low, embedding, norms)] == [1e-2, 1e-3, 1e-3]
    assert [g["weight_decay"] for g in (low, embedding, norms)] == [0.1, 0.1, 0.0]
    assert low["betas"] == (0.8, trainer.args.adam_beta2)

    given = with_trainer(tmp_path, "apollo", lr=0.5, weight_decay=0.0)
    given.create_optimizer()
    assert {g["lr"] for g in inner(given).param_groups} == {0.5}
    assert {g["weight_decay"] for g in inner(given).param_groups} == {0.0}


def test_a_scheduler_comes_where_the_number_of_steps_is_given(tmp_path):
    from transformers import TrainingArguments

    model, _ = tiny()
    args = TrainingArguments(str(tmp_path), **{**COMMON, "warmup_steps": 2})
    optimizer, scheduler = optimizers(model, args, num_training_steps=4, rest_lr=1e-3)
    rates = []
    for _ in range(4):
        rates.append([group["lr"] for group in optimizer.param_groups][:2])
        optimizer.step()
        scheduler.step()
    assert rates == [pytest.approx([1e-2 * f, 1e-3 * f]) for f in (0, 0.5, 1, 0.5)]
    assert optimizers(model, args)[1] is None


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        ("apolo", {}, r"optimizer\.kind: 'apolo' is not one of adamw.*did you mean 'apollo'"),
        ("apollo", {"rnk": 8}, r"^optimizer\.rnk: unknown key; did you mean 'rank'\?$"),
        ("apollo_mini", {"rank": 8}, r"^optimizer\.rank: unknown key"),
        (
            "apollo",
            {"rank": -1},
            r"^optimizer\.rank: -1 is not a whole number from 1, or a share .*$",
        ),
        ("apollo", {"scale": 2.0, "scale_sq": 4.0}, r"both give alpha; keep one$"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, kind, settings, sentence):
    from transformers import TrainingArguments

    args = TrainingArguments(str(tmp_path), **COMMON)
    with pytest.raises(UserError, match=sentence):
        optimizer_cls_and_kwargs(args, kind, **settings)


def test_a_trainer_without_factories_and_deepspeed_are_refused(tmp_path, monkeypatch):
    from transformers import TrainingArguments

    args = TrainingArguments(str(tmp_path), **COMMON)
    factory, kwargs = optimizer_cls_and_kwargs(args)
    model, _ = tiny()
    # As transformers 5.0 calls whatever it is given.
    with pytest.raises(UserError, match=r"knows no optimizer factories; upgrade it"):
        factory([{"params": list(model.parameters())}], **kwargs)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match=r"kind=apollo does not work under DeepSpeed"):
        factory()(model, **kwargs)
