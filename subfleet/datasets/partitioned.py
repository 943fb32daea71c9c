"""A pool of rows dealt to clients: a federation of CIFAR and its like."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import numpy as np

from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.scaling import Scaling
from subfleet.datasets.federation import Block, checked_ids, checked_number, offsets_of
from subfleet.datasets.memory import count_labels
from subfleet.datasets.partition import KINDS, Partition, partition, same_distribution
from subfleet.datasets.pool import Pool
from subfleet.datasets.split import TEST, TRAIN, VAL, Parts, check_shares, seeded_split

SPLITS = ("seeded", "official")


class _Dealt(NamedTuple):
    """Who has which rows of the pool."""

    numbers: np.ndarray  # int64 [rows]: rows of the pool, client after client
    labels: np.ndarray  # int64 [rows]
    parts: Parts
    report: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Partitioned:
    """The train rows of `pool` dealt to `clients` clients; a `Federation`.

    kind: a name in `partition.KINDS`; of the options that follow, those count that
    it has (`classes_per_client` is also the number of shards a client). split="seeded":
    of each client's rows `test_share` test and `val_share` validate; the publisher's
    test rows are left out. split="official": the publisher's test rows are dealt so
    that a client tests on labels distributed as those it trains on (`same_distribution`),
    and `val_share` of its train rows validate. It pickles as its arguments: who has
    which row is computed where it is asked for, and is the same everywhere.
    InputError: see `partition.partition`; "official" for a pool without test rows.
    """

    pool: Pool
    seed: int = 0
    _: KW_ONLY
    kind: str = "dirichlet"
    clients: int = 100
    alpha: float = 0.5
    classes_per_client: int = 2
    form: str = "auto"
    split: str = "seeded"
    test_share: float = 0.2
    val_share: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(
                f"partition={self.kind!r} is unknown; {did_you_mean(self.kind, KINDS)}"
            )
        if self.split not in SPLITS:
            raise InputError(f"split={self.split!r} is unknown; {did_you_mean(self.split, SPLITS)}")
        checked_number("clients", self.clients, 1, whole=True)
        check_shares(self.test_share, self.val_share)

    def __getstate__(self) -> dict[str, Any]:
        # Without what is cached, which is as large as the pool.
        return {name: self.__dict__[name] for name in self.__dataclass_fields__}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def name(self) -> str:
        """The pool's name."""
        return self.pool.name

    @property
    def num_clients(self) -> int:
        """Clients are numbered from 0 to this, exclusive."""
        return self.clients

    @property
    def num_classes(self) -> int:
        """Labels run from 0 to this, exclusive."""
        return self.pool.num_classes

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one row of x."""
        return self.pool.input_shape

    @property
    def scale(self) -> Scaling:
        """What turns stored x into the network's input, on the device."""
        return self.pool.scale

    @property
    def stored(self) -> bool:
        """Whether the pool's rows lie on disk, and can be streamed from there."""
        return getattr(self.pool, "stored", False)

    @property
    def vocabulary(self) -> int:
        """The pool's: tokens run from 0 to this, exclusive; 0 for what is none."""
        return getattr(self.pool, "vocabulary", 0)

    @property
    def embedding(self) -> np.ndarray | None:
        """The pool's vector for each token, where it has them."""
        return getattr(self.pool, "embedding", None)

    @property
    def options(self) -> dict[str, Any]:
        """The options of the partition's kind, by the names its generator has for them."""
        given = {
            "alpha": self.alpha,
            "classes_per_client": self.classes_per_client,
            "shards_per_client": self.classes_per_client,
            "form": self.form,
        }
        return {name: given[name] for name in KINDS[self.kind][1]}

    @property
    def fingerprint(self) -> str:
        """A digest (sha256, hexadecimal) of the pool's rows and of all that says who has which."""
        facts = {"pool": self.pool.fingerprint, "kind": self.kind, "clients": self.clients}
        facts |= {"seed": self.seed, "split": self.split, "val_share": self.val_share}
        facts |= {"test_share": self.test_share} if self.split == "seeded" else {}
        text = json.dumps(facts | self.options, sort_keys=True, default=float)
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def _dealt(self) -> _Dealt:
        labels = np.asarray(self.pool.labels(), dtype=np.int64)
        from_test = np.asarray(self.pool.from_test(), dtype=bool)
        train, test = np.flatnonzero(~from_test), np.flatnonzero(from_test)
        part = partition(self.kind, labels[train], self.clients, self.seed, **self.options)
        report: dict[str, Any] = {"partition": part.report.as_dict(), "split": self.split}
        held = np.bincount(labels[train], minlength=self.num_classes)
        report["partition"]["absent"] = np.flatnonzero(held == 0).tolist()
        if self.split == "seeded":
            shares = (self.test_share, self.val_share)
            codes = seeded_split(self.seed, part.offsets, None, *shares)
            numbers, offsets = train[part.rows], part.offsets
        else:
            dealt = self._official(part, labels, train, test)
            report["test partition"] = dealt.report.as_dict()
            inner = seeded_split(self.seed, part.offsets, None, self.val_share, 0.0, "train or val")
            codes = np.where(inner == TEST, VAL, TRAIN).astype(np.int8)
            numbers = np.concatenate([train[part.rows], test[dealt.rows]])
            codes = np.concatenate([codes, np.full(len(dealt.rows), TEST, np.int8)])
            order = np.argsort(np.concatenate([part.owners(), dealt.owners()]), kind="stable")
            numbers, codes = numbers[order], codes[order]
            offsets = offsets_of(part.sizes + dealt.sizes)
        parts = Parts(codes, offsets)
        report["left_out"] = self._left_out(report, len(test))
        report |= parts.report()
        report["warnings"] = [*getattr(self.pool, "warnings", []), *_warnings(report)]
        return _Dealt(numbers, labels[numbers], parts, report)

    def _official(
        self, part: Partition, labels: np.ndarray, train: np.ndarray, test: np.ndarray
    ) -> Partition:
        """The publisher's test rows dealt alike."""
        if not len(test):
            raise InputError(
                f'split="official", but {self.name} has no test rows of its publisher\'s; '
                'use split="seeded"'
            )
        alpha = self.alpha if self.kind == "dirichlet" else None
        return same_distribution(part, labels[train], labels[test], self.seed, alpha=alpha)

    def _left_out(self, report: dict[str, Any], tests: int) -> dict[str, int]:
        """Rows of the pool that nobody holds, by reason."""
        left_out = dict(report["partition"]["left_out"])
        left_out |= report.get("test partition", {}).get("left_out", {})
        if self.split == "seeded" and tests:
            left_out["the publisher's test rows, which split='official' would deal"] = tests
        return left_out

    @property
    def report(self) -> dict[str, Any]:
        """What the partition did, as plain JSON.

        "partition" (and "test partition"): see `partition_result.Report`; "left_out":
        rows by reason; rows of each part; "warnings": sentences for the user.
        """
        return self._dealt.report

    def sizes(self, ids: np.ndarray, part: str) -> np.ndarray:
        """The number of rows of each client in `part`, int64 [len(ids)]."""
        return self._dealt.parts.sizes(checked_ids(ids, self.clients), part)

    def label_counts(self, ids: np.ndarray, part: str = "train") -> np.ndarray:
        """The number of rows of each client and class, int64 [len(ids), num_classes]."""
        places, offsets = self._dealt.parts.rows(checked_ids(ids, self.clients), part)
        return count_labels(self._dealt.labels[places], offsets, self.num_classes)

    def block(self, ids: np.ndarray, part: str) -> Block:
        """The clients' rows, fetched from the pool by number."""
        places, offsets = self._dealt.parts.rows(checked_ids(ids, self.clients), part)
        x = self.pool.rows(self._dealt.numbers[places])
        return Block(x, self._dealt.labels[places], offsets)


def _warnings(report: dict[str, Any]) -> list[str]:
    """What a researcher should know of, in sentences."""
    facts, told = report["partition"], []
    if facts["moved"]:
        told.append(
            f"{facts['repaired']} of {facts['clients']} clients had fewer than {facts['least']} "
            f"rows after {facts['draws']} draws; {facts['moved']} rows were moved to them from "
            "the largest clients"
        )
    told += [f"{rows} rows are left out: {why}" for why, rows in report["left_out"].items()]
    if facts["absent"]:
        told.append(f"classes {facts['absent']} have no rows")
    if "test partition" in report and report["clients_without_test"]:
        told.append(
            f"{report['clients_without_test']} of {facts['clients']} clients have no test rows; "
            "local accuracy is measured on the others"
        )
    return told
