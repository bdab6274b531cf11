"""What README.md shows of a model in use runs as it stands there."""

import re
from pathlib import Path

from helpers.recipe_process import ROOT
from helpers.tiny_building import save_tiny
from helpers.tiny_gallery import jpeg
from PIL import Image


def test_what_the_readme_shows_runs(tmp_path, monkeypatch):
    save_tiny(tmp_path / "runs" / "scenes")
    for i, name in enumerate(("beach.jpg", "forest.jpg", "photo.jpg")):
        (tmp_path / name).write_bytes(jpeg(i))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "README.md").read_text()
    section = page[page.index("## Use a model") : page.index("## Export")]
    first, second, search = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {}
    exec(first, names)
    assert names["similarity"].shape == (1, 2) and names["scores"].shape == (1,)
    assert names["best"][0].keys() == {"corpus_id", "score"}
    exec(second, names)
    assert names["score"].shape == (1,)
    (tmp_path / "photos").mkdir()
    for i in range(2):
        Image.new("RGB", (900 - 200 * i, 600), (i, 100, 200)).save(tmp_path / "photos" / f"{i}.jpg")
    exec(search, names)
    assert Path(names["hit"].path).name == "0.jpg" and len(names["searcher"]) == 2  # The other one is not wide enough.
