"""`[fleet.device]` and a tier's `device`: what simulated time and energy are counted with."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from subfleet.config_tables import Table
from subfleet.core.device import DAY_S, KEYS, Quantity, windows
from subfleet.core.errors import InputError


class DeviceTable(Table):
    """A kind of device. A number is given, or a distribution to draw each client's from."""

    flops_per_s: Any = Field(default=None, description=f"give {KEYS['flops_per_s'].give}")
    up_bytes_per_s: Any = Field(default=None, description=f"give {KEYS['up_bytes_per_s'].give}")
    down_bytes_per_s: Any = Field(default=None, description=f"give {KEYS['down_bytes_per_s'].give}")
    latency_s: Any = Field(default=None, description=f"give {KEYS['latency_s'].give}")
    failure_rate: Any = Field(default=None, description=f"give {KEYS['failure_rate'].give}")
    joules_per_flop: Any = Field(default=None, description=f"give {KEYS['joules_per_flop'].give}")
    joules_per_byte: Any = Field(default=None, description=f"give {KEYS['joules_per_byte'].give}")
    shift_s: Any = Field(default=None, description=f"give {KEYS['shift_s'].give}")
    available: Any = Field(
        default=None, description="list the windows [from, to] in which a client can take part"
    )
    period_s: float | None = Field(
        default=None, gt=0, description="set the seconds after which windows repeat (a day)"
    )
    trace: str | None = Field(
        default=None,
        min_length=1,
        description="give a CSV or Parquet file with a row a client, or rows to deal to clients",
    )

    @field_validator(*KEYS)
    @classmethod
    def _a_number_or_a_law(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.field_name is not None:
            Quantity.of(info.field_name, value)
        return value

    @model_validator(mode="after")
    def _windows_fit_the_period(self) -> Self:
        if self.available is not None:
            try:
                windows(self.available, self.period_s or DAY_S)
            except InputError as error:
                raise ValueError(f"available: {error}") from None
        if not self.model_fields_set:
            raise ValueError("is empty; give flops_per_s, say, or remove the table")
        return self
