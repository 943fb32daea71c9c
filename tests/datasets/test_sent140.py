"""Sentiment140: the real samples, tokens and ids, pieces of a CSV, rows that cannot be used."""

import json
import zlib

import numpy as np
import pytest

from subfleet.core.errors import InputError
from subfleet.datasets import sent140
from subfleet.datasets.reader import Faults
from subfleet.datasets.sent140 import Sent140, tokens_of

TRAINING = "training.1600000.processed.noemoticon.csv"
MANUAL = "testdata.manual.2009.06.14.csv"


def read(reader, source, faults=None):
    faults = faults or Faults()
    return [client for shard in reader.shards(source) for client in reader.read(shard, faults)]


def _id(token, vocabulary=10_000):
    return 2 + zlib.crc32(token.encode()) % (vocabulary - 2)


def _csv(folder, *lines, name="training.csv"):
    text = "\n".join(lines) + "\n"
    (folder / name).write_bytes(text.encode("latin-1"))


def _row(label, user, text):
    return f'"{label}","1","Mon Apr 06","NO_QUERY","{user}","{text}"'


def test_the_real_json(real_data):
    faults = Faults()
    clients = read(Sent140(), real_data / "sent140", faults)
    y = np.concatenate([client.y for client in clients])
    assert len({client.name for client in clients}) == len(clients) == 2875
    assert (len(y), y.sum(), len(y) - y.sum()) == (16_025, 9_717, 6_308)
    sizes = np.array([len(client.y) for client in clients])
    assert (sizes.min(), sizes.max(), round(sizes.mean(), 2)) == (3, 55, 5.57)
    assert all(client.from_test.all() for client in clients) and not faults.counts


def test_the_real_csv(real_data):
    source = real_data / "sent140" / "raw_data"
    clients = read(Sent140(), source / TRAINING)
    sizes = np.array([len(client.y) for client in clients])
    assert len({client.name for client in clients}) == 14_545
    assert (sizes.sum(), sum(client.y.sum() for client in clients)) == (16_000, 8_000)
    assert (sizes >= 3).sum() == 221 and not any(client.from_test.any() for client in clients)
    faults = Faults()
    both = read(Sent140(), source, faults)
    test = sum(int(client.from_test.sum()) for client in both)
    assert test == 177 + 182 and faults.counts == {"neutral": 139}
    assert Sent140().layout(source).spread and not Sent140().layout(source.parent).spread


def test_the_real_csv_in_pieces_has_the_same_rows(real_data, monkeypatch):
    file = real_data / "sent140" / "raw_data" / TRAINING
    whole = read(Sent140(), file)
    monkeypatch.setattr(sent140, "_SHARD_BYTES", 100_003)
    assert len(Sent140().shards(file)) > 15
    pieces: dict[str, list] = {}
    for client in read(Sent140(), file):
        pieces.setdefault(client.name, []).append(client.x)
    for client in whole:
        np.testing.assert_array_equal(np.concatenate(pieces[client.name]), client.x)


def test_the_real_tweets_with_real_vectors(real_data):
    glove = real_data / "glove" / "glove.6B.300d.sample.txt.gz"
    reader = Sent140(glove=str(glove))
    source = real_data / "sent140" / "raw_data" / TRAINING
    assert reader.layout(source).vocabulary == 102
    x = np.concatenate([client.x for client in read(reader, source)])
    assert x.min() == 0 and x.max() == 100 and x.dtype == np.int16
    known = (x > 1).sum() / (x > 0).sum()
    assert 0.3 < known < 0.5  # by the 100 most frequent tokens


def test_tokens_are_leafs():
    text = "@Bob's  I'm SO happy... really?! \u00e9t\u00e9;1"
    assert tokens_of(text) == [
        *["bob's", "i'm", "so", "happy", ".", ".", ".", "really", "?", "!", "\u00e9t\u00e9", ";"],
        "1",
    ]


def test_rows_are_cut_and_padded(tmp_path):
    rows = (_row(0, "u", "A b, a"), _row(4, "v", ":-)"), _row(4, "u", "one two three four five"))
    _csv(tmp_path, *rows)
    u, v = read(Sent140(seq_len=4), tmp_path)
    assert u.x.tolist() == [
        [_id("a"), _id("b"), _id(","), _id("a")],
        [_id("one"), _id("two"), _id("three"), _id("four")],
    ]
    assert (u.y.tolist(), v.y.tolist(), v.x.tolist()) == ([0, 1], [1], [[1, 0, 0, 0]])
    assert (u.x.dtype, u.y.dtype, u.from_test.tolist()) == (np.int16, np.int64, [False, False])


def test_ids_stay_below_the_vocabulary(tmp_path):
    _csv(tmp_path, _row(0, "u", "one two three four five six seven"))
    small = Sent140(vocabulary=4)
    assert set(read(small, tmp_path)[0].x.reshape(-1).tolist()) <= {0, 2, 3}
    large = Sent140(vocabulary=2**15 + 1)
    assert read(large, tmp_path)[0].x.dtype == large.layout(tmp_path).dtype == "int32"
    assert Sent140(vocabulary=2**15).layout(tmp_path).dtype == "int16"


