"""What every section of the config is, and the kinds of numbers in it."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, Strict

Bool = Annotated[bool, Strict()]  # pydantic would otherwise read 'on', 'yes' and 1 as true
Count = Annotated[int, Field(ge=1)]  # at least one
CountOrZero = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, no NaN."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True, protected_namespaces=(),
        serialize_by_alias=True,
    )  # fmt: skip


def option_of(field: str) -> str:
    """Name of the option of a section's field: one that is a word of Python's has an underscore behind it there."""
    return field.removesuffix("_")
