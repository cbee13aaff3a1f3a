"""On an accelerator: a run uses it, measures it, and comes back to the same bits."""

import pytest
from support import lm_tree, rows_of, same_weights, train_here, weights_of

pytestmark = pytest.mark.gpu


def test_a_run_on_the_accelerator_is_measured_and_resumes(tmp_path):
    import torch

    device = torch.accelerator.current_accelerator().type
    for name, steps in (("whole", 8), ("broken", 4), ("broken", 8)):
        tree = lm_tree(
            tmp_path,
            run_dir=str(tmp_path / name),
            loop={"steps": steps, "schedule": "constant", "precision": "bf16"},
        )
        train_here(tree)
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "whole")
    assert same_weights(
        weights_of(tmp_path / "broken" / "final"), weights_of(tmp_path / "whole" / "final")
    )
    if device == "cuda":
        rows = rows_of(tmp_path / "whole", perf=True)
        assert all(row["perf/device_peak_bytes"] > 0 for row in rows)
