"""Answerers that are a causal LM in this process: any local one, or the model being trained with
its adapters off.

`SelfReader` costs no memory and stays as frozen as the base: what training does to the adapters it
never sees.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from mnemic.models.lora import adapters_off
from mnemic.models.memory.answer import Ask
from mnemic.models.memory.text import defuse, first_line, marks_of, memory_text, reader_prompt


def load_reader(path: str | Path, *, device: str = "auto") -> tuple[Any, Any]:
    """(model, tokenizer) of an HF folder, or of a PEFT folder as a PeftModel over its base; bf16
    on CUDA, else fp32. `device`: torch's name, or "auto" for the accelerator where there is one.
    `LoadError` where it cannot be had.
    """
    import torch

    from mnemic.models.load import LoadError, load_causal_lm, load_tokenizer

    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if found is None else found.type
    dtype = "bf16" if torch.device(device).type == "cuda" else "fp32"
    tokenizer = load_tokenizer(str(path))
    if not (Path(path) / "adapter_config.json").is_file():
        model = load_causal_lm(str(path), dtype=dtype)
    else:
        from peft import PeftConfig, PeftModel

        base = PeftConfig.from_pretrained(str(path)).base_model_name_or_path
        if not base:
            raise LoadError(
                f"{path}: its adapter does not say over which model it was trained; "
                "export the run with --merge"
            )
        # Not AutoModel over the adapter folder: that hides the adapters from `disable_adapter`.
        model = PeftModel.from_pretrained(load_causal_lm(base, dtype=dtype), str(path))
    model.eval()
    return model.to(torch.device(device)), tokenizer


class ModelReader:
    """Greedy answers of a causal LM. Of the memory it is shown at most `max_memory_tokens` (the
    model's), fewer where its context ends; where not all fits, the `k` best entries.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        k: int = 10,
        max_memory_tokens: int = 2048,
        max_new_tokens: int = 32,
        batch_size: int = 16,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.k, self.max_memory_tokens = k, max_memory_tokens
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self._marks = marks_of(tokenizer)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, device: str = "auto", **settings: Any
    ) -> "ModelReader":
        """From an HF or PEFT folder; `settings` are the constructor's."""
        return cls(*load_reader(path, device=device), **settings)

    def answer(self, asks: Sequence[Ask]) -> list[str]:
        """The first line of what the model says to each, stripped."""
        from mnemic.models.generation import generate

        if not asks:
            return []
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        prompts = [self.prompt(ask) for ask in asks]
        with self._as_reader():
            found = generate(
                self.model, prompts, eos_id=eos, pad_id=eos if pad is None else pad,
                max_new_tokens=self.max_new_tokens, batch_size=self.batch_size,
            )  # fmt: skip
        return [
            first_line(self.tokenizer.decode(one.ids, skip_special_tokens=True)) for one in found
        ]

    def prompt(self, ask: Ask) -> list[int]:
        """Token ids of the prompt, the tokenizer's chat template around it where there is one."""
        room = self.max_memory_tokens
        context = getattr(self.model.config, "max_position_embeddings", None)
        if context is not None:
            frame = len(self._render("", ask.question))
            # 8: tokens at the seams may differ from those of the parts.
            room = max(0, min(room, context - self.max_new_tokens - frame - 8))
        return self._render(memory_text(ask, self.k, room, self._count), ask.question)

    def _render(self, memory: str, question: str) -> list[int]:
        text = reader_prompt(defuse(memory, self._marks), defuse(question, self._marks))
        if not getattr(self.tokenizer, "chat_template", None):
            return list(self.tokenizer(f"{text}\nAnswer:").input_ids)
        return list(
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                add_generation_prompt=True, tokenize=True, return_dict=False,
                enable_thinking=False,  # Qwen3's name; other templates read no such variable
            )
        )  # fmt: skip

    def _count(self, text: str) -> int:
        ids = self.tokenizer(defuse(text, self._marks), add_special_tokens=False).input_ids
        return len(ids)

    def _as_reader(self) -> AbstractContextManager[None]:
        return nullcontext()


class SelfReader(ModelReader):
    """The base of a PeftModel, its adapters off while it answers. ValueError for a model without
    adapters: it would be judged by itself as it changes.
    """

    def __init__(self, model: Any, tokenizer: Any, **settings: Any) -> None:
        if not hasattr(model, "disable_adapter"):
            raise ValueError(
                "SelfReader needs a model with adapters (a PeftModel), whose base stays frozen; "
                "for one that is trained whole give another reader"
            )
        super().__init__(model, tokenizer, **settings)

    def _as_reader(self) -> AbstractContextManager[None]:
        return adapters_off(self.model)
