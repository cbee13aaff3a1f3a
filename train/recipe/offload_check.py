"""Which offload goes with which update, optimizer and adapters: a sentence for what does not."""

from typing import Any

from mnemic.train.recipe.model import Bank, Lora, NoAdapters
from mnemic.train.recipe.offload import HostOffload, NoOffload, SsdOffload
from mnemic.train.recipe.training import StreamedUpdate

STREAMED_OPTIMIZERS = ("adamw", "apollo", "apollo_mini")


def check_offload(
    model: Any, adapters: Any, optimizer: Any, update: Any, offload: Any
) -> list[str]:
    streamed = isinstance(update, StreamedUpdate)
    if isinstance(offload, NoOffload):
        if streamed:
            return [
                "update.kind=streamed reads the model from offload, which is none; set "
                "offload.kind=ssd (or host), or update.kind=in_backward"
            ]
        if offload.path is not None and offload.activations != "ssd":
            return ["offload.path has no effect with offload.kind=none; set offload.kind=ssd"]
        return []
    if not streamed:
        return [
            f"offload.kind={offload.kind} moves weights layer by layer, which update.kind="
            f"{update.kind} does not; set update.kind=streamed, or offload.kind=none"
        ]
    return [
        *_weights(model, adapters, offload),
        *(_full(optimizer, offload) if isinstance(adapters, NoAdapters) else _frozen(update)),
    ]


def _weights(model: Any, adapters: Any, offload: HostOffload | SsdOffload) -> list[str]:
    problems = []
    if model.weights == "int8":
        problems.append(
            "model.weights=int8 is not streamed; set model.weights=full (and, with adapters, "
            "offload.base=int8)"
        )
    if not isinstance(adapters, NoAdapters) and type(adapters) not in (Lora, Bank):
        other = "adapters.kind=lora and offload.base=nf4" if adapters.kind == "qlora" else "lora"
        problems.append(
            f"adapters.kind={adapters.kind} needs the whole base in memory; set {other}"
        )
    if isinstance(offload, SsdOffload) and offload.base != "full" and adapters.kind == "none":
        problems.append(
            f"offload.base={offload.base} is for a frozen base; set adapters=lora, or "
            "offload.base=full"
        )
    return problems


def _full(optimizer: Any, offload: HostOffload | SsdOffload) -> list[str]:
    if optimizer.kind not in STREAMED_OPTIMIZERS:
        instead = "adamw and offload.states=8bit" if optimizer.kind == "adamw8bit" else "adamw"
        return [
            f"optimizer.kind={optimizer.kind} keeps its state in memory, so it cannot be streamed; "
            f"set it to apollo_mini, apollo or {instead}"
        ]
    if optimizer.kind != "adamw" and offload.states != "fp32":
        return [
            f"offload.states={offload.states} is about AdamW's state, and optimizer.kind="
            f"{optimizer.kind} has its own; leave it out, or set optimizer.rest=adamw8bit"
        ]
    return []


def _frozen(update: StreamedUpdate) -> list[str]:
    if update.clip in ("layer", "previous_norm"):
        return [
            f"update.clip={update.clip} is for gradients that are not all in memory, and those of "
            "adapters are; set update.clip=exact_spill, which then writes nothing"
        ]
    return []
