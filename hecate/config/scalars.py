"""Read YAML scalars. An unquoted one is accepted only if YAML 1.1, YAML 1.2 and OmegaConf all read it as the same value."""

import math
import re

from hecate.config.problems import Refused, shorten

NULLS = ("", "~", "null", "Null", "NULL")
_TRUE = re.compile(r"true|yes|on", re.IGNORECASE)
_FALSE = re.compile(r"false|no|off", re.IGNORECASE)
_BOOL_WORD = re.compile(r"true|yes|on|y|false|no|off|n", re.IGNORECASE)
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.?(nan|inf|infinity)", re.IGNORECASE)
_ODD_NUMBERS = (
    (re.compile(r"[-+]?0[0-7]+"), "an octal number in YAML 1.1 and a decimal one in 1.2"),
    (re.compile(r"[-+]?0[0-9]+"), "a number with a leading zero"),
    (re.compile(r"[-+]?0o[0-7_]+"), "an octal number in YAML 1.2 and text in 1.1"),
    (re.compile(r"[-+]?0x[0-9a-fA-F_]+"), "a hexadecimal number"),
    (re.compile(r"[-+]?0b[01_]+"), "a binary number in YAML 1.1"),
    (re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?"), "a sexagesimal number (base 60) in YAML 1.1"),
    (re.compile(r"[-+]?\.?[0-9][0-9_]*(\.[0-9_]*)?([eE][-+]?[0-9_]+)?"), "a number with _ in YAML 1.1 and text in 1.2"),
)


def odd_number(text: str) -> str:
    """Return what kind of number an unquoted text is in some YAML version, or "" if it is a plain decimal number or none at all."""
    if _INT.fullmatch(text) or (_FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?0[0-9]+", text)):
        return ""
    return next((meaning for pattern, meaning in _ODD_NUMBERS if pattern.fullmatch(text)), "")


def not_text(text: str) -> str:
    """Return what a YAML reader may read an unquoted text as, if not as text ("null", "a number", ...), or "" if only as text."""
    if text in NULLS:
        return "null"
    if _BOOL_WORD.fullmatch(text):
        return "true or false in YAML 1.1"
    if _INT.fullmatch(text) or (_FLOAT.fullmatch(text) and not odd_number(text)):
        return "a number"
    if _NOT_FINITE.fullmatch(text):
        return "not a number or infinite"
    return odd_number(text)


def read_text(text: str, plain: bool) -> str:
    if plain and (meaning := not_text(text)):
        quoted = f'"{shorten(text)}"'
        hint = "give a value" if meaning == "null" else f"quote it: {quoted}, on a command line '{quoted}'"
        raise Refused(f"must be text, but unquoted {shorten(text) or 'nothing'} is {meaning}", hint)
    if not text:
        raise Refused("must not be empty")
    if text == "???":
        raise Refused("must be given; ??? is OmegaConf's mark for a missing value")
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise Refused(f"must be text without null characters and stray bytes, got {shorten(text)}")
    return text


def read_int(text: str, plain: bool) -> int:
    if not plain or not _INT.fullmatch(text):
        raise _refused_number("an integer", text, plain)
    if len(text) > 19:
        raise Refused(f"must be an integer of at most 18 digits, got {shorten(text)}")
    return int(text)


def read_float(text: str, plain: bool) -> float:
    if plain and _NOT_FINITE.fullmatch(text):
        raise Refused(f"must be a finite number, got {shorten(text)}")
    if not plain or odd_number(text) or not _FLOAT.fullmatch(text):
        raise _refused_number("a number", text, plain)
    value = float(text)
    if not math.isfinite(value):
        raise Refused(f"must be a finite number, got {shorten(text)}")
    return value


def read_bool(text: str, plain: bool) -> bool:
    if plain and _TRUE.fullmatch(text):
        return True
    if plain and _FALSE.fullmatch(text):
        return False
    raise Refused(f"must be true or false, got {shown(text, plain)}", _unquote_hint(text, plain, _BOOL_WORD))


def shown(text: str, plain: bool) -> str:
    """Return the scalar as it was written, shortened."""
    return (shorten(text) if text else "nothing (null)") if plain else f'"{shorten(text)}"'


def _refused_number(wanted: str, text: str, plain: bool) -> Refused:
    if plain and (meaning := odd_number(text)):
        return Refused(f"must be {wanted}, but {shorten(text)} is {meaning}", "write plain decimal digits")
    return Refused(f"must be {wanted}, got {shown(text, plain)}", _unquote_hint(text, plain, _FLOAT))


def _unquote_hint(text: str, plain: bool, pattern: re.Pattern[str]) -> str:
    return "remove the quotes" if not plain and pattern.fullmatch(text) else ""
