"""TrainTransform: crops, flips and distortions of training images."""

import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from loopitr.data import TrainTransform

AUGMENT = TrainTransform(32, (0.5,) * 3, (0.5,) * 3, crop_scale=(0.3, 1.0), flip=True, randaugment=True)


def test_train_transform():
    image = Image.new("RGB", (50, 30), (255, 0, 127))
    whole = TrainTransform(16, (0.5,) * 3, (0.25,) * 3, crop_scale=(1.0, 1.0))(image)
    assert whole.shape == (3, 16, 16) and whole.dtype == torch.float32
    assert torch.allclose(whole[:, 8, 8], torch.tensor([2.0, -2.0, -0.0078]), atol=1e-3)
    assert TrainTransform((8, 24), (0.5,) * 3, (0.5,) * 3)(image).shape == (3, 8, 24)
    half = Image.new("RGB", (32, 32))
    half.paste((255, 255, 255), (0, 0, 16, 32))  # The left half is white.
    lit = [TrainTransform(8, (0.0,) * 3, (1.0,) * 3, crop_scale=(1.0, 1.0), flip=flip) for flip in (False, True)]
    assert all(lit[0](half)[0, 4, 0] > 0.9 for _ in range(10))
    assert {bool(lit[1](half)[0, 4, 0] > 0.5) for _ in range(40)} == {True, False}
    torch.manual_seed(0)
    assert all(torch.isfinite(AUGMENT(image)).all() for _ in range(40))
    for arguments in ({"interpolation": "cubic"}, {"crop_scale": (0.0, 1.0)}):
        with pytest.raises(ValueError, match=str(next(iter(arguments)))):
            TrainTransform(16, (0.5,) * 3, (0.5,) * 3, **arguments)


def test_the_whole_of_a_wide_image_is_kept_if_that_is_asked_for():
    image = Image.new("RGB", (90, 30))
    image.paste((255, 255, 255), (0, 0, 9, 30))  # The left tenth is white.
    whole = TrainTransform(30, (0.0,) * 3, (1.0,) * 3, crop_scale=(1.0, 1.0))
    assert whole(image)[0, 15, 0] > 0.9 and whole(image)[0, 15, 4:].max() < 0.1


@pytest.mark.parametrize("low", [0.08, 0.3, 0.5, 0.75, 0.9])
def test_crops_of_an_image_of_the_shortest_side_are_never_enlarged(low):
    transform = TrainTransform((40, 24), (0.5,) * 3, (0.5,) * 3, crop_scale=(low, 1.0))
    crop = next(step for step in transform.steps.transforms if isinstance(step, v2.RandomResizedCrop))
    torch.manual_seed(0)
    least = []
    for longer in (1.0, 1.1, 4 / 3, 1.5, 3.0):
        image = torch.zeros(3, transform.shortest, int(longer * transform.shortest), dtype=torch.uint8)
        chosen = [crop.make_params([image if i % 2 else image.mT]) for i in range(400)]
        least.append(min(min(params["height"], params["width"]) for params in chosen))
    assert 40 <= min(least) <= 46  # The side is not far more than needed.


def test_the_transform_of_bytes_is_that_of_the_image():
    image = Image.fromarray(torch.randint(256, (50, 60, 3), dtype=torch.uint8).numpy())
    values = []
    for form in (image, v2.functional.pil_to_tensor(image)):
        torch.manual_seed(1)
        values.append(AUGMENT(form))
    assert torch.equal(*values)
