"""Streaming to an accelerator: the losses of the CPU, and on the device slots, not the model."""

import pytest
import torch
from support import lm_tree, rows_of, train_here

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["ssd", "host"])
@pytest.mark.parametrize("optimizer", ["adamw", "apollo_mini"])
def test_a_streamed_run_on_the_device(kind, optimizer, tmp_path):
    losses = {}
    for device in ("cpu", "auto"):
        folder = tmp_path / device
        folder.mkdir()
        tree = lm_tree(
            folder, model={"layers": 4}, update="streamed", offload={"kind": kind},
            optimizer={"kind": optimizer, "lr": 1e-3}, loop={"steps": 4, "device": device},
        )  # fmt: skip
        train_here(tree)
        losses[device] = [row["loss"] for row in rows_of(tree["run_dir"])[1:]]
    assert losses["auto"] == pytest.approx(losses["cpu"], rel=1e-3)


def test_the_device_holds_slots_and_not_the_model(tmp_path):
    """Eight layers more cost no byte of a layer on the device."""
    peaks = []
    for layers in (4, 12):
        folder = tmp_path / str(layers)
        folder.mkdir()
        tree = lm_tree(
            folder, model={"layers": layers, "hidden_size": 256, "heads": 4}, update="streamed",
            offload={"kind": "host"}, loop={"steps": 2},
        )  # fmt: skip
        torch.cuda.reset_peak_memory_stats()
        peaks.append(train_here(tree)["device_peak_bytes"])
    layer = 4 * (12 * 256 * 256)
    # Layer inputs grow: batch * tokens * hidden * 4 bytes each.
    assert peaks[1] - peaks[0] < layer + 8 * 8 * 32 * 256 * 4 * 2
