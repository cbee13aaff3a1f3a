"""What a recipe will take, before it takes it: memory, disk, bytes per step; and what its
neighbours would.

Nothing is allocated: a model without weights says what weights, gradients, states and the pieces of
a streamed model are, and runs once on fake tensors for what comes and goes in a step.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnemic.train.build import build_tokenizer
from mnemic.train.errors import RecipeError, UserError
from mnemic.train.plan.fits import WAYS, neighbour
from mnemic.train.plan.machine import Machine, imports_bytes, run_device, this_machine
from mnemic.train.plan.shapes import Shapes, shapes_of
from mnemic.train.plan.ways import Planner, Way
from mnemic.train.recipe.recipe import Recipe


@dataclass
class Report:
    """What `mnemic plan` prints; `ways` are those of `rows`, the first length that was asked for.
    `totals`: host bytes of each way by tokens of a row.
    """

    name: str
    model: str
    parameters: int
    trained: int
    rows: str
    machine: Machine
    ways: list[Way]
    totals: dict[int, dict[str, int | None]] = field(default_factory=dict)
    disk: dict[str, Any] = field(default_factory=dict)
    tbw: float = 600.0
    notes: list[str] = field(default_factory=list)


def plan(
    recipe: Recipe, *, lengths: list[int] | None = None, disk: list[Path] | None = None,
    tbw: float = 600.0,
) -> Report:  # fmt: skip
    """`lengths`: tokens of a row, in place of the recipe's; `disk`: folders whose speed counts, by
    default those of the offload; `tbw`: terabytes that the SSD is made to take.
    """
    notes: list[str] = []
    folders = disk_folders(recipe, disk)
    tokenizer, known = known_tokenizer(recipe, notes)
    device = run_device(recipe)
    machine = this_machine(device)
    base = imports_bytes(recipe, device)
    planner = Planner(recipe, tokenizer, device, base)
    ways, totals, shown = [], {}, None
    for length in lengths or [None]:
        shapes = shapes_of(recipe, tokenizer if known else None, length)
        found = [_way(planner, recipe, name, shapes) for name in WAYS]
        shown = shown or shapes
        ways = ways or found
        totals[shapes.largest.width] = {
            w.name: None if w.refused else w.host_bytes + w.device_bytes for w in found
        }
    assert shown is not None
    if device.type == "cuda":
        notes.append(
            "torch does not count the CUDA context, some 0.5 GiB of the device, nor what its "
            "allocator cannot fit"
        )
    notes += [*shown.missing, *planner.notes]
    if recipe.tokens.kind != "none":
        notes.append(
            f"tokens.kind={recipe.tokens.kind} is counted as if its supervised tokens had room in "
            "what is kept of a row"
        )
    if planner.teacher:
        notes.append(
            "the teacher's weights are counted, its forward and the chunks of both models' logits "
            "are not"
        )
    limit = getattr(planner.model.config, "max_position_embeddings", None)
    over = [n for n in lengths or [] if limit and n > limit]
    if over:
        notes.append(f"the model has {limit:,} positions: a run with longer rows is refused")
    report = Report(
        recipe.name, planner.describe(), planner.parameters, planner.trained, shown.note, machine,
        ways, totals if lengths and len(lengths) > 1 else {}, tbw=tbw, notes=notes,
    )  # fmt: skip
    report.disk = disk_speeds(folders, notes)
    for way in ways:
        _judge(way, report)
    return report


def known_tokenizer(recipe: Recipe, notes: list[str]) -> tuple[Any, bool]:
    """The recipe's, or one that stands in where the model's folder has none."""
    try:
        return build_tokenizer(recipe), True
    except UserError as error:
        if "tokenizer" not in str(error):
            raise
        from mnemic.models.tiny import byte_tokenizer

        notes.append(f"no tokenizer, which training needs: {str(error).removeprefix('model: ')}")
        return byte_tokenizer(), False


def _way(planner: Planner, recipe: Recipe, name: str, shapes: Shapes) -> Way:
    update, offload = WAYS[name]
    way = Way(name, [f"update={update}", f"offload={offload}"])
    try:
        changed = neighbour(recipe, name)
        way.chosen = changed is recipe
        planner.fill(way, changed, shapes)
    except RecipeError as error:
        way.refused = error.problems[0]
    except UserError as error:
        way.refused = str(error)
    return way


def disk_folders(recipe: Recipe, given: list[Path] | None = None) -> list[Path]:
    """Those of the offload, or the one where the run folder will be."""
    path = recipe.offload.path
    found = given or [
        Path(p).expanduser() for p in ([path] if isinstance(path, str) else path or [])
    ]
    if found:
        for folder in found:
            if not folder.is_dir():
                raise UserError(f"{folder}: not a folder; give one on the disk to plan for")
        return found
    folder = Path(recipe.folder).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return [folder]


def disk_speeds(folders: list[Path], notes: list[str]) -> dict[str, Any]:
    """Speeds of the folders together, and their room."""
    from mnemic.train.doctor import measure_disk as measure

    found = [measure(path) for path in folders]
    disk: dict[str, Any] = {"paths": [d["path"] for d in found]}
    disk["free_bytes"] = min(d["free_bytes"] for d in found) * len(found)
    for key in ("read_bytes_per_second", "write_bytes_per_second"):
        disk[key] = sum(d.get(key, 0.0) for d in found)
    for d in found:
        if "error" in d:
            notes.append(f"disk at {d['path']}: {d['error']}")
        elif not d["o_direct"]:
            notes.append(f"disk at {d['path']}: no O_DIRECT; the read speed is the page cache's")
    return disk


def _judge(way: Way, report: Report) -> None:
    """Step floor, endurance, and whether it fits here."""
    if way.refused:
        return
    machine, disk = report.machine, report.disk
    speeds = disk["read_bytes_per_second"], disk["write_bytes_per_second"]
    if way.read or way.written:
        way.floor_seconds = way.read / speeds[0] + way.written / speeds[1] if all(speeds) else None
    worn = way.written + way.checkpoint_written
    way.endurance_steps = int(report.tbw * 1e12 / worn) if worn else None
    lacking = []
    if way.host_bytes > machine.available:
        lacking.append("memory")
    if machine.device_total and way.device_bytes > machine.device_available:
        lacking.append("device memory")
    if sum(way.disk.values()) > disk["free_bytes"]:
        lacking.append("disk")
    way.lacking, way.fits = lacking, not lacking
