"""Every test runs offline, on the CPU unless marked `gpu`, with the package under its one name."""

import os
import sys
import tempfile

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
DATASETS = tempfile.TemporaryDirectory(prefix="mnemic-datasets-")
os.environ["HF_DATASETS_CACHE"] = DATASETS.name
os.environ["WANDB_SILENT"] = "true"
# Tiny models: threads that wait for each other cost more than they bring, above all beside others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in ("WANDB_MODE", "WANDB_API_KEY", "MNEMIC_RANK"):
    os.environ.pop(name, None)

from support import ForkServer  # noqa: E402


@pytest.fixture(autouse=True)
def one_identity():
    """A module imported as `optim` besides `mnemic.optim` would be two sets of classes."""
    yield
    doubled = {"train", "optim", "models", "recipes"} & sys.modules.keys()
    assert not doubled, f"imported past the package name: {doubled}"


@pytest.fixture(scope="session")
def fork_server():
    """Starts `mnemic` processes in milliseconds, from one that has torch imported already."""
    server = ForkServer()
    yield server
    server.close()


def pytest_collection_modifyitems(items):
    """`gpu` tests skip, saying why, where there is no accelerator."""
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if not torch.accelerator.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no accelerator on this machine"))


@pytest.fixture(scope="session")
def warm_model(tmp_path_factory):
    """Folder of a small model that a few seconds of SFT taught to write memory operations."""
    from memory_support import sft_memory_tree
    from support import train_here

    folder = tmp_path_factory.mktemp("warm")
    train_here(sft_memory_tree(folder))
    return folder / "run" / "final"
