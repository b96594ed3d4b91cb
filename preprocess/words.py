"""Checks of what a user typed, and how results are printed; shared by the commands.

In: an option and its value. Out: the value, or a UserError that says what to give.
"""

import json
import sys
from typing import Annotated, TypeVar

import typer

from shards.errors import UserError

Number = TypeVar("Number", int, float)
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


def at_least(option: str, value: int, least: int) -> int:
    """`value`, or UserError if it is below `least`."""
    if value < least:
        raise UserError(f"{option} {value} is too small; give at least {least}")
    return value


def between(option: str, value: Number, least: float, most: float) -> Number:
    """`value`, or UserError if it is not a number from `least` to `most`."""
    if not least <= value <= most:
        raise UserError(f"{option} {value} is out of range; give {least} to {most}")
    return value


def print_json(result: object) -> None:
    """`result` on stdout for machines."""
    print(json.dumps(result, indent=2, sort_keys=True))


def say(line: str) -> None:
    """A line on stderr."""
    print(line, file=sys.stderr)
