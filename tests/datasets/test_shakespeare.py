"""Shakespeare's roles and windows: LEAF's numbers on the real text, its rules on a small one."""

import gzip
import json
import subprocess
import sys

import numpy as np
import pytest

from subfleet.core.errors import InputError
from subfleet.datasets.reader import Faults
from subfleet.datasets.shakespeare import ALPHABET, Shakespeare, plays_of, roles_of, tokens_of

TEXT = """header, by William Shakespeare
1609

THE SONNETS

by William Shakespeare

  From fairest creatures we desire increase.

1603

ALL'S WELL

by William Shakespeare

Dramatis Personae

  Sir Toby. One  two.
    three
    four
  FOOL. Ha!
  SIR TOBY. Five < six.
                                             Exit
  FOOL. Ho!
    hum
not indented
    lost to nobody? No: to the fool
  PAGE. I am short.

1593

THE COMEDY OF ERRORS

by William Shakespeare

ACT I. SCENE 1.
Enter somebody
DROMIO. Well
said, sir
<gone
not said
DROMIO. Away
LUCE. One
two
three
"""


def read(reader, source, faults=None):
    faults = faults or Faults()
    return {c.name: c for shard in reader.shards(source) for c in reader.read(shard, faults)}


def words(row):
    return "".join((ALPHABET + "*")[token] for token in row)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "shakespeare.txt"
    file.write_text(TEXT)
    return file


MEASURE = """
import json, re, sys, time
from pathlib import Path
from subfleet.datasets.reader import Faults
from subfleet.datasets.shakespeare import Shakespeare
reader, faults, start = Shakespeare(), Faults(), time.perf_counter()
shards = reader.shards(Path(sys.argv[1]))
# All are held, as nothing in the package would.
parts = [list(reader.read(shard, faults)) for shard in shards]
print(json.dumps({
    "sizes": {client.name: len(client.y) for part in parts for client in part},
    "largest": max(sum(c.x.nbytes + c.y.nbytes for c in part) for part in parts),
    "roles": sum(map(len, parts)),
    "faults": faults.counts,
    "seconds": time.perf_counter() - start,
    # Not getrusage's, which begins with what the process that started this one had.
    "peak_kib": int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]),
}))
"""


