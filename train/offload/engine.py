"""The offload engine of one model: pieces, store, caches, streamer; what fits into `ram_budget`."""

import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnemic.models.exact.loss import scaling_of
from mnemic.optim.apollo import Apollo
from mnemic.train.errors import UserError
from mnemic.train.offload.activations import LayerInputs
from mnemic.train.offload.apply import SMALL, Applier, Rule, rule_for
from mnemic.train.offload.cache import Cache
from mnemic.train.offload.codec import Codec
from mnemic.train.offload.files import Backend, HostMemory, SsdFile
from mnemic.train.offload.io import Io, Trace
from mnemic.train.offload.layout import TILE, Spec, Tiling, pack
from mnemic.train.offload.memory import aligned_buffer
from mnemic.train.offload.skeleton import Anatomy, is_adapter
from mnemic.train.offload.spill import Spill, gradient_pieces
from mnemic.train.offload.store import Piece, Plan, Store
from mnemic.train.offload.streamer import Streamer
from mnemic.train.offload.transfer import Reader, SafetensorsWriter, own_name
from mnemic.train.offload.vocabulary import Matrix, Vocabulary

log = logging.getLogger("mnemic")

RING = 3  # state tiles, and vocabulary tiles, in memory at the least
SLOTS = 2  # layers: one computed while the next is read into what the last is written from


@dataclass(frozen=True)
class Settings:
    """How an engine is laid out. What only tests change has a default: `slots` overrides the budget
    for layers, `tile_elements` and `small` cut small models as large ones are cut.
    """

    kind: str = "ssd"
    folders: tuple[Path, ...] = ()
    ram_budget: int | None = None
    states: str = "fp32"
    direct: bool = True
    clip: str = "none"
    base: str = "full"
    single: bool = False  # one extent a piece: a copy that is only read
    slots: int | None = None
    tile_elements: int = TILE
    small: int = SMALL
    copy_to_device: bool | None = None


@dataclass
class Layout:
    """What is where: made from the skeleton and the optimizer alone, without allocating."""

    anatomy: Anatomy
    blocks: list[list[Spec]]
    block_bytes: list[int]
    rest: list[Spec]
    rest_bytes: int
    matrices: list[Matrix]
    applier: Applier | None
    weight_pieces: list[Piece]
    pieces: list[Piece]
    codecs: dict[str, Codec] = field(default_factory=dict)
    kept_layers: int = 0
    kept_tiles: int = 0
    kept_states: list[Piece] = field(default_factory=list)

    @property
    def tile_bytes(self) -> int:
        return max(p.padded for p in self.weight_pieces if p.name.startswith("rows/"))

    @property
    def state_tile_bytes(self) -> int:
        return max((p.padded for p in self.pieces if p.name.startswith("state/")), default=0)

    def resident(self) -> dict[str, int]:
        """Bytes of each part that the engine keeps in memory."""
        arena = self.applier.arena.nbytes if self.applier else 0
        encoded = max((codec.nbytes for codec in self.codecs.values()), default=0)
        return {
            "layers": self.kept_layers * (max(self.block_bytes) + encoded),
            "vocabulary tiles": self.kept_tiles * self.tile_bytes,
            "state tiles": (RING + len(self.kept_states)) * self.state_tile_bytes,
            "small states": arena,
            "rest": self.rest_bytes,
        }


def lay_out(
    anatomy: Anatomy, optimizer: Apollo | None, settings: Settings, names: dict[int, str]
) -> Layout:
    """Cut the model into pieces and say what stays in memory; `UserError` where that is more than
    `ram_budget`. `optimizer`: over all trained weights, or None where the base is frozen.
    """
    trained = optimizer is not None
    shadowed = settings.kind == "ssd" or settings.clip == "speculative"
    copies = 2 if trained and shadowed and not settings.single else 1
    blocks, sizes, pieces = [], [], []
    owners: dict[str, str] = {}
    codecs: dict[str, Codec] = {}
    for index in range(len(anatomy.layers)):
        held = [
            (n, tuple(p.shape), p.dtype)
            for n, p in anatomy.layer_parameters(index)
            if trained or not (p.requires_grad or is_adapter(n))
        ]
        specs, nbytes = pack(held)
        blocks.append(specs)
        sizes.append(nbytes)
        if not trained and settings.base != "full":
            codec = codecs[f"block/{index}"] = Codec(settings.base, specs)
            nbytes = codec.nbytes
        pieces.append(Piece(f"block/{index}", nbytes, copies))
        owners |= {spec.name: f"block/{index}" for spec in specs}
    rest_params = {
        n: p for n, p in anatomy.rest().items()
        if trained or not (p.requires_grad or is_adapter(n))
    }  # fmt: skip
    rest, rest_bytes = pack([(n, tuple(p.shape), p.dtype) for n, p in rest_params.items()])
    owners |= dict.fromkeys(rest_params, "rest")
    if rest_bytes:
        pieces.append(Piece("rest", rest_bytes, copies))
    matrices = []
    for name, param in anatomy.vocabulary().items():
        matrix = Matrix(name, param, Tiling.of(name, param.shape, settings.tile_elements))
        matrices.append(matrix)
        owners[name] = name
        for tile in range(len(matrix.tiling)):
            nbytes = matrix.tiling.numel(tile) * param.dtype.itemsize
            pieces.append(Piece(matrix.piece(tile), nbytes, copies))
    applier = None
    everything = list(pieces)
    if optimizer is not None:
        form = {"fp32": "master", "bf16": "bf16", "8bit": "8bit"}[settings.states]
        if any(g["rule"] == "apollo" for g in optimizer.param_groups):
            # Its other parameters have what they have in memory: fp32 moments or one byte, and
            # stochastic rounding in place of a master.
            form = "fp32"
        vocabulary = {matrix.name for matrix in matrices}
        rules: dict[str, Rule] = {}
        for group in optimizer.param_groups:
            for param in group["params"]:
                name = names[id(param)]
                rules[name] = rule_for(
                    group, name, param, form, name in vocabulary, settings.small,
                    settings.tile_elements,
                )  # fmt: skip
        used = {n: b for n, b in owners.items() if n in rules}
        applier = Applier(optimizer, names, used, rules)
        everything += applier.state_pieces(copies) + applier.arena.pieces(copies)
    layout = Layout(
        anatomy, blocks, sizes, rest, rest_bytes, matrices, applier, pieces, everything, codecs
    )
    _choose(layout, settings)
    return layout


