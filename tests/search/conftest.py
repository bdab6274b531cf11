"""A tiny model's index of a few images, written once for each file of tests that asks for it."""

import pytest
from helpers.small_index import write_small_index


@pytest.fixture(scope="module")
def small_index(tmp_path_factory):
    return write_small_index(tmp_path_factory.mktemp("small_index"))
