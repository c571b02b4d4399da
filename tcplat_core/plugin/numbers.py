"""Decimal numbers in options and environment variables."""

from __future__ import annotations


def decimal(text: str, most: int) -> int | None:
    """Return the number in a text; None if it is not a decimal number from 0 to `most`.

    The length is compared first: int() raises at more than 4,300 digits
    (sys.set_int_max_str_digits), and takes quadratic time before that.
    """
    if not (text.isascii() and text.isdecimal()):
        return None
    digits = text.lstrip("0") or "0"
    if len(digits) > len(str(most)):
        return None
    number = int(digits)
    return number if number <= most else None
