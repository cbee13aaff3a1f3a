"""Model and tokenizer from plain arguments. transformers and torch are imported on the
first call.
"""

import logging
from pathlib import Path
from typing import Any

log = logging.getLogger("mnemic")


class LoadError(RuntimeError):
    """A model that cannot be had; the text says which, why, and what to do."""


def torch_dtype(name: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The tokenizer of a hub name or a local folder; one without a padding token pads by its end
    token. `LoadError` where there is none.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(
        AutoTokenizer, path, "tokenizer", revision=revision, trust_remote_code=trust_remote_code
    )
    if tokenizer.pad_token_id is None:
        # Padding is masked by length, so any id will do; the end token always exists.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    path: str,
    *,
    dtype: str = "fp32",
    revision: str | None = None,
    attention: str = "sdpa",
    trust_remote_code: bool = False,
    quantize_4bit: bool = False,
    double_quant: bool = True,
) -> Any:
    """A causal LM from a hub name or a local folder, weights in `dtype` (with `quantize_4bit`:
    NF4).
    """
    from transformers import AutoModelForCausalLM

    kwargs: dict[str, Any] = {
        "revision": revision,
        "attn_implementation": attention,
        "trust_remote_code": trust_remote_code,
        "dtype": torch_dtype(dtype),
    }
    if quantize_4bit:
        kwargs["quantization_config"] = _nf4(dtype, double_quant)
    return _from_pretrained(AutoModelForCausalLM, path, "model", **kwargs)


def _nf4(dtype: str, double_quant: bool) -> Any:
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise LoadError("adapters.kind=qlora needs bitsandbytes: pip install 'mnemic[offload]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch_dtype(dtype),
    )


def _from_pretrained(cls: Any, path: str, what: str, **kwargs: Any) -> Any:
    local = Path(path).expanduser()
    try:
        return cls.from_pretrained(str(local) if local.exists() else path, **kwargs)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        # transformers answers a missing name, an unreachable hub, a broken folder and an unknown
        # architecture with these types and texts of many lines.
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        hint = (
            "check the files in this folder"
            if local.exists()
            else "check the name, the network, and HF_HUB_OFFLINE; or give a local folder"
        )
        raise LoadError(
            f"the {what} of {path} could not be loaded: {reason.strip()}; {hint}"
        ) from error
