"""The token loss: equal to TRL's, to one forward over all rows, and blind to a packed neighbour."""

import pytest
import torch

from mnemic.models.tiny import byte_tokenizer, tiny_llama
from mnemic.train.data.collate import collate, pack_rows
from mnemic.train.data.formats import as_example
from mnemic.train.data.tokenize import Example, SftTokenizer
from mnemic.train.objectives.tokens import keeps_packed_rows_apart, token_loss

TOKENIZER = byte_tokenizer()
TALK = [
    {"role": "user", "content": "hi there"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "and your name?"},
    {"role": "assistant", "content": "Ada"},
]
ROWS = {
    "strings": [
        {"prompt": "1 + 1 = ", "completion": "2"},
        {"prompt": "a long prompt, then ", "completion": "a longer completion than before"},
        {"prompt": "x", "completion": "y"},
    ],
    "messages": [{"messages": TALK}, {"messages": TALK[:2]}],
    "split": [{"prompt": TALK[:1], "completion": TALK[1:2]}, {"prompt": TALK[:3],
              "completion": TALK[3:]}],
}  # fmt: skip


def model():
    built = tiny_llama(TOKENIZER, hidden_size=32, layers=2, heads=2, max_position=256, seed=1)
    # Random weights are near-uniform: sharper ones make a wrong mask visible.
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.mul_(3)
    return built


def examples(rows, loss_on):
    convert = SftTokenizer(TOKENIZER, loss_on=loss_on, max_length=256, truncate=True, system=None)
    return [convert(as_example(row)) for row in rows]


@pytest.mark.parametrize(
    ("kind", "loss_on"), [("strings", "completion"), ("split", "completion"), ("messages", "all")]
)
def test_sft_loss_equals_trl(tmp_path, kind, loss_on):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    rows = ROWS[kind]
    config = trl.SFTConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=256,
        per_device_train_batch_size=len(rows), completion_only_loss=loss_on == "completion",
        gradient_checkpointing=False,
    )  # fmt: skip
    peer = model()
    trainer = trl.SFTTrainer(
        model=peer, args=config, processing_class=byte_tokenizer(),
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    inputs = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    with torch.no_grad():
        theirs = trainer.compute_loss(peer, dict(inputs)).item()
    batch = collate(examples(rows, loss_on), pad_id=TOKENIZER.pad_token_id, packed=False)
    with torch.no_grad():
        ours = token_loss(model(), batch).item() / batch.weight
    assert ours == pytest.approx(theirs, rel=1e-6)
    trained = int((inputs["labels"][:, 1:] != -100).sum())
    assert trained == batch.weight


def test_assistant_masks_equal_the_templates_own(tmp_path):
    """With {% generation %} in the template transformers marks assistant tokens; we find
    the same.
    """
    marked = byte_tokenizer()
    marked.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|end|>\n' }}{% endgeneration %}{% else %}"
        "{{ m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    )
    theirs = marked.apply_chat_template(
        TALK, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    (ours,) = examples([{"messages": TALK}], "assistant")
    assert ours.input_ids == theirs["input_ids"]
    assert [int(label != -100) for label in ours.labels] == theirs["assistant_masks"]


def test_only_needed_logits_give_the_same_loss_and_gradients():
    batch = collate(examples(ROWS["strings"], "completion"), pad_id=0, packed=False)
    assert "logit_columns" in batch.tensors
    found = []
    for keep in (True, False):
        if not keep:
            del batch.tensors["logit_columns"]
        net = model()
        loss = token_loss(net, batch)
        loss.backward()
        found.append((loss, [p.grad for p in net.parameters()]))
    torch.testing.assert_close(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_packed_batch_has_the_loss_of_its_rows_alone():
    rows = examples(ROWS["strings"] + ROWS["split"], "completion")
    packed = pack_rows(rows, 256)
    assert len(packed) < len(rows)
    net = model()
    together = token_loss(net, collate(packed, pad_id=0, packed=True))
    alone = sum(token_loss(net, collate([row], pad_id=0, packed=False)) for row in rows)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    assert keeps_packed_rows_apart(net)


def test_a_model_that_mixes_packed_rows_is_found_out():
    net = model()
    forward = net.forward

    def mixing(*args, **kwargs):
        # With a mask given, transformers takes positions at their word: plain causal attention.
        return forward(*args, attention_mask=torch.ones_like(kwargs["input_ids"]), **kwargs)

    net.forward = mixing
    assert not keeps_packed_rows_apart(net)


def test_the_loss_ignores_what_is_not_labelled():
    row = Example([1, 2, 3, 4], [-100, -100, 3, -100], (4,), 4)
    batch = collate([row], pad_id=0, packed=False)
    net = model()
    logits = net(input_ids=torch.tensor([[1, 2, 3, 4]])).logits.float()
    expected = -logits[0, 1].log_softmax(-1)[3]
    torch.testing.assert_close(token_loss(net, batch), expected, rtol=1e-5, atol=1e-6)
