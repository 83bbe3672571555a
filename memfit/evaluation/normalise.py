"""When two values are the same: strictly, and after the one published normalisation.

Strict: the same JSON type and the same content; texts character by character, numbers by their value (48.50 is 48.5).
A text of blanks, null, {} and [] are all "empty".

Normalised, in this order, the same for truths and answers:
1. Unicode NFKC (full-width to half-width letters, digits and signs), all dashes to "-", curly quotes to straight ones.
2. Whitespace: runs become one blank, none at the ends, none beside a Chinese, Japanese or Korean character.
3. "null", "none" and "n/a" in any case are empty; "true" and "false" in any case are booleans.
4. A text that is a number as a whole becomes that number: thousands separators (`1,234.50`, `1.234,50`, `1 234`,
   `1'234`), a decimal comma where only one reading is possible (`48,50`; `1,234` is a thousand), a sign, a percent
   sign (5% is not 5). A leading zero marks an identifier (`0042`), which stays a text.
5. A currency mark before or after the number is set apart. The amounts are compared; the marks only where both have
   one (`$48.50` agrees with `48.5`, not with `EUR 48.50`; the yen and the yuan share a sign and count as one).
6. A text that is a full date as a whole becomes YYYY-MM-DD, with a time of day YYYY-MM-DDTHH:MM:SS. `05/03/2024` may
   be March or May: it is not guessed and agrees only with the same three numbers in the same order.
Letters keep their case: a wrong capital is a wrong character.
"""

from __future__ import annotations

import datetime
import functools
import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

NULL_WORDS = frozenset({"null", "none", "n/a"})

_DASHES = dict.fromkeys(map(ord, "‐‑‒–—―−"), "-")
_QUOTES = dict.fromkeys(map(ord, "‘’‚‛′"), "'") | dict.fromkeys(map(ord, "“”„‟″"), '"')
# CJK signs and punctuation, kana, hangul, ideographs; full-width forms are gone after NFKC.
_CJK = "\u3000-\u30ff\u3100-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003134f"
_CJK_BLANK = re.compile(f"(?<=[{_CJK}]) | (?=[{_CJK}])")

# Marks on one line count as the same. ISO 4217 codes with the signs in common use; signs that several
# currencies share ($, ¥, kr) stand on their own line with the code that they most often mean.
_CURRENCIES = (
    "$ usd us$",
    "€ eur euro",
    "£ gbp",
    "¥ jpy cny rmb yuan yen 元 圆 円 块",
    "₩ krw won 원",
    "₹ inr rs rs.",
    "rm myr",
    "rp rp. idr",
    "chf fr.",
    "zł pln",
    "kr kr. sek nok dkk",
    "₫ vnd",
    "฿ thb",
    "₽ rub",
    "r$ brl",
    "hk$ hkd",
    "nt$ twd",
    "s$ sgd",
    "a$ aud",
    "c$ cad",
    "₱ php",
)
_MARK_CLASS = {mark: line.split()[0] for line in _CURRENCIES for mark in line.split()}
_MARK = "|".join(re.escape(mark) for mark in sorted(_MARK_CLASS, key=len, reverse=True))
_AMOUNT = re.compile(
    rf"(?P<sign>[+-]?)(?P<before>{_MARK})? ?(?P<inner>[+-]?)(?P<digits>\d[\d., ']*|\.\d+) ?(?P<after>{_MARK}|%)?",
    re.IGNORECASE,
)
# A group separator must stand at every third digit (or, in India, every second after the first three).
_PLAIN = re.compile(r"\d*\.?\d+|\d+\.")
_COMMA_GROUPS = re.compile(r"[1-9]\d{0,2}(,\d{3})+(\.\d+)?|[1-9]\d?(,\d{2})+,\d{3}(\.\d+)?")
_DOT_GROUPS = re.compile(r"[1-9]\d{0,2}(\.\d{3})+,\d+|[1-9]\d{0,2}(\.\d{3}){2,}")
_BLANK_GROUPS = re.compile(r"[1-9]\d{0,2}([ ']\d{3})+([.,]\d+)?")
# Not three digits after the comma, or no group of thousands before it: only a decimal comma is left.
_DECIMAL_COMMA = re.compile(r"\d+,(\d{1,2}|\d{4,})|(0|\d{4,}),\d{3}")

_MONTH_NAMES = """jan january, feb february, mar march, apr april, may, jun june, jul july, aug august,
sep sept september, oct october, nov november, dec december"""
_MONTHS = {name: month for month, names in enumerate(_MONTH_NAMES.split(","), 1) for name in names.split()}
_CLOCK = r"(?:[T ]+(?P<hour>\d{1,2}):(?P<minute>\d{2})(?::(?P<second>\d{2}))?)?"
_YEAR_FIRST = re.compile(rf"(?P<y>\d{{4}})(?P<s>[-/.])(?P<m>\d{{1,2}})(?P=s)(?P<d>\d{{1,2}}){_CLOCK}")
_YEAR_LAST = re.compile(rf"(?P<a>\d{{1,2}})(?P<s>[-/.])(?P<b>\d{{1,2}})(?P=s)(?P<y>\d{{4}}){_CLOCK}")
_CHINESE = re.compile(rf"(?P<y>\d{{4}})年(?P<m>\d{{1,2}})月(?P<d>\d{{1,2}})[日号]{_CLOCK}")
_DAY_NAMED = re.compile(
    rf"(?P<d>\d{{1,2}})(?:st|nd|rd|th)?[ -]?(?:of )?(?P<m>[A-Za-z]{{3,9}})\.?,?[ -]?(?P<y>\d{{4}}){_CLOCK}"
)
_NAMED_DAY = re.compile(rf"(?P<m>[A-Za-z]{{3,9}})\.? ?(?P<d>\d{{1,2}})(?:st|nd|rd|th)?,? (?P<y>\d{{4}}){_CLOCK}")

