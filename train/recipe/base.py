"""What every part of a recipe shares: frozen, no unknown keys, documented fields, tagged by `kind`.

Nothing here or in the other recipe modules imports torch: `mnemic validate` answers in a fraction
of a second.
"""

from typing import Any

from pydantic import BaseModel, BeforeValidator, ConfigDict


class Part(BaseModel):
    """Base of every recipe section. The docstring under a field is its description in the JSON
    Schema.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )


def _expand_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


KindShorthand = BeforeValidator(_expand_kind)
"""Lets `optimizer: adamw` stand for `optimizer: {kind: adamw}`."""
