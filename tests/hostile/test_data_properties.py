"""Whatever captions, identities, bytes and tables there are, what is read is what was written, or one line says why."""

import csv
import json
import string

import pytest
import torch
from helpers.hostile_images import picture
from helpers.tiny_gallery import tiny_processor
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from loopitr.data import (
    Collator,
    DataError,
    LoadReport,
    Record,
    UnreadableImage,
    caption_id,
    decode_image,
    load_albef,
    load_karpathy,
    load_table,
    stable_hash,
)
from loopitr.data.records import printable
from loopitr.data.report import clean_captions
from loopitr.reading import parse_json

few = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
any_text = st.text(st.characters(exclude_categories=[]), max_size=30)  # half characters too
text = st.text(max_size=30)
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    for number in range(8):
        picture(number).save(path / f"{number}.png")
    return path


def cleaned(value):
    """The captions, and how many were skipped; or the error's line."""
    report = LoadReport()
    try:
        return clean_captions(value, "x.jpg", report), report.skipped
    except DataError as error:
        return str(error), 0


@pytest.mark.slow
@few
@given(any_json | st.lists(any_text, max_size=5))
def test_captions_are_clean_or_counted_or_one_line(value):
    captions, skipped = cleaned(value)
    if isinstance(captions, str):
        assert captions.startswith("x.jpg: a caption must be text") and captions.isprintable()
        return
    assert len(captions) + skipped == (0 if value is None else 1 if isinstance(value, str) else len(value))
    for caption in captions:
        assert caption == " ".join(caption.split()) != "" and caption.encode()
        assert cleaned(caption) == ((caption,), 0)


@few
@given(text)
def test_the_id_of_a_caption_does_not_see_case_and_spaces(caption):
    number = caption_id(caption)
    assert -(2**63) <= number < 2**63
    assert (
        caption_id(f"  {caption}\n") == caption_id(" ".join(caption.split())) == caption_id(caption.lower()) == number
    )
    assert caption_id(caption + "x") != number


@few
@given(any_text)
@example("\ud800\n\x1b[31m")
def test_a_name_is_one_line(name):
    assert printable(name).isprintable() and len(printable(name)) >= len(name)
    assert printable(printable(name)) == printable(name)
    assert isinstance(stable_hash(name), int)


@few
@given(st.integers() | st.floats() | any_text | st.booleans() | st.binary(max_size=9))
@example(2**63 - 1)
@example(2**63)
@example(-(2**63))
@example(10**5000)
def test_an_identity_fits_a_tensor_or_is_refused(identity):
    try:
        record = Record(image="x.jpg", captions=("a dog",), identity=identity)
    except DataError as error:
        assert str(error).isprintable() and len(str(error)) < 300
        assert not isinstance(identity, int) or not -(2**63) <= identity < 2**63
        return
    example = {"pixel_values": torch.zeros(3, 2, 2), "caption": "a dog", "identity": record.identity, "skipped": []}
    batch = Collator(tiny_processor().tokenizer, max_length=8)([example])
    assert batch.inputs["identities"].tolist() == [identity]


@few
@given(st.binary(max_size=300))
def test_any_bytes_are_a_picture_or_unreadable(data):
    try:
        assert decode_image(data).mode == "RGB"
    except UnreadableImage as error:
        assert str(error).isprintable()


@few
@given(any_json)
def test_json_is_read_as_it_was_written(value):
    written = json.dumps(value)
    assert json.dumps(parse_json(written)) == written


@few
@given(st.text('[]{},:"0123456789.eE-+ntf\\u \0', max_size=60))
def test_what_is_no_json_is_a_value_error(content):
    try:
        value = parse_json(content)
    except ValueError:
        return
    json.loads(content)
    assert value == value or "NaN" in content


def as_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([("image", "caption"), *rows])


def as_json_lines(path, rows):
    lines = [json.dumps({"image": image, "caption": caption}) for image, caption in rows]
    path.write_text("\n".join(lines), encoding="utf-8")


rows = st.lists(st.tuples(st.integers(0, 7).map(lambda n: f"{n}.png"), text), min_size=1, max_size=8)


@few
@given(rows, st.sampled_from(["t.csv", "t.tsv", "t.jsonl"]))
def test_a_table_gives_back_the_captions_that_were_written(folder, rows, name):
    rows = [(image, caption.replace("\0", "")) for image, caption in rows if not caption.lstrip().startswith("[")]
    rows = [(image, caption.replace("\r", "\n")) for image, caption in rows]
    path = folder / name
    (as_json_lines if name == "t.jsonl" else as_csv)(path, rows)
    expected: dict[str, list[str]] = {}
    for image, caption in rows:
        expected.setdefault(image, []).extend(cleaned(caption)[0])
    report = LoadReport()
    try:
        records = load_table(path, folder, report)
    except DataError as error:
        assert not any(expected.values()), error
        return
    assert {r.name: list(r.captions) for r in records} == {k: v for k, v in expected.items() if v}
    assert report.captions + report.counts.get("empty caption", 0) == len(rows)


@few
@given(st.lists(any_json, min_size=1, max_size=8), st.sampled_from(["imgid", "cocoid"]))
def test_images_never_share_an_identity_that_does_not_identify(folder, values, field):
    entries = [
        {"filename": f"{n}.png", "split": "val", "sentences": [{"raw": f"c {n}"}], field: value}
        for n, value in enumerate(values)
    ]
    (folder / "k.json").write_text(json.dumps({"images": entries}))
    records = load_karpathy(folder / "k.json", folder, "val", LoadReport())
    identities = [record.identity for record in records]
    assert len(set(identities)) == len(values) and all(-(2**63) <= number < 2**63 for number in identities)


@few
@given(st.lists(any_json, min_size=1, max_size=8))
def test_images_share_an_identity_where_a_list_says_so(folder, values):
    rows = [{"image": f"{n}.png", "caption": f"c {n}", "image_id": value} for n, value in enumerate(values)]
    (folder / "a.json").write_text(json.dumps(rows))
    records = load_albef(folder / "a.json", folder, LoadReport())
    for a, first in enumerate(values):
        for b, second in enumerate(values):
            known = first is not None and str(first).strip() not in ("", "nan")
            same = a == b or (known and str(first) == str(second))
            assert (records[a].identity == records[b].identity) == same


@few
@given(st.dictionaries(st.sampled_from(["image", "caption", "split", "image_id"]), any_json))
def test_any_row_is_read_skipped_or_refused(folder, row):
    good = {"image": "0.png", "caption": "good", "split": "val", "image_id": "good"}
    (folder / "r.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row))
    (folder / "r.json").write_text(json.dumps([good, row]))
    for read in (
        lambda report: load_table(folder / "r.jsonl", folder, report, split="val"),
        lambda report: load_table(folder / "r.jsonl", folder, report),
        lambda report: load_albef(folder / "r.json", folder, report),
    ):
        try:
            first = read(LoadReport())[0]
        except DataError as error:
            assert str(error).isprintable() and len(str(error)) < 500 + len(string.printable)
        else:
            assert first.name == "0.png" and first.captions[0] == "good"
