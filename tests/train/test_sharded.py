"""Checkpoints in shards, read by one process: what was written, and nothing that could do harm."""

import os
import pickle

import pytest
import torch
from torch import nn

from mnemic.train.errors import UserError
from mnemic.train.sharded import FOLDER, load_optimizer, load_weights, save_parts


def trained(seed):
    torch.manual_seed(seed)
    model = nn.Linear(4, 3, dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_what_was_written_comes_back(tmp_path):
    model, optimizer = trained(0)
    save_parts(model, optimizer, tmp_path / FOLDER)
    other, state = trained(1)
    load_weights(other, tmp_path)
    load_optimizer(other, state, tmp_path, {})
    assert all(
        torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True)
    )
    for param, same in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[param].items():
            assert torch.equal(state.state[same][key], value), key


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def with_objects():
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

    return Metadata({"model.weight": BytesStorageMetadata()})


@pytest.mark.parametrize("kind", ["a call", "pickled objects", "another record", "half a file"])
def test_metadata_that_would_do_something_are_refused(tmp_path, kind):
    model, optimizer = trained(0)
    save_parts(model, optimizer, tmp_path / FOLDER)
    path = tmp_path / FOLDER / ".metadata"
    made = tmp_path / "made"
    content = {
        "a call": lambda: pickle.dumps(Harm(str(made))),
        "pickled objects": lambda: pickle.dumps(with_objects()),
        "another record": lambda: pickle.dumps(torch.Size([2])),
        "half a file": lambda: path.read_bytes()[:40],
    }[kind]()
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not the metadata of a checkpoint"):
        load_weights(model, tmp_path)
    assert not made.exists()
