"""Experiments: what they accept, what they refuse and in which words, and that they round-trip."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from subfleet.config import Experiment
from subfleet.config_text import apply_override, parse_grid, parse_value
from subfleet.core.errors import InputError
from subfleet.platform.sameness import NOT_OF_THE_RESULT, WHEN_TO_STOP

DATA = {"name": "femnist"}
HALVES = [
    {"name": "high", "share": 0.5, "width": 1.0},
    {"name": "low", "share": 0.5, "flops": 3e7, "params": 1_000},
]


def refused(**tables: Any) -> str:
    with pytest.raises(InputError) as caught:
        Experiment(**({"data": DATA} | tables))
    return str(caught.value)


def tier(**keys: Any) -> dict[str, Any]:
    return {"tiers": [{"name": "a", "share": 1.0} | keys]}


# --- what is accepted ---------------------------------------------------------------------------


def test_the_smallest_experiment_is_a_data_set(tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    file.write_text('[data]\nname = "femnist"\n')
    experiment = Experiment.load(file)
    assert experiment == Experiment(data=DATA)
    assert experiment.train.epochs == 1
    assert [t.name for t in experiment.fleet.tiers] == ["all"]


def test_whole_floats_stand_for_large_counts() -> None:
    experiment = Experiment(data=DATA, fleet={"tiers": HALVES})
    assert experiment.fleet.tiers[1].flops == 30_000_000
    assert isinstance(experiment.fleet.tiers[1].flops, int)


def test_steps_take_the_place_of_epochs() -> None:
    train = Experiment(data=DATA, train={"steps": 7}).train
    assert (train.steps, train.epochs) == (7, None)


def test_own_keys_of_data_model_and_algorithm_are_carried() -> None:
    experiment = Experiment(
        data=DATA | {"clients": 5, "slant": 0.2},
        model={"name": "small_cnn", "channels": [4, 8]},
        algorithm={"name": "fedpa", "statistics": "local"},
    )
    assert experiment.data.options == {"clients": 5, "slant": 0.2}
    assert experiment.model.options == {"channels": [4, 8]}
    assert experiment.algorithm.options == {"statistics": "local"}


def test_experiments_are_frozen_and_pickle() -> None:
    experiment = Experiment(data=DATA, fleet={"tiers": HALVES})
    with pytest.raises(ValueError, match="frozen"):
        experiment.train.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    assert pickle.loads(pickle.dumps(experiment)) == experiment


# --- what is refused ----------------------------------------------------------------------------

REFUSALS = [
    ({"date": {}}, "date: unknown table; did you mean 'data'?"),
    ({"train": {"lrr": 0.1}}, "train.lrr: unknown key; did you mean 'lr'?"),
    ({"train": {"rounds": 9}}, "train.rounds: unknown key; did you mean 'run.rounds'?"),
    ({"fleet": tier(withd=1)}, "fleet.tiers[0].withd: unknown key; did you mean 'width'?"),
    ({"data": {}}, "data.name is missing; name a data set"),
    ({"data": 3}, "data = 3: must be a table"),
    ({"train": {"lr": "0.1"}}, "train.lr = '0.1': must be a number; set the clients' learning"),
    ({"train": {"lr": 0}}, "train.lr = 0: must be greater than 0; set the clients' learning rate"),
    ({"train": {"lr": float("nan")}}, "train.lr = nan: must be a finite number"),
    ({"train": {"momentum": 1.0}}, "train.momentum = 1.0: must be less than 1"),
    ({"train": {"weight_decay": -0.1}}, "train.weight_decay = -0.1: must be at least 0"),
    ({"train": {"batch_size": 2.5}}, "train.batch_size = 2.5: must be a whole number"),
    ({"train": {"batch_size": True}}, "train.batch_size = true: must be a whole number"),
    ({"train": {"epochs": 0}}, "train.epochs = 0: must be at least 1"),
    ({"train": {"clip_norm": 0.0}}, "train.clip_norm = 0.0: must be greater than 0"),
    ({"train": {"optimizer": "adam"}}, "train.optimizer = 'adam': must be 'sgd'"),
    ({"train": {"warmup": -1}}, "train.warmup = -1: must be at least 0"),
    ({"train": {"schedule": "poly"}}, "'constant', 'cosine', 'step' or 'exponential'"),
    ({"train": {"schedule": "step"}}, "schedule = 'step' needs milestones; set it"),
    ({"train": {"schedule": "exponential"}}, "schedule = 'exponential' needs decay; set it"),
    ({"train": {"decay": 0.5}}, "schedule = 'constant' has no use for it; set schedule to 'step'"),
    (
        {"train": {"schedule": "step", "milestones": [9, 5], "decay": 0.1}},
        "milestones = [9, 5] do not rise; list each round once, in order",
    ),
    (
        {"train": {"schedule": "step", "milestones": [0], "decay": 0.1}},
        "train.milestones[0] = 0: must be at least 1",
    ),
    ({"train": {"epochs": 1, "steps": 2}}, "epochs = 1 and steps = 2 are both set; remove one"),
    ({"run": {"seed": -1}}, "run.seed = -1: must be at least 0"),
    ({"run": {"rounds": 0}}, "run.rounds = 0: must be at least 1"),
    ({"run": {"cohort": 1.5}}, "run.cohort = 1.5: must be a whole number"),
    ({"run": {"device": "gpu"}}, "run.device = 'gpu': must be 'auto', 'cpu' or 'cuda'"),
    ({"run": {"engine": "jit"}}, "run.engine = 'jit': must be 'auto', 'loop', 'traced' or 'vmap'"),
    ({"run": {"eval_every": -1}}, "run.eval_every = -1: must be at least 0"),
    ({"run": {"keep_checkpoints": 0}}, "run.keep_checkpoints = 0: must be at least 1"),
    ({"run": {"target_accuracy": 74}}, "run.target_accuracy = 74: must be at most 1"),
    ({"run": {"on_nan": "ignore"}}, "run.on_nan = 'ignore': must be 'stop' or 'skip'"),
    ({"data": DATA | {"alpha": 0}}, "data.alpha = 0: must be greater than 0"),
    ({"data": DATA | {"clients": 0}}, "data.clients = 0: must be at least 1"),
    ({"data": {"name": 3}}, "data.name = 3: must be a string"),
    ({"model": {"width": -1}}, "model.width = -1: must be greater than 0"),
    ({"model": {"own": float("inf")}}, "own = inf is not a finite number"),
    ({"fleet": {"tiers": []}}, "tiers is empty; add at least one tier"),
    ({"fleet": {"tiers": 3}}, "fleet.tiers = 3: must be a list"),
    ({"fleet": tier(share=0.9, width=1.0)}, "shares 0.9 sum to 0.9; make them sum to 1"),
    ({"fleet": tier()}, "tier 'a' gives neither of a width and a cost limit"),
    ({"fleet": tier(width=1.0, flops=9)}, "tier 'a' gives both of a width and a cost limit"),
    ({"fleet": tier(width=1.5)}, "fleet.tiers[0].width = 1.5: must be at most 1"),
    ({"fleet": tier(flops="30M")}, "fleet.tiers[0].flops = '30M': must be a whole number"),
    ({"fleet": {"tiers": [HALVES[0], HALVES[0]]}}, "two tiers are named 'high'"),
]


@pytest.mark.parametrize(("tables", "words"), REFUSALS, ids=[words for _, words in REFUSALS])
def test_a_wrong_key_is_named_with_value_bound_and_remedy(tables: dict, words: str) -> None:
    message = refused(**tables)
    assert words in message
    assert "\n" not in message


def test_without_data_there_is_no_experiment() -> None:
    with pytest.raises(InputError, match=r"data is missing; add a table \[data\] with a `name`"):
        Experiment()


def test_several_mistakes_are_listed_together() -> None:
    message = refused(train={"lr": -1, "epochs": 0})
    assert message.startswith("2 problems:\n")
    assert "train.lr" in message
    assert "train.epochs" in message


# --- files and overrides --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'[data\nname = "a"', "not valid TOML"),
        (b"[data]\nname = '\xff'", "not UTF-8 text at byte 15"),
        (b'[data]\nname = "a"\n[train]\nlr = "x"', "train.lr = 'x': must be a number"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        Experiment.load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert words in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.toml: no such file"):
        Experiment.load(tmp_path / "none.toml")
    with pytest.raises(InputError, match="is a folder"):
        Experiment.load(tmp_path)


def test_overrides_are_typed_and_applied_in_order(tmp_path: Path) -> None:
    file = tmp_path / "e.toml"
    file.write_text(Experiment(data=DATA, fleet={"tiers": HALVES}).to_toml())
    overrides = ["train.lr=0.5", "train.lr=0.25", "data.name=mnist", "fleet.tiers.0.width=0.5"]
    experiment = Experiment.load(file, overrides)
    assert experiment.train.lr == 0.25
    assert experiment.data.name == "mnist"
    assert experiment.fleet.tiers[0].width == 0.5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lr=0.1", "not of the form table.key=value"),
        ("train.lr", "not of the form table.key=value"),
        ("train..lr=1", "not of the form table.key=value"),
        ("train.lr=[1", "'[1' is not a TOML value"),
        ("train.lr=", "'' is not a TOML value"),
        ("train.lr=fast", "train.lr = 'fast': must be a number"),
        ("train.lr.x=1", "train.lr is not a table"),
        ("fleet.tiers.1.width=1", "fleet.tiers has 1 entries, numbered from 0"),
        ("train.learning=1", "train.learning: unknown key"),
    ],
)
def test_a_bad_override_is_named(override: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        Experiment(data=DATA).with_overrides([override])
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "blamed"), [("", "--set: train.lr = -1: "), ("lr = -2.0", "{}: train.lr = -1: ")]
)
def test_the_file_is_not_blamed_for_an_override(text: str, blamed: str, tmp_path: Path) -> None:
    file = tmp_path / "experiment.toml"
    file.write_text(f'[data]\nname = "femnist"\n[train]\n{text}\n')
    with pytest.raises(InputError) as caught:
        Experiment.load(file, ["train.lr=-1"])
    assert str(caught.value).startswith(blamed.format(file))


def test_an_override_cannot_smuggle_in_a_second_key() -> None:
    tables: dict[str, Any] = {}
    with pytest.raises(InputError):
        apply_override(tables, "run.seed=1\nrounds=2")
    assert parse_value('"two words"') == "two words"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a.b=1,2", [1, 2]),
        ("a.b=0.5", [0.5]),
        ("a.b=x,y", ["x", "y"]),
        ('a.b="p,q","r"', ["p,q", "r"]),
        ("a.b=[1,2],[3]", [[1, 2], [3]]),
    ],
)
def test_the_axes_of_a_sweep(text: str, values: list) -> None:
    assert parse_grid(text) == ("a.b", values)


def test_an_empty_axis_is_refused() -> None:
    with pytest.raises(InputError, match="cannot read the values"):
        parse_grid("a.b=")


# --- text and fingerprint -------------------------------------------------------------------------

own_values = st.one_of(
    st.booleans(),
    st.integers(-(2**60), 2**60),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.lists(st.integers(-9, 9)),
)


@given(
    lr=st.floats(min_value=1e-12, max_value=1e6),
    seed=st.integers(0, 2**63 - 1),
    clip=st.none() | st.floats(min_value=1e-6, max_value=1e6),
    own=st.lists(own_values, max_size=3),
)
def test_loading_what_was_written_gives_the_same_experiment(
    lr: float, seed: int, clip: float | None, own: list[Any]
) -> None:
    experiment = Experiment(
        data=DATA | {f"own{i}": value for i, value in enumerate(own)},
        train={"lr": lr} | ({} if clip is None else {"clip_norm": clip}),
        run={"seed": seed},
        fleet={"tiers": HALVES},
    )
    again = Experiment.from_toml(experiment.to_toml())
    assert again == experiment
    assert again.fingerprint() == experiment.fingerprint()


CHANGES = {
    "run.hosts": 3,
    "run.checkpoint_every": 7,
    "run.keep_checkpoints": 9,
    "run.max_seconds": 60.0,
    "run.rounds": 7,
    "run.target_accuracy": 0.5,
    "run.seed": 1,
    "run.start_from": "'runs/a'",
    "train.lr": 0.3,
    "data.clients": 4,
    "run.bundle_clients": 3,
    "algorithm.name": "'fedpa'",
}


@pytest.mark.parametrize(("key", "value"), CHANGES.items())
def test_the_fingerprint_changes_with_what_decides_the_result(key: str, value: object) -> None:
    before = Experiment(data=DATA)
    after = before.with_overrides([f"{key}={value}"])
    assert after != before
    same = key in NOT_OF_THE_RESULT
    assert (after.fingerprint() == before.fingerprint()) == same
    same_rounds = same or key in WHEN_TO_STOP
    assert (after.fingerprint(stops=False) == before.fingerprint(stops=False)) == same_rounds


def test_rounds_count_where_every_rate_depends_on_them() -> None:
    step = {"schedule": "step", "milestones": [2, 4], "decay": 0.5}
    for train, same in (({"schedule": "cosine"}, False), (step, True)):
        short, long = (
            Experiment(data=DATA, train=train, run={"rounds": rounds}) for rounds in (7, 8)
        )
        assert (short.fingerprint(stops=False) == long.fingerprint(stops=False)) == same
        assert Experiment.from_toml(short.to_toml()) == short


def test_a_default_spelled_out_changes_nothing() -> None:
    assert Experiment(data=DATA).fingerprint() == (
        Experiment(data=DATA, train={"lr": 0.1, "epochs": 1}, run={"rounds": 100}).fingerprint()
    )


def test_keys_left_out_of_the_fingerprint_exist() -> None:
    experiment = Experiment(data=DATA)
    for dotted in NOT_OF_THE_RESULT | WHEN_TO_STOP:
        table, key = dotted.split(".")
        assert key in type(getattr(experiment, table)).model_fields
