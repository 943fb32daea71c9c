"""Data sets by name."""

import pytest

from subfleet.core.errors import InputError
from subfleet.datasets import SETS, open_set


def test_names():
    assert set(SETS) == {"femnist", "synthetic_femnist", "synthetic_vectors"}
    assert open_set("synthetic_femnist", clients=7, seed=3).num_clients == 7


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("femnits", {}, "did you mean 'femnist'"),
        ("synthetic_femnist", {"clients": 5, "skwe": 1}, "'skwe' .* did you mean 'skew'"),
        ("synthetic_femnist", {}, "needs 'clients'"),
        ("femnist", {}, "needs 'source'"),
        ("synthetic_vectors", {"clients": "many"}, "clients='many'"),
    ],
)
def test_wrong_names_and_options_are_input_errors(name, options, message):
    with pytest.raises(InputError, match=message):
        open_set(name, **options)
