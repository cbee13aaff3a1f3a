"""Bytes and seconds of recipes that differ in a few levers; what two have in common is counted
once.
"""

from typing import Any

from mnemic.train.plan.machine import imports_bytes, run_device, this_machine
from mnemic.train.plan.pace import Speeds, measure_flops, step_seconds
from mnemic.train.plan.plan import disk_folders, disk_speeds, known_tokenizer
from mnemic.train.plan.shapes import Shapes, shapes_of
from mnemic.train.plan.ways import HEAP, Planner, Way
from mnemic.train.recipe.offload import parse_size
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import InBackwardUpdate, StreamedUpdate

_TECHNIQUES = {
    "gradient_checkpointing", "checkpoint_every", "sequence_chunk", "mlp_tile", "loss",
}  # fmt: skip
"""Keys of `loop` that a model without weights is made with."""


class Counter:
    """For the levers of one recipe. `budget`: bytes of the accelerator's memory where there is one,
    else of the whole process.
    """

    def __init__(self, given: Recipe) -> None:
        self.given, self.notes, self.counted = given, list[str](), 0
        self.tokenizer, self.known = known_tokenizer(given, self.notes)
        self.device = run_device(given)
        self.base = imports_bytes(given, self.device)
        self.machine = this_machine(self.device)
        self.on_device = bool(self.machine.device_total)
        self.place = "device memory" if self.on_device else "memory"
        # What this process holds by now are the imports, which the run counts as its own.
        free = self.machine.available + self.base
        free = self.machine.device_available if self.on_device else free
        asked = given.loop.memory_budget
        self.budget: int = free if asked in (None, "auto") else parse_size(asked)
        disk = disk_speeds(disk_folders(given), self.notes)
        self._free_disk = disk["free_bytes"]
        self.speeds = Speeds(
            measure_flops(self.device, given), disk["read_bytes_per_second"],
            disk["write_bytes_per_second"],
        )  # fmt: skip
        self._planners: dict[str, Planner] = {}
        self._trainings: dict[str, Any] = {}
        self._shapes: dict[Any, Shapes] = {}
        self._known: dict[str, list[tuple[int, int, int, int]]] = {}

    def shapes(self, recipe: Recipe) -> Shapes:
        """What the levers do not change is the data's, so two keys are enough."""
        part = recipe.evaluation
        key = recipe.loop.micro_batch_size, part and part.batch_size
        if key not in self._shapes:
            self._shapes[key] = shapes_of(recipe, self.tokenizer if self.known else None)
        return self._shapes[key]

    def planner(self, recipe: Recipe, *, own: bool = True) -> Planner:
        """For the recipe's model and optimizer, with its own techniques or with the given one's."""
        loop = (recipe if own else self.given).loop
        techniques = {key: getattr(loop, key) for key in sorted(_TECHNIQUES)}
        # Activations do not depend on the optimizer.
        body = repr((recipe.model, recipe.adapters, techniques))
        key = repr((recipe.optimizer, body))
        if key not in self._planners:
            like = recipe.model_copy(update={"loop": recipe.loop.model_copy(update=techniques)})
            made = Planner(like, self.tokenizer, self.device, self.base)
            made.trainings = self._trainings.setdefault(body, made.trainings)
            self.notes += [note for note in made.notes if note not in self.notes]
            self._planners[key] = made
        return self._planners[key]

    def floor(self, recipe: Recipe) -> int:
        """Less than the need can be: what is held for the whole run, then what an evaluation adds,
        and what has been counted for more rows at once. No step is run for it.
        """
        planner = self.planner(recipe, own=False)
        held = 0 if self.on_device else self.base + self.shapes(self.given).data_bytes
        if isinstance(recipe.update, StreamedUpdate):
            return held
        held += planner.weights + planner.state
        loop = recipe.loop
        micro = loop.micro_batch_size or loop.batch_size
        inside = isinstance(recipe.update, InBackwardUpdate)
        work = 0 if inside and micro >= loop.batch_size else planner.gradients
        if held + work > self.budget:
            return held + work
        for rows, gradients, others, top in self._known.get(self._work(recipe), []):
            if micro == rows:
                work = max(work, top)
            elif micro < rows:
                # At the same moment of a step: the same gradients, and its share of the rest.
                work = max(work, (0 if inside else gradients) + others * micro // rows)
        same = all(getattr(loop, k) == getattr(self.given.loop, k) for k in ("loss", "mlp_tile"))
        if same and held + work <= self.budget:
            found = planner.evaluation(recipe, self.shapes(recipe))
            work = max([work, *(peak.total for peak in found.values())])
        return held + work

    def _work(self, recipe: Recipe) -> str:
        """What a step's activations depend on, but for its rows."""
        loop = [getattr(recipe.loop, key) for key in sorted(_TECHNIQUES)]
        kind = recipe.update.kind, recipe.offload.activations
        return repr((recipe.model, recipe.adapters, loop, kind))

    def need(self, recipe: Recipe) -> tuple[int, Way]:
        """Bytes at the peak; `UserError` where it cannot be run so."""
        way, planner = Way("", []), self.planner(recipe)
        planner.fill(way, recipe, self.shapes(recipe))
        self.notes += [note for note in planner.notes if note not in self.notes]
        self.counted += 1
        if way.training is not None:
            rows = recipe.loop.micro_batch_size or recipe.loop.batch_size
            peak = way.training
            heap = 0 if self.on_device or recipe.settles_heap else HEAP
            top = max(peak.total, int(heap * peak.small) + peak.large if heap else 0)
            found = rows, peak.gradients, peak.others, top
            self._known.setdefault(self._work(recipe), []).append(found)
        return (way.device_bytes if self.on_device else way.host_bytes), way

    def seconds(self, recipe: Recipe, way: Way | None) -> float:
        """Of a step; `way` as `need` gave it, None for the least that it could be."""
        planner = self.planner(recipe, own=False)
        tokens = sum(shape.tokens for shape in self.shapes(self.given).step)
        return step_seconds(
            recipe, self.speeds, parameters=planner.parameters, tokens=tokens,
            weights=planner.weights, way=way,
        )  # fmt: skip

    def lacking(self, way: Way) -> str:
        """What else a way that is within the budget takes more of than there is."""
        if self.on_device and way.host_bytes > self.machine.available:
            return "more host memory than is free"
        return "more disk than is free" if sum(way.disk.values()) > self._free_disk else ""