def _choose(layout: Layout, settings: Settings) -> None:
    """Spend `ram_budget`: weights first (read twice a step), then states (read once)."""
    layers, tiles = len(layout.blocks), sum(len(m.tiling) for m in layout.matrices)
    layout.kept_layers = settings.slots or min(SLOTS, layers)
    layout.kept_tiles = min(RING, tiles)
    least = sum(layout.resident().values())
    if settings.ram_budget is None:
        return
    left = settings.ram_budget - least
    if left < 0:
        parts = ", ".join(f"{k} {v:,}" for k, v in layout.resident().items() if v)
        raise UserError(
            f"offload.ram_budget={settings.ram_budget:,} bytes is less than the {least:,} that "
            f"streaming this model takes ({parts}); raise it, or set it to null"
        )
    encoded = max((codec.nbytes for codec in layout.codecs.values()), default=0)
    largest = max(layout.block_bytes) + encoded
    if settings.slots is None:
        more = min(left // largest, layers - layout.kept_layers)
        layout.kept_layers += more
        left -= more * largest
    more = min(left // layout.tile_bytes, tiles - layout.kept_tiles)
    layout.kept_tiles += more
    left -= more * layout.tile_bytes
    # The resident states have buffers of the largest one's size.
    states = [p for p in layout.pieces if p.name.startswith("state/")]
    if states:
        layout.kept_states = states[: left // layout.state_tile_bytes]


class Engine:
    """Everything behind a streamed model. Make it, then `load` (first run) or `open` (resume)."""

    def __init__(
        self, layout: Layout, settings: Settings, *, folder: Path | None, names: dict[int, str],
        device: torch.device, autocast: Callable[[], Any] = nullcontext, trace: Trace | None = None,
        inputs: LayerInputs | None = None, backends: Sequence[Backend] | None = None,
    ) -> None:  # fmt: skip
        self.layout, self.settings, self.names, self.device = layout, settings, names, device
        self.folder, self.trace = folder, trace
        self.commits = folder is not None
        count = max(1, len(settings.folders)) if settings.kind == "ssd" else 1
        plan = Plan(layout.pieces, count)
        if backends is None:
            backends = _backends(settings, plan, "data.bin")
        self.io = Io(backends, trace)
        self.store = Store(plan, self.io, folder)
        apart = settings.copy_to_device
        largest = max(layout.block_bytes)
        self.layers = Cache(self.store, largest, layout.kept_layers, device, apart, layout.codecs)
        self.tiles = Cache(self.store, layout.tile_bytes, layout.kept_tiles, device, apart)
        self.matrices = layout.matrices
        self.applier = layout.applier
        if self.applier is not None:
            self.applier.attach(self.store, RING, layout.kept_states, device, apart)
        self._rest_buffer = aligned_buffer(layout.rest_bytes).to(device)
        anatomy = layout.anatomy
        self.rest: dict[str, nn.Parameter] = {}
        every = dict(anatomy.model.named_parameters())
        for spec in layout.rest:
            every[spec.name].data = spec.view(self._rest_buffer)
            self.rest[spec.name] = every[spec.name]
        bias = getattr(anatomy.head, "bias", None)
        self.vocabulary = Vocabulary(
            self.matrices[0], self.matrices[-1], self.store, self.tiles,
            bias=None if bias is None else bias, scaling=scaling_of(anatomy.model.config),
            autocast=autocast,
        )  # fmt: skip
        self.inputs = inputs or LayerInputs()
        self.streamer = Streamer(
            anatomy, layout.blocks, self.layers, self.vocabulary, self.inputs, device=device,
            autocast=autocast, trace=trace,
        )  # fmt: skip
        self._spill_store: Store | None = None
        self.spill: Any = None
        if settings.clip == "exact_spill":
            gradients = Plan(gradient_pieces(layout.weight_pieces), count)
            self._spill_store = Store(
                gradients, Io(_backends(settings, gradients, "gradients.bin"), trace), None
            )
            specs = {f"block/{i}": s for i, s in enumerate(layout.blocks)}
            self.spill = Spill(self._spill_store, specs | {"rest": layout.rest}, device)

    # Content ---------------------------------------------------------------------------------

    def load(self, read: Reader) -> None:
        """Fill the store with a model's weights, a layer or a tile at a time, and commit it as step
        0; optimizer states start at zero.
        """
        for index, specs in enumerate(self.layout.blocks):
            self._fill(f"block/{index}", specs, read, self.layout.block_bytes[index])
        if self.layout.rest_bytes:
            self._fill("rest", self.layout.rest, read, self.layout.rest_bytes)
        for matrix in self.matrices:
            for tile in range(len(matrix.tiling)):
                part = matrix.tiling.slice(tile)
                self._wait_write(matrix.piece(tile), read(matrix.name, part), matrix.param.dtype)
        self.store.commit(0, {})
        self._load_rest()

    def _fill(self, piece: str, specs: Sequence[Spec], read: Reader, nbytes: int) -> None:
        codec = self.layout.codecs.get(piece)
        buffer = aligned_buffer(codec.nbytes if codec else nbytes)
        if codec is not None:
            for part in codec.parts:
                codec.encode(part, read(part.decoded.name, None), buffer)
        else:
            for spec in specs:
                spec.view(buffer).copy_(read(spec.name, None))
        self.store.write(piece, buffer[: self.store.plan.pieces[piece].padded]).wait()

    def _wait_write(self, piece: str, tensor: Tensor, dtype: torch.dtype) -> None:
        nbytes = self.store.plan.pieces[piece].nbytes
        buffer = aligned_buffer(nbytes)
        buffer[:nbytes].view(dtype).copy_(tensor.reshape(-1))
        self.store.write(piece, buffer[: self.store.plan.pieces[piece].padded]).wait()

    def _load_rest(self) -> None:
        if self.layout.rest_bytes:
            host = aligned_buffer(self.layout.rest_bytes)
            self.store.read("rest", host).wait()
            self._rest_buffer.copy_(host)

    def open(self) -> dict[str, Any] | None:
        """Take up the last commit of an earlier process: {"step", "state"}, or None."""
        found = self.store.open()
        if found is not None:
            self.reload()
        return found

    def reload(self) -> None:
        """Memory follows the store: caches forget, states and rest are read."""
        self.layers.drop()
        self.tiles.drop()
        self._load_rest()
        if self.applier is not None:
            self.applier.forget()

    def rollback(self) -> None:
        """Take back everything since the last commit."""
        self.store.rollback()
        self.reload()

    def write_block(self, block: str) -> None:
        if block != "rest":
            self.layers.write(block)
        elif self.layout.rest_bytes:
            host = self._rest_buffer
            if host.device.type != "cpu":
                host = aligned_buffer(self.layout.rest_bytes)
                host.copy_(self._rest_buffer)
            self.store.write("rest", host[: self.store.plan.pieces["rest"].padded])

    # Copies ----------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """All of it into one file of a checkpoint folder."""
        from mnemic.train.offload.copies import save_store

        save_store(self.store, folder)

    def restore(self, folder: Path) -> None:
        from mnemic.train.offload.copies import restore_store

        restore_store(self.store, folder)
        self.reload()

    def export(self, folder: Path) -> None:
        """Weights as safetensors, under the names of the base model, a tile at a time."""
        tensors: list[tuple[str, tuple[int, ...], torch.dtype]] = []
        for matrix in self.matrices:
            tensors.append((own_name(matrix.name), tuple(matrix.param.shape), matrix.param.dtype))
        every = [s for specs in (*self.layout.blocks, self.layout.rest) for s in specs]
        tensors += [(own_name(s.name), s.shape, s.dtype) for s in every]
        writer = SafetensorsWriter(folder, tensors)
        for matrix in self.matrices:
            for _, weight in self.vocabulary.tiles(matrix):
                writer.add(weight)
        for index, specs in enumerate(self.layout.blocks):
            buffer = self.layers.acquire(f"block/{index}")
            self.layers.prefetch(f"block/{min(index + 1, len(self.layout.blocks) - 1)}")
            for spec in specs:
                writer.add(spec.view(buffer))
            self.layers.release(f"block/{index}")
        for spec in self.layout.rest:
            writer.add(spec.view(self._rest_buffer))
        writer.close()

    def close(self) -> None:
        self.inputs.close()
        self.store.close()
        if self._spill_store is not None:
            self._spill_store.close()
            for folder in self.settings.folders:
                (folder / "gradients.bin").unlink(missing_ok=True)


def _backends(settings: Settings, plan: Plan, file: str) -> list[Backend]:
    if settings.kind == "host":
        return [HostMemory(size) for size in plan.sizes]
    return [
        SsdFile(folder / file, size, direct=settings.direct)
        for folder, size in zip(settings.folders, plan.sizes, strict=True)
    ]