Leaf = str | int | float | bool | None


@dataclass(frozen=True)
class Canonical:
    """A value after normalisation. `text` is compared and measured; `mark` is the currency, "" where there is none."""

    kind: Literal["empty", "text", "number", "percent", "date", "boolean"]
    text: str
    mark: str = ""


EMPTY = Canonical("empty", "")


def plain_text(value: Leaf) -> str:
    """A plain value as JSON would show it, texts without their quotes; empty for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def canonical(value: Leaf) -> Canonical:
    """The normalised form of a plain JSON value, by the rules at the top of this file."""
    if value is None:
        return EMPTY
    if isinstance(value, bool):
        return Canonical("boolean", plain_text(value))
    if isinstance(value, int | float):
        return Canonical("number", _number_text(Decimal(str(value))))
    return _canonical_text(value)


def clean_text(text: str) -> str:
    """Rules 1 and 2: Unicode forms and whitespace, nothing typed."""
    text = unicodedata.normalize("NFKC", text).translate(_DASHES).translate(_QUOTES)
    # Once more, since a letter and its accent may now stand side by side.
    return unicodedata.normalize("NFKC", _CJK_BLANK.sub("", " ".join(text.split())))


def is_empty(value: Any, view: str) -> bool:
    """Nothing is said: None, blanks, {} or []; in the normalised view also a word for nothing."""
    if isinstance(value, dict | list):
        return not value
    if view == "strict":
        return value is None or (isinstance(value, str) and not value.strip())
    return canonical(value).kind == "empty"


def agree(truth: Leaf, predicted: Leaf, view: str) -> bool:
    """Whether two plain values, neither of them empty, are the same in `view`."""
    if view == "strict":
        # bool is a kind of int in Python: True == 1 must not hold here.
        kinds = [bool if isinstance(v, bool) else str if isinstance(v, str) else float for v in (truth, predicted)]
        return kinds[0] is kinds[1] and truth == predicted
    a, b = canonical(truth), canonical(predicted)
    marks_agree = not a.mark or not b.mark or a.mark == b.mark
    return a.kind == b.kind and a.text == b.text and marks_agree


def leaf_text(value: Leaf, view: str) -> str:
    """The text of a value that character and edit measures compare in `view`."""
    return plain_text(value) if view == "strict" else canonical(value).text


@functools.lru_cache(maxsize=65536)
def _canonical_text(raw: str) -> Canonical:
    text = clean_text(raw)
    if not text or text.lower() in NULL_WORDS:
        return EMPTY
    if text.lower() in {"true", "false"}:
        return Canonical("boolean", text.lower())
    return _read_date(text) or _read_amount(text) or Canonical("text", text)


def _read_amount(text: str) -> Canonical | None:
    """Rules 4 and 5, or None where `text` is not one number as a whole."""
    match = _AMOUNT.fullmatch(text)
    if match is None or (match["sign"] and match["inner"]) or (match["before"] and match["after"]):
        return None
    digits = match["digits"].strip()
    if _PLAIN.fullmatch(digits):
        plain = digits
    elif _COMMA_GROUPS.fullmatch(digits):
        plain = digits.replace(",", "")
    elif _DOT_GROUPS.fullmatch(digits):
        plain = digits.replace(".", "").replace(",", ".")
    elif _BLANK_GROUPS.fullmatch(digits):
        plain = digits.replace(" ", "").replace("'", "").replace(",", ".")
    elif _DECIMAL_COMMA.fullmatch(digits):
        plain = digits.replace(",", ".")
    else:
        return None
    if re.match(r"0\d", plain):  # 0042 is a name, not the number 42
        return None
    number = Decimal(plain)
    if "-" in (match["sign"], match["inner"]):
        number = -number
    if match["after"] == "%":
        return Canonical("percent", _number_text(number) + "%")
    mark = (match["before"] or match["after"] or "").lower()
    return Canonical("number", _number_text(number), _MARK_CLASS.get(mark, ""))


def _number_text(number: Decimal) -> str:
    """Without exponent or trailing zeros: 48.50 -> 48.5, 1E+3 -> 1000, -0 -> 0."""
    if number == 0:
        return "0"
    text = f"{number:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _read_date(text: str) -> Canonical | None:
    """Rule 6, or None where `text` is not one full date as a whole, or no day of the calendar."""
    for pattern in (_YEAR_FIRST, _CHINESE, _DAY_NAMED, _NAMED_DAY):
        if match := pattern.fullmatch(text):
            month = match["m"]
            number = int(month) if month.isdigit() else _MONTHS.get(month.lower())
            return _date(match, number, int(match["d"])) if number else None
    match = _YEAR_LAST.fullmatch(text)
    if match is None:
        return None
    first, second = int(match["a"]), int(match["b"])
    day_first, month_first = _date(match, second, first), _date(match, first, second)
    if day_first and month_first and first != second:  # both readings are days: keep the numbers, guess nothing
        clock = day_first.text[10:]
        return Canonical("text", f"{first:02d}/{second:02d}/{match['y']}{clock}")
    return day_first or month_first


def _date(match: re.Match[str], month: int, day: int) -> Canonical | None:
    year, hour = int(match["y"]), match["hour"]
    try:
        date = datetime.datetime(year, month, day, int(hour or 0), int(match["minute"] or 0), int(match["second"] or 0))
    except ValueError:
        return None
    return Canonical("date", date.isoformat() if hour else date.date().isoformat())
