"""Files that are damaged, or made to do harm: one line that names them, and nothing waits for ever."""

import os

import pytest

from loopitr.reading import MAX_LETTERS, read_json, read_object, read_yaml, user_path

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
JSON = {
    "empty": ("", "not JSON"),
    "cut off": ('{"a": [1,', "not JSON"),
    "deep": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "deep objects": ('{"a":' * 100_000, "nested too deeply"),
    "long number": ("9" * 5000, "not JSON"),
    "bytes": (b"\xff\xfe", "not UTF-8"),
}
YAML = {
    "cut off": ("a: [", "is damaged"),
    "deep": ("[" * 5000, "nest(ed too deeply|ing depth)|expected node content"),
    "bomb": (BOMB, "aliases are circular or expand"),
    "circle": ("a: &a {b: *a}", "aliases are circular or expand"),
    "object": ("!!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "date": ("2024-13-45", "month must be"),
    "key": ("? [a]\n: b", "is damaged"),
    "long": ("a: " + "x" * MAX_LETTERS, "letters"),
    "bytes": (b"\xff\xfe\x00", "is damaged"),
}


def written(folder, content):
    path = folder / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("read", "content", "words"),
    [(read_json, *case) for case in JSON.values()] + [(read_yaml, *case) for case in YAML.values()],
    ids=[f"JSON {name}" for name in JSON] + [f"YAML {name}" for name in YAML],
)
def test_what_is_damaged_is_one_line(tmp_path, read, content, words):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match=words) as raised:
        read(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("read", [read_json, read_object, read_yaml])
def test_what_is_no_file_is_not_waited_for(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path, tmp_path / "gone"):
        with pytest.raises(OSError, match=str(path)):
            read(path)


def test_what_is_whole_is_read(tmp_path):
    assert read_json(written(tmp_path, '{"a": [1]}')) == read_yaml(tmp_path / "file") == {"a": [1]}
    assert read_yaml(written(tmp_path, "")) is None
    assert read_yaml(written(tmp_path, "a: &a {b: 1}\nc: *a")) == {"a": {"b": 1}, "c": {"b": 1}}
    for content, kind in (("[]", "list"), ("null", "NoneType"), ('"x"', "str")):
        with pytest.raises(ValueError, match=f"holds a {kind}, wanted an object"):
            read_object(written(tmp_path, content))


def test_a_home_of_nobody_is_no_error():
    assert str(user_path("~nobody-of-that-name/x")) == "~nobody-of-that-name/x"
    assert user_path("~/x").is_absolute()