def test_the_real_text_gives_leafs_numbers_in_time_and_memory(real_data, root):
    command = [sys.executable, "-c", MEASURE, str(real_data / "shakespeare")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    sizes = list(found["sizes"].values())
    assert found["roles"] == len(sizes) == 1129 and sum(sizes) == 4_226_158
    assert (round(np.mean(sizes), 2), round(np.std(sizes), 2)) == (3743.28, 6212.26)
    assert "ALLS_WELL_THAT_ENDS_WELL_BERTRAM" in found["sizes"]
    assert found["faults"] == {"role without a window": 15}
    assert found["seconds"] < 60 and found["peak_kib"] < 2_000_000
    assert found["largest"] < 100e6


def test_the_real_text_has_36_plays(real_data):
    with gzip.open(real_data / "shakespeare" / "shakespeare.txt.gz") as stream:
        assert len(plays_of(stream.read().decode("utf-8-sig"))) == 36


def test_plays_and_roles():
    plays = dict(plays_of(TEXT))
    assert list(plays) == ["ALL'S WELL", "THE COMEDY OF ERRORS"]
    assert plays["ALL'S WELL"] == {
        "SIR TOBY": ["One  two.", "three", "four", "Five < six.", " " * 41 + "Exit"],
        "FOOL": ["Ha!", "Ho!", "hum", "lost to nobody? No: to the fool"],
        "PAGE": ["I am short."],
    }
    # A stage direction ends a speech; an act is no speaker.
    assert plays["THE COMEDY OF ERRORS"] == {
        "DROMIO": ["Well", "said, sir", "Away"],
        "LUCE": ["One", "two", "three"],
    }
    names = list(roles_of(list(plays.items())))
    assert names == [
        "ALL_S_WELL_SIR_TOBY",
        "ALL_S_WELL_FOOL",
        "THE_COMEDY_OF_ERRORS_DROMIO",
        "THE_COMEDY_OF_ERRORS_LUCE",
    ]


def test_windows_slide_over_a_roles_words(text):
    faults = Faults()
    clients = read(Shakespeare(seq_len=20), text, faults)
    toby = clients["ALL_S_WELL_SIR_TOBY"]
    spoken = "One two. three four Five * six. Exit "
    # The window before "<" is left out: no label says what comes next.
    starts = [i for i in range(len(spoken) - 20) if spoken[i + 20] != "*"]
    assert [words(row) for row in toby.x] == [spoken[i : i + 20] for i in starts]
    assert words(toby.y) == "".join(spoken[i + 20] for i in starts)
    assert (toby.x.dtype, toby.y.dtype, toby.from_test.any()) == (np.int8, np.int64, False)
    assert faults.counts == {"label outside the alphabet": 1, "role without a window": 2}
    assert "LUCE" not in " ".join(clients)


def test_layout():
    layout = Shakespeare(seq_len=30).layout(None)
    assert (layout.num_classes, layout.vocabulary, layout.overlap) == (80, 81, 29)
    assert (layout.input_shape, layout.dtype, layout.natural) == ((30,), "int8", True)


def test_pieces_of_a_text_share_its_roles(text, monkeypatch):
    whole = read(Shakespeare(seq_len=5), text)
    monkeypatch.setattr("subfleet.datasets.shakespeare._SHARD_BYTES", 3000)
    reader, faults = Shakespeare(seq_len=5), Faults()
    shards = reader.shards(text)
    pieces = [{c.name for c in reader.read(shard, faults)} for shard in shards]
    assert len(shards) == 3 and sum(map(len, pieces)) == 4
    assert set.union(*pieces) == set(whole)


def test_the_text_is_found_in_raw_data_and_packed(tmp_path, text):
    (tmp_path / "raw_data").mkdir()
    (tmp_path / "raw_data" / "raw_data.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    plain = read(Shakespeare(5), text)
    text.unlink()
    packed = read(Shakespeare(5), tmp_path)
    assert list(packed) == list(plain)


def test_tokens():
    assert len(ALPHABET) == 80
    assert tokens_of(ALPHABET).tolist() == list(range(80))
    assert tokens_of("<é\u20ac\U0001f600\ud800{").tolist() == [80] * 6


def test_a_text_that_is_none_is_a_fault_of_one_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("subfleet.datasets.shakespeare._SHARD_BYTES", 3000)
    (tmp_path / "notes.txt").write_text("nothing to be said\n" * 20)
    with pytest.raises(InputError, match=r"notes\.txt has no plays"):
        read(Shakespeare(), tmp_path)
    faults = Faults(skip=True)
    assert read(Shakespeare(), tmp_path, faults) == {}
    assert faults.counts == {"text without plays": 1}


def test_a_cut_text_is_a_fault(tmp_path):
    packed = gzip.compress(TEXT.encode())
    (tmp_path / "a.txt.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match=r"a\.txt\.gz cannot be decoded .* cut short"):
        read(Shakespeare(), tmp_path)
    (tmp_path / "a.txt.gz").unlink()
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe" + TEXT.encode())
    with pytest.raises(InputError, match=r"a\.txt cannot be decoded"):
        read(Shakespeare(), tmp_path)


def _json(folder, x, y, users=("r",)):
    data = {"users": list(users), "user_data": {user: {"x": x, "y": y} for user in users}}
    (folder / "all_data.json").write_text(json.dumps(data))


def test_leafs_json(tmp_path):
    _json(tmp_path, ["to b", "o be"], ["e", "!"], ("r", "s"))
    clients = read(Shakespeare(seq_len=4), tmp_path)
    assert list(clients) == ["r", "s"]
    assert [words(row) for row in clients["r"].x] == ["to b", "o be"]
    assert words(clients["r"].y) == "e!"


BAD = {
    "short": (["to b", "o b"], ["e", "!"], "wrong window", "sample 1 has 3 characters in x, not 4"),
    "no text": ([7, "o be"], ["e", "!"], "wrong window", "sample 0 has no characters in x"),
    "long label": (["to b", "o be"], ["e", "ab"], "unknown label", "sample 1 has label 'ab'"),
    "number": (["to b", "o be"], [3, "!"], "unknown label", "sample 0 has label 3, not a single"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_json_rows_are_faults(tmp_path, case):
    x, y, kind, message = BAD[case]
    _json(tmp_path, x, y)
    with pytest.raises(InputError, match=f"user 'r', {message}"):
        read(Shakespeare(seq_len=4), tmp_path)
    faults = Faults(skip=True)
    clients = read(Shakespeare(seq_len=4), tmp_path, faults)
    assert len(clients["r"].y) == len(clients["r"].x) == 1 and faults.counts == {kind: 1}


def test_empty_roles_and_unknown_letters_in_json(tmp_path):
    _json(tmp_path, [], [])
    with pytest.raises(InputError, match="user 'r' has no samples"):
        read(Shakespeare(), tmp_path)
    _json(tmp_path, ["to b", "o b<"], ["<", "!"])
    faults = Faults()
    assert read(Shakespeare(seq_len=4), tmp_path, faults)["r"].x[0, -1] == 80
    assert faults.counts == {"label outside the alphabet": 1}


def test_wrong_folders_and_options_are_input_errors(tmp_path):
    with pytest.raises(InputError, match=r"has no \.txt"):
        Shakespeare().shards(tmp_path)
    with pytest.raises(InputError, match="seq_len=0"):
        Shakespeare(seq_len=0)
