"""A small model trained twice on the same batches: in memory, and streamed."""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers as hf

from mnemic.models.tokens.config import TokensConfig
from mnemic.models.tokens.sparsity import TokenSparsity
from mnemic.optim.apollo import Apollo
from mnemic.optim.groups import decay_groups
from mnemic.optim.select import apollo_groups
from mnemic.train.data.collate import Batch, collate
from mnemic.train.data.tokenize import Example
from mnemic.train.objectives.tokens import TokenObjective, token_loss
from mnemic.train.offload.engine import Engine, Settings, lay_out
from mnemic.train.offload.skeleton import dissect, without_weights
from mnemic.train.offload.transfer import read_model
from mnemic.train.offload.update import StreamedUpdate

VOCABULARY = 300
_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
_GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaConfig(**_SMALL),
    "llama_tied": lambda: hf.LlamaConfig(**_SMALL, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**_SMALL, head_dim=8),
    "qwen3_tied": lambda: hf.Qwen3Config(**_SMALL, head_dim=8, tie_word_embeddings=True),
    "gpt2": lambda: hf.GPT2Config(**_GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt2_untied": lambda: hf.GPT2Config(
        **_GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False
    ),
    "gpt2_dropout": lambda: hf.GPT2Config(**_GPT2),
    "mixtral": lambda: hf.MixtralConfig(**_SMALL, num_local_experts=4),
    "qwen3_moe_tied": lambda: hf.Qwen3MoeConfig(
        **_SMALL, head_dim=8, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2,
        tie_word_embeddings=True,
    ),
    "opt": lambda: hf.OPTConfig(**_PLAIN, ffn_dim=48, word_embed_proj_dim=16, dropout=0.0),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**_PLAIN, intermediate_size=48),
    "gemma2": lambda: hf.Gemma2Config(**_SMALL, head_dim=8, query_pre_attn_scalar=8),
    "gemma3": lambda: hf.Gemma3TextConfig(**_SMALL, head_dim=8, query_pre_attn_scalar=8),
    "phi3": lambda: hf.Phi3Config(**{**_SMALL, "pad_token_id": 1}),
    "cohere": lambda: hf.CohereConfig(**{**_SMALL, "pad_token_id": 1}, logit_scale=0.25),
    "granite": lambda: hf.GraniteConfig(**_SMALL, logits_scaling=4.0),
}  # fmt: skip


class Batches(TokenObjective):
    """`count` micro-batches a step, each a function of (step, number)."""

    def __init__(self, count: int, padded: bool = False) -> None:
        self.count, self.padded = count, padded

    def microbatches(self, step: int) -> list[Batch]:
        draw = torch.Generator().manual_seed(step)
        batches = []
        for _ in range(self.count):
            examples = []
            for row in range(2):
                length = 17 - 4 * row if self.padded else 17
                ids = torch.randint(0, VOCABULARY, (length,), generator=draw).tolist()
                first = length // 2 if self.padded else 1
                labels = [-100] * first + ids[first:]
                examples.append(Example(ids, labels, (length,), length))
            batches.append(collate(examples, pad_id=0, packed=False))
        return batches


def optimizer_for(rule: str, model: Any, weight_decay: float = 0.01, lr: float = 1e-3) -> Apollo:
    """adamw; apollo, mini (embedding and head by AdamW); mini_all (APOLLO for those too)."""
    if rule.startswith("adamw"):
        groups = [{**g, "rule": "adamw"} for g in decay_groups(model, weight_decay)]
        return Apollo(groups, lr, rule="adamw")
    patterns: list[dict[str, Any]] = []
    if rule.endswith("_all"):
        roles = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        names = [n for n, p in model.named_parameters() if any(p is role for role in roles)]
        patterns = [{"match": name, "rule": "apollo"} for name in names]
    groups = apollo_groups(model, weight_decay=weight_decay, patterns=patterns, min_coverage=0.1)
    mini = {"rank": 1, "scale_type": "tensor"} if rule.startswith("mini") else {}
    return Apollo(groups, lr, update_proj_gap=3, **mini)


def first_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype).train()


def train_in_memory(
    name: str, rule: str, objective: Batches, steps: int,
    dtype: torch.dtype = torch.float32, max_grad_norm: float | None = None,
    tokens: TokensConfig | None = None,
) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:  # fmt: skip
    """(losses, weights, norms) of the plain order of things."""
    model = first_model(name, dtype)
    if tokens is not None:
        TokenSparsity(model, tokens)
    optimizer = optimizer_for(rule, model)
    losses, norms = [], []
    for step in range(1, steps + 1):
        torch.manual_seed(step)
        batches = objective.microbatches(step)
        total = sum(batch.weight for batch in batches)
        loss = 0.0
        for batch in batches:
            found = token_loss(model, batch)
            (found * (1 / total)).backward()
            loss += found.item()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_grad_norm, norm)
        norms.append(float(norm))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss / total)
    return losses, {n: p.detach() for n, p in model.named_parameters()}, norms


def streamed_update(
    name: str, rule: str, folder: Path, dtype: torch.dtype = torch.float32,
    max_grad_norm: float | None = None, tokens: TokensConfig | None = None, **settings: Any,
) -> StreamedUpdate:  # fmt: skip
    """The same model and optimizer over an engine in `folder` (and further `folders`)."""
    first = first_model(name, dtype)
    model = without_weights(copy.deepcopy(first.config), dtype).train()
    names = {id(p): n for n, p in model.named_parameters()}
    folders = settings.pop("folders", (folder,))
    for path in folders:
        path.mkdir(parents=True, exist_ok=True)
    made = Settings(folders=folders, **settings)
    layout = lay_out(dissect(model), optimizer_for(rule, model), made, names)
    engine = Engine(
        layout, made, folder=folder if made.kind == "ssd" else None, names=names,
        device=torch.device("cpu"),
    )  # fmt: skip
    engine.load(read_model(first))
    if tokens is not None:
        engine.streamer.sparsity = TokenSparsity(model, tokens, apart=True)
    return StreamedUpdate(engine, made.clip, max_grad_norm)


def one_step(update: StreamedUpdate, objective: Any, step: int) -> tuple[float, float]:
    """(loss, norm) of step `step`, committed."""
    torch.manual_seed(step)
    batches = objective.microbatches(step)
    total = sum(batch.weight for batch in batches)
    trainer = SimpleNamespace(step=step - 1, objective=objective)
    loss, _ = update.run(trainer, batches, 1 / total)
    norm = update.finish(step)
    update.engine.store.commit(step, {})
    return float(loss) / total, norm


def weights_in(update: StreamedUpdate, folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    folder.mkdir(exist_ok=True)
    update.engine.export(folder)
    return load_file(folder / "model.safetensors")


def train_streamed(
    name: str, rule: str, objective: Batches, steps: int, folder: Path, **settings: Any
) -> tuple[list[float], dict[str, torch.Tensor], list[float]]:
    update = streamed_update(name, rule, folder, **settings)
    try:
        found = [one_step(update, objective, step) for step in range(1, steps + 1)]
        return [x for x, _ in found], weights_in(update, folder / "out"), [n for _, n in found]
    finally:
        update.engine.close()
