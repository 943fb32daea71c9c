"""The natural twins: Table 1's statistics, reproducible, quick and learnable."""

import pickle
import time

import numpy as np
import pytest
import torch

from subfleet.core.errors import InputError
from subfleet.datasets import Federation
from subfleet.datasets.census import census
from subfleet.datasets.drawn import spread, weibull
from subfleet.datasets.draws import stream_key
from subfleet.datasets.shakespeare import ALPHABET
from subfleet.datasets.synthetic import TABLE_1, SyntheticFemnist
from subfleet.datasets.twin_celeba import SyntheticCelebA
from subfleet.datasets.twin_sent140 import PADDING, SyntheticSent140
from subfleet.datasets.twin_shakespeare import WINDOW, SyntheticShakespeare

TWINS = {
    "celeba": SyntheticCelebA(seed=1, size=24),
    "shakespeare": SyntheticShakespeare(seed=1),
    "sent140": SyntheticSent140(seed=1),
}
each_twin = pytest.mark.parametrize("data", TWINS.values(), ids=TWINS.keys())


@pytest.mark.parametrize(
    ("data", "clients", "mean", "sd", "present", "least", "most"),
    [
        (SyntheticFemnist(**TABLE_1), 1062, 241_756 / 1062, 78, 62, 9, 62),
        (SyntheticCelebA(), 1213, 47_903 / 1213, 11, 2, 1, 2),
        (SyntheticShakespeare(), 528, 625_127 / 528, 1218, 70, 2, 70),
        (SyntheticSent140(), 1330, 57_385 / 1330, 19, 2, 1, 2),
    ],
    ids=["femnist", "celeba", "shakespeare", "sent140"],
)
def test_the_defaults_are_adds_table_1(data, clients, mean, sd, present, least, most):
    facts = census(data)
    assert facts["clients"] == clients
    assert abs(facts["mean"] / mean - 1) < 0.01 and abs(facts["sd"] / sd - 1) < 0.05
    assert (facts["classes_present"], facts["classes_min"], facts["classes_max"]) == (
        present,
        least,
        most,
    )


@pytest.mark.parametrize("seed", range(5))
def test_sizes_follow_mean_and_deviation_for_any_seed(seed):
    data = SyntheticShakespeare(seed=seed)
    sizes = data.sizes(np.arange(528), "all")
    assert abs(sizes.mean() / 1183 - 1) < 0.01 and abs(sizes.std() / 1218 - 1) < 0.05


def test_other_sizes_can_be_asked_for():
    sizes = SyntheticSent140(512, mean_samples=20, sd_samples=0).sizes(np.arange(512), "all")
    assert np.array_equal(sizes, np.full(512, 20))


def test_consecutive_clients_take_evenly_spread_quantiles():
    at = spread(stream_key(3, "sizes"), np.arange(64, 128))
    assert np.array_equal(np.sort((at * 64).astype(int)), np.arange(64))
    assert not np.array_equal(at, np.sort(at))
    assert weibull(at, 10, 10).min() > 0


@each_twin
def test_it_is_a_federation_of_the_said_types(data):
    assert isinstance(data, Federation)
    block = data.block(np.arange(4), "train")
    kinds = {"synthetic_celeba": np.uint8, "synthetic_shakespeare": np.int8}
    assert block.x.dtype == kinds.get(data.name, np.int16) and block.y.dtype == np.int64
    assert block.x.shape[1:] == data.input_shape
    assert block.y.min() >= 0 and block.y.max() < data.num_classes
    assert block.x.min() >= 0 and block.x.max() < getattr(data, "vocabulary", 256)


@each_twin
def test_a_client_is_the_same_alone_among_others_pickled_and_of_more(data):
    among = data.block(np.array([3, 77, 500]), "all")
    again = pickle.loads(pickle.dumps(data))
    assert len(pickle.dumps(data)) < 500 and again.fingerprint == data.fingerprint
    more = type(data)(1_000_000, 1, **data._options)
    for other in (again, more):
        alone = other.block(np.array([77]), "all")
        low, high = among.offsets[1:3]
        assert np.array_equal(alone.x, among.x[low:high])
        assert np.array_equal(alone.y, among.y[low:high])


@each_twin
def test_seeds_and_clients_differ(data):
    other = type(data)(data.num_clients, 2, **data._options)
    assert other.fingerprint != data.fingerprint
    some = np.arange(20)
    assert not np.array_equal(data.sizes(some, "all"), other.sizes(some, "all"))
    first, second = data.block(some, "test"), other.block(some, "test")
    assert not np.array_equal(first.x[:5], second.x[:5])
    assert not np.array_equal(first.x[0], first.x[first.offsets[1]])


@each_twin
@pytest.mark.parametrize("part", ["train", "test", "val", "all"])
def test_sizes_and_counts_agree_with_the_block(data, part):
    ids = np.array([11, 4, 300])
    block = data.block(ids, part)
    assert np.array_equal(np.diff(block.offsets), data.sizes(ids, part))
    assert len(block.x) == len(block.y) == block.offsets[-1]
    assert (len(block.y) == 0) == (part == "val")
    for i, counts in enumerate(data.label_counts(ids, part)):
        labels = block.y[block.offsets[i] : block.offsets[i + 1]]
        assert np.array_equal(np.bincount(labels, minlength=data.num_classes), counts)


