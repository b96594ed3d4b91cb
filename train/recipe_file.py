"""A recipe as TOML: a file to start from, what a run used, and a table of all fields.

In addition to fields the file may have `base`, the recipe with the values of all other fields, and
a table `run` of other options that decide a run's numbers: see RUN.
"""

import json
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from shards.errors import UserError, nearest
from train.recipes import Recipe, changed, find_recipe, kind_in_words

RUN_FILE = "run.toml"
RUN: dict[str, type] = {  # options of `kamim pretrain` that are kept with what a run used
    "seed": int,
    "init": str,
    "detector": str,
    "bank": bool,
    "window": int,
    "decode": str,
    "deterministic": bool,
    "shares": list,
}


def is_file(recipe: str) -> bool:
    """Whether `recipe` means a file, not a name."""
    return recipe.endswith(".toml")


def read_recipe(what: str) -> tuple[Recipe, dict[str, Any]]:
    """(recipe, options of the run) of a recipe's name or a TOML file; a name has no options.

    Raises UserError if there is no such recipe or file, or it has what it should not have.
    """
    if (Path(what) / RUN_FILE).is_file():
        raise UserError(f"{what} is a run; its recipe is {what}/{RUN_FILE}")
    if not is_file(what):
        return find_recipe(what), {}
    try:
        found = tomllib.loads(Path(what).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"there is no recipe file {what}; write one by: kamim recipes --show vit_base > "
            f"{shlex.quote(what)}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{what} is no sound TOML: {error}") from None
    options, base = found.pop("run", {}), found.pop("base", None)
    if not isinstance(options, dict):
        raise UserError(f"{what}: run = {options!r} is no table; write [run], and options below it")
    for name, value in options.items():
        if name not in RUN:
            raise UserError(f"{what}: [run] has no {name!r}{nearest(name, RUN) or _known(RUN)}")
        if name == "decode" and value not in ("cpu", "gpu"):
            raise UserError(f"{what}: decode = {value!r} is unknown; there are cpu and gpu")
        if type(value) is not RUN[name]:
            raise UserError(f"{what}: {name} = {value!r} is no {RUN[name].__name__}")
        if isinstance(value, list) and {*map(type, value)} - {int, float}:
            raise UserError(f"{what}: shares = {value!r} are no numbers, one for each set")
    if base is None and "model" not in found:
        raise UserError(f'{what} names no base; add a line as base = "vit_base"')
    recipe = find_recipe(str(base)) if base is not None else Recipe(model="")
    try:
        return changed(recipe, (f"{name}={_word(value)}" for name, value in found.items())), options
    except UserError as error:
        raise UserError(f"{what}: {error}") from None


def default_out(what: str) -> Path:
    """Where a run of `what` goes without --out: runs/NAME; what repeats runs/a, to runs/a-again."""
    path = Path(what)
    if path.name == RUN_FILE:
        return path.absolute().parent.with_name(f"{path.absolute().parent.name}-again")
    return Path("runs") / (path.stem if is_file(what) else what)


def show(name: str) -> str:
    """The recipe called `name`, or in a file, as TOML with a line on each field."""
    recipe, _ = read_recipe(name)
    lines = ["# For kamim pretrain SHARDS --recipe FILE.toml; a line left out is as in the base."]
    lines += [] if is_file(name) else [f"base = {_toml(name)}"]
    for field, _, _, text in documented():
        lines.append(f"{field} = {_toml(getattr(recipe, field))}  # {text}")
    return "\n".join(lines) + "\n"


def used(recipe: Recipe, options: Mapping[str, Any], remarks: Mapping[str, Any]) -> str:
    """What a run used as TOML, with every field, so that it stays whatever defaults become."""
    detector = options["detector"] or options.get("select_detector", "")  # of weights, or of draws
    options = {**options, "detector": detector}
    lines = [f"# {name}: {' '.join(str(value).split())}" for name, value in remarks.items()]
    lines += [f"{name} = {_toml(value)}" for name, value in asdict(recipe).items()]
    kept = {name: options[name] for name in RUN if name != "shares" or options[name]}
    lines += ["", "[run]", *(f"{name} = {_toml(value)}" for name, value in kept.items())]
    return "\n".join(lines) + "\n"


def documented() -> Iterator[tuple[str, str, str, str]]:
    """(name, kind, default, what it is) of every field of Recipe, from its source."""
    kinds = get_type_hints(Recipe, include_extras=True)
    for each in fields(Recipe):
        kind, text = get_args(kinds[each.name])
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        yield each.name, kind_in_words(kind), "" if default is MISSING else _toml(default), text


def _word(value: Any) -> str:
    """A value of TOML as --set takes it."""
    if isinstance(value, list):
        return ",".join(map(_word, value))
    if isinstance(value, dict | bool):
        return json.dumps(value, default=str)
    return str(value)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        inside = ", ".join(f"{name} = {_toml(each)}" for name, each in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if type(value) is float:
        return repr(value)
    return json.dumps("none" if value is None else value, ensure_ascii=False)


def _known(names: Mapping[str, Any]) -> str:
    return f"; there are {', '.join(names)}"
