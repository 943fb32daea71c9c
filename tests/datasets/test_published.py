"""A data set by name: its options, its cache, its clients, and what a run hears of it."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from toy_reader import Lines, parsed

from subfleet import registry
from subfleet.config import Experiment
from subfleet.core.errors import InputError
from subfleet.datasets import READERS, SETS, Partitioned, Store, download
from subfleet.datasets.celeba import CelebA
from subfleet.datasets.cifar import Cifar10
from subfleet.datasets.download import Remote
from subfleet.datasets.federation import identity
from subfleet.datasets.prepare import prepare
from subfleet.datasets.published import cache_folder, deal, find_source, open_set, published
from subfleet.datasets.reader import Layout, Reader
from subfleet.launch import launch


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing of these tests is kept in the user's own cache."""
    monkeypatch.setenv("SUBFLEET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two files of three clients with six rows each; the pixel tells rows apart."""
    folder = tmp_path / "source"
    folder.mkdir()
    for number, name in enumerate(("a.txt", "b_test.txt")):
        lines = [f"c{k % 3} {k % 4} {k + 100 * number}" for k in range(9)]
        (folder / name).write_text("\n".join(lines))
    return folder


def opened(source: Path, reader: Reader | None = None, **options: Any) -> Any:
    return open_set(reader or Lines(), str(source), **options)


# --- what `[data]` may hold ----------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
def test_a_sets_options_are_its_readers_and_those_that_all_share(name: str) -> None:
    parameters = inspect.signature(SETS[name]).parameters
    fields = {field.name: field for field in dataclasses.fields(cast(Any, READERS[name]))}
    shared = set(list(inspect.signature(open_set).parameters)[1:])
    assert set(parameters) == fields.keys() | shared and not fields.keys() & shared
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())
    assert all(p.default is not p.empty for p in parameters.values())
    for key, field in fields.items():
        assert parameters[key].default == field.default
    assert SETS[name].__doc__ == READERS[name].__doc__


def test_a_dealt_twin_has_the_pools_options_and_those_of_dealing() -> None:
    parameters = inspect.signature(SETS["synthetic_cifar10"]).parameters
    assert {"train", "variation", "partition", "alpha", "clients", "split", "seed"} <= set(
        parameters
    )
    assert not {"source", "download", "cache"} & set(parameters)
    assert set(list(inspect.signature(deal).parameters)[1:]) <= set(parameters)


def test_options_are_checked_by_name_and_type() -> None:
    def build(**options: Any) -> Any:
        return registry.build_data(Experiment(data={"name": "celeba", **options}).data, seed=0)

    with pytest.raises(
        InputError, match=r"data\.sise: not an option of celeba; did you mean 'size'"
    ):
        build(sise=64)
    with pytest.raises(InputError, match=r"data\.size = 'big'.* give a whole number"):
        build(size="big")
    with pytest.raises(InputError, match=r"data\.skip_bad = 'no'"):
        build(skip_bad="no")
    with pytest.raises(InputError, match=r"data\.seed follows from the run and cannot be set"):
        build(seed=3)


# --- from files to clients -----------------------------------------------------------------------


def test_clients_of_the_sets_own_are_natural(source: Path) -> None:
    data = opened(source)
    assert isinstance(data, Store) and data.split == "seeded"
    assert data.client_names == ["c0", "c1", "c2"]
    assert data.sizes(np.arange(3), "all").tolist() == [6, 6, 6]
    named = opened(source, partition="natural")
    assert (named.split, named.fingerprint) == (data.split, data.fingerprint)


def test_the_seed_splits_and_the_options_part(source: Path) -> None:
    everyone = np.arange(3)
    rows = [opened(source, seed=seed).block(everyone, "test").x.tobytes() for seed in range(6)]
    assert len(set(rows)) > 1 and opened(source).block(everyone, "test").x.tobytes() == rows[0]
    data = opened(source, test_share=0.33, val_share=0.17)
    sizes = {part: data.sizes(everyone, part).tolist() for part in ("train", "val", "test")}
    assert sizes == {"train": [3, 3, 3], "val": [1, 1, 1], "test": [2, 2, 2]}
    publishers = opened(source, split="leaf").block(np.array([0]), "test")
    assert publishers.x[:, 0].tolist() == [100, 103, 106]


def test_natural_clients_may_be_dealt_anew(source: Path) -> None:
    data = opened(source, partition="iid", clients=6, seed=2)
    assert isinstance(data, Partitioned) and (data.kind, data.clients, data.seed) == ("iid", 6, 2)
    # The publisher's test rows are left out, or dealt in their own right.
    assert data.sizes(np.arange(6), "all").sum() == 9
    official = opened(source, partition="iid", clients=3, split="official")
    assert official.sizes(np.arange(3), "test").sum() == 9


