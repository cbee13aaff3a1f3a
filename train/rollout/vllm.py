"""Rollouts by a `trl vllm-serve` server, which gets the trained weights before each batch of them.

The server's client is TRL's. Weights travel over NCCL, so training needs a CUDA device of its own;
adapters are merged for the transfer and taken out again, since the server holds a plain model.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mnemic.models.generation import Generated
from mnemic.train.errors import UserError

_WRAPPERS = ("base_model.model.", "module.")


class ServerGenerator:
    """`sends`: whether this process is the one that sends weights; the others wait in `barrier`."""

    def __init__(
        self, url: str, model: Any, tokenizer: Any, *, max_new_tokens: int, timeout: float,
        sends: bool = True, barrier: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        try:
            from trl.generation.vllm_client import VLLMClient
        except ImportError as error:
            raise UserError(
                f"objective.generator.kind=vllm needs trl: pip install 'mnemic[rl]' ({error})"
            ) from None
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.sends, self.barrier = max_new_tokens, sends, barrier
        device = next(model.parameters()).device
        if sends and device.type != "cuda":
            raise UserError(
                "objective.generator.kind=vllm sends weights over NCCL, and this process trains on "
                f"{device.type}; set objective.generator.kind=hf"
            )
        try:
            self.client: Any = VLLMClient(base_url=url, connection_timeout=timeout)
            if sends:
                self.client.init_communicator(device)
        except Exception as error:
            # requests', trl's and NCCL's own types; each means that there is no such server.
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise UserError(
                f"objective.generator.url: {url}: {first}; start it with "
                "`trl vllm-serve --model MODEL`"
            ) from error

    def prepare(self) -> None:
        """Send the present weights, all ranks waiting for it."""
        self.barrier()
        if self.sends:
            merged = hasattr(self.model, "merge_adapter")
            if merged:
                self.model.merge_adapter()
            try:
                with self.client.weight_update():
                    for name, weight in served_weights(self.model):
                        self.client.update_named_param(name, weight)
            finally:
                if merged:
                    self.model.unmerge_adapter()
            self.client.reset_prefix_cache()
        self.barrier()

    def __call__(
        self, prompts: Sequence[list[int]], seeds: Sequence[int] | None
    ) -> list[Generated]:
        """Continuations in the prompts' order. The server draws by its own generator: `seeds` only
        says that it should sample.
        """
        temperature = 0.0 if seeds is None else 1.0
        answer = self.client.generate(
            [list(prompt) for prompt in prompts],
            temperature=temperature, max_tokens=self.max_new_tokens,
        )  # fmt: skip
        return [self._made(ids) for ids in answer["completion_ids"]]

    def _made(self, ids: list[int]) -> Generated:
        eos = self.tokenizer.eos_token_id
        if eos in ids:
            return Generated(ids[: ids.index(eos) + 1], False)
        if len(ids) >= self.max_new_tokens:
            return Generated(ids, True)
        # Stopped by the server without the token that says so.
        return Generated([*ids, eos], False)


@torch.no_grad()
def served_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain model's parameters under their own names, adapters (merged by the caller) left
    out.
    """
    for name, param in model.named_parameters():
        for prefix in _WRAPPERS:
            name = name.removeprefix(prefix)
        name = name.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
        if "lora_" in name or ".original_module." in name:
            continue
        yield name, param.data
