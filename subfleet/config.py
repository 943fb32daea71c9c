"""The one configuration: an `Experiment`, read from TOML or built in Python.

Each table of the TOML file is a frozen model below. A key's bound and the words
that explain it stand beside it; error messages and the reference page of the
documentation are made from them. Tables that belong to an algorithm, a model or
a data set also carry that thing's own keys (`Table.options`), which
`subfleet.registry` checks against what it builds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import tomli_w
from pydantic import ConfigDict, Field, ValidationError, model_validator

from subfleet import config_errors, config_text
from subfleet.config_devices import DeviceTable
from subfleet.config_tables import Count, Table
from subfleet.core.errors import InputError
from subfleet.core.schedule import ScheduleName
from subfleet.platform.sameness import NOT_OF_THE_RESULT, WHEN_TO_STOP

SHARE_TOLERANCE = 1e-6
SCHEDULE_KEYS = {"step": ("milestones", "decay"), "exponential": ("decay",)}


class OpenTable(Table):
    """A table that also carries the own keys of what its `name` names."""

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def _options_survive_toml(self) -> Self:
        for key, value in (self.model_extra or {}).items():
            if not config_text.is_plain(value):
                raise ValueError(
                    f"{key} = {value!r} is not a finite number, string, true/false, "
                    "or a list or table of these; write it as one"
                )
        return self

    @property
    def options(self) -> dict[str, Any]:
        """What is set, without `name`: the shared keys and the thing's own.

        >>> DataTable(name="femnist", clients=100, slant=0.2).options
        {'clients': 100, 'slant': 0.2}
        """
        return self.model_dump(exclude={"name"}, exclude_none=True)


class DataTable(OpenTable):
    """`[data]`: which samples, and who holds them."""

    name: str = Field(description="name a data set; `subfleet data list` shows them")
    source: str | None = Field(default=None, description="give the folder that holds the files")
    partition: str | None = Field(
        default=None, description="name the way samples are dealt to clients, such as 'dirichlet'"
    )
    alpha: float | None = Field(
        default=None,
        gt=0,
        description="set the Dirichlet concentration; 0.1 is very skewed, 100 is even",
    )
    classes_per_client: int | None = Field(
        default=None, ge=1, description="set how many classes each client holds"
    )
    clients: Count | None = Field(default=None, ge=1, description="set how many clients there are")
    split: str | None = Field(
        default=None, description="name the split of a client's samples into training and test"
    )


class ModelTable(OpenTable):
    """`[model]`: the super-network."""

    name: str = Field(
        default="small_cnn", description="name a super-network; `subfleet models list` shows them"
    )
    width: float | None = Field(
        default=None, gt=0, le=16, description="set the multiple of the super-network's own widths"
    )


class Tier(Table):
    """One class of device: its share of the fleet and what it can afford."""

    name: str = Field(min_length=1, description="give the tier a name, such as 'low'")
    share: float = Field(gt=0, le=1, description="set the tier's share of the clients")
    width: float | None = Field(
        default=None, gt=0, le=1, description="set the share of each layer's units this tier trains"
    )
    flops: Count | None = Field(
        default=None, ge=1, description="set the most multiply-accumulates for one sample"
    )
    params: Count | None = Field(default=None, ge=1, description="set the most parameters")
    depth: float = Field(
        default=1.0, ge=0, le=1, description="set the share of the skippable blocks to keep"
    )
    kernel: int | None = Field(default=None, ge=1, description="set the largest kernel size")
    device: DeviceTable | None = Field(
        default=None, description="say what the tier's devices can do; the rest is [fleet.device]'s"
    )

    @model_validator(mode="after")
    def _one_kind_of_limit(self) -> Self:
        by_cost = self.flops is not None or self.params is not None
        if (self.width is not None) == by_cost:
            given = "both" if by_cost else "neither"
            raise ValueError(
                f"tier {self.name!r} gives {given} of a width and a cost limit; "
                "set either `width`, or `flops` and/or `params`"
            )
        return self


def _one_tier() -> tuple[Tier, ...]:
    return (Tier(name="all", share=1.0, width=1.0),)


class FleetTable(Table):
    """`[fleet]`: the devices."""

    # TOML has lists, Python callers may give tuples; both become a tuple.
    tiers: tuple[Tier, ...] = Field(
        default_factory=_one_tier,
        strict=False,
        description="list the tiers as {name, share, width | flops | params, depth, kernel}",
    )
    device: DeviceTable | None = Field(
        default=None, description="say what devices can do, for simulated time and energy"
    )

    @model_validator(mode="after")
    def _shares_and_names(self) -> Self:
        if not self.tiers:
            raise ValueError("tiers is empty; add at least one tier, or leave the key out")
        names = [tier.name for tier in self.tiers]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tiers are named {name!r}; give each tier its own name")
        total = sum(tier.share for tier in self.tiers)
        if abs(total - 1.0) > SHARE_TOLERANCE:
            shares = " + ".join(f"{tier.share:g}" for tier in self.tiers)
            raise ValueError(f"the tiers' shares {shares} sum to {total:.7g}; make them sum to 1")
        return self

    @model_validator(mode="after")
    def _all_devices_or_none(self) -> Self:
        bare = [tier.name for tier in self.tiers if tier.device is None]
        if self.device is None and 0 < len(bare) < len(self.tiers):
            raise ValueError(
                f"tier {bare[0]!r} has no device and others have; give it one, or all tiers in "
                "[fleet.device]"
            )
        return self

    def devices(self) -> list[dict[str, Any]]:
        """The device of each tier as one plain table; none where nobody says any.

        What a tier says replaces what [fleet.device] says, key by key.
        """
        shared = self.device.model_dump(exclude_none=True) if self.device else {}
        own = [t.device.model_dump(exclude_none=True) if t.device else {} for t in self.tiers]
        found = [shared | table for table in own]
        return found if any(found) else []


class AlgorithmTable(OpenTable):
    """`[algorithm]`: what server and clients do."""

    name: str = Field(
        default="fedavg", description="name an algorithm; `subfleet algorithms` shows them"
    )


class TrainTable(Table):
    """`[train]`: a client's local training."""

    optimizer: Literal["sgd"] = Field(default="sgd", description="use 'sgd'")
    lr: float = Field(default=0.1, gt=0, description="set the clients' learning rate")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="set the momentum; 0 is none")
    weight_decay: float = Field(default=0.0, ge=0, description="set the weight decay; 0 is none")
    batch_size: int = Field(default=20, ge=1, description="set the samples of one step")
    epochs: int | None = Field(
        default=None, ge=1, description="set the passes over a client's samples in one round"
    )
    steps: int | None = Field(
        default=None,
        ge=1,
        description="set the steps a client makes in one round, in place of epochs",
    )
    clip_norm: float | None = Field(
        default=None, gt=0, description="set the largest norm of a step's gradient, or leave it out"
    )
    schedule: ScheduleName = Field(
        default="constant", description="say how the learning rate falls from round to round"
    )
    warmup: Count = Field(
        default=0, ge=0, description="set in how many first rounds the learning rate rises"
    )
    milestones: tuple[Annotated[Count, Field(ge=1)], ...] | None = Field(
        default=None,
        strict=False,
        description="list the rounds after which the learning rate falls by a step",
    )
    decay: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="set the learning rate's factor at each milestone, or of each round",
    )

    @model_validator(mode="before")
    @classmethod
    def _one_epoch_by_default(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("steps") is None:
            values = {**values, "epochs": 1 if values.get("epochs") is None else values["epochs"]}
        return values

    @model_validator(mode="after")
    def _what_a_schedule_needs(self) -> Self:
        needed = SCHEDULE_KEYS.get(self.schedule, ())
        for key in ("milestones", "decay"):
            given = getattr(self, key) is not None
            if given and key not in needed:
                users = " or ".join(
                    repr(name) for name in SCHEDULE_KEYS if key in SCHEDULE_KEYS[name]
                )
                raise ValueError(
                    f"{key} is set, and schedule = {self.schedule!r} has no use for it; "
                    f"set schedule to {users}, or remove {key}"
                )
            if key in needed and not given:
                example = {"milestones": "[50, 75]", "decay": "0.99"}[key]
                raise ValueError(
                    f"schedule = {self.schedule!r} needs {key}; set it, for example to {example}"
                )
        rounds = list(self.milestones or ())
        if rounds != sorted(set(rounds)):
            raise ValueError(f"milestones = {rounds} do not rise; list each round once, in order")
        return self

    @model_validator(mode="after")
    def _epochs_or_steps(self) -> Self:
        if self.steps is not None and self.epochs is not None:
            raise ValueError(
                f"epochs = {self.epochs} and steps = {self.steps} are both set; remove one of them"
            )
        return self


class RunTable(Table):
    """`[run]`: how long, how many at a time, where, and what to keep."""

    seed: int = Field(default=0, ge=0, lt=2**63, description="set the seed of all randomness")
    rounds: Count = Field(default=100, ge=1, description="set how many rounds to run")
    cohort: Count = Field(default=20, ge=1, description="set how many clients take part in a round")
    hosts: int = Field(
        default=0, ge=0, description="set how many hosts work; 0 follows the machine"
    )
    start_from: str | None = Field(
        default=None,
        min_length=1,
        description="give the folder of a former run, to begin with its newest weights and with "
        "what its clients last reported",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="say where clients train"
    )
    engine: Literal["auto", "loop", "traced", "vmap"] = Field(
        default="auto",
        description="say how clients of one shape run: one by one through autograd, one by one "
        "traced, or side by side; auto tries",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="say in which precision networks are run while they train"
    )
    compile: bool = Field(
        default=False,
        description="say whether steps are compiled, in the background, and used once they are",
    )
    deadline: float | None = Field(
        default=None,
        gt=0,
        description="set the simulated seconds after which a round waits for nobody",
    )
    over_select: float = Field(
        default=1.0,
        ge=1,
        description="set how many times run.cohort clients are asked; the first run.cohort count",
    )
    eval_every: int = Field(
        default=5, ge=0, description="set the rounds between evaluations; 0 is only after the last"
    )
    eval_clients: Count = Field(
        default=1000, ge=0, description="set the most clients to evaluate on; 0 is all"
    )
    held_out: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="set the share of the clients that never train and only measure, such as 0.2; "
        "with 0 those that train are measured on their test rows",
    )
    checkpoint_every: int = Field(
        default=10, ge=0, description="set the rounds between checkpoints; 0 is only after the last"
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="set how many of the newest to keep")
    target_accuracy: float | None = Field(
        default=None, gt=0, le=1, description="set the accuracy, as a fraction, at which to stop"
    )
    max_seconds: float | None = Field(
        default=None, gt=0, description="set the time after which to stop"
    )
    on_nan: Literal["stop", "skip"] = Field(
        default="stop",
        description="say whether a client that turns NaN stops the run or is left out",
    )
    # Bundles decide the order of the sums and with it the last bits: a number of the
    # experiment, never of the hosts.
    bundle_clients: int = Field(
        default=0,
        ge=0,
        description="set how many average clients one bundle may cost; 0 is automatic",
    )
    stream: bool | None = Field(
        default=None,
        description="say whether Ray Data streams the rows to the hosts, or hosts read them; "
        "left out, what is on disk is streamed",
    )


