"""The figures of one way to run a recipe. Those of a model in memory are here, those of a streamed
one in `streamed.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from mnemic.train.exact import checkpoint_layers
from mnemic.train.offload.layout import TILE
from mnemic.train.plan.guess import guessed_logits, guessed_training
from mnemic.train.plan.layer import step_bytes
from mnemic.train.plan.live import SMALL, Counted, Fake, Peak, evaluating, fake, training
from mnemic.train.plan.shapes import Shape, Shapes
from mnemic.train.plan.sizes import (
    checkpoint_bytes,
    describe,
    empty_model,
    gradient_bytes,
    quiet,
    state_bytes,
    teacher_bytes,
    trained,
    weight_bytes,
)
from mnemic.train.plan.techniques import kept_tokens
from mnemic.train.recipe.offload import NoOffload
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import InBackwardUpdate, LmObjective, Loop, StreamedUpdate
from mnemic.train.tokens import install_tokens

T = TypeVar("T")

HEAP = 1.5
"""glibc's heap serves blocks below 32 MiB, finds them by best fit, and hardly ever shrinks: it
takes this many times the most that was in use of such blocks at any moment, and keeps it. Found by
the runs of docs/plan.md. Once, where the run makes the heap give back (`Recipe.settles_heap`)."""

KERNELS = 32 * (3 << 18)
"""oneDNN's, where rows have many lengths: as many as `bound_kernels` lets it keep, three quarters
of a MiB each, measured on products of 200 to 1,500 by 600."""


@dataclass
class Way:
    """Bytes by part. `disk`: at the most, files by kind; `read`, `written`: of a step, past the
    page cache; `checkpoint_written`: of checkpoints, per step. `training`: the peak of a step of a
    model in memory.
    """

    name: str
    overrides: list[str]
    chosen: bool = False
    refused: str = ""
    host: dict[str, int] = field(default_factory=dict)
    device: dict[str, int] = field(default_factory=dict)
    peak: str = ""
    disk: dict[str, int] = field(default_factory=dict)
    read: int = 0
    written: int = 0
    checkpoint_written: int = 0
    floor_seconds: float | None = None
    endurance_steps: int | None = None
    fits: bool = False
    lacking: list[str] = field(default_factory=list)
    training: Peak | None = None

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())


class Planner:
    """One model without weights, measured as often as a way or a length of rows needs.

    `base`: resident bytes of a process that has built nothing yet.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any, device: torch.device, base: int) -> None:
        self.tokenizer, self.device, self.base = tokenizer, device, base
        self.model = empty_model(recipe, tokenizer, device)
        with quiet():
            install_tokens(recipe, self.model, tokenizer)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.trained = sum(p.numel() for _, p in trained(self.model))
        self.weights = weight_bytes(recipe, self.model)
        self.teacher = teacher_bytes(recipe)
        self.gradients = gradient_bytes(self.model)
        self.gradient_sizes = [p.numel() * p.element_size() for _, p in trained(self.model)]
        self.largest = max((p.numel() for _, p in trained(self.model)), default=0)
        self.state = state_bytes(recipe, self.model)
        self.checkpoint = checkpoint_bytes(recipe, self.model)
        full = self.trained == self.parameters
        every = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.result = every if full else self.gradients
        self.fake: Fake = fake(self.model, device, recipe.loop.precision)
        self.notes: list[str] = []
        self.runs = True
        self.trainings: dict[Any, Counted] = {}
        self.layouts: dict[str, Any] = {}
        self._layers: dict[Any, Any] = {}
        self._forwards: dict[Shape, Peak] = {}

    def fill(self, way: Way, recipe: Recipe, shapes: Shapes) -> None:
        """Put the figures of `recipe` into `way`; `UserError` where it cannot be run so."""
        if isinstance(recipe.update, StreamedUpdate):
            from mnemic.train.plan.streamed import fill_streamed

            fill_streamed(self, way, recipe, shapes)
        else:
            self._in_memory(way, recipe, shapes)

    # A model in memory -----------------------------------------------------------------------

    def _in_memory(self, way: Way, recipe: Recipe, shapes: Shapes) -> None:
        mode = recipe.offload.activations
        moves = mode == "ssd" or (mode == "host" and self.device.type != "cpu")
        found = self._training(recipe, shapes, moves)
        inside = isinstance(recipe.update, InBackwardUpdate)
        peak, step = found.freed if inside else found.held, self.step_bytes(recipe)
        way.training = peak
        small = sum(size for size in self.gradient_sizes if size < SMALL)
        moments = {
            "backward": peak,
            "optimizer step": Peak(self.gradients, step, small + step, self.gradients - small),
        }
        if inside:
            moments["backward"] = Peak(
                peak.gradients, peak.others + step, peak.small + step, peak.large
            )
            del moments["optimizer step"]
        moments |= self.evaluation(recipe, shapes)
        way.peak = max(moments, key=lambda name: moments[name].total)
        top = moments[way.peak]
        most = HEAP * max(p.small for p in moments.values())
        most += max(p.large for p in moments.values())
        parts = {
            "weights": self.weights, "gradients": top.gradients, "optimizer state": self.state,
            "activations": top.others,
        }  # fmt: skip
        if self.teacher:
            parts["teacher"] = self.teacher
        way.host = {"imports": self.base, "data": shapes.data_bytes}
        if self.device.type == "cpu":
            way.host |= parts
            way.host["heap"] = 0 if recipe.settles_heap else max(0, int(most) - top.total)
            way.host["kernels"] = self.kernels(recipe)
        else:
            way.device = parts
            way.host["moved activations"] = found.moved if mode == "host" else 0
        if mode == "ssd":
            way.disk["activations"] = found.moved
            way.read = way.written = found.moved * len(shapes.step)
        self.add_checkpoints(way, recipe, self.checkpoint, commits=False)

    def _training(self, recipe: Recipe, shapes: Shapes, moves: bool) -> Counted:
        key, on = (tuple(shapes.step), moves), recipe.loop.gradient_checkpointing
        if key not in self.trainings:
            self.checkpointing(recipe.loop)
            self.trainings[key] = self.measured(
                lambda: training(
                    self.fake,
                    shapes.step,
                    moved=moves,
                    around=lambda shape: kept_tokens(recipe, shape),
                ),
                lambda: guessed_training(self.model, shapes.largest, on),
            )
        return self.trainings[key]

    def measured(self, measure: Callable[[], T], guess: Callable[[], T]) -> T:
        """`measure()` on fake tensors; where the model cannot be run so, `guess()`, and a note."""
        if not self.runs:
            return guess()
        try:
            return measure()
        except RuntimeError as error:
            reason = next((x for x in str(error).splitlines() if x.strip()), repr(error))
            self.notes.append(
                f"activations are by formula: {type(self.model).__name__} does not run without "
                f"values ({reason.strip()[:100]})"
            )
            self.runs = False
            return guess()

    def evaluation(self, recipe: Recipe, shapes: Shapes) -> dict[str, Peak]:
        """Peaks of the moments of an evaluation."""
        found = {}
        if shapes.evaluation is not None:
            found["evaluation"] = self._forward(shapes.evaluation)
        if shapes.prompts is not None and recipe.evaluation is not None:
            first = self._forward(shapes.prompts)
            cache = self.cache_bytes(shapes.prompts, recipe.evaluation.max_new_tokens)
            found["generation"] = Peak(0, first.total + cache, first.small + cache, first.large)
        return found

    def _forward(self, shape: Shape) -> Peak:
        if shape not in self._forwards:
            self._forwards[shape] = self.measured(
                lambda: evaluating(self.fake, shape),
                lambda: Peak(0, guessed_logits(self.model, shape)),
            )
        return self._forwards[shape]

    def kernels(self, recipe: Recipe) -> int:
        """Of matrix products in bf16 on a CPU; few where all rows are of one length."""
        low = recipe.loop.precision != "fp32" or recipe.model.dtype != "fp32"
        one = isinstance(recipe.objective, LmObjective)
        return KERNELS if self.device.type == "cpu" and low and not one else 0

    # What the streamed ways use as well ------------------------------------------------------

    def layer(self, key: Any, measure: Callable[[], T], guess: Callable[[], T]) -> T:
        """`measured`, once for each `key`: a layer and the shape it runs on."""
        if key not in self._layers:
            self._layers[key] = self.measured(measure, guess)
        return self._layers[key]

    def checkpointing(self, loop: Loop | None) -> None:
        """As `loop.gradient_checkpointing` makes it; None: off."""
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        if loop is not None and loop.gradient_checkpointing:
            checkpoint_layers(loop, self.model, adapted=self.trained != self.parameters)

    def step_bytes(self, recipe: Recipe) -> int:
        """Temporaries of an optimizer's step of one tensor, by how each is written."""
        part, size = recipe.optimizer, 4 * self.largest
        streaming = isinstance(recipe.update, StreamedUpdate)
        if part.kind == "adamw" and not streaming:
            return 0  # one fused kernel
        if part.kind in ("sgd", "adafactor", "muon", "galore"):
            return size * {"sgd": 1, "adafactor": 3}.get(part.kind, 4)
        eight_bit = "8bit" in (getattr(part, "rest", part.kind))
        if streaming and not isinstance(recipe.offload, NoOffload):
            eight_bit = eight_bit or recipe.offload.states == "8bit"
        # Larger tensors are changed in parts (optim/adamw.py), streamed ones in tiles.
        return step_bytes(min(self.largest, TILE if streaming else 2 * TILE), eight_bit=eight_bit)

    def cache_bytes(self, shape: Shape, new_tokens: int) -> int:
        """Keys and values of a generation; a layer's are copied when they grow."""
        config = self.model.config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        size = next(p.element_size() for p in self.model.parameters())
        layer = 2 * heads * width * size * shape.rows * (shape.width + new_tokens)
        return layer * (config.num_hidden_layers + 1)

    def add_checkpoints(self, way: Way, recipe: Recipe, each: int, *, commits: bool) -> None:
        """Kept ones, the one being written, the best one; and the result at the end."""
        loop = recipe.loop
        kept = loop.keep_checkpoints + 1 + (recipe.evaluation is not None)
        if loop.steps is not None:
            saved = loop.steps // loop.save_every + (0 if commits else 1)
            kept = min(kept, saved + (recipe.evaluation is not None))
        way.disk["checkpoints"] = kept * each
        way.disk["result"] = self.result
        way.checkpoint_written = each // loop.save_every

    def describe(self) -> str:
        return describe(self.model)
