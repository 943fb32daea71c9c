"""The papers' tables: parts of published data sets, and ADDS's rate on them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from subfleet import registry
from subfleet.core.errors import InputError
from subfleet.datasets.federation import split_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def papers(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a module of `benchmarks/papers` by its name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "papers"))
    return importlib.import_module


def leaf_json(folder: Path, users: dict[str, tuple[list, list]]) -> Path:
    data = {user: {"x": x, "y": y} for user, (x, y) in users.items()}
    sizes = [len(y) for _, y in users.values()]
    found = {"users": list(users), "num_samples": sizes, "user_data": data}
    (folder / "data.json").write_text(json.dumps(found))
    return folder


def test_roles_are_thinned_without_sharing_a_character(
    papers: Callable[[str], Any], tmp_path: Path
) -> None:
    from subfleet.datasets.shakespeare import ALPHABET, tokens_of

    draw = np.random.default_rng(0)

    def role(windows: int) -> tuple[list[str], list[str]]:
        text = "".join(draw.choice(list(ALPHABET[24:76]), windows + 80))
        return [text[i : i + 80] for i in range(windows)], list(text[80:])

    users = {"A": role(300), "B": role(129), "C": role(128)}
    source = str(leaf_json(tmp_path, users))
    data = papers("samples").shakespeare(source=source, clients=0, most=50)
    assert data.num_clients == 2, "C has too few for 50 windows and a gap of 79"
    both = np.arange(2)
    assert data.sizes(both, "train").tolist() == [40, 40]
    assert data.sizes(both, "test").tolist() == [10, 10]
    for client, name in enumerate("AB"):
        place = {tokens_of(x).tobytes(): i for i, x in enumerate(users[name][0])}
        train, test = (
            [place[x.tobytes()] for x in data.block(np.array([client]), part).x]
            for part in ("train", "test")
        )
        assert len(set(train)) == 40 and len(set(test)) == 10
        assert min(test) >= max(train) + 80
    with pytest.raises(InputError, match=r"data.clients = 5: 2 clients have 129 rows or more"):
        papers("samples").shakespeare(source=source, clients=5, most=50)


def test_users_with_few_tweets_are_left_out(papers: Callable[[str], Any], tmp_path: Path) -> None:
    def user(tweets: int) -> tuple[list, list]:
        rows = [[str(i), "", "", "u", f"word{i} good", "training"] for i in range(tweets)]
        return rows, [i % 2 for i in range(tweets)]

    source = str(leaf_json(tmp_path, {"a": user(9), "b": user(10), "c": user(20)}))
    data = papers("samples").sent140(source=source, least=10, vocabulary=100)
    assert (data.num_clients, data.vocabulary, data.num_classes) == (2, 100, 2)
    assert data.sizes(np.arange(2), "all").tolist() == [10, 20]
    assert data.sizes(np.arange(2), "test").tolist() == [2, 4]


# --- apart from what is measured -------------------------------------------------------------


def tweets(name: str, number: int = 10) -> tuple[list, list]:
    rows = [[str(i), "", "", name, f"{name}a {name}b {name}{i}", "training"] for i in range(number)]
    return rows, [i % 2 for i in range(number)]


def rows_of(data: Any, clients: np.ndarray, part: str) -> set[bytes]:
    return {x.tobytes() for x in data.block(clients, part).x}


def test_settings_are_tried_on_nothing_that_is_measured(
    papers: Callable[[str], Any], tmp_path: Path
) -> None:
    (tmp_path / "sent140").mkdir()
    users = {name: tweets(name) for name in (f"u{i}" for i in range(20))}
    leaf_json(tmp_path / "sent140", users)
    words = ["--data", str(tmp_path), "--tables", "sent140", "--rows", "adds-slim", "--validate"]
    words += ["--try", "adds-slim:arch_lr=0.5,penalty=0.0", "--try", "fedavg:no=1", "--seeds", "3"]
    adds = papers("adds")
    table = adds.table("sent140", ["adds-slim"], adds.parsed(words))
    plain, tried = table.rows
    assert tried.title == "ADDS (slim), arch_lr=0.5, penalty=0.0"
    assert tried.settings == plain.settings | {"algorithm.arch_lr": 0.5, "algorithm.penalty": 0.0}
    (cell, _) = table.cells([3], tmp_path)
    inner = registry.build_data(cell.experiment.data, seed=3)
    every = np.arange(inner.num_clients)
    seen = rows_of(inner, every, "all")
    train, test = rows_of(inner, every, "train"), rows_of(inner, every, "test")
    assert train and test and not train & test
    # The page's seeds and that of the command: none tests on a row of it, nor holds one out.
    source, clients = cell.experiment.data.source, None
    for seed in (0, 1, 3):
        whole = papers("samples").sent140(source=source, seed=seed, vocabulary=2000)
        ids, held = split_of(whole, seed)
        assert not seen & rows_of(whole, ids, "test")
        assert not seen & rows_of(whole, held, "all")
        clients = set(ids) if clients is None else clients & set(ids)
    assert inner.num_clients == len(clients) < 16


def test_what_is_apart_of_rows_in_order_is_split_in_order(
    papers: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = papers("samples")
    x = np.arange(60, dtype=np.int16)[:, None]
    inner = samples.Sample(x, np.zeros(60), np.arange(0, 61, 10), train=np.arange(60) % 10 < 8)
    inner.ordered = True
    monkeypatch.setattr(samples, "build_data", lambda table, seed, progress: inner)
    made = samples.apart(of="it", seeds=[0], seed=5)
    ids, _ = split_of(inner, 0)
    firsts = 10 * ids[:, None]
    assert (
        made.block(np.arange(5), "train").x.reshape(5, -1).tolist()
        == (firsts + np.arange(6)).tolist()
    )
    assert (
        made.block(np.arange(5), "test").x.reshape(5, -1).tolist()
        == (firsts + np.arange(6, 8)).tolist()
    )
    with pytest.raises(InputError, match="no client of it trains under all of them"):
        samples.apart(of="it", seeds=list(range(40)))


# --- ADDS's rate -----------------------------------------------------------------------------


def test_the_rate_is_fitted_to_every_client_or_to_the_mean(papers: Callable[[str], Any]) -> None:
    rate = papers("adds_rate")
    lambdas, steps = np.array([0.5, 1.0, 1.5]), np.array([3, 3, 12])
    each = rate.rate_of_each(lambdas, steps)
    assert rate.left(each, lambdas, steps).mean() == pytest.approx(0.4)
    mean = rate.rate_of_mean(lambdas, steps)
    assert (1 - 2 * mean * 1.0) ** 6 == pytest.approx(0.4)
    assert rate.left(mean, lambdas, steps).mean() > 0.45, "clients of few steps keep more"
    # 1 - 2 eta lambda never gets negative, even where 0.4 is out of reach.
    assert rate.rate_of_each(np.array([0.5, 0.5, 1.5]), np.ones(3)) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("name", "rate", "words"),
    [
        ("femnist", 0.028, ["3 to 21 local steps", "2 of the 71 clients validate on one row"]),
        ("sent140", 0.14, ["3 to 12 local steps", "152 of the 174 clients", "2,000 hashed"]),
    ],
)
def test_the_page_tells_how_the_rate_fits_real_clients(
    name: str,
    rate: float,
    words: list[str],
    papers: Callable[[str], Any],
    real_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SUBFLEET_CACHE", str(tmp_path))
    adds = papers("adds")
    table = adds.table(name, ["adds-slim"], adds.parsed(["--data", str(real_data)]))
    assert table.rows[0].settings["algorithm.arch_lr"] == rate
    rounds = table.experiment.run.rounds
    for one in [*words, f"ends at {0.98**rounds:.3g} after", "the paper's 200 end at 0.0176"]:
        assert one in table.about
