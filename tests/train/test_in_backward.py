"""`update: in_backward` is the plain update, with gradients freed on the way."""

import gc
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import lm_tree, rows_of, same_weights, train_here, weights_of

from mnemic.train.errors import UserError
from mnemic.train.recipe.load import build_recipe

OPTIMIZERS = [
    {"kind": "apollo", "lr": 3e-3, "update_proj_gap": 4, "weight_decay": 0.1},
    {"kind": "apollo_mini", "lr": 3e-3, "rest": "adamw8bit"},
    {"kind": "adamw", "lr": 3e-3, "weight_decay": 0.1},
    {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
]


def run(folder, update, optimizer=OPTIMIZERS[0], **changes):
    folder.mkdir(exist_ok=True)
    tree = lm_tree(folder, optimizer=optimizer, update=update, **changes)
    train_here(tree)
    return rows_of(folder / "run"), weights_of(folder / "run" / "final")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda o: o["kind"])
def test_the_same_bits_as_plain(tmp_path, optimizer, dtype):
    """Weights and every metric, the gradient norm included; with two micro-batches as with one."""
    for micro in (8, 4):
        sizes = {"loop": {"micro_batch_size": micro}, "model": {"dtype": dtype, "layers": 2}}
        plain = {"kind": "plain", "max_grad_norm": None}
        rows, weights = run(tmp_path / f"plain{micro}", plain, optimizer, **sizes)
        again, same = run(tmp_path / f"in{micro}", "in_backward", optimizer, **sizes)
        assert rows == again and same_weights(weights, same)
        assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize("kind", ["plain", "in_backward"])
@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_resume_is_bit_exact(tmp_path, at, kind):
    """At steps 1, T-1, T and T+1 of update_proj_gap T = 4, clipping by the norm before."""
    update = {"kind": kind, "max_grad_norm": 1.0}
    if kind == "in_backward":
        update["clip"] = "previous_norm"
    loop = {"schedule": "constant", "steps": 7}
    rows, weights = run(tmp_path / "straight", update, loop=loop)
    run(tmp_path / "stopped", update, loop={**loop, "steps": at})
    again, same = run(tmp_path / "stopped", update, loop=loop)
    assert again == rows and same_weights(weights, same)


def displacement(folder, update, steps) -> dict:
    """What each tensor moved in the last of `steps` steps of SGD at rate 1."""
    optimizer = {"kind": "sgd", "lr": 1.0}
    loop = {"schedule": "constant"}
    _, before = run(folder / "a", update, optimizer, loop={**loop, "steps": steps - 1})
    _, after = run(folder / "b", update, optimizer, loop={**loop, "steps": steps})
    return {n: (after[n] - before[n]).double() for n in after}


def test_layer_clips_each_tensor_by_its_own_norm(tmp_path):
    tmp_path.joinpath("free").mkdir()
    tmp_path.joinpath("clipped").mkdir()
    update = {"kind": "in_backward", "clip": "layer", "max_grad_norm": 0.05}
    free = displacement(tmp_path / "free", "in_backward", 2)
    clipped = displacement(tmp_path / "clipped", update, 2)
    norms = [float(x.norm()) for x in clipped.values()]
    assert max(norms) < 0.0501 and sum(n > 0.0499 for n in norms) >= 3
    assert max(float(x.norm()) for x in free.values()) > 0.1


def test_previous_norm_clips_by_the_norm_of_the_step_before(tmp_path):
    """The second step is the unclipped one times max_grad_norm / (norm of step 1)."""
    for name in ("free", "clipped"):
        tmp_path.joinpath(name).mkdir()
    update = {"kind": "in_backward", "clip": "previous_norm", "max_grad_norm": 0.5}
    free = displacement(tmp_path / "free", "in_backward", 2)
    clipped = displacement(tmp_path / "clipped", update, 2)
    rows = rows_of(tmp_path / "clipped" / "b" / "run")
    first, second = (row["grad_norm"] for row in rows if row["step"] in (1, 2))
    unclipped = rows_of(tmp_path / "free" / "b" / "run")[-1]["grad_norm"]
    assert second == unclipped > 1, "the logged norm is not the true one"
    for name, moved in clipped.items():
        torch.testing.assert_close(moved, free[name] * 0.5 / first, rtol=1e-3, atol=1e-6)


