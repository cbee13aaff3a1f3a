"""What an adapter bank takes and what it refuses, before peft is asked.

peft 0.21 accepts most of what is refused here, or fails halfway: a second PiSSA adapter makes the
first wrong without a word, a hot swap of `mem_a` sets `mem_ab` to zero (it looks for the name as a
part of each key), an adapter called `update` raises a KeyError, and a mixed batch that is refused
leaves its hooks on the model, so that the next plain forward fails. Pure functions over configs;
no torch is imported here.
"""

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

NAME = re.compile(r"mem_[a-z0-9]+(_[a-z0-9]+)*")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Expert:
    """LoRA of one operation in plain values; `to_peft` makes the LoraConfig.

    `alpha` / `r` (with `rslora`: / sqrt(r)) scales B A. `freeze_a`: train B only (LoRA-FA).
    `modules_to_save`: names of modules trained whole, a copy for each expert.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    rslora: bool = False
    dora: bool = False
    freeze_a: bool = False
    modules_to_save: tuple[str, ...] = ()

    def to_peft(self) -> Any:
        from peft import LoraConfig

        named = self.target_modules
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft computes with floats
            lora_dropout=self.dropout,
            target_modules=named if isinstance(named, str) else list(named),
            use_rslora=self.rslora,
            use_dora=self.dora,
            modules_to_save=list(self.modules_to_save) or None,
        )


def check_names(names: Iterable[str]) -> None:
    """ValueError unless each is `mem_` and words of a-z, 0-9 joined by `_`, and none holds another.

    peft keeps adapters in `nn.ModuleDict`s, so `update`, `keys` or a name with a dot cannot be one;
    and it finds an adapter's tensors by the name as a part of theirs.
    """
    names = list(names)
    for name in names:
        if not isinstance(name, str) or not NAME.fullmatch(name) or len(name) > 64:
            raise ValueError(
                f"operation {name!r}: a name is 'mem_' and then words of a-z and 0-9 joined by "
                "'_', such as mem_extract, mem_update or mem_generate, at most 64 characters"
            )
        for other in names:
            if name != other and name in other:
                raise ValueError(
                    f"operation {name!r} is a part of the name {other!r}, and peft would swap or "
                    "clear both where one is meant; rename one, say mem_v2_extract for a second "
                    "mem_extract"
                )


def check_config(operation: str, config: Any) -> None:
    """ValueError for what would change the base under the other experts, or is no LoRA."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise ValueError(
            f"{operation}: is of peft type {kind}; a bank holds LoRA adapters only, because types "
            "cannot be mixed over one base"
        )
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{operation}: init_lora_weights={init!r} writes into the base that all experts share, "
            "which makes the others wrong without a word; take the default, or convert the adapter "
            "to a plain one (peft's path_initial_model_for_weight_conversion)"
        )
    changes = {
        "bias": config.bias != "none",
        "layer_replication": bool(config.layer_replication),
        "kasa_config": getattr(config, "kasa_config", None) is not None,
    }
    for key, changed in changes.items():
        if changed:
            raise ValueError(
                f"{operation}: {key}={getattr(config, key)!r} changes the base that all experts "
                "share; leave it out"
            )


def check_mixed(configs: Mapping[str, Any]) -> None:
    """ValueError for the first expert that cannot share a batch with others."""
    for operation, config in configs.items():
        reasons = {
            "DoRA rescales the whole output of a layer, not the rows of one expert": (
                config.use_dora
            ),
            f"it trains {', '.join(config.modules_to_save or ())} whole, and such copies are "
            "chosen for a batch, not for a row": bool(config.modules_to_save),
            "it adapts parameters, not layers": bool(config.target_parameters),
            "aLoRA needs the place of its invocation tokens in each row": (
                config.alora_invocation_tokens is not None
            ),
        }
        for reason, holds in reasons.items():
            if holds:
                raise ValueError(
                    f"{operation}: cannot be in a batch of several operations: {reason}; run it "
                    f"alone, inside bank.use({operation!r})"
                )


def check_mergeable(configs: Mapping[str, Any]) -> None:
    """ValueError for the first expert whose change of the base is not B A alone."""
    for operation, config in configs.items():
        if config.use_dora or config.modules_to_save or config.lora_bias or (
            config.target_parameters
        ):  # fmt: skip
            raise ValueError(
                f"{operation}: only plain LoRA can be merged with other adapters, and this one has "
                "DoRA, lora_bias, modules_to_save or target_parameters"
            )


def can_mix(operation: str, config: Any) -> bool:
    try:
        check_mixed({operation: config})
    except ValueError:
        return False
    return True


def peft_config(operation: str, expert: Any) -> Any:
    """A checked LoraConfig of an `Expert` or of a config of peft's; a copy, since peft writes the
    layers it found into it.
    """
    config = expert.to_peft() if isinstance(expert, Expert) else deepcopy(expert)
    check_config(operation, config)
    config.task_type = config.task_type or "CAUSAL_LM"
    config.inference_mode = False
    return config
