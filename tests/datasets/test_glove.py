"""GloVe vectors: the real sample, tokens with spaces, archives, damaged lines."""

import gzip
import zipfile

import numpy as np
import pytest

from subfleet.core.errors import InputError
from subfleet.datasets.glove import embedding, read_glove, read_tokens

TEXT = "the 0.5 -1.25 2e-3\n. . . 1.0 2.0 3.0\n0.25 1 2 3\nna\u00efve\u0085 4.0 5.0 6.0\n"
VECTORS = [[0.5, -1.25, 2e-3], [1, 2, 3], [1, 2, 3], [4, 5, 6]]
TOKENS = ["the", ". . .", "0.25", "na\u00efve\u0085"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_text(TEXT, encoding="utf-8", newline="")
    return path


def test_the_real_sample(real_data):
    path = real_data / "glove" / "glove.6B.300d.sample.txt.gz"
    tokens, vectors = read_glove(path)
    assert vectors.shape == (100, 300) and vectors.dtype == np.float32
    assert tokens[:2] == ["the", ","] and tokens[-1] == "u.s." and "'s" in tokens
    assert vectors[0, 0] == np.float32(0.04656) and read_tokens(path) == tokens
    table = embedding(tokens, vectors)
    assert table.shape == (102, 300) and not table[:2].any()
    np.testing.assert_array_equal(table[2:], vectors)


def test_tokens_may_hold_spaces_and_look_like_numbers(file):
    tokens, vectors = read_glove(file)
    assert tokens == TOKENS == read_tokens(file)
    np.testing.assert_array_equal(vectors, np.array(VECTORS, np.float32))


def test_more_lines_than_a_batch(tmp_path):
    lines = [f"w{number} {number}.5 1.0\n" for number in range(2500)]
    (tmp_path / "v.txt").write_text("".join(lines))
    tokens, vectors = read_glove(tmp_path / "v.txt")
    assert tokens[2400] == "w2400" and vectors[2400].tolist() == [2400.5, 1.0]
    (tmp_path / "v.txt").write_text("".join([*lines[:2400], "w 1.0\n", *lines[2400:]]))
    with pytest.raises(InputError, match="line 2401 has 2 columns, not a token and 2 numbers"):
        read_glove(tmp_path / "v.txt")


def test_archives(tmp_path):
    (tmp_path / "v.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    assert read_glove(tmp_path / "v.txt.gz")[0] == TOKENS
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        archive.writestr("vectors.txt", TEXT)
    assert read_glove(tmp_path / "one.zip")[0] == TOKENS
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("vectors.50d.txt", "the 1.0 2.0\n")
        archive.writestr("vectors.txt", TEXT)
    assert read_glove(tmp_path / "two.zip" / "vectors.txt")[0] == TOKENS
    with pytest.raises(InputError, match=r"two\.zip holds .*; name one of its files"):
        read_glove(tmp_path / "two.zip")


BAD = {
    "empty": ("", "is empty"),
    "header": ("400000 300\n" + TEXT, "line 1 has 2 columns.* word2vec"),
    "cut": (TEXT[:-8], r"line 4 has 3 columns, not a token and 3 numbers .*cut short"),
    "one more": ("the 0.5 1.5 2.5\na 0.5 1.5 2.5 3.5\n", "line 2 has 5 columns"),
    "no token": ("the 0.5 1.5\n 0.5 1.5\n", "line 2 has 3 columns"),
    "a word": ("the 0.5 1.5\na 0.5 x1\n", "line 2, column 3 is 'x1', not a finite number"),
    "two spaces": ("the 0.5 1.5 2.5\na 0.5  1.5\n", "line 2, column 3 is ''"),
    "nan": ("the 0.5 nan\n", "line 1, column 3 is 'nan'"),
    "too large": ("the 0.5 1e999\n", "line 1, column 3 is '1e999'"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore:overflow")
def test_damaged_files_are_input_errors(tmp_path, case):
    text, message = BAD[case]
    (tmp_path / "v.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        read_glove(tmp_path / "v.txt")


def test_damaged_archives_are_input_errors(tmp_path):
    packed = gzip.compress(np.random.default_rng(0).bytes(4000).hex().encode())
    (tmp_path / "v.txt.gz").write_bytes(packed[:-900])
    with pytest.raises(InputError, match=r"cannot be decoded .* cut short"):
        read_glove(tmp_path / "v.txt.gz")
    (tmp_path / "v.zip").write_bytes(b"no archive")
    with pytest.raises(InputError, match="cannot be decoded"):
        read_glove(tmp_path / "v.zip")
    (tmp_path / "v.txt").write_bytes(b"the \xff 1.0 2.0\n")
    with pytest.raises(InputError, match="line 1 is not UTF-8"):
        read_glove(tmp_path / "v.txt")
    with pytest.raises(InputError, match="cannot be read"):
        read_glove(tmp_path / "nowhere.txt")


def test_an_embedding_needs_a_vector_for_each_token():
    with pytest.raises(InputError, match="2 tokens, but 1 vectors"):
        embedding(["a", "b"], np.ones((1, 3), np.float32))
