"""A frozen base in 8 or 4 bits: what is stored, what comes back, and a run over it."""

import pytest
import torch
from support import rows_of, sft_tree, train_here, weights_of

from mnemic.train.offload.codec import NF4, Codec
from mnemic.train.offload.layout import pack
from mnemic.train.offload.memory import aligned_buffer

SHAPES = [("w", (96, 100)), ("small", (8, 8)), ("bias", (96,)), ("experts", (3, 64, 48)),
          ("odd", (81, 83))]  # fmt: skip


def round_trip(kind, dtype):
    torch.manual_seed(0)
    specs, nbytes = pack([(name, shape, dtype) for name, shape in SHAPES])
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES}
    codec = Codec(kind, specs)
    stored, block = aligned_buffer(codec.nbytes), aligned_buffer(nbytes)
    for part in codec.parts:
        codec.encode(part, tensors[part.decoded.name], stored)
    codec.decode(stored, block)
    return codec, tensors, {spec.name: spec.view(block) for spec in specs}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "step"), [("int8", 1 / 254), ("nf4", 0.153)])
def test_values_come_back_to_half_a_step(kind, step, dtype):
    """A step is a share of a group's largest magnitude: of int8 1/127, of NF4 at most 0.304."""
    codec, tensors, found = round_trip(kind, dtype)
    for name in ("small", "bias"):
        assert torch.equal(found[name], tensors[name]), "small tensors stay as they are"
    for name in ("w", "experts", "odd"):
        flat = tensors[name].float().view(-1)
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % codec.group))
        top = padded.view(-1, codec.group).abs().amax(1).repeat_interleave(codec.group)
        error = (found[name].float().view(-1) - flat).abs() / top[: len(flat)]
        assert step / 2 < error.max() < step + 2**-8


def test_nf4_is_that_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(1)
    weight = torch.randn(64, 128)
    specs, nbytes = pack([("w", (64, 128), torch.float32)])
    codec = Codec("nf4", specs)
    stored, block = aligned_buffer(codec.nbytes), aligned_buffer(nbytes)
    codec.encode(codec.parts[0], weight, stored)
    codec.decode(stored, block)
    codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    expected = functional.dequantize_4bit(codes, state)
    torch.testing.assert_close(specs[0].view(block), expected, rtol=1e-6, atol=1e-7)
    assert len(NF4) == 16


def test_bytes_stored():
    for kind, share in (("int8", 1 + 4 / 128), ("nf4", 0.5 + 4 / 64)):
        specs, _ = pack([("w", (512, 512), torch.bfloat16)])
        assert Codec(kind, specs).nbytes == pytest.approx(512 * 512 * share, abs=128)


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_a_run_over_an_encoded_base(base, tmp_path):
    """The loss starts near that of the full base and falls; the file is as much smaller."""
    model = {"hidden_size": 128, "layers": 2, "heads": 4}
    losses, sizes = {}, {}
    for kind in ("full", base):
        folder = tmp_path / kind
        folder.mkdir()
        tree = sft_tree(
            folder, model=model, adapters={"kind": "lora", "r": 4}, update="streamed",
            offload={"kind": "ssd", "base": kind}, loop={"steps": 6, "batch_size": 4},
        )  # fmt: skip
        train_here(tree)
        losses[kind] = [row["loss"] for row in rows_of(tree["run_dir"])[1:]]
        sizes[kind] = (folder / "run" / "offload" / "data.bin").stat().st_size
        assert weights_of(folder / "run" / "final")
    assert losses[base][0] == pytest.approx(losses["full"][0], rel=0.02)
    assert losses[base] != losses["full"] and losses[base][-1] < losses[base][0]
    assert sizes[base] < (0.7 if base == "int8" else 0.5) * sizes["full"]
