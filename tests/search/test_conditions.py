"""SQL conditions as filters of Qdrant, on points of its client's local mode."""

import pytest

from loopitr.search.conditions import check_condition, parse_condition

qdrant_client = pytest.importorskip("qdrant_client", reason="conditions become those of Qdrant (extra `qdrant`)")
ROWS = [
    {"year": 2020, "caption": "a red dog", "stars": 1.5, "public": True, "mtime": "2024-05-01T10:00:00+00:00"},
    {"year": 2021, "caption": "it's a card", "stars": -2.0, "public": False, "mtime": "2024-06-01T10:00:00+00:00"},
    {"year": 2022, "caption": "a dogged dog", "mtime": "2024-07-01T10:00:00+00:00"},
    {"caption": "old", "stars": 3.0, "mtime": "1999-01-01T00:00:00.5+00:00"},
]


@pytest.fixture(scope="module")
def client():
    models = qdrant_client.models
    client = qdrant_client.QdrantClient(":memory:")
    client.create_collection("x", vectors_config=models.VectorParams(size=2, distance=models.Distance.DOT))
    client.upsert("x", [models.PointStruct(id=i, vector=[1.0, 0.0], payload=row) for i, row in enumerate(ROWS)])
    yield client
    client.close()


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("year = 2020", {0}),
        ("year <> 2020", {1, 2}),  # as in SQL, not what has no year
        ("year != 2020 or year is null", {1, 2, 3}),
        ("YEAR = 1 OR year >= 2021", {1, 2}),
        ("year > 2020 AND year < 2022", {1}),
        ("year BETWEEN 2021 AND 2022", {1, 2}),
        ("year NOT BETWEEN 2021 AND 2022", {0}),
        ("year IN (2020, 2022)", {0, 2}),
        ("year NOT IN (2020, 2022)", {1}),
        ("year IS NOT NULL", {0, 1, 2}),
        # What has no value is neither inside nor outside of a NOT, as in SQL.
        ("NOT year = 2020", {1, 2}),
        ("NOT (year = 2020 OR stars > 2)", {1}),
        ("NOT (year = 2020 AND stars > 1)", {1, 2}),
        ("NOT (year IS NULL)", {0, 1, 2}),
        ("NOT NOT year = 2020", {0}),
        ("NOT public", {1}),
        ("caption = 'it''s a card'", {1}),
        ("caption HAS 'dog'", {0, 2}),
        ("NOT caption HAS 'dog red'", {1, 2, 3}),
        ("public", {0}),
        ("public = false", {1}),
        ("NOT public AND year = 2021", {1}),
        ("stars = 1.5 OR stars <= -2", {0, 1}),
        ("stars = 3.0", {3}),
        ("(year = 2020 OR year = 2021) AND public", {0}),
        ("year = 2020 OR year = 2021 AND public", {0}),  # AND binds first
        ("mtime >= timestamp '2024-06-01 10:00:00'", {1, 2}),
        ("mtime < timestamp '2000-01-01'", {3}),
        ('`year` = 2022 and "year" = 2022', {2}),
    ],
)
def test_conditions(client, where, found):
    points, _ = client.scroll("x", scroll_filter=parse_condition(where).filter, limit=10)
    assert {point.id for point in points} == found


def test_the_columns_of_a_condition():
    assert parse_condition("year = 2020 AND (public OR NOT caption HAS 'dog')").columns == {"year", "public", "caption"}


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("year =", "expected a number or a text in single quotes, got 'the end'"),
        ("year = 3 4", "'4' is unexpected"),
        ("= 3", "expected a column, got '='"),
        ("year ~ 3", "'~ 3' is not understood"),
        ("(year = 3", "expected ), got the end"),
        ("year IN 3", "expected (, got '3'"),
        ("year IN (3", "expected , or ), got the end"),
        ("year NOT 3", "expected IN or BETWEEN or LIKE or HAS, got '3'"),
        ("caption LIKE '%dog%'", "caption HAS 'dog beach' instead of LIKE"),
        ("caption < 'dog'", "'dog' has no order on a Qdrant server"),
        ("caption HAS 3", "expected words in single quotes, got 3"),
        ("mtime > timestamp 'yesterday'", "'yesterday' is not a date and time"),
        ("mtime > timestamp 3", "expected a date and time in quotes, got 3"),
        ("year = 'open", "is not understood"),
        ("(" * 1000 + "year = 3", "its parentheses are nested too deeply"),
        ("NOT " * 301 + "public", "301 operators are more than 300"),
        ("year > 0" + " + 1" * 1000, "1001 operators are more than 300; compare a column with many values by IN (...)"),
    ],
)
def test_what_is_no_condition(where, problem):
    with pytest.raises(ValueError) as raised:
        parse_condition(where)
    shown = repr(where) if len(where) <= 200 else repr(f"{where[:200]}...")
    assert str(raised.value).startswith(f"where {shown}: ") and problem in str(raised.value)


@pytest.mark.parametrize("where", [5, None, ["year = 1"], b"year = 1", "", " ", "year = 1) OR (year = 2", "year = 1)"])
def test_what_no_reader_may_get(where):
    with pytest.raises(ValueError, match="must be a condition|unexpected"):
        check_condition(where)


def test_a_long_word_is_shortened_in_errors():
    with pytest.raises(ValueError, match="where 'year = 1 xxx") as error:
        parse_condition("year = 1 " + "x" * 5000)
    assert len(str(error.value)) < 600
