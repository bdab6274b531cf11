import pytest
from PIL import Image

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0), (0, 200, 200), (200, 0, 200), (90, 90, 90), (9, 9, 9)]


@pytest.fixture
def image_dir(tmp_path):
    """Eight images, 0.png to 7.png, each of one colour."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index, colour in enumerate(COLOURS):
        Image.new("RGB", (20, 16), colour).save(folder / f"{index}.png")
    return folder
