"""The equation of an `einsum`, taken apart."""

from __future__ import annotations


def letters_of(equation: str) -> tuple[list[str], str] | None:
    """The letters of the operands and of the result; None if one has no letter, or one twice, or no arrow."""
    given, arrow, result = equation.replace(" ", "").partition("->")
    operands = given.split(",")
    is_plain = bool(arrow) and all(x.isalpha() and len(set(x)) == len(x) for x in (*operands, result))
    return (operands, result) if is_plain else None