def test_a_pool_is_dealt_by_dirichlet_unless_told_otherwise(source: Path) -> None:
    pool = Lines(natural=False, spread=True)
    data = opened(source, pool, clients=2, alpha=5.0)
    assert isinstance(data, Partitioned)
    assert (data.kind, data.alpha, data.split) == ("dirichlet", 5.0, "seeded")
    classes = opened(source, pool, partition="pathological", clients=4, classes_per_client=1)
    assert (classes.label_counts(np.arange(4), "all") > 0).sum(axis=1).tolist() == [1] * 4
    with pytest.raises(InputError, match='"natural": lines has no clients of its own; use "iid"'):
        opened(source, pool, partition="natural")
    with pytest.raises(InputError, match="partition='dirichlett' is unknown; did you mean"):
        opened(source, pool, partition="dirichlett")


class Windows(Lines):
    """Rows of which each shares inputs with the next."""

    def layout(self, source: Path) -> Layout:
        return replace(super().layout(source), overlap=1)


def test_windows_of_a_text_are_parted_by_time(source: Path) -> None:
    data = opened(source, Windows())
    assert data.split == "temporal"
    parts = [data.block(np.array([2]), part).x[:, 0].tolist() for part in ("train", "test")]
    assert parts == [[2, 5, 8, 102], [108]], "105 overlaps with both"
    assert any("overlap" in told for told in data.report["warnings"])
    assert opened(source, Windows(), split="seeded").split == "seeded"


def test_a_readers_options_reach_it(tmp_path: Path) -> None:
    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    names = [f"{number:06d}.jpg" for number in range(1, 9)]
    for number, name in enumerate(names):
        Image.new("RGB", (178, 218), (30 * number, 0, 0)).save(folder / name)
    (folder.parent / "identity_CelebA.txt").write_text(
        "".join(f"{name} {1 + number // 4}\n" for number, name in enumerate(names))
    )
    (folder.parent / "list_attr_celeba.txt").write_text(
        "8\nSmiling\n" + "".join(f"{name} {1 - 2 * (n % 2)}\n" for n, name in enumerate(names))
    )
    build: Callable[..., Any] = published(CelebA)
    small = build(source=str(folder.parent), size=16, min_images=4)
    assert small.input_shape == (3, 16, 16) and small.num_clients == 2
    assert build(source=str(folder.parent), size=24, min_images=4).input_shape == (3, 24, 24)


# --- stores as sources, and the cache ------------------------------------------------------------


def test_a_store_is_read_as_it_is(source: Path, tmp_path: Path, cache: Path) -> None:
    prepare(Lines(), source, tmp_path / "store")
    data = opened(tmp_path / "store", split="leaf")
    assert data.path == tmp_path / "store" and data.split == "leaf" and not cache.exists()
    dealt = opened(tmp_path / "store", partition="iid", clients=2)
    assert dealt.pool.path == tmp_path / "store"


def test_a_store_of_another_set_is_refused(source: Path, tmp_path: Path) -> None:
    prepare(Lines(), source, tmp_path / "store")
    with pytest.raises(InputError) as caught:
        opened(tmp_path / "store", Cifar10())
    told = str(caught.value)
    assert f"data.source = {str(tmp_path / 'store')!r} is a store of lines, not of cifar10" in told
    assert 'set data.name = "lines" or give another store' in told


def test_files_are_parsed_once_for_all_ways_to_deal_them(source: Path, cache: Path) -> None:
    first = opened(source)
    assert sorted(name for name, _ in parsed(source)) == ["a.txt", "b_test.txt"]
    again = [opened(source, seed=4), opened(source, test_share=0.5)]
    dealt = opened(source, partition="iid", clients=2)
    assert len(parsed(source)) == 2, "a seed, a share or a partition parses nothing"
    assert {data.path for data in again} == {first.path} == {dealt.pool.path}
    assert [path.name for path in cache.iterdir()] == [first.path.name]
    other = opened(source, Lines(spread=True))
    assert len(parsed(source)) == 4 and other.path != first.path, "an option of the reader does"
    (source / "a.txt").write_text("c0 1 7\nc0 2 8")
    assert opened(source).path != first.path and len(parsed(source)) == 6


def test_the_cache_may_lie_elsewhere(source: Path, tmp_path: Path, cache: Path) -> None:
    data = opened(source, cache=str(tmp_path / "mine"))
    assert data.path.parent == tmp_path / "mine" and not cache.exists()
    assert cache_folder("~/x") == Path.home() / "x" and cache_folder() == cache


@pytest.mark.parametrize("damaged", ["manifest.json", "rows.arrow", "offsets.npy"])
def test_a_damaged_cache_is_made_again(source: Path, damaged: str) -> None:
    path = opened(source).path
    os.truncate(path / damaged, 10)
    data = opened(source)
    assert data.path == path and len(parsed(source)) == 4
    assert data.block(np.array([1]), "all").x[:, 0].tolist() == [1, 4, 7, 101, 104, 107]
    (path / damaged).unlink()
    assert opened(source).num_clients == 3


