"""Names of folders and files that would break a card's heading, its code, or its metadata."""

import ast
import json
import re

import pytest
from helpers.support import tiny_model
from huggingface_hub import ModelCard

from loopitr.building.card import write_card


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("name", ['a "quoted": name', "two\nlines", "back\\slash", "--- {width} 🐕"])
def test_any_name_of_a_folder_is_a_heading_and_a_path_of_code(tmp_path, model, name):
    folder = tmp_path / name
    folder.mkdir()
    assert write_card(folder, model)
    text = ModelCard.load(folder / "README.md").text
    assert f"# {' '.join(name.split())}\n" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert name in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]


def test_a_file_whose_name_is_no_hub_id_is_named_in_the_text_alone(tmp_path, model):
    data = {"table": "/home/me/secret/our captions: (v2).csv", "images": "x"}
    (tmp_path / "config.yaml").write_text(json.dumps({"data": data}))
    assert write_card(tmp_path, model)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets is None and "- data: our captions: (v2)\n" in card.text
