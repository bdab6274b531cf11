"""The licence in a card's metadata."""

import pytest
import yaml
from huggingface_hub import ModelCardData

from loopitr.building.licences import licence_fields


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("apache-2.0", {"license": "apache-2.0"}),
        (" CC-BY-NC-4.0\n", {"license": "cc-by-nc-4.0"}),
        ("My: licence\n---\n# x", {"license": "other", "license_name": "my-licence-x"}),
        ("no", {"license": "other", "license_name": "no"}),
        ("\u2603 [", {"license": "unknown"}),
        ("", {"license": "unknown"}),
        ("x" * 5000, {"license": "other", "license_name": "x" * 100}),
    ],
)
def test_a_name_that_the_hub_does_not_know_is_another_licence(name, fields):
    assert licence_fields(name) == fields
    assert yaml.safe_load(ModelCardData(**fields).to_yaml()) == fields