def test_gradients_are_freed_on_the_way(tmp_path, monkeypatch):
    """When the optimizer runs for one tensor, hardly another gradient is alive."""
    from mnemic.train.in_backward import InBackwardUpdate

    alive = []
    apply = InBackwardUpdate._apply

    def counting(self, index):
        alive.append(sum(p.grad is not None for p in self.parameters))
        apply(self, index)

    monkeypatch.setattr(InBackwardUpdate, "_apply", counting)
    run(tmp_path / "one", "in_backward", model={"layers": 3}, loop={"steps": 2})
    assert len(alive) == 2 * 29 and max(alive) == 1
    gc.collect()


def test_global_clipping_is_refused():
    tree = {"kind": "in_backward", "max_grad_norm": 1.0}
    with pytest.raises(UserError, match="set clip to layer or previous_norm, or kind to plain"):
        build_recipe({**minimal(), "update": tree})
    with pytest.raises(UserError, match="clip=layer needs max_grad_norm"):
        build_recipe({**minimal(), "update": {"kind": "in_backward", "clip": "layer"}})


def minimal() -> dict:
    return {
        "name": "x", "model": "tiny", "data": {"kind": "text", "path": "x.txt"},
        "objective": "lm", "optimizer": "sgd", "loop": {"steps": 1},
    }  # fmt: skip


def test_a_gradient_that_is_not_finite_ends_the_run_and_spares_its_tensor(tmp_path):
    """A NaN put into one gradient: one sentence names the tensor, whose weights stay."""
    from mnemic.train import in_backward

    seen = {}
    apply = in_backward.InBackwardUpdate._apply

    def poisoned(self, index):
        if "q_proj" in self.names[index]:
            seen["before"] = self.parameters[index].detach().clone()
            seen["param"] = self.parameters[index]
            self.parameters[index].grad[0, 0] = float("nan")
        apply(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(in_backward.InBackwardUpdate, "_apply", poisoned)
        with pytest.raises(UserError, match=r"step 1: the gradient of model.layers.0.*q_proj"):
            run(tmp_path / "nan", "in_backward")
    assert torch.equal(seen["param"].detach(), seen["before"])


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path, monkeypatch):
    from mnemic.train.objectives.tokens import TokenObjective

    weights = {}
    loss = TokenObjective.loss

    def bad(self, model, batch):
        weights.setdefault("model", model)
        weights.setdefault("before", [p.detach().clone() for p in model.parameters()])
        value, counts = loss(self, model, batch)
        return value * float("nan"), counts

    monkeypatch.setattr(TokenObjective, "loss", bad)
    with pytest.raises(UserError, match="the loss is not finite, so the weights were left"):
        run(tmp_path / "nan", "in_backward")
    assert all(
        torch.equal(p, q)
        for p, q in zip(weights["model"].parameters(), weights["before"], strict=True)
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc")
@pytest.mark.parametrize("kind", ["plain", "in_backward"])
def test_freed_memory_goes_back_to_the_system(tmp_path, kind):
    """Blocks of 1 MiB between small lasting ones: glibc's heap keeps what they took, and a run that
    is meant to take little lets it go. In a process of its own: the setting stays.
    """
    tree = lm_tree(tmp_path, update={"kind": kind}, loop={"steps": 1})
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
import torch
from support import train_here
from mnemic.train.plan.machine import resident_bytes
train_here({tree!r})
torch.ones(1 << 21)  # from then on glibc takes blocks up to this size from the heap
before = resident_bytes()
large, small = [], []
for _ in range(64):
    large.append(torch.ones(1 << 18))
    small.append(torch.ones(1 << 14))
del large
print("LEFT", resident_bytes() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    left = int(done.stdout.split("LEFT")[1])
    assert (left < 16 << 20) == (kind == "in_backward"), left