def test_glove_gives_ids_by_line(tmp_path):
    (tmp_path / "v.txt").write_text("the 0.1 0.2\n. 0.1 0.2\ncat 0.1 0.2\nthe 0.3 0.4\n")
    _csv(tmp_path, _row(0, "u", "The cat sat."))
    reader = Sent140(seq_len=6, glove=str(tmp_path / "v.txt"))
    assert read(reader, tmp_path)[0].x.tolist() == [[2, 4, 1, 3, 0, 0]]
    assert reader.layout(tmp_path).vocabulary == 6
    with pytest.raises(InputError, match=r"nowhere\.txt cannot be read"):
        Sent140(glove="nowhere.txt").layout(tmp_path)


def test_latin_1_and_its_odd_line_ends_stay_in_the_text(tmp_path):
    _csv(tmp_path, _row(0, "u", "caf\u00e9\u0085 \u00a0 nn") + "\r", _row(4, "u", "a\x0bb"))
    (client,) = read(Sent140(seq_len=3), tmp_path)
    assert client.x.tolist() == [[_id("caf\u00e9"), _id("nn"), 0], [_id("a"), _id("b"), 0]]


def test_quotes(tmp_path):
    _csv(tmp_path, _row(0, "u", 'said ""hi"", ok'), _row(0, "u", 'a "b" c'), "0,1,d,q,u,it's a b")
    (client,) = read(Sent140(seq_len=5), tmp_path)
    assert client.x.tolist() == [
        [_id("said"), _id("hi"), _id(","), _id("ok"), 0],
        [_id("a"), _id("b"), _id("c"), 0, 0],
        [_id("it's"), _id("a"), _id("b"), 0, 0],
    ]


def test_files_named_test_are_the_test_part(tmp_path):
    (tmp_path / "raw_data").mkdir()
    _csv(tmp_path / "raw_data", _row(0, "u", "a"), name="training.csv")
    _csv(tmp_path / "raw_data", _row(4, "u", "b"), _row(2, "u", "c"), name="testdata.csv")
    faults = Faults()
    clients = read(Sent140(), tmp_path, faults)
    assert [(c.name, c.from_test.tolist()) for c in clients] == [("u", [True]), ("u", [False])]
    assert faults.counts == {"neutral": 1}


BAD = {
    "five columns": ("0,1,d,q,u", "wrong columns", "line 3 has 5 columns, not 6"),
    "seven columns": ("0,1,d,q,u,a,b", "wrong columns", "line 3 has 7 columns"),
    "blank": ("", "wrong columns", "line 3 has no whole columns"),
    "cut in a quote": ('"0","1","d","q","u","half a tw', "wrong columns", "line 3 has no whole"),
    "polarity 7": (_row(7, "u", "a"), "unknown label", "line 3 has polarity '7', not 0, 2 or 4"),
    "polarity 4.0": (_row("4.0", "u", "a"), "unknown label", r"line 3 has polarity '4\.0'"),
    "no user": (_row(0, "", "a"), "empty user", "line 3 has no user"),
}


@pytest.mark.parametrize("piece", [1 << 24, 50])
@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_faults_with_their_line(tmp_path, case, piece, monkeypatch):
    monkeypatch.setattr(sent140, "_SHARD_BYTES", piece)
    line, kind, message = BAD[case]
    good = _row(4, "u", "some words")
    _csv(tmp_path, good, good, line, good)
    with pytest.raises(InputError, match=rf"training\.csv, {message}"):
        read(Sent140(), tmp_path)
    faults = Faults(skip=True)
    clients = read(Sent140(), tmp_path, faults)
    assert sum(len(client.y) for client in clients) == 3 and faults.counts == {kind: 1}


def _json(folder, x, y):
    (folder / "all.json").write_text(
        json.dumps({"users": ["u"], "user_data": {"u": dict(x=x, y=y)}})
    )


def test_leafs_json(tmp_path):
    row = ["1", "Mon", "NO_QUERY", "u", "Well done!", "training"]
    _json(tmp_path, [row, row], [1, 0])
    (client,) = read(Sent140(seq_len=4), tmp_path)
    assert client.x.tolist() == [[_id("well"), _id("done"), _id("!"), 0]] * 2
    assert (client.name, client.y.tolist()) == ("u", [1, 0])


BAD_JSON = {
    "short row": (["1", "Mon", "q", "u"], 1, "wrong columns", "sample 0 has x"),
    "a text": ("Well", 1, "wrong columns", "sample 0 has x 'Well', not a list"),
    "a number": (["1", "Mon", "q", "u", 5, "training"], 1, "wrong columns", "sample 0 has x"),
    "label 4": (["1", "Mon", "q", "u", "t", "training"], 4, "unknown label", "label 4, not 0 or 1"),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_rows_are_faults(tmp_path, case):
    x, y, kind, message = BAD_JSON[case]
    _json(tmp_path, [x, ["1", "Mon", "q", "u", "fine", "training"]], [y, 1])
    with pytest.raises(InputError, match=f"user 'u'.*{message}"):
        read(Sent140(), tmp_path)
    faults = Faults(skip=True)
    (client,) = read(Sent140(), tmp_path, faults)
    assert client.x[0, 0] == _id("fine") and faults.counts == {kind: 1}


def test_empty_users_wrong_folders_and_options_are_input_errors(tmp_path):
    with pytest.raises(InputError, match=r"has no \.csv"):
        Sent140().shards(tmp_path)
    _json(tmp_path, [], [])
    with pytest.raises(InputError, match="user 'u' has no samples"):
        read(Sent140(), tmp_path)
    with pytest.raises(InputError, match="vocabulary=2"):
        Sent140(vocabulary=2)
    with pytest.raises(InputError, match="seq_len=0"):
        Sent140(seq_len=0)
