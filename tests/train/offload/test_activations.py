"""Saved activations on the host or in a file: the same bits, and no more memory than is allowed."""

import copy
import errno
import logging
import os
import shutil
import subprocess
from contextlib import closing
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from support import lm_tree, merge, rows_of, same_weights, train_here, weights_of, write_recipe

from mnemic.models.tiny import byte_tokenizer
from mnemic.train.errors import UserError
from mnemic.train.offload import saved, scratch
from mnemic.train.offload.activations import LayerInputs, layer_inputs
from mnemic.train.offload.build import streamed
from mnemic.train.offload.memory import ALIGN
from mnemic.train.offload.saved import SavedTensors, saved_activations
from mnemic.train.offload.scratch import BUFFERS, HostCopies, Scratch
from mnemic.train.recipe.load import build_recipe
from mnemic.train.recipe.offload import SsdOffload

CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path):
    place = Scratch(tmp_path, CPU)
    yield place
    place.close()


def numbers(nbytes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def whole(place):
    """Whether all of the file is free, in one stretch."""
    return place._free == ([(0, place.file_bytes)] if place.file_bytes else [])


# The file --------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [True, False])
def test_bytes_of_any_length_come_back_in_any_order(tmp_path, monkeypatch, direct):
    """Through few buffers that are shorter than most of what goes through them."""
    monkeypatch.setattr(scratch, "UNIT", 2 * ALIGN)
    place = Scratch(tmp_path, CPU, direct=direct)
    sizes = [0, 1, ALIGN, ALIGN + 1, 2 * ALIGN, 9 * ALIGN + 5, 3]
    for order in (range(7), reversed(range(7)), [3, 0, 6, 1, 5, 2, 4]):
        tickets = [place.put(numbers(size, i)) for i, size in enumerate(sizes)]
        assert len(place._bounce) <= BUFFERS
        for i in order:
            assert torch.equal(place.get(tickets[i], CPU), numbers(sizes[i], i)), i
        assert whole(place)
    place.close()
    place.close()


def test_stretches_are_used_again(file):
    """Other sizes, other orders, some given up unread: the file is as long as the fullest step."""
    sizes = torch.Generator().manual_seed(1)
    fullest = 0
    for step in range(20):
        lengths = torch.randint(1, 40_000, (10,), generator=sizes).tolist()
        tickets = [file.put(numbers(length, step)) for length in lengths]
        fullest = max(fullest, sum(t.end - t.offset for t in tickets))
        stretches = sorted((t.offset, t.end) for t in tickets)
        assert all(a[1] <= b[0] for a, b in pairwise(stretches))
        for i in torch.randperm(10, generator=sizes).tolist():
            if i < 3:
                file.drop(tickets[i])
            else:
                assert torch.equal(file.get(tickets[i], CPU), numbers(lengths[i], step))
    # What was dropped is noticed with the next `put`.
    file.get(file.put(numbers(1)), CPU)
    assert whole(file) and file.file_bytes == fullest


def test_the_file_has_no_name_and_its_blocks_are_reserved(tmp_path, file):
    file.put(numbers(100_000))
    assert list(tmp_path.iterdir()) == []
    found = os.fstat(file._file.fd)
    assert found.st_size == file.file_bytes == 102_400 <= found.st_blocks * 512


def test_a_disk_that_fails_is_one_sentence(file, monkeypatch):
    """Noticed when the tensor is wanted, inside the backward."""

    def write(offset, view):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(file._file, "write", write)
    x = torch.randn(64, 64, requires_grad=True)
    with SavedTensors(file, torch.nn.Linear(1, 1), CPU, 1)():
        y = x.exp().sin().sum()
    with pytest.raises(UserError, match="Input/output error; what is saved of the run is whole"):
        y.backward()


# Inputs of layers ------------------------------------------------------------------------------


def odd_tensors():
    return [
        torch.randn(3, 5, 7).to(torch.bfloat16),
        torch.randn(40, 30).t(),
        torch.randn(6, 8)[:, 2:5],
        torch.tensor(3.5, dtype=torch.float64),
        torch.rand(9, 9) > 0.5,
        torch.empty(0, 4),
        torch.tensor([float("nan"), -0.0, 1e-45]),
    ]


@pytest.mark.parametrize("kind", ["device", "host", "ssd"])
def test_any_tensor_comes_back_as_it_was(file, kind):
    host = HostCopies(CPU) if kind == "host" else None
    inputs = LayerInputs(num_layers=2, host=host, scratch=file if kind == "ssd" else None)
    tensors = odd_tensors()
    for layer in range(2):
        for micro, tensor in enumerate(tensors):
            inputs.put(layer, micro, tensor)
    for layer in (1, 0):
        for micro, tensor in enumerate(tensors):
            found = inputs.take(layer, micro)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            if tensor.untyped_storage().nbytes() == tensor.nbytes:
                assert found.stride() == tensor.stride()
            bits = [x.contiguous().view(-1).view(torch.uint8) for x in (found, tensor)]
            assert torch.equal(*bits)
    total = 2 * sum(tensor.nbytes for tensor in tensors)
    assert (inputs.spilled_bytes, inputs.held_bytes) == {
        "device": (0, total), "host": (0, total), "ssd": (total, 0)
    }[kind]  # fmt: skip
    inputs.close()


@pytest.mark.parametrize("budget", [0, 1000, 4 * 1024, 7 * 1024 - 1, 7 * 1024, 10**6])
def test_the_last_layers_stay_as_far_as_the_budget_goes(file, budget):
    """Five layers of two micro-batches, 1024 bytes and 512; steps of the same inputs."""
    inputs = LayerInputs(num_layers=5, budget=budget, scratch=file)
    sizes = [256, 128]
    for step in range(2):
        for layer in range(5):
            for micro, size in enumerate(sizes):
                inputs.put(layer, micro, torch.full((size,), 10.0 * layer + micro))
        kept = [key for key, value in inputs._inputs.items() if not value.spilled]
        # In the order in which they are put, what stays is the end, and it fills the budget.
        order = [(layer, micro) for layer in range(5) for micro in range(2)]
        assert kept == order[len(order) - len(kept) :]
        held = sum(sizes[micro] * 4 for _, micro in kept)
        assert held == inputs.held_bytes <= budget
        if len(kept) < len(order):
            assert held + sizes[order[-len(kept) - 1][1]] * 4 > budget
        assert inputs.spilled_bytes == (step + 1) * (5 * 1536 - held)
        for layer in reversed(range(5)):
            for micro, size in enumerate(sizes):
                found = inputs.take(layer, micro)
                assert torch.equal(found, torch.full((size,), 10.0 * layer + micro))
    inputs.close()


def test_the_next_inputs_are_read_meanwhile(file):
    inputs = LayerInputs(num_layers=3, scratch=file)
    for layer in range(3):
        for micro in range(2):
            inputs.put(layer, micro, torch.ones(10))
    begun = []
    for layer, micro in [(2, 0), (2, 1), (1, 0), (1, 1), (0, 0), (0, 1)]:
        inputs.take(layer, micro)
        begun.append([key for key, kept in inputs._inputs.items() if kept.what.read is not None])
    assert begun[0] == [(1, 0), (2, 1)] and begun[1] == [(1, 0), (1, 1)]
    assert begun[3] == [(0, 0), (0, 1)] and begun[5] == []


def test_a_step_that_broke_off_leaves_nothing_behind(file):
    inputs = LayerInputs(num_layers=2, scratch=file)
    for _ in range(5):
        for layer in range(2):
            inputs.put(layer, 0, torch.ones(2048))
        inputs.take(1, 0)
    assert file.file_bytes == 2 * 8192


def test_the_budget_is_what_others_leave_of_it(tmp_path):
    def budget(ram, resident):
        part = SsdOffload(activations="ssd", ram_budget=ram)
        inputs = layer_inputs(part, tmp_path, CPU, num_layers=2, resident=resident)
        inputs.close()
        return inputs.budget

    assert [budget(1000, 400), budget(1000, 2000), budget(None, 0)] == [600, 0, 0]


def test_no_file_without_training(tmp_path):
    part = SsdOffload(activations="ssd")
    assert layer_inputs(part, None, CPU, num_layers=2, resident=0).scratch is None


# Saved tensors ---------------------------------------------------------------------------------


class Odd(torch.nn.Module):
    """Saves views, transposes, slices, expansions, tables of all layers, outputs, weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(32, 96)
        self.out = torch.nn.Linear(32, 32, bias=False)
        self.register_buffer("table", torch.randn(1, 16, 32))

    def forward(self, x):
        for _ in range(2):
            q, k, v = self.qkv(x).chunk(3, -1)
            k = k * self.table * torch.linspace(0, 1, 16)[:, None].expand(16, 32)
            mixed = (q @ k.transpose(1, 2)).relu_().softmax(-1) @ v
            x = x + torch.nn.functional.linear(mixed[:, ::2].repeat(1, 2, 1), self.out.weight.t())
            x = torch.nn.functional.layer_norm(x.permute(0, 2, 1), (16,)).permute(0, 2, 1)
        return (x[:, 3] * x[:, 4]).sum()


def gradients(model, around=None):
    model.zero_grad()
    x = torch.linspace(-1, 1, 4 * 16 * 32).reshape(4, 16, 32).requires_grad_()
    if around is None:
        model(x).backward()
    else:
        with around():
            loss = model(x)
        loss.backward()
    return [x.grad, *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("kind", ["host", "ssd"])
def test_gradients_have_the_same_bits_and_slots_are_freed(file, kind):
    model = Odd()
    place = HostCopies(CPU) if kind == "host" else file
    around = SavedTensors(place, model, CPU, 1)
    expected = gradients(model)
    for _ in range(3):
        for found, exact in zip(gradients(model, around), expected, strict=True):
            assert torch.equal(found, exact)
        assert around.spilled_bytes and whole(file)
    assert place is not file or file.read_bytes == file.written_bytes > 0


def test_strides_and_offsets_are_restored_and_a_storage_moves_once(file):
    """Views of one storage, saved at one version, cost its bytes once and come back as one; after a
    change in place it is another.
    """
    around = SavedTensors(file, torch.nn.Linear(1, 1), CPU, 1)
    base = torch.arange(4096.0).reshape(64, 64)
    views = [base, base.t(), base[3:40:2, 5:], base[:, :1].expand(64, 9), base.view(-1)[7:]]
    with around():
        packed = [around._pack(view) for view in views]
        assert around.spilled_bytes == base.nbytes
        base.add_(1)
        changed = around._pack(base)
    assert around.spilled_bytes == 2 * base.nbytes
    found = [around._unpack(item) for item in packed]
    for item, view in zip(found, views, strict=True):
        assert torch.equal(item + 1, view) and item.stride() == view.stride()
        assert item.storage_offset() == view.storage_offset()
    assert len({item.untyped_storage().data_ptr() for item in found}) == 1
    assert torch.equal(around._unpack(changed), base)
    assert file.read_bytes == 2 * base.nbytes


def test_memory_used_again_is_not_taken_for_what_was_there(file):
    """Storages die in the forward and others come to lie at their addresses."""
    around = SavedTensors(file, torch.nn.Linear(1, 1), CPU, 1)
    with around():
        packed = [around._pack(torch.full((5000,), float(i))) for i in range(20)]
    for i, item in enumerate(packed):
        assert torch.equal(around._unpack(item), torch.full((5000,), float(i)))


def test_a_change_in_place_is_noticed_where_nothing_was_copied(file):
    """autograd's own check sleeps under hooks. What was copied has its old content, which is right;
    for the rest an error says so, as without hooks.
    """
    around = SavedTensors(file, torch.nn.Linear(1, 1), CPU, 1000)
    for size in (1000, 10):
        x = torch.linspace(0, 1, size, requires_grad=True)
        with around():
            y = x.exp()
            loss = (y * 1.0).sum()
            y.add_(1)
        if size == 1000:
            loss.backward()
            assert torch.equal(x.grad, x.exp())
        else:
            with pytest.raises(RuntimeError, match=r"shape \(10,\) .* modified by an inplace"):
                loss.backward()


def test_reads_are_begun_last_written_first(file):
    around = SavedTensors(file, torch.nn.Linear(1, 1), CPU, 1)
    with around():
        packed = [around._pack(torch.full((1024,), float(i))) for i in range(6)]
    tickets = [item.storage.ticket for item in packed]
    around._unpack(packed[5])
    assert [ticket.read is not None for ticket in tickets] == [False] * 3 + [True] * 3
    around._unpack(packed[4])
    assert [ticket.read is not None for ticket in tickets] == [False] * 2 + [True] * 4
    del packed  # a graph that is dropped gives its room back
    file.get(file.put(numbers(1)), CPU)
    assert whole(file)


# Whole runs ------------------------------------------------------------------------------------

SHAPE = {
    "model": {"hidden_size": 64, "layers": 3, "heads": 4},
    "objective": {"seq_len": 32},
    "loop": {"steps": 2},
}
HIDDEN = 8 * 32 * 64 * 4  # bytes of a layer's input


def run(folder, **changes):
    folder.mkdir()
    train_here(lm_tree(folder, **merge(copy.deepcopy(SHAPE), copy.deepcopy(changes))))
    return rows_of(folder / "run"), weights_of(folder / "run" / "final")


@pytest.fixture
def made(monkeypatch):
    """The places and holders that runs make, with a minimum that small models reach."""
    found = SimpleNamespace(scratch=[], saved=[], inputs=[])

    def noting(cls, into):
        init = cls.__init__

        def noted(self, *args, **kwargs):
            into.append(self)
            init(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", noted)

    noting(Scratch, found.scratch)
    noting(SavedTensors, found.saved)
    noting(LayerInputs, found.inputs)
    monkeypatch.setattr(saved, "MINIMUM", 1 << 14)
    return found


IN_MEMORY = {
    "plain": {"loop": {"micro_batch_size": 4}},
    "checkpointing": {"loop": {"gradient_checkpointing": True}, "model": {"dtype": "bf16"}},
    "in_backward": {"update": "in_backward", "loop": {"precision": "bf16"}},
    "in_backward, checkpointing": {
        "update": "in_backward", "optimizer": {"kind": "apollo"},
        "loop": {"gradient_checkpointing": True, "precision": "bf16", "micro_batch_size": 4},
    },
    "lora": {"adapters": {"kind": "lora", "dropout": 0.1}},
    "lora, checkpointing": {"adapters": {"kind": "lora"}, "loop": {"gradient_checkpointing": True}},
    "int8": {"model": {"weights": "int8"}, "optimizer": {"kind": "apollo"}},
}  # fmt: skip


@pytest.mark.parametrize("changes", IN_MEMORY.values(), ids=IN_MEMORY)
def test_a_model_in_memory_trains_to_the_same_bits(tmp_path, made, changes):
    rows, weights = run(tmp_path / "device", **changes)
    assert not made.saved
    again, same = run(tmp_path / "ssd", offload={"activations": "ssd"}, **changes)
    assert rows == again and same_weights(weights, same)
    (around,), (place,) = made.saved, made.scratch
    assert around.spilled_bytes > 2 * 3 * HIDDEN // 2, "less than the inputs of its layers"
    assert place.read_bytes >= around.spilled_bytes and place._closed and whole(place)
    assert not list((tmp_path / "ssd" / "run").glob("*.bin"))


STREAMED = {
    "full": {},
    "budget": {"offload": {"kind": "ssd", "ram_budget": 1 << 30}, "loop": {"micro_batch_size": 4}},
    "clip": {"update": {"kind": "streamed", "clip": "speculative", "max_grad_norm": 0.5}},
    "host, lora": {"offload": {"kind": "host"}, "adapters": {"kind": "lora", "dropout": 0.1}},
}


@pytest.mark.parametrize("changes", STREAMED.values(), ids=STREAMED)
def test_a_streamed_model_trains_to_the_same_bits(tmp_path, made, changes):
    base = {"update": {"kind": "streamed"}, "offload": {"kind": "ssd"}}
    changes = merge(base, copy.deepcopy(changes))
    rows, weights = run(tmp_path / "device", **changes)
    there = merge(copy.deepcopy(changes), {"offload": {"activations": "ssd"}})
    budget = "ram_budget" in there["offload"]
    if budget:
        # What everything else takes, and half of the layer inputs.
        recipe = build_recipe(lm_tree(tmp_path, **merge(copy.deepcopy(SHAPE), there)))
        resident = streamed(recipe, byte_tokenizer(), CPU).layout.resident()
        there["offload"]["ram_budget"] = sum(resident.values()) + 3 * HIDDEN // 2
    again, same = run(tmp_path / "ssd", **there)
    assert rows == again and same_weights(weights, same)
    device, inputs = made.inputs
    assert device.spilled_bytes == 0 < inputs.spilled_bytes
    assert inputs.held_bytes <= inputs.budget and made.scratch[0]._closed
    assert inputs.held_bytes == (3 * HIDDEN // 2 if budget else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["host", "ssd"])
@pytest.mark.parametrize("update", ["plain", "streamed"])
def test_the_same_bits_on_an_accelerator(tmp_path, made, kind, update):
    changes = {"update": update, "loop": {"precision": "bf16"}}
    offload = {"kind": "none" if update == "plain" else "ssd"}
    rows, weights = run(tmp_path / "device", offload=offload, **changes)
    again, same = run(tmp_path / kind, offload={**offload, "activations": kind}, **changes)
    assert rows == again and same_weights(weights, same)
    assert made.saved[0].spilled_bytes if update == "plain" else made.inputs[1].host


def test_the_bytes_are_those_that_autograd_saves(tmp_path, made, monkeypatch):
    """Without checkpointing: every large storage that the graph holds, once, weights aside. With
    it: the inputs of the layers, and what comes after them.
    """
    seen = []
    context = SavedTensors.__call__

    def run_twice(self):
        """Note in a first forward what autograd saves; count by address, all being alive."""
        held = {}
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            assert not isinstance(around._pack(tensor), saved._Packed) or (
                storage.data_ptr() not in own
            ), "a parameter was packed"
            if storage.nbytes() >= self.minimum and storage.data_ptr() not in own:
                held[storage.data_ptr()] = storage
            return tensor

        around = SavedTensors(HostCopies(CPU), self.model, CPU, 1)
        with context(around):
            pass
        around._own = {p.untyped_storage()._cdata for p in self.model.parameters()}
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
        seen.append((self, held))
        return hooks

    for checkpointing in (False, True):
        loop = {"gradient_checkpointing": checkpointing, "steps": 1}
        with monkeypatch.context() as patch:
            patch.setattr(SavedTensors, "__call__", run_twice)
            run(tmp_path / f"seen{checkpointing}", offload={"activations": "ssd"}, loop=loop)
        held = seen.pop()[1]
        made.saved.clear()
        run(tmp_path / f"moved{checkpointing}", offload={"activations": "ssd"}, loop=loop)
        (around,) = made.saved
        assert around.spilled_bytes == sum(storage.nbytes() for storage in held.values())
        if checkpointing:
            # Three inputs; the last norm's input, its normalised form and the head's; log-softmax.
            assert around.spilled_bytes == 6 * HIDDEN + 8 * 31 * 261 * 4
        else:
            assert around.spilled_bytes > 30 * HIDDEN


# What is refused, what is said -----------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 1 MiB (needs root)."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_is_one_sentence(tmp_path, fork_server, small_disk):
    tree = lm_tree(
        tmp_path, **merge(copy.deepcopy(SHAPE), {"objective": {"seq_len": 256}}),
        offload={"activations": "ssd", "path": str(small_disk)},
    )  # fmt: skip
    path = write_recipe(tmp_path / "r.yaml", tree)
    status, output = fork_server.run("train", path, cwd=tmp_path)
    assert status == 1 and "Traceback" not in output, output
    said = output.splitlines()[-1]
    for part in ("activations=ssd", str(small_disk), "No space left", "it needs", "make room"):
        assert part in " ".join(output.split()) or part in said, (part, output)
    assert list(small_disk.iterdir()) == []


def test_a_full_disk_under_layer_inputs(small_disk):
    inputs = LayerInputs(num_layers=9, scratch=Scratch(small_disk, CPU))
    with (
        closing(inputs),
        pytest.raises(UserError, match="No space left on device; it needs 1,204,224 bytes"),
    ):
        for layer in range(9):
            inputs.put(layer, 0, torch.zeros(100_000))


def test_a_folder_that_is_none(tmp_path):
    (tmp_path / "x").mkdir()
    path = str(tmp_path / "missing")
    with pytest.raises(UserError, match="missing is not a folder; give an existing one"):
        run(tmp_path / "run", offload={"activations": "ssd", "path": path})


def test_host_on_a_cpu_says_so_and_does_nothing(tmp_path, caplog):
    logging.getLogger("mnemic").propagate = True
    rows, weights = run(tmp_path / "device")
    again, same = run(tmp_path / "host", offload={"activations": "host"})
    assert rows == again and same_weights(weights, same)
    run(tmp_path / "streamed", update="streamed", offload={"kind": "ssd", "activations": "host"})
    said = [r for r in caplog.records if "has no effect on the CPU" in r.message]
    assert len(said) == 2 and all(r.levelname == "WARNING" for r in said)


def test_settings_that_move_nothing_say_so(tmp_path, caplog):
    """Small activations stay where they are; a CPU's host memory is its own."""
    logging.getLogger("mnemic").propagate = True
    run(tmp_path / "small", offload={"activations": "ssd"}, model={"hidden_size": 16})
    assert (
        "offload.activations=ssd had no effect: no tensor that the backward needs has 1,048,576"
        in (caplog.text)
    )
    caplog.clear()
    run(tmp_path / "streamed", update="streamed", offload={"kind": "host"})
    assert "offload.kind=host takes no weight and no state off the CPU" in caplog.text


def test_activations_that_move_are_not_said_to_stay(tmp_path, caplog, made):
    logging.getLogger("mnemic").propagate = True
    run(tmp_path / "run", offload={"activations": "ssd"})
    assert made.saved[0].spilled_bytes and "had no effect" not in caplog.text


def test_engines_that_gather_weights_are_refused(tmp_path):
    tree = lm_tree(tmp_path, offload={"activations": "ssd"})
    for name in ("FSDP", "DEEPSPEED"):
        there = SimpleNamespace(device=CPU, distributed_type=f"DistributedType.{name}")
        with pytest.raises(UserError, match=f"the weights that {name} gathers.*launch with DDP"):
            saved_activations(build_recipe(tree), torch.nn.Linear(1, 1), there, tmp_path, None)


def test_an_unknown_key_still_asks_for_the_kind(tmp_path):
    with pytest.raises(UserError, match=r"offload\.kind: missing; allowed are none, host, ssd"):
        build_recipe(lm_tree(tmp_path, offload={"ram_budget": "1GiB"}))