def test_bad_rows_are_refused_or_left_out_and_told(source: Path, cache: Path) -> None:
    with (source / "a.txt").open("a") as file:
        file.write("\nc0 9 1")
    with pytest.raises(InputError, match=r"a\.txt, line 10: label '9'"):
        opened(source)
    assert list(cache.iterdir()) == []
    told = opened(source, skip_bad=True).report["warnings"]
    assert told == ["left out when prepared: 1 x unknown label"]
    dealt = opened(source, skip_bad=True, partition="iid", clients=2).report["warnings"]
    assert dealt[0] == told[0]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", 'data.source is missing: cifar10 needs .* data.name = "synthetic_cifar10"'),
        ("/nowhere/at/all", "data.source = '/nowhere/at/all' does not exist"),
    ],
)
def test_sources_that_are_not_there(source: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        find_source(Cifar10(), source)


def test_without_a_network_a_download_says_what_to_fetch_by_hand(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = [Remote("cifar-10-python.tar.gz", ("http://subfleet.invalid/cifar.tar.gz",), "0" * 32)]
    monkeypatch.setattr(download, "remotes", lambda name: gone)
    with pytest.raises(InputError) as caught:
        open_set(Cifar10(), download=True)
    told = str(caught.value)
    assert "http://subfleet.invalid/cifar.tar.gz cannot be reached" in told
    assert "Where there is no network, fetch " in told
    assert f"by hand into {cache / 'downloads' / 'cifar10'}" in told
    with pytest.raises(InputError, match=r"data\.download: femnist has no downloader; LEAF's"):
        open_set(READERS["femnist"](), download=True)
    # A source that is given is read, and nothing is fetched.
    with pytest.raises(InputError, match="does not exist"):
        open_set(Cifar10(), "/nowhere/at/all", download=True)


# --- what reaches a run --------------------------------------------------------------------------

RUN = {
    "model.name": "small_cnn",
    "model.channels": [2, 4],
    "model.hidden": 8,
    "fleet.tiers": [{"name": "all", "share": 1.0, "width": 1.0}],
    "run.rounds": 1,
    "run.cohort": 2,
    "run.eval_clients": 2,
}


def test_a_run_hears_that_its_files_are_cut(real_data: Path, tmp_path: Path) -> None:
    files = {"source": str(real_data / "cifar10" / "cifar-10-batches-py"), "clients": 40}
    experiment = Experiment(data={"name": "cifar10", **files}).with_values(RUN)
    watcher = Heard()
    run = launch(experiment, out=tmp_path / "run", local=True, observers=[watcher])
    told = "\n".join(watcher.warnings)
    assert "lacks data_batch_5; the rest is read, which is not the whole data set" in told
    assert "its MD5 sum is" in told and "cut or changed" in told
    assert "1017 rows are left out: the publisher's test rows" in told
    noted = json.loads((run.path / "environment.json").read_text())["data"]
    again = identity(SETS["cifar10"](**files))
    assert noted == again and noted["clients"] == 40


class Heard:
    """Keeps the warnings with which a run starts."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def on_start(self, info: dict[str, Any]) -> None:
        self.warnings = list(info["warnings"])

    def on_round(self, record: dict[str, Any], coverage: dict[str, np.ndarray]) -> None:
        pass

    def on_end(self, summary: dict[str, Any]) -> None:
        pass


def test_word_vectors_go_through_the_store_to_the_network(real_data: Path) -> None:
    glove = real_data / "glove" / "glove.6B.300d.sample.txt.gz"
    table = {"source": str(real_data / "sent140" / "raw_data"), "glove": str(glove)}
    experiment = Experiment(data={"name": "sent140", **table}, model={"name": "sent_lstm"})
    data = registry.build_data(experiment.data, seed=0)
    assert (data.path / "embedding.npy").exists()
    assert data.vocabulary == 102 and data.embedding.shape == (102, 300)
    assert not data.embedding[:2].any() and data.embedding[2:].any(axis=1).all()
    net = registry.build_model(experiment.model, **registry.model_facts(data))
    assert not any("embedding" in name for name in net.parameters), "frozen, not sent"
    x = torch.from_numpy(data.block(np.array([0]), "all").x.astype(np.int64))
    assert net.module()(x).shape == (len(x), 2)
    dealt = registry.build_data(
        experiment.with_values({"data.partition": "iid", "data.clients": 10}).data, seed=0
    )
    assert np.array_equal(dealt.embedding, data.embedding) and dealt.vocabulary == 102


def test_without_word_vectors_there_are_none(source: Path) -> None:
    facts = registry.model_facts(opened(source))
    assert facts["embedding"] is None and facts["vocabulary"] == 0
