"""One frozen base, one LoRA expert for each memory operation (MemLoRA, arXiv 2512.04763).

The paper trains an expert for each of extraction, update and answering, and switches them by stage.
Here besides: experts trained in one run, batches of several operations (peft's `adapter_names`),
folders that plain peft loads, exact merges, and a count of every byte a memory takes (MEMO, 603
Exemplars). What a bank refuses and why: adapter_rules.py.
"""

import os
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mnemic.models.adapter_budget import byte_budget as byte_budget
from mnemic.models.adapter_budget import tensor_bytes
from mnemic.models.adapter_card import AdapterCard
from mnemic.models.adapter_card import base_hash as hash_of_base
from mnemic.models.adapter_files import compare
from mnemic.models.adapter_merge import How, fill, merge_target
from mnemic.models.adapter_rules import (
    Expert,
    can_mix,
    check_config,
    check_mergeable,
    check_mixed,
    check_names,
    peft_config,
)
from mnemic.models.generation import Generated, generate
from mnemic.models.lora import compute_in_input_type

Compute = Literal["model", "fp32"]


class AdapterBank:
    """`base` (a plain causal LM) is wrapped in place and frozen; `.model` is the PeftModel over it.
    `experts`: operation -> `Expert` or peft's LoraConfig. A's weights are a function of `seed` and
    the operation's name; B starts at zero. `compute` as in `add_lora`. `base_hash`: of a base that
    is not in memory. The bank is the model's `expert_bank`.

    At first no expert is active (the base answers) and none is trained: `use` chooses who computes,
    `train_only` who learns, and neither touches the other. ValueError for what cannot share a base.
    """

    def __init__(
        self, base: Any, experts: Mapping[str, Any], *, compute: Compute = "model", seed: int = 0,
        base_hash: str | None = None,
    ) -> None:  # fmt: skip
        if hasattr(base, "peft_config"):
            raise ValueError("the base has adapters already; give the bank the plain model")
        if not experts:
            raise ValueError("a bank needs at least one operation, such as mem_extract")
        check_names(experts)
        configs = {op: peft_config(op, expert) for op, expert in experts.items()}
        parts = {part for name, _ in base.named_modules() for part in name.split(".")}
        if taken := parts.intersection(configs):
            raise ValueError(f"operation {min(taken)!r}: the base has a module of that name")
        self._streamed = base_hash is not None
        self.base_hash = hash_of_base(base) if base_hash is None else base_hash
        self.base_model = str(getattr(base, "name_or_path", None) or "")
        self.cards: dict[str, AdapterCard] = {}
        # DoRA's norms want W and B A in one type, and the choice is a layer's, not an expert's.
        dora = any(config.use_dora for config in configs.values())
        self._input_typed, self._seed = compute == "model" and not dora, seed
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._frozen: dict[str, set[str]] = {}
        self._training: tuple[str, ...] = ()
        base.requires_grad_(False)
        self.model: Any = None
        for operation, config in configs.items():
            freeze_a = getattr(experts[operation], "freeze_a", False)
            self._add(operation, config, base, freeze_a=freeze_a)
        self.activate(None)
        self.model.expert_bank = self

    @property
    def operations(self) -> tuple[str, ...]:
        """In the order they came; merged ones too."""
        return tuple(self._parameters)

    @property
    def active(self) -> str | None:
        """Who computes now; None is the base."""
        layer = self._layers()[0]
        return None if layer.disable_adapters else layer.active_adapters[0]

    @contextmanager
    def use(self, operation: str | None) -> Iterator[None]:
        """Let one expert compute (None: the base) in `.model`, then again who did before.

        A backward belongs inside: gradient checkpointing runs the forward again, by whichever
        expert is active then.
        """
        before = self.active
        self.activate(operation)
        try:
            yield
        finally:
            self.activate(before)

    def parameters_of(self, operation: str) -> list[nn.Parameter]:
        """What `train_only(operation)` trains: its parameters but those frozen on purpose."""
        self._check(operation)
        self._note_frozen()
        own, frozen = self._parameters[operation], self._frozen[operation]
        return [p for name, p in own.items() if name not in frozen]

    def train_only(self, *operations: str) -> None:
        """Let these experts learn and no other parameter of the model; none: nothing learns.

        What was frozen on purpose (`freeze_a`, or by hand while the expert was in training) stays
        frozen. Jointly: name all, build one optimizer, and run each micro-batch of one operation
        inside `use`; the others' gradients stay None, so it does not move them.
        """
        self._check(*operations)
        self._note_frozen()
        self._training = operations
        for operation, own in self._parameters.items():
            for name, parameter in own.items():
                free = name not in self._frozen[operation]
                parameter.requires_grad_(operation in operations and free)

    def forward(self, operations: Sequence[str | None], **inputs: Any) -> Any:
        """The model's output, row i of the batch by `operations[i]` (None: the base), in evaluation
        mode: no dropout, no gradient checkpointing. Gradients flow.
        """
        with self._rows(operations) as names:
            return self.model(**inputs, **({"adapter_names": names} if names else {}))

    def generate(
        self, prompts: Sequence[list[int]], operations: Sequence[str | None], **settings: Any
    ) -> list[Generated]:
        """models.generation.generate (`settings` are its own), prompt i by `operations[i]`, in
        mixed batches; a text does not depend on what else is in its batch, up to rounding.
        """
        if len(prompts) != len(operations):
            raise ValueError(f"{len(prompts)} prompts and {len(operations)} operations")
        with self._rows(operations) as names:
            return generate(self.model, prompts, adapter_names=names, **settings)

    def name_base(self, hash: str) -> None:
        """The base's hash, where it was not in memory when the bank was made."""
        self.base_hash = hash
        for operation, card in self.cards.items():
            self.cards[operation] = replace(card, base_hash=hash)

    def describe(self, operation: str, **words: str) -> None:
        """Put `teacher`, `data`, `version` or `licence` on the operation's card."""
        self._check(operation)
        if unknown := set(words) - {"teacher", "data", "version", "licence"}:
            raise ValueError(
                f"{operation}: no {min(unknown)!r}; a card has teacher, data, version, licence"
            )
        self.cards[operation] = replace(self.cards[operation], **words)  # type: ignore[arg-type]

    def save(self, folder: str | Path, operations: Sequence[str] | None = None) -> None:
        """Write `folder/<operation>/`: a plain PEFT folder and card.json. An operation that is
        there is replaced whole. ValueError if the base is no longer what it was: its adapters
        would fit no checkpoint.
        """
        chosen = self.operations if operations is None else tuple(operations)
        self._check(*chosen)
        same = self._streamed or hash_of_base(self.model, self.operations) == self.base_hash
        if not same:
            raise ValueError(
                "the base under the adapters has changed since the bank was made (merged or "
                "trained), so what would be saved fits no base; unmerge, or make the bank anew"
            )
        size, now = self.bytes(), datetime.now(timezone.utc).isoformat(timespec="seconds")
        folder = Path(folder)
        for operation in chosen:
            temp = folder / f".saving-{operation}"
            shutil.rmtree(temp, ignore_errors=True)
            # "auto" would ask the hub for the base's config, and the base is frozen.
            self.model.save_pretrained(
                temp, selected_adapters=[operation], save_embedding_layers=False
            )
            self.cards[operation] = replace(
                self.cards[operation], bytes=size[operation], created=now
            )
            self.cards[operation].write(temp / operation)
            if (folder / operation).exists():
                os.replace(folder / operation, temp / "old")
            os.replace(temp / operation, folder / operation)
            shutil.rmtree(temp)

    @classmethod
    def load(
        cls,
        base: Any,
        folder: str | Path,
        operations: Sequence[str] | None = None,
        *,
        any_base: bool = False,
        compute: Compute = "model",
    ) -> "AdapterBank":
        """A bank of the PEFT folders `folder/<operation>` (all there are, by name). ValueError
        where a card names another base, unless `any_base`; a folder without a card is taken.
        """
        from peft import PeftConfig

        folder = Path(folder)
        found = sorted(path.parent.name for path in folder.glob("*/adapter_config.json"))
        chosen = found if operations is None else list(operations)
        if not chosen or set(chosen) - set(found):
            raise ValueError(f"{folder}: holds {', '.join(found) or 'no adapter'}, wanted {chosen}")
        configs = {op: PeftConfig.from_pretrained(str(folder / op)) for op in chosen}
        bank = cls(base, configs, compute=compute)
        for operation in chosen:
            bank._take_card(operation, folder / operation, any_base)
            bank._take_weights(operation, folder / operation)
        return bank

    def swap(self, operation: str, path: str | Path, *, any_base: bool = False) -> None:
        """Put the adapter of a PEFT folder in the place of an expert's weights, in place:
        optimizers and compiled code keep their tensors. It must have the same layers, ranks and
        dropout; alpha may differ.
        """
        from peft import PeftConfig
        from peft.utils.hotswap import hotswap_adapter

        self._check(operation)
        old: Any = self.model.peft_config[operation]
        new: Any = PeftConfig.from_pretrained(str(path))
        check_config(str(path), new)
        check_mergeable({operation: old, str(path): new})
        compare(self.model, operation, path)
        self._take_card(operation, Path(path), any_base)
        # peft compares the new config with the active adapter's, whatever the name it is given.
        with self.use(operation):
            device = next(iter(self._parameters[operation].values())).device
            hotswap_adapter(self.model, str(path), operation, torch_device=str(device))
        # peft leaves the old config, so that saving would lose the new alpha.
        old.lora_alpha, old.alpha_pattern = new.lora_alpha, new.alpha_pattern

    def merge(
        self, operations: Sequence[str], how: How = "cat", *, name: str = "", rank: int = 0
    ) -> tuple[str, float]:
        """A new adapter that is the sum of `operations`, not trained; its name (`mem_sum_<how>`
        unless given) and its relative error, ||merged - sum|| / ||sum|| over all layers. `cat` is
        exact; `svd` keeps `rank` (the highest of theirs), `linear` needs equal ranks.
        """
        name = name or f"mem_sum_{how}"
        self._check(*operations)
        if len(operations) < 2 or name in self.operations:
            raise ValueError(f"merge {name!r}: give two operations or more, and a name that is new")
        check_names([*self.operations, name])
        check_mergeable({op: self.model.peft_config[op] for op in operations})
        layers, rank = merge_target(self.model.base_model.model, operations, how, rank)
        target = Expert(r=rank, alpha=rank, target_modules=tuple(layers))
        active = self.active
        self._add(name, target.to_peft())
        self.activate(active)
        return name, fill(list(layers.values()), operations, name, how, rank)

    def drop(self, operation: str) -> None:
        """Remove an expert that is not active; the last one stays."""
        self._check(operation)
        active = self.active
        if operation == active or len(self.operations) == 1:
            raise ValueError(f"{operation}: is active, or the last one; it cannot be dropped")
        with self._flags():
            # Deleting what peft believes active would warn and choose another.
            other = active or next(op for op in self.operations if op != operation)
            self.model.set_adapter(other, inference_mode=True)
            self.model.delete_adapter(operation)
        self.activate(active)
        self._training = tuple(op for op in self._training if op != operation)
        for kept in (self._parameters, self._frozen, self.cards):
            del kept[operation]

    def bytes(self) -> dict[str, int]:
        """Bytes of the weights of each operation."""
        return {op: sum(map(tensor_bytes, own.values())) for op, own in self._parameters.items()}

    def _add(self, operation: str, config: Any, base: Any = None, freeze_a: bool = False) -> None:
        from peft import get_peft_model

        with torch.random.fork_rng(devices=[]), self._flags():
            torch.manual_seed(zlib.crc32(operation.encode()) + self._seed)
            config.base_model_name_or_path = None
            if self.model is None:
                self.model = get_peft_model(base, config, adapter_name=operation)
            else:
                self.model.add_adapter(operation, config)
        # peft notes the base's name with the first adapter only, if at all.
        self.model.peft_config[operation].base_model_name_or_path = self.base_model or None
        if self._input_typed:
            compute_in_input_type(self.model)
        own = {
            name: parameter for name, parameter in self.model.named_parameters()
            if operation in name.split(".")
        }  # fmt: skip
        for parameter in own.values():
            parameter.requires_grad_(False)
        self._parameters[operation] = own
        self._frozen[operation] = {n for n in own if freeze_a and ".lora_A." in n}
        self.cards[operation] = AdapterCard(operation, self.base_model, self.base_hash)

    def activate(self, operation: str | None) -> None:
        """`use` until the next call: for a loop whose backward comes after the forward's return."""
        if operation is not None:
            self._check(operation)
        tuner = self.model.base_model
        with self._flags():
            if operation is None:
                tuner.disable_adapter_layers()
                return
            if self.active is None:
                tuner.enable_adapter_layers()
            self.model.set_adapter(operation, inference_mode=True)

    @contextmanager
    def _flags(self) -> Iterator[None]:
        """peft makes what it activates trainable and freezes the rest; what trains is ours to say
        (as in lora.adapters_off).
        """
        parameters = [] if self.model is None else list(self.model.parameters())
        wanted = [p.requires_grad for p in parameters]
        try:
            yield
        finally:
            for parameter, want in zip(parameters, wanted, strict=True):
                parameter.requires_grad_(want)

    @contextmanager
    def _rows(self, operations: Sequence[str | None]) -> Iterator[list[str] | None]:
        """Rows by operation: the names for peft, or None where one adapter computes them all."""
        chosen = list(dict.fromkeys(op for op in operations if op is not None))
        self._check(*chosen)
        first = chosen[0] if chosen else None
        names: list[str] | None = [op or "__base__" for op in operations]
        if len(set(operations)) > 1:
            check_mixed({op: self.model.peft_config[op] for op in chosen})
        elif first is None or not can_mix(first, self.model.peft_config[first]):
            names = None
        # A single operation goes by its name too: peft computes such rows in fp32, plain ones in
        # the base's type, and a text must not depend on its neighbours.
        modes = [(module, module.training) for module in self.model.modules()]
        hooks = [(layer, set(layer._forward_pre_hooks)) for layer in self._layers()]
        with self.use(first):
            self.model.eval()
            try:
                yield names
            finally:
                for module, training in modes:
                    module.training = training
                # peft forgets its hooks when a forward fails, and the next one fails for them.
                for layer, before in hooks:
                    for key in set(layer._forward_pre_hooks) - before:
                        del layer._forward_pre_hooks[key]
                        layer._forward_pre_hooks_with_kwargs.pop(key, None)

    def _note_frozen(self) -> None:
        for operation in self._training:
            own = self._parameters[operation]
            self._frozen[operation] = {n for n, p in own.items() if not p.requires_grad}

    def _take_card(self, operation: str, path: Path, any_base: bool) -> None:
        card = AdapterCard.read(path)
        if card is not None and card.base_hash != self.base_hash and not any_base:
            raise ValueError(
                f"{path}: was trained over the base {card.base_model or '(no name)'} with hash "
                f"{card.base_hash}, and this one is {self.base_model or '(no name)'} with "
                f"{self.base_hash}; give that base, or any_base=True (a quantised copy of it, say)"
            )
        mine = self.cards[operation] if card is None else card
        self.cards[operation] = replace(
            mine, operation=operation, base_model=self.base_model, base_hash=self.base_hash
        )

    def _take_weights(self, operation: str, path: Path) -> None:
        from peft import set_peft_model_state_dict

        tensors = compare(self.model, operation, path)
        set_peft_model_state_dict(self.model, tensors, adapter_name=operation)

    def _layers(self) -> list[Any]:
        from peft.tuners.lora import LoraLayer

        return [module for module in self.model.modules() if isinstance(module, LoraLayer)]

    def _check(self, *operations: str) -> None:
        for operation in operations:
            if operation not in self._parameters:
                raise ValueError(
                    f"no operation {operation!r} in this bank; it has {', '.join(self.operations)}"
                )