class Experiment(Table):
    """All that a run needs to know, checked and frozen.

    The smallest names a data set; every other key has a default.

    >>> Experiment(data={"name": "synthetic_femnist"}).train.lr
    0.1
    >>> Experiment(data={"name": "femnist"}, train={"lr": -1})
    Traceback (most recent call last):
    subfleet.core.errors.InputError: train.lr = -1: must be greater than 0; ...

    Raises:
        InputError: Naming the key, its value, the bound and the remedy.
    """

    data: DataTable = Field(description="add a table [data] with a `name`")
    model: ModelTable = Field(default_factory=ModelTable)
    fleet: FleetTable = Field(default_factory=FleetTable)
    algorithm: AlgorithmTable = Field(default_factory=AlgorithmTable)
    train: TrainTable = Field(default_factory=lambda: TrainTable.model_validate({}))
    run: RunTable = Field(default_factory=RunTable)

    def __init__(self, **tables: Any) -> None:
        try:
            super().__init__(**tables)
        except ValidationError as error:
            raise InputError(config_errors.explain(error, type(self), tables)) from None

    @classmethod
    def load(cls, path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
        """Read an experiment from a TOML file, then apply `a.b=c` overrides in order.

        Raises:
            InputError: The file cannot be read, is not TOML, or a key is wrong;
                the message starts with the file's path, unless an override is to blame.
        """
        tables = config_text.read_toml(Path(path))
        overrides = list(overrides)
        changed = copy.deepcopy(tables)
        for override in overrides:
            config_text.apply_override(changed, override)
        try:
            return cls(**changed)
        except InputError as error:
            if overrides and cls._fits(tables):
                raise InputError(f"--set: {error}") from None
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def _fits(cls, tables: dict[str, Any]) -> bool:
        try:
            cls(**tables)
        except InputError:
            return False
        return True

    @classmethod
    def _from_tables(cls, tables: dict[str, Any], origin: str) -> Experiment:
        try:
            return cls(**tables)
        except InputError as error:
            raise InputError(f"{origin}: {error}") from None

    def with_overrides(self, overrides: Iterable[str]) -> Experiment:
        """A copy with `a.b=c` overrides applied.

        >>> smaller = Experiment(data={"name": "femnist"}).with_overrides(["run.rounds=3"])
        >>> smaller.run.rounds
        3
        """
        tables = self.to_tables()
        for override in overrides:
            config_text.apply_override(tables, override)
        return type(self)(**tables)

    def with_values(self, values: Mapping[str, Any]) -> Experiment:
        """A copy with dotted keys set to values.

        >>> Experiment(data={"name": "femnist"}).with_values({"train.lr": 0.2}).train.lr
        0.2
        """
        tables = self.to_tables()
        for dotted, value in values.items():
            config_text.set_key(tables, dotted.split("."), value)
        return type(self)(**tables)

    def to_tables(self) -> dict[str, Any]:
        """The experiment as plain tables, every default spelled out, unset keys left out."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_toml(self) -> str:
        """The experiment as TOML; loading it gives an equal experiment."""
        return tomli_w.dumps(self.to_tables())

    @classmethod
    def from_toml(cls, text: str, origin: str = "experiment") -> Experiment:
        """An experiment from TOML text; `origin` heads the messages of errors."""
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"{origin}: not valid TOML: {error}") from None
        return cls._from_tables(tables, origin)

    def fingerprint(self, *, stops: bool = True) -> str:
        """A digest (sha256, hexadecimal) of the keys that decide the result.

        Keys in `NOT_OF_THE_RESULT` never count. With `stops=False` those in
        `WHEN_TO_STOP` do not either: two experiments with equal such digests
        run the same rounds, so the longer may continue from the shorter. Under a
        cosine schedule `run.rounds` always counts: every round's rate depends on it.

        >>> experiment = Experiment(data={"name": "femnist"})
        >>> experiment.fingerprint() == experiment.with_overrides(["run.hosts=3"]).fingerprint()
        True
        """
        tables = self.to_tables()
        left_out = NOT_OF_THE_RESULT | (frozenset() if stops else WHEN_TO_STOP)
        if self.train.schedule == "cosine":
            left_out -= {"run.rounds"}
        for dotted in left_out:
            table, key = dotted.split(".")
            tables[table].pop(key, None)
        text = json.dumps(tables, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()
