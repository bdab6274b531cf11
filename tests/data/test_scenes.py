"""The built-in scenes: determinism, disjoint splits, near misses, exact relevance, pictures that show what is said."""

import itertools
import random
import time
from collections import Counter

import numpy as np
import pytest

from loopitr.data import Scene, SceneObject, SceneRecords, relevance, scene_captions, scene_vocabulary, scenes
from loopitr.data.rendering import RGB
from loopitr.data.scenes import COLOURS, GROUP_SIZE, INVERSE, SHAPES, SIZES


@pytest.fixture(scope="module")
def train():
    return SceneRecords("train", 4000)


@pytest.mark.slow
def test_scenes_are_distinct_and_splits_disjoint_for_any_seed(train):
    scenes = {train.scene(i) for i in range(len(train))}
    assert len(scenes) == 4000
    all_train = {SceneRecords("train", 5000, seed=3).scene(i) for i in range(5000)}
    val, test = (
        {records.scene(i) for i in range(len(records))}
        for records in (SceneRecords("val", 880), SceneRecords("test", 880, seed=1))
    )
    assert len(val) == len(test) == 880
    assert not all_train & val and not all_train & test and not val & test and scenes <= all_train
    captions = {c for s in all_train for c in scene_captions(s)}
    assert not captions & {c for s in val | test for c in scene_captions(s)}


def test_groups_are_near_misses_with_the_same_words(train):
    for start in range(0, 400, GROUP_SIZE):
        base, changed, exchanged, bound = (train.scene(start + i) for i in range(GROUP_SIZE))
        assert relevance(base, changed) == pytest.approx(6 / 7)
        assert exchanged == Scene(base.second, base.relation, base.first)
        words = [[Counter(c.split()) for c in scene_captions(s)] for s in (base, changed, exchanged, bound)]
        assert words[0] == words[2] == words[3] != words[1]
        assert len({scene_captions(s)[0] for s in (base, exchanged, bound)}) == 3


def test_a_caption_fits_one_scene_only(train):
    owners = Counter(c for i in range(len(train)) for c in train.paraphrases(i))
    assert set(owners.values()) == {1} and len(owners) == 4 * 4000


def test_captions_name_every_attribute(train):
    for i in range(200):
        scene = train.scene(i)
        for caption in train[i].captions:
            assert str(scene.first) in caption and str(scene.second) in caption
            assert set(caption.split()) <= set(scene_vocabulary())
    assert scene_vocabulary() == sorted(set(scene_vocabulary()))


def test_both_directions_of_a_relation_are_directions(train):
    directions = Counter(
        word
        for i in range(400)
        for word in train.paraphrases(i)[0].split()
        if word in ("left", "right", "above", "below")
    )
    assert min(directions.values()) > 50 and len(directions) == 4


def test_rendering_is_deterministic_and_seeded(train):
    again, other = SceneRecords("train", 4000), SceneRecords("train", 4000, seed=1)
    for i in (0, 17, 3999):
        assert np.array_equal(np.asarray(train[i].image), np.asarray(again[i].image))
        assert train[i].captions == again[i].captions and train[i].identity == again[i].identity
    assert any(train.scene(i) != other.scene(i) for i in range(8))
    assert train[0].image.size == (64, 64) and SceneRecords("val", 1, image_size=32)[0].image.size == (32, 32)


def test_larger_train_repeats_scenes_under_one_identity():
    records = SceneRecords("train", 8000)
    period = len({records.identity(i) for i in range(8000)})
    assert 4000 <= period < 8000 and records.identity(0) == records.identity(period)
    assert not np.array_equal(np.asarray(records[0].image), np.asarray(records[period].image))


def centroid_and_area(image, colour):
    pixels = np.asarray(image, dtype=int)
    near = np.abs(pixels - np.array(RGB[colour])).max(axis=2) <= 16
    rows, columns = near.nonzero()
    return rows.mean(), columns.mean(), near.sum()


def test_pictures_show_their_scene(train):
    checked = 0
    for i in range(300):
        scene = train.scene(i)
        if scene.first.colour == scene.second.colour:
            continue
        (y1, x1, area1), (y2, x2, area2) = (
            centroid_and_area(train[i].image, o.colour) for o in (scene.first, scene.second)
        )
        along, across = (x2 - x1, y2 - y1) if scene.relation == "left of" else (y2 - y1, x2 - x1)
        assert along > 0.3 * 64 and abs(across) < 0.2 * 64
        if scene.first.shape == scene.second.shape and scene.first.size != scene.second.size:
            assert (area1 > 2 * area2) == (scene.first.size == "large")
        checked += 1
    assert checked > 150


def test_relevance_is_symmetric_graded_and_one_only_for_the_same_scene():
    rng = random.Random(0)

    def scene():
        objects = [SceneObject(rng.choice(SIZES), rng.choice(COLOURS), rng.choice(SHAPES)) for _ in range(2)]
        return Scene(objects[0], rng.choice(list(INVERSE)), objects[1])

    scenes = [scene() for _ in range(60)]
    for a, b in itertools.product(scenes, scenes):
        value = relevance(a, b)
        assert value == relevance(b, a) == relevance(a.canonical(), b) and 0 <= value <= 1
        assert (value == 1) == (a.canonical() == b.canonical())
    red, blue = SceneObject("small", "red", "circle"), SceneObject("large", "blue", "square")
    assert relevance(Scene(red, "left of", blue), Scene(blue, "right of", red)) == 1
    assert relevance(Scene(red, "left of", blue), Scene(blue, "left of", red)) == pytest.approx(6 / 7)
    other = SceneObject("small", "green", "ring")
    assert relevance(Scene(red, "left of", blue), Scene(other, "above", other)) == pytest.approx(1 / 7)


def test_access_is_fast(train):
    best = min(_seconds(lambda: [train[i] for i in range(50)]) for _ in range(3))
    assert best / 50 < 0.002  # 0.2 ms measured; the margin is for busy machines


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize("arguments", [("dev", 10), ("val", 881), ("train", 0), ("train", 5, 0, 8)])
def test_refuses(arguments):
    with pytest.raises(ValueError, match=str(arguments[-1] if arguments[0] != "dev" else "dev")):
        SceneRecords(*arguments)
    with pytest.raises(IndexError):
        SceneRecords("val", 4)[4]


def test_an_image_is_rendered_once_while_there_is_room(monkeypatch):
    rendered = []
    real = scenes.render
    monkeypatch.setattr(scenes, "render", lambda *a, **k: rendered.append(1) or real(*a, **k))
    monkeypatch.setattr(scenes, "KEPT_BYTES", 2 * 4 * 64 * 64)  # There is room for two images.
    records = SceneRecords("train", 3)
    first = [records[index].image.tobytes() for index in range(3)]
    again = [records[index].image.tobytes() for index in range(3)]
    assert first == again and len(rendered) == 4