@each_twin
def test_all_is_the_train_part_then_the_test_part_of_each_client(data):
    ids = np.array([9, 2])
    every, train, test = (data.block(ids, part) for part in ("all", "train", "test"))
    for i in range(2):
        parts = [b.x[b.offsets[i] : b.offsets[i + 1]] for b in (train, test)]
        mine = every.x[every.offsets[i] : every.offsets[i + 1]]
        assert np.array_equal(np.concatenate(parts), mine)


@pytest.mark.parametrize("data", [TWINS["celeba"], TWINS["sent140"]], ids=["celeba", "sent140"])
def test_shares_of_labels_differ_between_clients_with_the_skew(data):
    def spread_of(skew):
        some = type(data)(300, **(data._options | {"skew": skew}))
        counts = some.label_counts(np.arange(300), "all")
        return (counts[:, 1] / counts.sum(1)).std()

    assert spread_of(0.0) < 0.15 < 0.25 < spread_of(1.0) < spread_of(3.0)


def test_windows_follow_each_other_and_79_lie_between_train_and_test():
    data, who = TWINS["shakespeare"], np.array([7])
    train, test = data.block(who, "train"), data.block(who, "test")
    text = np.concatenate([train.x[0], train.y])
    for i in (1, len(train.y) - 1):
        assert np.array_equal(train.x[i], text[i : i + WINDOW])
    more = SyntheticShakespeare(seed=1, mean_samples=4000, sd_samples=0)
    longer = np.concatenate([(b := more.block(who, "train")).x[0], b.y])
    # The same role's longer text holds both parts, at the distance that LEAF prescribes.
    start = len(train.y) + WINDOW - 1
    assert np.array_equal(test.x[0], longer[start : start + WINDOW])
    assert np.array_equal(text, longer[: len(text)])


def test_roles_speak_in_sentences():
    said = "".join(ALPHABET[letter] for letter in TWINS["shakespeare"].block(np.arange(9), "all").y)
    assert "  " not in said and said.count(".") > 20 and " the " in said.lower()


def test_tweets_are_padded_at_their_end():
    x = TWINS["sent140"].block(np.arange(20), "train").x
    padded = x == PADDING
    assert np.array_equal(padded, np.sort(padded, axis=1)) and not padded[:, :4].any()


def learnt(data, net, clients, epochs, lr):
    """Accuracy on clients never seen, and how often their most frequent class occurs."""
    torch.manual_seed(0)

    def rows(ids):
        block = data.block(ids, "all")
        x = torch.from_numpy(block.x)
        x = x.long() if hasattr(data, "vocabulary") else data.scale.apply(x.float())
        return x, torch.from_numpy(block.y)

    x, y = rows(np.arange(clients))
    optimiser = torch.optim.Adam(net.parameters(), lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(y)).split(50):
            optimiser.zero_grad()
            torch.nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimiser.step()
    fresh, truth = rows(np.arange(480, 520))
    with torch.no_grad():
        guess = net(fresh).argmax(1)
    return (guess == truth).float().mean(), torch.bincount(truth).max() / len(truth)


def test_a_small_network_learns_who_smiles():
    layers = [torch.nn.Conv2d(3, 8, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 3, 2)]
    layers += [torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LazyLinear(2)]
    reached, majority = learnt(TWINS["celeba"], torch.nn.Sequential(*layers), 60, 8, 3e-3)
    assert reached > 0.8 > 0.6 > majority


def test_a_bag_of_words_learns_the_mood():
    class Votes(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.votes = torch.nn.Embedding(10_000, 2, padding_idx=0)
            torch.nn.init.zeros_(self.votes.weight)

        def forward(self, x):
            return self.votes(x).sum(1)

    reached, majority = learnt(TWINS["sent140"], Votes(), 400, 4, 2e-2)
    assert reached > 0.7 > 0.6 > majority


def test_the_last_letters_tell_the_next_one():
    class Last(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(81, 8)
            self.hidden, self.out = torch.nn.Linear(48, 64), torch.nn.Linear(64, 80)

        def forward(self, x):
            return self.out(torch.relu(self.hidden(self.embedding(x[:, -6:]).flatten(1))))

    reached, majority = learnt(TWINS["shakespeare"], Last(), 20, 2, 5e-3)
    assert reached > 0.45 > 0.25 > majority


@each_twin
def test_drawing_is_quick(data):
    data.block(np.arange(2), "train")
    start = time.process_time()
    rows = len(data.block(np.arange(60), "train").y)
    # 30,000 small faces, 35,000 tweets and a million windows where it was measured.
    assert rows / (time.process_time() - start) > 3_000


@each_twin
@pytest.mark.parametrize("wrong", [{"clients": 0}, {"mean_samples": 1}, {"sd_samples": -1}])
def test_options_out_of_bounds_are_input_errors(data, wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"{name}="):
        type(data)(**wrong)
