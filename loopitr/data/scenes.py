"""The built-in data: scenes of two coloured shapes and their relation, in groups of near misses.

Each group of `GROUP_SIZE` consecutive images is a base scene and three variants: with one attribute of one object
changed; with the two objects exchanged; and with one attribute exchanged between them. The captions of the last two
have the same words as the base's, so a bag of words cannot distinguish them. Splits have no scene in common, with any
seed.
"""

from __future__ import annotations

import functools
import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from .records import LazyRecords, Record
from .rendering import render

if TYPE_CHECKING:
    from torch import Tensor

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "black")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
AXES = ("left of", "above")  # the relations of scenes in canonical form
VALUES = (SIZES, COLOURS, SHAPES)
SPLITS = ("train", "val", "test")
GROUP_SIZE = 4
KEPT_BYTES = 2**27  # memory for rendered images, which are the same in every epoch
MOST_SCENES, LARGEST = 1_000_000, 2048
HELD_OUT_GROUPS = 220  # the groups of val and of test; train has the rest, over 1000

TEMPLATES = {
    "left of": (
        "a {a} left of a {b}",
        "a {b} to the right of a {a}",
        "there is a {a} and to its right there is a {b}",
        "the {a} sits to the left of the {b}",
    ),
    "right of": (
        "a {a} right of a {b}",
        "a {b} to the left of a {a}",
        "there is a {a} and to its left there is a {b}",
        "the {a} sits to the right of the {b}",
    ),
    "above": (
        "a {a} above a {b}",
        "a {b} just below a {a}",
        "there is a {a} and under it there is a {b}",
        "the {a} sits higher than the {b}",
    ),
    "below": (
        "a {a} below a {b}",
        "a {b} just above a {a}",
        "there is a {a} and over it there is a {b}",
        "the {a} sits lower than the {b}",
    ),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene, by the words that captions use for it."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """Two objects and their relation: `first` is, for example, "left of" `second`."""

    first: SceneObject
    relation: str
    second: SceneObject

    def canonical(self) -> Scene:
        """The same scene described with "left of" or "above"."""
        return self if self.relation in AXES else Scene(self.second, INVERSE[self.relation], self.first)


def relevance(a: Scene, b: Scene) -> float:
    """The fraction of seven facts (size, colour and shape of two objects; relation) that two scenes have in common.

    Objects are matched in the better of the two ways. The relevance is symmetric, and 1 exactly if both describe the
    same scene.
    """
    straight = _matches(a.first, b.first) + _matches(a.second, b.second) + (a.relation == b.relation)
    crossed = _matches(a.first, b.second) + _matches(a.second, b.first) + (a.relation == INVERSE[b.relation])
    return max(straight, crossed) / 7.0


def _matches(a: SceneObject, b: SceneObject) -> int:
    return (a.size == b.size) + (a.colour == b.colour) + (a.shape == b.shape)


def scene_captions(scene: Scene) -> tuple[str, ...]:
    """Four paraphrases, each of which names every attribute of both objects and the relation."""
    scene = scene.canonical()
    first, second = scene.first, scene.second
    # Half of the scenes are described with the inverse relation, so that the first object is not always the left one.
    # The choice depends only on the words, so captions of scenes with the same words differ only in word order.
    parity = sum(
        values.index(value)
        for item in (first, second)
        for values, value in zip(VALUES, (item.size, item.colour, item.shape))
    )
    if parity % 2:
        first, second = second, first
    relation = INVERSE[scene.relation] if parity % 2 else scene.relation
    return tuple(template.format(a=first, b=second) for template in TEMPLATES[relation])


def scene_vocabulary() -> list[str]:
    """All words of the captions, sorted."""
    words = {word for values in VALUES for word in values}
    for template in itertools.chain.from_iterable(TEMPLATES.values()):
        words.update(re.sub(r"\{.\}", "", template).split())
    return sorted(words)


# A scene is coded as one number, (axis * 60 + first object) * 60 + second object; an object is a triple of indices of
# its values.
_OBJECTS = tuple(itertools.product(*(range(len(values)) for values in VALUES)))
_OBJECT_CODE = {triple: code for code, triple in enumerate(_OBJECTS)}


def _code(axis: int, first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return (axis * len(_OBJECTS) + _OBJECT_CODE[first]) * len(_OBJECTS) + _OBJECT_CODE[second]


def _decode(code: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    rest, second = divmod(code, len(_OBJECTS))
    axis, first = divmod(rest, len(_OBJECTS))
    return axis, _OBJECTS[first], _OBJECTS[second]


def _scene(code: int) -> Scene:
    axis, first, second = _decode(code)
    objects = [SceneObject(*(values[i] for values, i in zip(VALUES, triple))) for triple in (first, second)]
    return Scene(objects[0], AXES[axis], objects[1])


@functools.lru_cache(maxsize=1)
def _groups() -> dict[str, tuple[tuple[int, ...], ...]]:
    """Disjoint groups of near misses for each split, the same for every seed, so that splits never share a scene."""
    rng = random.Random("loopitr scenes")
    codes = [_code(axis, a, b) for axis in range(len(AXES)) for a in _OBJECTS for b in _OBJECTS if a != b]
    rng.shuffle(codes)
    used: set[int] = set()
    triples = []
    for base in codes:
        axis, first, second = _decode(base)
        differing = [i for i in range(3) if first[i] != second[i]]
        exchanged = _code(axis, second, first)
        rng.shuffle(differing)
        # If only one attribute differs, exchanging it would be the same as exchanging the objects.
        bindings = [_code(axis, _with(first, i, second[i]), _with(second, i, first[i])) for i in differing]
        binding = next((code for code in bindings if code not in used), None) if len(bindings) > 1 else None
        if binding is not None and base not in used and exchanged not in used:
            used.update((base, exchanged, binding))
            triples.append((base, exchanged, binding))
    groups = []
    for base, exchanged, binding in triples:
        variants = [code for code in _one_attribute_away(base) if code not in used]
        if variants:
            variant = rng.choice(variants)
            used.add(variant)
            groups.append((base, variant, exchanged, binding))
    rng.shuffle(groups)
    held_out = HELD_OUT_GROUPS
    return {
        "test": tuple(groups[:held_out]),
        "val": tuple(groups[held_out : 2 * held_out]),
        "train": tuple(groups[2 * held_out :]),
    }


def _with(triple: tuple[int, ...], position: int, value: int) -> tuple[int, ...]:
    return (*triple[:position], value, *triple[position + 1 :])


def _one_attribute_away(code: int) -> list[int]:
    axis, first, second = _decode(code)
    variants = []
    for position, values in enumerate(VALUES):
        for value in range(len(values)):
            variants.append((_with(first, position, value), second))
            variants.append((first, _with(second, position, value)))
    return [_code(axis, a, b) for a, b in variants if a != b and (a, b) != (first, second)]


class SceneRecords(LazyRecords):
    """`size` scenes of a split, rendered on first access, as a function of (seed, split, index).

    Train has over 4000 different scenes. A larger `size` repeats them in new renderings of the same identity, since
    their captions fit both images. The held-out splits never repeat a scene and are limited in size.

    Raises:
        ValueError: there is no such split, or `size` or `image_size` is out of range.
    """

    def __init__(self, split: str, size: int, seed: int = 0, image_size: int = 64) -> None:
        if split not in SPLITS:
            raise ValueError(f"scenes have the splits {', '.join(SPLITS)}; got {split!r}")
        groups = list(_groups()[split])
        limit = len(groups) * GROUP_SIZE
        if size < 1 or (split != "train" and size > limit):
            raise ValueError(
                f"size of the scenes split {split!r} must be at least 1"
                f"{'' if split == 'train' else f' and at most {limit}'}; got {size}"
            )
        if size > MOST_SCENES:
            raise ValueError(f"size of the scenes split {split!r} must be at most {MOST_SCENES}, got {size}")
        if not 16 <= image_size <= LARGEST:
            raise ValueError(f"image_size of scenes must be at least 16 and at most {LARGEST}, got {image_size}")
        random.Random(f"{seed}/{split}").shuffle(groups)
        self.split, self.size, self.seed, self.image_size = split, size, seed, image_size
        self._rendered: dict[int, Image.Image] = {}
        self._codes = [code for group in groups for code in group]

    def take(self, count: int) -> SceneRecords:
        """The first `count` records."""
        return SceneRecords(self.split, min(count, self.size), self.seed, self.image_size)

    def __len__(self) -> int:
        return self.size

    def read(self, index: int) -> Record:
        return Record(
            image=self.image(index),
            captions=self.paraphrases(index),
            identity=self.identity(index),
            name=self.name(index),
            split=self.split,
        )

    def image(self, index: int) -> Image.Image:
        """The rendered image of record `index`; up to `KEPT_BYTES` of images are kept in memory."""
        image = self._rendered.get(index)
        if image is None:
            image = self._render(index)
            if (len(self._rendered) + 1) * 4 * self.image_size**2 <= KEPT_BYTES:  # Pillow stores RGB in four bytes.
                self._rendered[index] = image
        return image

    def _render(self, index: int) -> Image.Image:
        rng = random.Random(f"{self.seed}/{self.split}/{index}")
        scene = self.scene(index)
        return render(
            [(o.size, o.colour, o.shape) for o in (scene.first, scene.second)],
            vertical=scene.relation == "above",
            image_size=self.image_size,
            rng=rng,
        )

    def scene(self, index: int) -> Scene:
        """The scene of image `index`, in canonical form."""
        return _scene(self.identity(index))

    def relevance(self, positions: Sequence[int]) -> Tensor:
        """The function `relevance` of all pairs of the n scenes at `positions`: `[n, n]` float32."""
        import torch  # This import is not at the top, so that options can be read without torch.

        codes = [_decode(self.identity(position)) for position in positions]
        facts = torch.tensor([[axis, *first, *second] for axis, first, second in codes]).view(-1, 7)  # [n, 7]
        crossed = facts[:, [0, 4, 5, 6, 1, 2, 3]]  # the objects of each scene exchanged
        counts = torch.zeros(2, len(facts), len(facts))  # common facts, with objects matched straight and crossed
        for fact in range(7):
            counts[0] += facts[:, None, fact] == facts[None, :, fact]
        for fact in range(1, 7):  # Canonical relations are never inverse to each other, so none is shared crossed.
            counts[1] += facts[:, None, fact] == crossed[None, :, fact]
        return counts.amax(0) / 7

    def paraphrases(self, index: int) -> tuple[str, ...]:
        """The captions of image `index`, which are paraphrases of each other."""
        return scene_captions(self.scene(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return self.paraphrases(index)

    def caption_count(self, index: int) -> int:
        return len(TEMPLATES["above"])

    def identity(self, index: int) -> int:
        return self._codes[index % len(self._codes)]

    def name(self, index: int) -> str:
        return f"scenes-seed{self.seed}-{self.image_size}px/{self.split}/{index}"
