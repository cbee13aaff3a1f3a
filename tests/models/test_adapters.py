"""One base and its experts: who computes, who learns, what a folder holds, and what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from bank_support import (
    EXTRACT,
    GENERATE,
    IDS,
    SETTINGS,
    UPDATE,
    bank_of,
    base,
    logits,
    randomize,
)
from peft import LoHaConfig, LoraConfig, get_peft_model

from mnemic.models.adapter_card import AdapterCard, base_hash
from mnemic.models.adapter_rules import Expert
from mnemic.models.adapters import AdapterBank
from mnemic.models.generation import generate
from mnemic.models.lora import adapters_off


def test_use_switches_restores_and_leaves_alone_what_trains():
    plain = base()(input_ids=IDS).logits
    bank = bank_of()
    assert bank.active is None and torch.equal(logits(bank, None), plain)
    bank.train_only(EXTRACT)
    flags = {n: p.requires_grad for n, p in bank.model.named_parameters()}
    outputs = [logits(bank, op) for op in (None, *bank.operations)]
    assert all((a - b).abs().max() > 0.01 for i, a in enumerate(outputs) for b in outputs[:i])
    with bank.use(EXTRACT):
        with pytest.raises(KeyError), bank.use(None):
            assert bank.active is None
            with bank.use(UPDATE):
                raise KeyError
        assert bank.active == EXTRACT
        with adapters_off(bank.model):
            assert torch.equal(bank.model(input_ids=IDS).logits, plain)
        assert torch.equal(bank.model(input_ids=IDS).logits, outputs[1])
    assert bank.active is None
    assert flags == {n: p.requires_grad for n, p in bank.model.named_parameters()}
    with pytest.raises(ValueError, match="no operation 'mem_other'"), bank.use("mem_other"):
        pass
    assert torch.equal(logits(bank, None), plain)


def test_training_moves_the_chosen_experts_and_nothing_else():
    bank = bank_of()
    assert not any(p.requires_grad for p in bank.model.parameters())
    bank.train_only(EXTRACT, UPDATE)
    optimizer = torch.optim.AdamW([*bank.parameters_of(EXTRACT), *bank.parameters_of(UPDATE)])
    before = {n: p.detach().clone() for n, p in bank.model.named_parameters()}

    def step(*operations: str) -> set[str]:
        optimizer.zero_grad()
        for operation in operations:
            with bank.use(operation):
                bank.model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        after = dict(bank.model.named_parameters())
        moved = {n for n, old in before.items() if not torch.equal(old, after[n])}
        return {op for op in (*bank.operations, "base") for n in moved if op in n.split(".")} | {
            "base" for n in moved if "lora_" not in n
        }

    assert step(EXTRACT) == {EXTRACT}
    assert step(EXTRACT, UPDATE) == {EXTRACT, UPDATE}


def test_what_was_frozen_on_purpose_stays_frozen():
    bank = AdapterBank(base(), {EXTRACT: Expert(r=2, freeze_a=True), UPDATE: Expert(r=2)})
    count = len(bank.parameters_of(UPDATE))
    assert len(bank.parameters_of(EXTRACT)) == count / 2
    bank.train_only(UPDATE)
    by_hand = bank.parameters_of(UPDATE)[0]
    by_hand.requires_grad_(False)
    for operations in ((EXTRACT,), (), (EXTRACT, UPDATE)):
        bank.train_only(*operations)
        with bank.use(UPDATE), bank.use(None):
            pass
    assert not by_hand.requires_grad and len(bank.parameters_of(UPDATE)) == count - 1
    names = [n for n, p in bank.model.named_parameters() if p.requires_grad and EXTRACT in n]
    assert names and all(".lora_B." in name for name in names)


def test_a_mixed_batch_equals_one_by_one():
    bank = bank_of()
    operations = [GENERATE, EXTRACT, None, UPDATE, EXTRACT, UPDATE]
    prompts = [list(range(40, 40 + n)) for n in (3, 9, 5, 5, 7, 12)]
    bank.model.train()
    mixed = bank.generate(prompts, operations, batch_size=4, **SETTINGS)
    alone = []
    for prompt, operation in zip(prompts, operations, strict=True):
        with bank.use(operation):
            alone += generate(bank.model, [prompt], **SETTINGS)
    assert mixed == alone and len({tuple(one.ids) for one in mixed}) == len(prompts)
    assert bank.model.training and bank.active is None
    rows = IDS.repeat(3, 1)
    found = bank.forward([UPDATE, None, EXTRACT], input_ids=rows).logits
    bank.model.eval()
    wanted = torch.cat([logits(bank, op) for op in (UPDATE, None, EXTRACT)])
    assert torch.allclose(found, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="6 prompts and 2 operations"):
        bank.generate(prompts, operations[:2], **SETTINGS)


def test_a_text_does_not_depend_on_its_neighbours_over_a_bf16_base():
    bank = bank_of(model=base().to(torch.bfloat16))
    rows = IDS.repeat(2, 1)
    with torch.no_grad():
        alone = bank.forward([EXTRACT] * 2, input_ids=rows).logits[:1]
        mixed = bank.forward([EXTRACT, UPDATE], input_ids=rows).logits[:1]
    assert torch.equal(alone, mixed)


@pytest.mark.parametrize("name", ["update", "mem", "mem.a", "mem_", "__base__", "Mem_a", "mem_a-b"])
def test_names_that_peft_cannot_hold_are_refused(name):
    with pytest.raises(ValueError, match="mem_extract, mem_update or mem_generate"):
        AdapterBank(base(), {name: Expert()})


def test_a_name_within_a_name_is_refused_since_peft_clears_both():
    with pytest.raises(ValueError, match=r"'mem_a' is a part of the name 'mem_ab'"):
        AdapterBank(base(), {"mem_a": Expert(), "mem_ab": Expert()})


def test_peft_alone_zeroes_the_adapter_with_the_longer_name(tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    model = get_peft_model(base(), LoraConfig(r=2, init_lora_weights=False), adapter_name="mem_a")
    model.add_adapter("mem_ab", LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path, selected_adapters=["mem_a"])
    hotswap_adapter(model, str(tmp_path / "mem_a"), "mem_a", torch_device="cpu")
    other = [p for n, p in model.named_parameters() if "lora_B.mem_ab." in n]
    assert other and not any(p.any() for p in other)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_inits_that_write_into_the_shared_base_are_refused(init):
    model, config = base(), LoraConfig()
    config.init_lora_weights = init
    with pytest.raises(ValueError, match="writes into the base that all experts share"):
        AdapterBank(model, {EXTRACT: Expert(), UPDATE: config})
    assert not hasattr(model, "peft_config")


@pytest.mark.filterwarnings("ignore")
def test_peft_alone_breaks_the_first_of_two_pissa_adapters():
    model = base()
    plain = model(input_ids=IDS).logits
    model = get_peft_model(model, LoraConfig(r=4, init_lora_weights="pissa"), adapter_name="mem_a")
    assert torch.allclose(model(input_ids=IDS).logits, plain, atol=1e-3)
    model.add_adapter("mem_b", LoraConfig(r=4, init_lora_weights="pissa"))
    assert (model(input_ids=IDS).logits - plain).abs().max() > 0.1


def test_other_types_and_shared_biases_are_refused():
    with pytest.raises(ValueError, match="LOHA; a bank holds LoRA adapters only"):
        AdapterBank(base(), {EXTRACT: Expert(), UPDATE: LoHaConfig()})
    with pytest.raises(ValueError, match="bias='all' changes the base"):
        AdapterBank(base(), {EXTRACT: LoraConfig(bias="all")})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", [{"dora": True}, {"modules_to_save": ("norm",)}])
def test_what_cannot_share_a_batch_is_refused_and_leaves_no_hook(changes):
    bank = bank_of(EXTRACT, UPDATE, **changes)
    rows = IDS.repeat(2, 1)
    with pytest.raises(ValueError, match=r"cannot be in a batch of several operations"):
        bank.forward([EXTRACT, UPDATE], input_ids=rows)
    alone = bank.forward([EXTRACT, EXTRACT], input_ids=rows).logits[:1]
    assert torch.allclose(alone, logits(bank, EXTRACT), atol=1e-5)
    bank.model.eval()
    # peft's own refusal comes within the forward, and its hooks stay: any other batch fails.
    with bank.use(EXTRACT):
        with pytest.raises((ValueError, TypeError)):
            bank.model(input_ids=rows, adapter_names=[EXTRACT, UPDATE])
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            bank.model(input_ids=IDS)


def test_a_mixed_forward_that_fails_leaves_no_hook():
    bank = bank_of()
    with pytest.raises(IndexError):
        bank.forward([EXTRACT, UPDATE], input_ids=torch.full((2, 3), 10**6))
    assert logits(bank, EXTRACT).shape[0] == 1 and bank.active is None


PLAIN = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
model = AutoModelForCausalLM.from_pretrained(folder + "/base", dtype=torch.float32)
names = ["mem_extract", "mem_update"]
model = PeftModel.from_pretrained(model, folder + "/bank/mem_extract", adapter_name=names[0])
model.load_adapter(folder + "/bank/mem_update", names[1])
wanted = torch.load(folder + "/logits.pt")
for name in names:
    model.set_adapter(name)
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, wanted[name]), name
assert not any(name.startswith("mnemic") for name in sys.modules)
"""


