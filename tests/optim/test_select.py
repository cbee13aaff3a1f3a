"""Parameters get their rule by role."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, MixtralConfig

from mnemic.models.tiny import byte_tokenizer, tiny_llama
from mnemic.optim.apollo import Apollo
from mnemic.optim.select import SelectionError, apollo_groups, group_sizes, roles


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(byte_tokenizer(), hidden_size=32, layers=2, heads=4, max_position=64, seed=0)


def count(found):
    return {role: list(found.values()).count(role) for role in set(found.values())}


def test_llama_tied(llama):
    assert count(roles(llama)) == {"matrix": 14, "embedding": 1, "vector": 5}
    assert roles(llama)["model.embed_tokens.weight"] == "embedding"


def test_gpt2_conv1d_and_mixtral_experts():
    """The published selection by name reaches 0 % of the first and 11 % of the second."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    assert count(roles(gpt2))["matrix"] == 8 and count(roles(gpt2))["embedding"] == 2
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, vocab_size=64, tie_word_embeddings=False,
    )  # fmt: skip
    mixtral = AutoModelForCausalLM.from_config(config)
    found = count(roles(mixtral))
    assert found["experts"] == 2 and found["head"] == 1 and found["matrix"] >= 4
    groups = apollo_groups(mixtral)
    low = sum(p.numel() for p in groups[0]["params"])
    body = sum(
        p.numel() for n, p in mixtral.named_parameters() if "embed" not in n and "lm_" not in n
    )
    assert low > 0.95 * body


def test_lora_matrices_and_frozen_weights(llama):
    from peft import LoraConfig, get_peft_model

    base = tiny_llama(byte_tokenizer(), hidden_size=32, layers=1, heads=4, max_position=64, seed=0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    assert count(roles(model)) == {"matrix": 14}


def test_a_convolution_is_no_stack_of_experts():
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Linear(8, 8))
    assert roles(model) == {
        "0.weight": "other", "0.bias": "vector", "1.weight": "matrix", "1.bias": "vector",
    }  # fmt: skip


def test_patterns_overrule_roles_first_match_first(llama):
    patterns = [
        {"match": "*.layers.0.mlp.*", "rank": 4},
        {"match": "*.mlp.down_proj.*", "rule": "adamw", "lr": 0.5},
        {"match": "role:vector", "weight_decay": 0.3},
    ]
    groups = apollo_groups(llama, weight_decay=0.1, rest={"lr": 0.2}, patterns=patterns)
    by_name = {n: g for g in groups for n in g["param_names"]}
    assert len(by_name) == 20
    assert by_name["model.layers.0.mlp.down_proj.weight"]["rank"] == 4
    second = by_name["model.layers.1.mlp.down_proj.weight"]
    assert (second["rule"], second["lr"], second["weight_decay"]) == ("adamw", 0.5, 0.1)
    norm = by_name["model.norm.weight"]
    assert (norm["rule"], norm["lr"], norm["weight_decay"]) == ("adamw", 0.2, 0.3)
    embedding = by_name["model.embed_tokens.weight"]
    assert (embedding["rule"], embedding["weight_decay"]) == ("adamw", 0.1)
    attention = by_name["model.layers.0.self_attn.q_proj.weight"]
    assert "rank" not in attention and attention["rule"] == "apollo"


def test_a_pattern_that_takes_nothing_is_an_error(llama):
    with pytest.raises(SelectionError, match=r"'\*.nope.\*' takes nothing: no trainable parameter"):
        apollo_groups(llama, patterns=[{"match": "*.nope.*"}])
    with pytest.raises(SelectionError, match="all 14 parameters it matches are taken"):
        apollo_groups(llama, patterns=[{"match": "*layers*proj*"}, {"match": "role:matrix"}])


def test_a_pattern_whose_settings_do_nothing_is_an_error(llama):
    with pytest.raises(SelectionError, match="'role:embedding' sets rank, and every parameter"):
        apollo_groups(llama, patterns=[{"match": "role:embedding", "rank": 4}])
    low = apollo_groups(llama, patterns=[{"match": "role:embedding", "rank": 4, "rule": "apollo"}])
    assert next(g for g in low if "model.embed_tokens.weight" in g["param_names"])["rank"] == 4
    assert apollo_groups(llama, patterns=[{"match": "*", "rank": 4}])


def test_little_or_no_coverage_is_an_error(llama):
    everything = [{"match": "*_proj*", "rule": "adamw"}]
    with pytest.raises(SelectionError, match=r"would have 0 of the [\d,]+ trainable"):
        apollo_groups(llama, patterns=everything)
    mostly = [{"match": "*.mlp.*", "rule": "adamw"}]
    with pytest.raises(SelectionError, match="at least 50% of them"):
        apollo_groups(llama, patterns=mostly)
    assert apollo_groups(llama, patterns=mostly, min_coverage=0.1)
    with pytest.raises(SelectionError, match="would have 0 of the 0"):
        apollo_groups(nn.Embedding(10, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rest", ["adamw", "adamw8bit"])
def test_the_table_is_what_is_held(rest, dtype):
    model = tiny_llama(byte_tokenizer(), hidden_size=48, layers=1, heads=4, max_position=64, seed=0)
    model.to(dtype)
    optimizer = Apollo(apollo_groups(model, rest={"rule": rest}), rank=5)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for group, size in zip(
        optimizer.param_groups, group_sizes(optimizer.param_groups), strict=True
    ):
        states = [optimizer.state[p] for p in group["params"]]
        held = sum(t.untyped_storage().nbytes() for s in states for t in s.values())
        assert size.state_bytes == held and size.tensors == len(states)
