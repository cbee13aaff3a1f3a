"""oneDNN's kernels are bounded in every run, unless the user bounds them."""

import os

import pytest
from support import lm_tree, train_here

NAMES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@pytest.mark.parametrize("given", [None, "77"])
def test_a_plain_run_keeps_few_kernels(given, tmp_path, monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, given or "")
        if given is None:
            monkeypatch.delenv(name)
    train_here(lm_tree(tmp_path, loop={"steps": 1}))
    assert [os.environ[name] for name in NAMES] == [given or "32"] * 2