def test_plain_peft_in_a_fresh_process_gives_the_same_outputs(tmp_path):
    base().save_pretrained(tmp_path / "base")
    bank = bank_of(EXTRACT, UPDATE, rslora=True)
    bank.save(tmp_path / "bank")
    torch.save({op: logits(bank, op) for op in bank.operations}, tmp_path / "logits.pt")
    arguments = [sys.executable, "-c", PLAIN, str(tmp_path), json.dumps(IDS.tolist())]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_folder_gives_the_bank_back_with_its_cards(tmp_path):
    bank = bank_of(EXTRACT, UPDATE)
    bank.describe(EXTRACT, teacher="gold", data="kvstream", version="3", licence="Apache-2.0")
    bank.save(tmp_path)
    bank.save(tmp_path, [UPDATE])  # over the old one
    assert sorted(p.name for p in tmp_path.iterdir()) == [EXTRACT, UPDATE]
    loaded = AdapterBank.load(base(), tmp_path)
    for operation in bank.operations:
        assert torch.equal(logits(loaded, operation), logits(bank, operation))
    card = AdapterCard.read(tmp_path / EXTRACT)
    assert card == loaded.cards[EXTRACT] and card.created.endswith("+00:00")
    assert (card.teacher, card.data, card.version, card.licence) == (
        "gold", "kvstream", "3", "Apache-2.0",
    )  # fmt: skip
    weights = tmp_path / EXTRACT / "adapter_model.safetensors"
    assert card.bytes == bank.bytes()[EXTRACT] < weights.stat().st_size < card.bytes + 8192
    assert AdapterBank.load(base(), tmp_path, [UPDATE]).operations == (UPDATE,)
    with pytest.raises(ValueError, match="holds mem_extract, mem_update"):
        AdapterBank.load(base(), tmp_path, [GENERATE])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", [{"dora": True}, {"modules_to_save": ("norm", "lm_head")}])
