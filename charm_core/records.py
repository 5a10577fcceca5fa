"""Small frozen results that serialise to JSON. Big data stays in Polars frames (see ``tables.py``)."""

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """Base of every result and setting of this package: immutable, no unknown fields."""

    # a NaN would make the JSON unreadable elsewhere: what is not known is None
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Estimate(Record):
    """A number with its interval."""

    value: float | None = Field(description="Point estimate; None where it does not exist.")
    low: float | None = Field(default=None, description="Lower end of the interval; None where open or not computed.")
    high: float | None = Field(default=None, description="Upper end of the interval; None where open or not computed.")
