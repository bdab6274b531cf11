"""Translates SQL conditions on the columns of an index to Qdrant's filters. LanceDB reads the conditions directly."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdrant_client import models as qdrant

WORD = re.compile(
    r"\s*(?:(?P<text>'(?:[^']|'')*')|(?P<number>-?\d+\.?\d*(?:[eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*|`[^`]+`|\"[^\"]+\")"
    r"|(?P<sign><>|!=|<=|>=|[=<>(),]))"
)
KEYWORDS = ("and", "or", "not", "in", "is", "null", "between", "like", "has", "true", "false", "timestamp")
RELATIONS = ("in", "between", "like", "has")
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
OPERATOR = re.compile(r"[-+*/%|&^~=<>!#]+|\b(?:and|or|not|is|like|ilike|in|between)\b", re.IGNORECASE)
MOST_OPERATORS = 300  # LanceDB crashes on a sum of a thousand terms
SHOWN = 200  # characters of a condition in an error
EXACT = 2**53  # Up to it a range, which an index on any numbers answers, is exact.
BOUNDS = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}


@dataclass(frozen=True)
class Condition:
    """A Qdrant filter, and the columns that it uses."""

    filter: qdrant.Filter
    columns: set[str]


def check_condition(where: str) -> None:
    """Check what a reader of conditions does not: it must not crash one, and must be read to its end.

    Raises:
        ValueError: it is not a text, is blank, closes more parentheses than it has opened, or has too many operators.
    """
    if not isinstance(where, str) or not where.strip():
        raise ValueError(f"where must be a condition such as 'width > 800', got {where!r}")
    bare = QUOTED.sub("", where)
    depth = 0
    for sign in bare:
        depth += (sign == "(") - (sign == ")")
        if depth < 0:  # LanceDB would ignore this one and what follows it.
            raise ValueError(f"{shown_condition(where)}: ')' is unexpected")
    count = len(OPERATOR.findall(bare))
    if count > MOST_OPERATORS:
        more = "compare a column with many values by IN (...)"
        raise ValueError(f"{shown_condition(where)}: {count} operators are more than {MOST_OPERATORS}; {more}")


def shown_condition(where: str) -> str:
    """A condition as errors show it, in one line and shortened."""
    return f"where {where if len(where) <= SHOWN else where[:SHOWN] + '...'!r}"


def parse_condition(where: str) -> Condition:
    """Parse a condition.

    It consists of comparisons (`=`, `<>`, `<`, `<=`, `>`, `>=`, `IN`, `BETWEEN`, `IS NULL`) of columns with numbers,
    texts, `true`, `false` and `timestamp '...'`, joined by `AND`, `OR`, `NOT` and parentheses.
    `caption HAS 'dog beach'` holds for texts that contain all these words. There is no `LIKE`, since a server does not
    search for parts of words.

    Raises:
        ValueError: the condition has anything else.
    """
    check_condition(where)
    parser = _Parser(where)
    try:
        condition = parser.any_of()
    except RecursionError as error:
        raise parser.error("its parentheses are nested too deeply") from error
    parser.end()
    return Condition(condition.true, parser.columns)


@dataclass(frozen=True)
class _Logic:
    """Filters for the images for which an expression is true, and for those for which it is false.

    As in SQL, it is neither for an image without the value, so that the one is not the opposite of the other.
    """

    true: qdrant.Filter
    false: qdrant.Filter


class _Parser:
    def __init__(self, where: str) -> None:
        self.where, self.columns = where, set[str]()
        self.words: list[tuple[str, str]] = []  # (kind, text)
        at = 0
        while where[at:].strip():
            match = WORD.match(where, at)
            if match is None:
                raise self.error(f"{where[at:].strip()!r} is not understood")
            kind = str(match.lastgroup)
            word = match[kind]
            if kind == "name" and word.lower() in KEYWORDS:
                kind, word = "keyword", word.lower()
            self.words.append((kind, word))
            at = match.end()
        self.at = 0

    def error(self, problem: str) -> ValueError:
        shown = problem if len(problem) <= SHOWN else problem[:SHOWN] + "..."
        return ValueError(f"{shown_condition(self.where)}: {shown}")

    def end(self) -> None:
        if self.at < len(self.words):
            raise self.error(f"{self.words[self.at][1]!r} is unexpected")

    def take(self, *words: str) -> str | None:
        """The next word, if it is one of these."""
        if self.at < len(self.words):
            kind, word = self.words[self.at]
            if kind in ("keyword", "sign") and word in words:
                self.at += 1
                return word
        return None

    def need(self, *words: str) -> str:
        word = self.take(*words)
        if word is None:
            got = repr(self.words[self.at][1]) if self.at < len(self.words) else "the end"
            raise self.error(f"expected {' or '.join(word.upper() for word in words)}, got {got}")
        return word

    def any_of(self) -> _Logic:
        from qdrant_client import models

        parts = [self.all_of()]
        while self.take("or"):
            parts.append(self.all_of())
        true = models.Filter(should=[part.true for part in parts])
        return parts[0] if len(parts) == 1 else _Logic(true, models.Filter(must=[part.false for part in parts]))

    def all_of(self) -> _Logic:
        from qdrant_client import models

        parts = [self.one()]
        while self.take("and"):
            parts.append(self.one())
        true = models.Filter(must=[part.true for part in parts])
        return parts[0] if len(parts) == 1 else _Logic(true, models.Filter(should=[part.false for part in parts]))

    def one(self) -> _Logic:
        if self.take("not"):
            inner = self.one()
            return _Logic(true=inner.false, false=inner.true)
        if self.take("("):
            inner = self.any_of()
            self.need(")")
            return inner
        return self.comparison(self.name())

    def name(self) -> str:
        kind, word = self.words[self.at] if self.at < len(self.words) else ("", "the end")
        if kind != "name":
            raise self.error(f"expected a column, got {word!r}")
        self.at += 1
        self.columns.add(word.strip('`"'))
        return word.strip('`"')

    def value(self) -> Any:
        if self.take("timestamp"):
            value = self.value()
            if not isinstance(value, str):
                raise self.error(f"expected a date and time in quotes, got {value!r}")
            try:
                moment = datetime.fromisoformat(value)
            except ValueError as error:
                raise self.error(f"{value!r} is not a date and time such as 2024-12-31 23:59:59") from error
            return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        word = self.take("true", "false")
        if word:
            return word == "true"
        kind, text = self.words[self.at] if self.at < len(self.words) else ("", "the end")
        if kind not in ("text", "number"):
            raise self.error(f"expected a number or a text in single quotes, got {text!r}")
        self.at += 1
        if kind == "text":
            return text[1:-1].replace("''", "'")
        return int(text) if re.fullmatch(r"-?\d+", text) else float(text)

    def comparison(self, column: str) -> _Logic:
        from qdrant_client import models

        empty: Any = models.IsEmptyCondition(is_empty=models.PayloadField(key=column))
        if self.take("is"):
            negated = bool(self.take("not"))
            self.need("null")
            conditions: list[Any] = [empty]
        else:
            negated, conditions = self.relation(column)
        true = models.Filter(should=conditions)
        false = models.Filter(must_not=conditions if conditions == [empty] else [*conditions, empty])
        return _Logic(false, true) if negated else _Logic(true, false)

    def relation(self, column: str) -> tuple[bool, list[Any]]:
        """Conditions of which one holds if the relation does, and whether the relation is negated."""
        from qdrant_client import models

        negated = bool(self.take("not"))
        word = self.need(*RELATIONS) if negated else self.take(*RELATIONS)
        if word is None:
            word = self.take("=", "<>", "!=", "<", "<=", ">", ">=")
            if word is None:  # The column itself is true or false.
                return False, [self.compared(column, "=", True)]
            negated = word in ("<>", "!=")
            return negated, [self.compared(column, "=" if negated else word, self.value())]
        if word == "in":
            self.need("(")
            conditions = [self.compared(column, "=", self.value())]
            while self.need(",", ")") == ",":
                conditions.append(self.compared(column, "=", self.value()))
            return negated, conditions
        if word == "between":
            low = self.compared(column, ">=", self.value())
            self.need("and")
            return negated, [models.Filter(must=[low, self.compared(column, "<=", self.value())])]
        if word == "has":
            return negated, [self.has(column, self.value())]
        raise self.error(f"a Qdrant server searches for whole words: use {column} HAS 'dog beach' instead of LIKE")

    def compared(self, column: str, sign: str, value: Any) -> Any:
        from qdrant_client import models

        if isinstance(value, datetime):
            bounds = {"gte": value, "lte": value} if sign == "=" else {BOUNDS[sign]: value}
            return models.FieldCondition(key=column, range=models.DatetimeRange(**bounds))
        exact = isinstance(value, (str, bool)) or (isinstance(value, int) and abs(value) > EXACT)
        if sign == "=" and exact:
            return models.FieldCondition(key=column, match=models.MatchValue(value=value))
        if isinstance(value, (str, bool)):
            raise self.error(f"{value!r} has no order on a Qdrant server; compare it by =, <>, IN or HAS")
        limits = {"gte": value, "lte": value} if sign == "=" else {BOUNDS[sign]: value}
        return models.FieldCondition(key=column, range=models.Range(**limits))

    def has(self, column: str, words: Any) -> Any:
        from qdrant_client import models

        if not isinstance(words, str) or not words.strip():
            raise self.error(f"expected words in single quotes, got {words!r}")
        return models.FieldCondition(key=column, match=models.MatchText(text=words))
