"""int8 and binary vectors against the formulas written out, and shortened vectors."""

import numpy as np
import pytest
from helpers.support import tiny_model
from helpers.tiny_gallery import captions, tiny_processor

from loopitr import Retriever
from loopitr.search.quantisation import quantize, shorten

RETRIEVER, TEXTS = Retriever(tiny_model(), tiny_processor()), list(captions(0, 6))
EMBEDS = RETRIEVER.encode_texts(TEXTS)


def test_int8_is_the_step_that_a_value_lies_in():
    got = RETRIEVER.encode_texts(TEXTS, precision="int8")
    assert got.dtype == np.int8 and got.shape == EMBEDS.shape
    for row, vector in zip(got, EMBEDS):
        for dimension, value in enumerate(vector):
            low, high = EMBEDS[:, dimension].min(), EMBEDS[:, dimension].max()
            assert row[dimension] == pytest.approx(255 * (value - low) / (high - low) - 128, abs=1.01)
    assert (got.min(0) == -128).all() and (got.max(0) >= 126).all()


def test_given_ranges_are_used_and_what_lies_outside_gets_the_last_step():
    ranges = np.stack([np.full(16, -0.1), np.full(16, 0.1)])
    got = RETRIEVER.encode_texts(TEXTS[0], precision="int8", ranges=ranges)
    assert got.shape == (16,)
    assert (got[EMBEDS[0] > 0.101] == 127).all() and (got[EMBEDS[0] < -0.101] == -128).all()
    assert np.array_equal(got, RETRIEVER.encode_texts(TEXTS, precision="int8", ranges=ranges)[0])
    assert np.array_equal(quantize(np.zeros((2, 3), np.float32), "int8"), np.full((2, 3), -128))  # no range at all


def test_binary_is_one_bit_per_dimension():
    got = RETRIEVER.encode_texts(TEXTS, precision="binary")
    assert got.dtype == np.int8 and got.shape == (6, 2)
    for row, vector in zip(got, EMBEDS):
        for byte in range(2):
            bits = "".join("1" if value > 0 else "0" for value in vector[8 * byte : 8 * byte + 8])
            assert row[byte] == int(bits, 2) - 128
    assert quantize(np.ones((1, 9), np.float32), "binary").tolist() == [[127, 0]]  # 0b11111111 and 0b10000000


def test_shortened_vectors_are_unit_vectors_of_the_first_dimensions():
    got = RETRIEVER.encode_texts(TEXTS, truncate_dim=5)
    assert got.shape == (6, 5)
    for row, vector in zip(got, EMBEDS):
        assert np.allclose(row, vector[:5] / np.sqrt((vector[:5] ** 2).sum()), atol=1e-6)
    assert np.allclose(RETRIEVER.encode_texts(TEXTS, truncate_dim=16), EMBEDS, atol=1e-6)
    assert np.array_equal(shorten(np.zeros((1, 4), np.float32), 2), np.zeros((1, 2)))
    both = RETRIEVER.encode_texts(TEXTS, truncate_dim=5, precision="int8", convert_to_tensor=True)
    assert np.array_equal(both.numpy(), quantize(got, "int8"))


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (TEXTS, {"precision": "int4"}, "unknown precision 'int4'; known: float32, int8, binary"),
        (TEXTS, {"truncate_dim": 0}, "truncate_dim must be from 1 to the vectors' 16 dimensions, got 0"),
        (TEXTS, {"truncate_dim": 2.5}, "truncate_dim must be a whole number of at least 0, got 2.5"),
        (TEXTS, {"truncate_dim": 17}, "truncate_dim must be from 1 to the vectors' 16 dimensions, got 17"),
        (TEXTS[0], {"precision": "int8"}, "int8 needs ranges for a single vector: .*"),
        (TEXTS[:1], {"precision": "int8"}, "int8 needs ranges for a single vector: .*"),
        (TEXTS, {"precision": "int8", "ranges": np.zeros((2, 3))}, r"ranges must be \[2, 16\], .*, got \[2, 3\]"),
        (TEXTS, {"precision": "int8", "ranges": np.stack([np.ones(16), np.zeros(16)])}, r"ranges must be \[2, 16\].*"),
    ],
)
def test_what_cannot_be_made_is_said_before_the_work(texts, options, message, monkeypatch):
    monkeypatch.setattr(RETRIEVER.model.dual.text, "forward", lambda *_, **__: pytest.fail("the backbone ran"))
    with pytest.raises(ValueError, match=f"^{message}$"):
        RETRIEVER.encode_texts(texts, **options)
