"""A published data set by name: prepared once, kept, and dealt to clients.

`published(Reader)` makes the factory that `subfleet.datasets.SETS` holds. Its
parameters, which are the keys of `[data]`, are the reader's own fields and those
that all sets share.
"""

from __future__ import annotations

import functools
import inspect
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from subfleet.core.errors import InputError
from subfleet.core.folders import cache_folder as cache_folder
from subfleet.datasets.federation import Federation
from subfleet.datasets.partitioned import Partitioned
from subfleet.datasets.pool import Pool
from subfleet.datasets.prepare import Progress, digest, prepare
from subfleet.datasets.reader import Reader
from subfleet.datasets.store import Store, read_manifest


def published(make: type) -> Callable[..., Federation]:
    """A factory of the data set that the reader class `make` reads."""
    return _factory(make, open_set)


def dealt(make: Callable[..., Pool]) -> Callable[..., Federation]:
    """A factory of what `make`, a pool of rows without clients, gives when it is dealt."""
    return _factory(make, deal)


def open_set(
    reader: Reader,
    source: str = "",
    seed: int = 0,
    *,
    split: str | None = None,
    test_share: float = 0.2,
    val_share: float = 0.0,
    partition: str | None = None,
    clients: int | None = None,
    alpha: float | None = None,
    classes_per_client: int | None = None,
    form: str | None = None,
    download: bool = False,
    skip_bad: bool = False,
    cache: str | None = None,
    progress: Progress | None = None,
) -> Federation:
    """The data set of a reader, as clients.

    Args:
        reader: The set, with its own options.
        source: The publisher's files, or a store that `subfleet data prepare` wrote.
        seed: Draws splits and partitions.
        split: How a client's rows are parted; see `Store` and `Partitioned`. Left out, it
            is "temporal" for windows of a text and "seeded" for all else.
        test_share: The share of a client's rows that test.
        val_share: The share that validate.
        partition: "natural", for sets with clients of their own; else see `Partitioned`.
        clients: How many clients a partition makes; 100 when left out.
        alpha: Dirichlet's concentration, where a partition has one; 0.5 when left out.
        classes_per_client: Classes (or shards) of each client, where a partition has them.
        form: How a pathological partition deals: "pfedme", "random", "shards" or "auto".
        download: Fetch the files into the cache when `source` is left out.
        skip_bad: Leave out, and count, what cannot be used.
        cache: Where prepared data are kept; else $SUBFLEET_CACHE, else ~/.cache/subfleet.
        progress: Called with (what, done, total).
    """
    store = _store_path(reader, source, download, skip_bad, cache, progress)
    natural = read_manifest(store)["natural"]
    parting = {"test_share": test_share, "val_share": val_share}
    dealing = {
        **{"clients": clients, "alpha": alpha},
        **{"classes_per_client": classes_per_client, "form": form},
    }
    given = {name: value for name, value in dealing.items() if value is not None}
    if partition is None:
        partition = "natural" if natural else "dirichlet"
    if partition != "natural":
        return deal(Store(store, seed), seed, split=split, partition=partition, **parting, **given)
    if not natural:
        raise InputError(
            f'data.partition = "natural": {reader.name} has no clients of its own; '
            'use "iid", "dirichlet", "pathological", "shards" or "quantity"'
        )
    if given:
        name, value = next(iter(given.items()))
        raise InputError(
            f"data.{name} = {value!r} has no effect on {reader.name}'s own clients; remove it, "
            'or deal the rows anew with data.partition, such as "dirichlet"'
        )
    temporal = read_manifest(store)["overlap"] > 0
    return Store(store, seed, split or ("temporal" if temporal else "seeded"), **parting)


def deal(
    pool: Pool,
    seed: int = 0,
    *,
    split: str | None = None,
    test_share: float = 0.2,
    val_share: float = 0.0,
    partition: str = "dirichlet",
    clients: int = 100,
    alpha: float = 0.5,
    classes_per_client: int = 2,
    form: str = "auto",
) -> Federation:
    """The rows of a pool dealt to `clients` clients; see `Partitioned`."""
    return Partitioned(
        pool,
        seed,
        kind=partition,
        clients=clients,
        alpha=alpha,
        classes_per_client=classes_per_client,
        form=form,
        split=split or "seeded",
        test_share=test_share,
        val_share=val_share,
    )


def _store_path(
    reader: Reader,
    source: str,
    download: bool,
    skip_bad: bool,
    cache: str | None,
    progress: Progress | None,
) -> Path:
    """The store to read: `source` itself, or what was or is now prepared of it in the cache."""
    files = find_source(reader, source, download=download, cache=cache, progress=progress)
    if (files / "manifest.json").exists():
        found = read_manifest(files)["name"]
        if found != reader.name:
            raise InputError(
                f"data.source = {str(files)!r} is a store of {found}, not of {reader.name}; "
                f'set data.name = "{found}" or give another store'
            )
        return files
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are kept with the store, and told from there
        shards = reader.shards(files)
    path = cache_folder(cache) / f"{reader.name}-{digest(reader, files, shards, skip_bad)[:20]}"
    try:
        read_manifest(path)
    except InputError:
        prepare(reader, files, path, skip_bad=skip_bad, progress=progress)
    return path


def find_source(
    reader: Reader,
    source: str,
    *,
    download: bool = False,
    cache: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """The folder or file to read; InputError when it is not there."""
    if not source:
        if download:
            from subfleet.datasets.download import download as fetch

            return fetch(reader.name, cache_folder(cache) / "downloads" / reader.name, progress)
        raise InputError(
            f"data.source is missing: {reader.name} needs its publisher's files; give their "
            "folder with --set data.source=/path, set data.download = true where there is a "
            f'network, or use data.name = "synthetic_{reader.name}", which needs no files'
        )
    path = Path(source).expanduser()
    if not path.exists():
        raise InputError(
            f"data.source = {str(path)!r} does not exist; give the folder of {reader.name}'s "
            "files, a path on the machine that runs the experiment, e.g. --set "
            "data.source=/path/to/them"
        )
    return path


# --- a factory whose signature says what `[data]` may hold ---------------------------------------


def _factory(make: Any, use: Callable[..., Federation]) -> Callable[..., Federation]:
    """`use(make(...), ...)` with the parameters of both; one that both have goes to both."""
    own = inspect.signature(make).parameters
    shared = dict(list(inspect.signature(use).parameters.items())[1:])

    def opened(**options: Any) -> Federation:
        made = make(**{name: value for name, value in options.items() if name in own})
        return use(made, **{name: value for name, value in options.items() if name in shared})

    both = {**own, **{name: p for name, p in shared.items() if name not in own}}
    keyword = [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in both.values()]
    whole = make.func if isinstance(make, functools.partial) else make
    hints = typing.get_type_hints(use)
    hints |= typing.get_type_hints(whole.__init__ if isinstance(whole, type) else whole)
    opened.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    opened.__annotations__ = {name: hints[name] for name in both}
    opened.__name__ = opened.__qualname__ = whole.__name__
    opened.__doc__ = whole.__doc__
    return opened
