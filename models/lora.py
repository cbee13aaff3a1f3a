"""LoRA, DoRA and QLoRA through peft, from plain arguments."""

from typing import Any

from mnemic.models.load import LoadError


def add_lora(
    model: Any,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: str | list[str],
    rslora: bool,
    dora: bool,
    quantized: bool,
    seed: int,
) -> Any:
    """A PeftModel over `model`, its base frozen. A's weights are a function of `seed`; B starts at
    zero.
    """
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft computes with floats, its annotation says int
        lora_dropout=dropout,
        target_modules=target_modules,
        use_rslora=rslora,
        use_dora=dora,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return get_peft_model(model, config)
    except ValueError as error:
        if "target" not in str(error).lower():
            raise
        linear = {
            n.rsplit(".", 1)[-1] for n, m in model.named_modules() if hasattr(m, "in_features")
        }
        raise LoadError(
            f"adapters.target_modules={target_modules!r} matches no layer; "
            f"take all-linear, or from {', '.join(sorted(linear))}"
        ) from error
