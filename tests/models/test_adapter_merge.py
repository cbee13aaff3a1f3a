"""Experts added up, and what a bank weighs."""

import json

import pytest
import torch
from bank_support import (
    EXTRACT,
    IDS,
    UPDATE,
    bank_of,
    base,
    logits,
    randomize,
)

from mnemic.models.adapter_rules import Expert
from mnemic.models.adapters import AdapterBank, byte_budget
from mnemic.models.memory import make_store


def test_cat_is_the_sum_and_the_others_say_how_far_off_they_are():
    for dtype, rslora in ((torch.float32, False), (torch.bfloat16, True)):
        experts = {
            op: Expert(r=4, alpha=alpha, rslora=rslora)
            for op, alpha in ((EXTRACT, 8), (UPDATE, 32))
        }
        bank = randomize(AdapterBank(base().to(dtype), experts))
        errors = {}
        for how in ("cat", "svd", "linear"):
            name, errors[how] = bank.merge([EXTRACT, UPDATE], how)
            off = total = 0.0
            for layer in bank._layers():
                parts = [layer.lora_A[op].weight.double() for op in (EXTRACT, UPDATE, name)]
                ups = [layer.lora_B[op].weight.double() for op in (EXTRACT, UPDATE, name)]
                scales = [layer.scaling[op] for op in (EXTRACT, UPDATE, name)]
                one, two, both = (s * b @ a for s, a, b in zip(scales, parts, ups, strict=True))
                off += float((both - one - two).square().sum())
                total += float((one + two).square().sum())
            assert errors[how] == pytest.approx((off / total) ** 0.5, rel=1e-3, abs=1e-6)
        if dtype == torch.float32 and not rslora:  # where peft's own merges can be trusted
            for how in errors:
                bank.model.add_weighted_adapter([EXTRACT, UPDATE], [1.0, 1.0], f"peft_{how}", how)
                for layer in bank._layers():
                    mine = layer.get_delta_weight(f"mem_sum_{how}")
                    assert torch.allclose(mine, layer.get_delta_weight(f"peft_{how}"), atol=1e-4)
        assert errors["cat"] < 1e-6 < 0.05 < errors["svd"] < errors["linear"]
    assert bank.operations[2:] == ("mem_sum_cat", "mem_sum_svd", "mem_sum_linear")
    bank.drop("mem_sum_svd")
    assert "mem_sum_svd" not in bank.operations and not any(
        "mem_sum_svd" in name for name, _ in bank.model.named_parameters()
    )
    with pytest.raises(ValueError, match="linear needs equal ranks"):
        bank_of().merge([EXTRACT, UPDATE], "linear")


def test_a_merge_computes_the_sum_and_survives_a_folder(tmp_path):
    bank = bank_of(EXTRACT, UPDATE)
    name, _ = bank.merge([EXTRACT, UPDATE])
    bank.save(tmp_path)
    loaded = AdapterBank.load(base(), tmp_path)
    assert torch.equal(logits(loaded, name), logits(bank, name))
    bank.model.base_model.set_adapter([EXTRACT, UPDATE])
    bank.model.base_model.enable_adapter_layers()
    assert torch.allclose(bank.model(input_ids=IDS).logits, logits(bank, name), atol=1e-4)


def test_the_budget_counts_adapters_optimizer_replay_and_store_together():
    bank = bank_of(EXTRACT, UPDATE)
    assert bank.bytes()[UPDATE] == bank.bytes()[EXTRACT] * 6 // 4
    bank.train_only(EXTRACT)
    optimizer = torch.optim.AdamW(bank.parameters_of(EXTRACT), foreach=False)
    assert byte_budget(bank, optimizer)["optimizer"] == 0
    with bank.use(EXTRACT):
        bank.model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    store = make_store("flat")
    store.insert("Zoë lives in Rome")
    found = byte_budget(bank, optimizer, replay_bytes=100, store=store)
    counters = 4 * len(bank.parameters_of(EXTRACT))
    assert found["adapters"] == sum(bank.bytes().values())
    assert found["optimizer"] == 2 * bank.bytes()[EXTRACT] + counters
    assert found["store"] == len(json.dumps(store.snapshot(), ensure_ascii=False).encode())
    assert found["total"] == sum(v for k, v in found.items() if k != "total")
