"""Numbers and dates as people write them: every value that a literal can mean."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from mlxkd.errors import unknown

SPACES = " \u00a0\u202f"


@dataclass(frozen=True)
class Locale:
    """How numbers and dates are written (Unicode CLDR).

    Args:
        decimal: the decimal sign.
        groups: signs that may separate thousands.
        order: order of the numbers in a short date, of "dmy".
    """

    decimal: str
    groups: str
    order: str


LOCALES = {
    "en_US": Locale(".", ",", "mdy"),
    "en_GB": Locale(".", ",", "dmy"),
    "de_DE": Locale(",", "." + SPACES, "dmy"),
    "de_CH": Locale(".", "'\u2019", "dmy"),
    "fr_FR": Locale(",", SPACES, "dmy"),
    "es_ES": Locale(",", "." + SPACES, "dmy"),
    "ja_JP": Locale(".", ",", "ymd"),
}
_MONTHS = (
    "january jan januar janvier enero",
    "february feb februar février febrero",
    "march mar märz mars marzo",
    "april apr avril abril",
    "may mai mayo",
    "june jun juni juin junio",
    "july jul juli juillet julio",
    "august aug août agosto",
    "september sep sept septembre septiembre",
    "october oct oktober octobre octubre",
    "november nov novembre noviembre",
    "december dec dezember décembre diciembre",
)
MONTHS = {name: number for number, names in enumerate(_MONTHS, 1) for name in names.split()}
NUMBER = re.compile(
    rf"(?<![\w.,])[-+\u2212]?(?:\d{{1,3}}(?:([.,'\u2019{SPACES}])\d{{3}}(?:\1\d{{3}})*)(?:[.,]\d+)?|\d+(?:[.,]\d+)?)(?!\w)"
)
_SHORT = re.compile(r"(?<!\d)(\d{1,4})([./-])(\d{1,2})\2(\d{1,4})(?!\d)")
_NAME = "|".join(sorted(MONTHS, key=len, reverse=True))
_DAY_FIRST = re.compile(
    rf"(?<!\d)(\d{{1,2}})(?:st|nd|rd|th|\.)?\s+(?:de\s+)?({_NAME})\.?,?\s+(?:de\s+)?(\d{{4}})", re.I
)
_MONTH_FIRST = re.compile(rf"\b({_NAME})\.?\s+(\d{{1,2}})(?:st|nd|rd|th)?,?\s+(\d{{4}})", re.I)


def locale_named(name: str | None) -> Locale | None:
    """A locale by name, None for "any".

    Raises:
        UserError: not listed.
    """
    if name is None:
        return None
    if name not in LOCALES:
        raise unknown("locale", name, LOCALES)
    return LOCALES[name]


def number_readings(literal: str, locale: Locale | None = None) -> set[Decimal]:
    """Every number that a literal can mean; "1,234" means two things unless the locale says which."""
    text = literal.strip().replace("\u2212", "-")
    candidates = LOCALES.values() if locale is None else [locale]
    return {value for one in candidates if (value := _read_number(text, one)) is not None}


def _read_number(text: str, locale: Locale) -> Decimal | None:
    whole, _, fraction = text.partition(locale.decimal)
    sign, digits = (whole[:1], whole[1:]) if whole[:1] in "+-" else ("", whole)
    parts = re.split(f"[{re.escape(locale.groups)}]", digits)
    grouped = len(parts) > 1
    if grouped and (not 1 <= len(parts[0]) <= 3 or any(len(p) != 3 for p in parts[1:]) or parts[0] == "0"):
        return None
    if not all(p.isdecimal() for p in parts) or (fraction and not fraction.isdecimal()):
        return None
    return Decimal(f"{sign}{''.join(parts)}.{fraction or '0'}")


def numbers(text: str, locale: Locale | None = None) -> Iterator[tuple[int, int, set[Decimal]]]:
    """(start, end, readings) of every number literal in a text."""
    for match in NUMBER.finditer(text):
        found = number_readings(match[0], locale)
        if found:
            yield match.start(), match.end(), found


def dates(text: str, locale: Locale | None = None) -> Iterator[tuple[int, int, set[datetime.date]]]:
    """(start, end, readings) of every date in a text: short, ISO 8601, or with the month's name."""
    orders = {one.order for one in LOCALES.values()} if locale is None else {locale.order}
    for match in _SHORT.finditer(text):
        found = _short_readings(match[1], match[3], match[4], orders)
        if found:
            yield match.start(), match.end(), found
    for pattern, order in ((_DAY_FIRST, (1, 2, 3)), (_MONTH_FIRST, (2, 1, 3))):
        for match in pattern.finditer(text):
            day, month, year = (match[i] for i in order)
            value = _date(int(year), MONTHS[month.lower()], int(day))
            if value:
                yield match.start(), match.end(), {value}


def _short_readings(a: str, b: str, c: str, orders: set[str]) -> set[datetime.date]:
    if len(a) == 4:  # a leading year means year, month, day everywhere
        orders = {"ymd"}
    elif len(c) in (2, 4):
        orders = orders - {"ymd"}
    else:
        return set()
    values = (_date(*_ordered(order, (a, b, c))) for order in orders)
    return {value for value in values if value}


def _ordered(order: str, parts: tuple[str, str, str]) -> tuple[int, int, int]:
    by = dict(zip(order, parts, strict=True))
    year = int(by["y"]) + (2000 if len(by["y"]) == 2 else 0)
    return year, int(by["m"]), int(by["d"])


def _date(year: int, month: int, day: int) -> datetime.date | None:
    try:
        return datetime.date(year, month, day)
    except ValueError:
        return None


def same_value(a: Any, b: Any, locale: Locale | None = None) -> bool:
    """Whether two JSON scalars mean the same number, date or text (case and outer spaces aside)."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b
    left, right = str(a).strip(), str(b).strip()
    if left.casefold() == right.casefold():
        return True
    return bool(_readings(a, left, locale) & _readings(b, right, locale))


def _readings(value: Any, text: str, locale: Locale | None) -> set[Decimal | datetime.date]:
    if isinstance(value, int | float):  # a JSON number has one meaning whatever the locale
        return {Decimal(str(value))}
    found: set[Decimal | datetime.date] = set()
    for start, end, values in numbers(text, locale):
        found |= values if (start, end) == (0, len(text)) else set()
    for start, end, days in dates(text, locale):
        found |= days if (start, end) == (0, len(text)) else set()
    return found