def test_more_than_plain_lora_comes_back_from_a_folder(tmp_path, changes):
    bank = bank_of(EXTRACT, UPDATE, model=base().to(torch.bfloat16), **changes)
    if not changes.get("dora"):
        next(p for n, p in bank.model.named_parameters() if f"norm.modules_to_save.{EXTRACT}" in n
             ).data.mul_(2)  # fmt: skip
    bank.save(tmp_path)
    loaded = AdapterBank.load(base().to(torch.bfloat16), tmp_path)
    found = [logits(loaded, operation) for operation in (EXTRACT, UPDATE, None)]
    assert all(
        torch.equal(a, logits(bank, op))
        for a, op in zip(found, (EXTRACT, UPDATE, None), strict=True)
    )
    if changes.get("dora"):  # whose layers compute in fp32, whatever is asked for
        typed = AdapterBank.load(base().to(torch.bfloat16), tmp_path, compute="fp32")
        assert all(layer.cast_input_dtype_enabled for layer in loaded._layers())
        assert torch.equal(found[0], logits(typed, EXTRACT))
    assert (found[0] - found[1]).abs().max() > 0.01 < (found[0] - found[2]).abs().max()


def test_a_base_of_another_hash_is_refused_unless_one_insists(tmp_path):
    bank_of(EXTRACT).save(tmp_path)
    other = base()
    assert base_hash(other) == base_hash(base().to(torch.bfloat16)) != base_hash(base(1))
    other.model.norm.weight.data[3] += 1
    with pytest.raises(ValueError, match=r"trained over the base .* any_base=True"):
        AdapterBank.load(other, tmp_path)
    assert AdapterBank.load(base(1), tmp_path, any_base=True).operations == (EXTRACT,)
    (tmp_path / EXTRACT / "card.json").write_text('{"operation": 3}')
    with pytest.raises(ValueError, match=r"card\.json: operation: 3 must be of type str"):
        AdapterBank.load(base(), tmp_path)


def test_adapters_over_a_changed_base_are_not_saved(tmp_path):
    bank = bank_of(EXTRACT)
    with bank.use(EXTRACT):
        bank.model.merge_adapter()
        with pytest.raises(ValueError, match="the base under the adapters has changed"):
            bank.save(tmp_path)
        bank.model.unmerge_adapter()
    bank.save(tmp_path)


def test_swap_puts_another_expert_in_place(tmp_path):
    donor = randomize(AdapterBank(base(), {EXTRACT: Expert(r=4, alpha=32)}), seed=9)
    donor.describe(EXTRACT, version="2")
    donor.save(tmp_path / "donor")
    bank = bank_of()
    others = [logits(bank, op) for op in (UPDATE, GENERATE)]
    tensors = bank.parameters_of(EXTRACT)
    with bank.use(UPDATE):
        bank.swap(EXTRACT, tmp_path / "donor" / EXTRACT)
        assert bank.active == UPDATE
    assert torch.equal(logits(bank, EXTRACT), logits(donor, EXTRACT))
    assert all(
        torch.equal(logits(bank, op), out)
        for op, out in zip((UPDATE, GENERATE), others, strict=True)
    )
    assert all(a is b for a, b in zip(tensors, bank.parameters_of(EXTRACT), strict=True))
    assert bank.cards[EXTRACT].version == "2"
    # The swapped alpha is saved too.
    bank.save(tmp_path / "bank")
    again = AdapterBank.load(base(), tmp_path / "bank")
    assert torch.equal(logits(again, EXTRACT), logits(donor, EXTRACT))
    with pytest.raises(ValueError, match="layers and ranks must be the same"):
        bank.swap(UPDATE, tmp_path / "donor" / EXTRACT)
