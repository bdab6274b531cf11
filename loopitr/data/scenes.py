"""The built-in data: scenes of two coloured shapes and their relation, in groups of near misses.

Each group of `GROUP_SIZE` consecutive images is a base scene; the base with one attribute of one object changed; with
its two objects exchanged; and with one attribute exchanged between them. The last two have captions made of the same
words as the base's, so a bag of words cannot tell them apart. Splits share no scene, whatever the seed.
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
AXES = ("left of", "above")  # These are the relations of a scene in canonical form.
VALUES = (SIZES, COLOURS, SHAPES)
SPLITS = ("train", "val", "test")
GROUP_SIZE = 4
KEPT_BYTES = 2**27  # So much memory holds rendered images, since every epoch shows the same ones.
HELD_OUT_GROUPS = 220  # Val and test have so many each; train has the rest, over 1000.

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
    """`first` is `relation` `second`, e.g. left of it."""

    first: SceneObject
    relation: str
    second: SceneObject

    def canonical(self) -> Scene:
        """The same scene described with "left of" or "above"."""
        return self if self.relation in AXES else Scene(self.second, INVERSE[self.relation], self.first)


def relevance(a: Scene, b: Scene) -> float:
    """Fraction of the seven facts (size, colour, shape of two objects; relation) that two scenes share, under the
    better pairing of their objects. In [0, 1], symmetric, and 1 exactly for the same scene, however it is described."""
    straight = _matches(a.first, b.first) + _matches(a.second, b.second) + (a.relation == b.relation)
    crossed = _matches(a.first, b.second) + _matches(a.second, b.first) + (a.relation == INVERSE[b.relation])
    return max(straight, crossed) / 7.0


def _matches(a: SceneObject, b: SceneObject) -> int:
    return (a.size == b.size) + (a.colour == b.colour) + (a.shape == b.shape)


def scene_captions(scene: Scene) -> tuple[str, ...]:
    """Four paraphrases, each naming every attribute of both objects and the relation."""
    scene = scene.canonical()
    first, second = scene.first, scene.second
    # Half of the scenes are described from the other end, or the first-named object would always be the left one. The
    # choice depends on the words alone, so scenes made of the same words start alike and differ only in order.
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
    """Every word that a caption may use, sorted."""
    words = {word for values in VALUES for word in values}
    for template in itertools.chain.from_iterable(TEMPLATES.values()):
        words.update(re.sub(r"\{.\}", "", template).split())
    return sorted(words)


# A scene as a number: ((axis * 60) + first object) * 60 + second object, an object as the triple of value indices.
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
    """Disjoint near-miss groups over all scenes, dealt to the splits: fixed, so that no seed can leak a scene."""
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
        # Where one attribute differs, exchanging it would be exchanging the objects.
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
    away = []
    for position, values in enumerate(VALUES):
        for value in range(len(values)):
            away.append((_with(first, position, value), second))
            away.append((first, _with(second, position, value)))
    return [_code(axis, a, b) for a, b in away if a != b and (a, b) != (first, second)]


class SceneRecords(LazyRecords):
    """`size` scenes of a split, rendered on first access from (seed, split, index) alone.

    Train has over 4000 different scenes; a larger `size` repeats them in new renderings under the same identity, since
    their captions fit either image. The held-out splits never repeat and are limited in size.
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
        if image_size < 16:
            raise ValueError(f"image_size of scenes must be at least 16, got {image_size}")
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
        """The rendered image of record `index`, the same object at every call while `KEPT_BYTES` have room for it."""
        image = self._rendered.get(index)
        if image is None:
            image = self._render(index)
            if (len(self._rendered) + 1) * 4 * self.image_size**2 <= KEPT_BYTES:  # Pillow keeps RGB in four bytes
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
        """The exact content of image `index`, in canonical form."""
        return _scene(self.identity(index))

    def relevance(self, positions: Sequence[int]) -> Tensor:
        """The function `relevance` between all of the scenes at `positions` (n): `[n, n]` float32."""
        import torch  # here, so that options can be read without torch

        codes = [_decode(self.identity(position)) for position in positions]
        facts = torch.tensor([[axis, *first, *second] for axis, first, second in codes]).view(-1, 7)  # [n, 7]
        crossed = facts[:, [0, 4, 5, 6, 1, 2, 3]]  # each scene's objects exchanged
        counts = torch.zeros(2, len(facts), len(facts))  # of shared facts, straight and crossed
        for fact in range(7):
            counts[0] += facts[:, None, fact] == facts[None, :, fact]
        for fact in range(1, 7):  # a canonical relation is never the inverse of another: no relation is shared
            counts[1] += facts[:, None, fact] == crossed[None, :, fact]
        return counts.amax(0) / 7

    def paraphrases(self, index: int) -> tuple[str, ...]:
        return scene_captions(self.scene(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return self.paraphrases(index)

    def caption_count(self, index: int) -> int:
        return len(TEMPLATES["above"])

    def identity(self, index: int) -> int:
        return self._codes[index % len(self._codes)]

    def name(self, index: int) -> str:
        return f"scenes-seed{self.seed}-{self.image_size}px/{self.split}/{index}"
