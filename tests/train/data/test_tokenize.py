"""What is learned of a row, and how rows become batches."""

import pytest
import torch

from mnemic.models.tiny import byte_tokenizer
from mnemic.train.data.collate import collate, pack_rows
from mnemic.train.data.formats import FormatError, as_example, as_text
from mnemic.train.data.tokenize import IGNORE, Example, SftTokenizer

TOKENIZER = byte_tokenizer()
TALK = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "name?"},
    {"role": "assistant", "content": "Ada"},
]


def convert(fields, **changes):
    options = {"loss_on": "completion", "max_length": 512, "truncate": True, "system": None}
    return SftTokenizer(TOKENIZER, **{**options, **changes})(as_example(fields))


def learned(example):
    return TOKENIZER.decode([t for t, label in zip(example.input_ids, example.labels, strict=True)
                             if label != IGNORE])  # fmt: skip


def test_loss_on_completion_is_the_last_turn():
    assert learned(convert({"messages": TALK})) == "Ada<|end|>\n"


def test_loss_on_assistant_is_every_assistant_turn():
    example = convert({"messages": TALK}, loss_on="assistant")
    assert learned(example) == "hello<|end|>\nAda<|end|>\n"


def test_loss_on_all_leaves_out_only_the_first_token():
    example = convert({"messages": TALK}, loss_on="all")
    assert example.labels == [IGNORE, *example.input_ids[1:]]


def test_prompt_and_completion_strings_end_with_eos():
    example = convert({"prompt": "1+1=", "completion": "2"})
    assert learned(example) == "2<|end|>"
    assert TOKENIZER.decode(example.input_ids) == "1+1=2<|end|>"


def test_prompt_and_completion_messages_equal_the_conversation():
    split = {"prompt": TALK[:3], "completion": TALK[3:]}
    assert convert(split) == convert({"messages": TALK})


def test_a_system_message_is_added_only_where_there_is_none():
    example = convert({"messages": TALK}, system="be brief")
    assert TOKENIZER.decode(example.input_ids).startswith("<|system|>\nbe brief<|end|>\n")
    own = [{"role": "system", "content": "mine"}, *TALK]
    assert "be brief" not in TOKENIZER.decode(
        convert({"messages": own}, system="be brief").input_ids
    )
    assert learned(example) == "Ada<|end|>\n"


def test_generation_prompt_is_the_training_prompt():
    tokenizer = SftTokenizer(
        TOKENIZER, loss_on="completion", max_length=512, truncate=True, system="s"
    )
    row = as_example({"messages": TALK})
    example = tokenizer(row)
    prompt = tokenizer.prompt(row)
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[: len(prompt)] == [IGNORE] * len(prompt)
    assert tokenizer.reference(row) == "Ada"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": "x"}, "needs columns 'messages', or 'prompt'"),
        ({"prompt": "x", "completion": ""}, "completion: empty"),
        ({"prompt": "x", "completion": ["y"]}, "prompt: str, not a list"),
        ({"messages": "x"}, "messages: str, not a list"),
        ({"messages": []}, "messages: list, not a list of messages"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\]: needs the keys"),
        ({"messages": [{"role": "user", "content": 3}]}, "must be strings"),
        ({"messages": TALK[:1]}, "no turn has role 'assistant'"),
        ({"prompt": TALK[:1], "completion": TALK[2:3]}, "first role is 'user'"),
    ],
)
def test_rows_that_cannot_be_used(fields, words):
    with pytest.raises(FormatError, match=words):
        as_example(fields)


def test_text_rows():
    assert as_text({"text": "x"}) == "x"
    with pytest.raises(FormatError, match="column 'text'"):
        as_text({"txt": "x"})


def test_a_long_row_is_cut_or_refused_and_never_trains_nothing():
    fields = {"prompt": "x" * 50, "completion": "y" * 50}
    cut = convert(fields, max_length=60)
    assert (len(cut.input_ids), cut.num_targets, cut.source_length) == (60, 10, 101)
    with pytest.raises(FormatError, match=r"longer than objective\.max_length"):
        convert(fields, max_length=60, truncate=False)
    with pytest.raises(FormatError, match="no trainable token"):
        convert(fields, max_length=40)


def test_an_unstable_template_is_named():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(FormatError, match="renders earlier turns differently"):
        SftTokenizer(tokenizer, loss_on="completion", max_length=99, truncate=True, system=None)(
            as_example({"messages": TALK})
        )


def test_padding_is_masked_by_length_even_when_pad_is_a_real_token():
    rows = [Example([5, 6, 7], [IGNORE, 6, 7], (3,), 3), Example([5], [IGNORE], (1,), 1)]
    batch = collate(rows, pad_id=5, packed=False)
    assert batch.tensors["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.tensors["labels"].tolist() == [[IGNORE, 6, 7], [IGNORE] * 3]
    assert (batch.weight, batch.counts) == (2.0, {"rows": 2.0, "tokens": 4.0})


def test_packing_keeps_every_row_once_and_within_the_length():
    rows = [Example([i] * n, [IGNORE] + [i] * (n - 1), (n,), n) for i, n in
            enumerate([7, 3, 3, 5, 2, 9, 10, 1, 4])]  # fmt: skip
    packed = pack_rows(rows, 10)
    assert all(len(p.input_ids) <= 10 for p in packed)
    assert sorted(t for p in packed for t in p.input_ids) == sorted(
        t for r in rows for t in r.input_ids
    )
    assert sum(p.num_targets for p in packed) == sum(r.num_targets for r in rows)
    assert len(packed) == 5  # 44 tokens in rows of 10: no packing does better


def test_packed_positions_restart_and_padding_is_a_row_of_its_own():
    rows = pack_rows([Example([1, 2, 3], [IGNORE, 2, 3], (3,), 3),
                      Example([4, 5], [IGNORE, 5], (2,), 2)], 8)  # fmt: skip
    other = Example([9] * 7, [IGNORE] + [9] * 6, (7,), 7)
    batch = collate([*rows, other], pad_id=0, packed=True)
    assert batch.tensors["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert "attention_mask" not in batch.tensors
    assert torch.equal(batch.tensors["labels"][0], torch.tensor([-100, 2, 3, -100, 5, -100, -100]))
