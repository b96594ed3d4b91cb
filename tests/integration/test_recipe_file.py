"""Recipes as files: what is shown, read, refused, kept of a run, and repeated by it."""

import json
import re
import shutil
import tomllib
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
from conftest import errors
from typed import without_torch
from typer.testing import CliRunner

from kamim.__main__ import app
from shards.errors import UserError
from train.recipe_file import documented, read_recipe, show
from train.recipes import Recipe, changed, find_recipe, recipe_names

TINY = ['options={"embed_dim": 32, "depth": 2, "num_heads": 2}', "batch=8", "epochs=3"]


def kamim(*words, check=True):
    """The command as a user types it, in this process: importing torch anew takes seconds."""
    result = CliRunner().invoke(app, list(map(str, words)))
    error = result.exception
    if error is not None and (check or not isinstance(error, UserError)):
        raise error
    said = result.stderr + (f"kamim: {error}\n" if error else "")
    return SimpleNamespace(returncode=2 if error else 0, stdout=result.stdout, stderr=said)


def losses(out):
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def pretrain(shards, out, *words, check=True):
    flags = ("--detector", "fast", "--device", "cpu", "--out", out)
    return kamim("pretrain", shards, *flags, *words, check=check)


def setting(*words):
    return [part for word in words for part in ("--set", word)]


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_shown_of_a_recipe_is_that_recipe(name, tmp_path):
    (tmp_path / "my.toml").write_text(show(name))
    assert read_recipe(str(tmp_path / "my.toml")) == (find_recipe(name), {})


def test_a_file_is_a_base_and_its_changes(tmp_path):
    path = tmp_path / "my.toml"
    path.write_text('base = "small"\ntemperature = "none"\narea = [0.3, 1]\n[run]\nseed = 3\n')
    other = replace(find_recipe("small"), temperature=None, area=(0.3, 1.0))
    assert read_recipe(str(path)) == (other, {"seed": 3})
    path.write_text(kamim("recipes", "--show", path).stdout)
    assert read_recipe(str(path)) == (other, {})


def test_tables_and_pairs_are_set_in_every_way_that_people_write_them():
    small = find_recipe("small")
    whole = {"embed_dim": 64, "depth": 2}
    for text in ('{"embed_dim": 64, "depth": 2}', "{embed_dim = 64, depth = 2}"):
        assert changed(small, [f"options={text}"]).options == whole
    one = changed(small, ["options.depth=2", "options.act_layer=relu"]).options
    assert one == {**small.options, "depth": 2, "act_layer": "relu"}
    for text in ("False", "false", "FALSE"):
        assert changed(small, [f"options.class_token={text}"]).options["class_token"] is False
    for text in ("0.5,1", "[0.5, 1]", "(0.5,1)"):
        assert changed(small, [f"area={text}"]).area == (0.5, 1)
    for word, said in (
        ("options.depth=", "options.depth= does not fit; give a number, true, false or a word"),
        ("options.depth=2020-01-01", "does not fit; give a number"),
        ("options=3", "it takes: table, as {depth = 2}; one of its values as options.depth=2"),
        ("area=3", "it takes: 2 numbers, as 0.5,1"),
        ("seed=3", "seed is no field of a recipe but an option of its own: --seed"),
        ("options.depth", "a recipe has no 'options.depth'; did you mean options?"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            changed(small, [word])


def test_a_mistake_in_a_file_is_one_line_before_torch_is_imported(tmp_path):
    mistakes = (
        ('base = "smal"', "did you mean small[?]"),
        (
            'base = "small"\ntemprature = 1',
            "[.]toml: a recipe has no 'temprature'; did you mean t",
        ),
        ('base = "small"\nbatch = 8.5', "[.]toml: batch=8.5 does not fit; it takes: whole number"),
        ('base = "small"\nepochs = true', "epochs=true does not fit; it takes: number"),
        ('base = "small"\narea = [1]', "it takes: 2 numbers"),
        ('base = "small"\n[run]\nsead = 1', r"\[run\] has no 'sead'; did you mean seed?"),
        ('base = "small"\n[run]\nseed = "1"', "seed = '1' is no int"),
        ('base = "small"\nrun = 3', r"run = 3 is no table; write \[run\]"),
        (
            'base = "small"\n[run]\ndecode = "tpu"',
            "decode = 'tpu' is unknown; there are cpu",
        ),
        ('base = "small"\n[run]\nshares = [1, "x"]', "are no numbers, one for each set"),
        ("base = 'small'\noptions = {x = 1979-05-27}", "nowhere"),
        ("size = 96", "names no base"),
        ("size = ", "is no sound TOML"),
        (None, "there is no recipe file"),
    )
    commands = []
    for number, (text, _) in enumerate(mistakes):
        if text is not None:
            (tmp_path / f"{number}.toml").write_text(text)
        commands.append(["pretrain", "nowhere", "--recipe", f"{number}.toml"])
    for done, (_, said) in zip(without_torch(*commands, cwd=tmp_path), mistakes, strict=True):
        assert (done.returncode, errors(done)) == (2, 1), done
        assert re.search(said, done.stderr), done


def test_a_run_is_repeated_by_what_it_kept(built, tmp_path):
    pytest.importorskip("torch")
    first, again = tmp_path / "a", tmp_path / "a-again"
    words = setting(*TINY, "temperature=0.5")
    words += ["--recipe", "small", "--seed", "5", "--bank", "--micro-batch", "4"]
    pretrain(built, first, *words)
    kept = tomllib.loads((first / "run.toml").read_text())
    assert set(kept) == {each.name for each in fields(Recipe)} | {"run"}
    assert (kept["temperature"], kept["micro_batch"], kept["run"]["seed"]) == (0.5, 4, 5)
    flags = ("--recipe", first / "run.toml", "--device", "cpu")
    assert kamim("pretrain", built, *flags).stdout.strip() == str(again)
    assert losses(again) == losses(first)
    assert len(losses(again)) == 15
    assert tomllib.loads((again / "run.toml").read_text()) == kept
    pretrain(built, tmp_path / "b", "--seed", 6, *flags)  # what is typed goes first
    assert losses(tmp_path / "b") != losses(first)


def test_a_mixture_is_repeated_by_the_shares_that_it_kept(built, tmp_path):
    pytest.importorskip("torch")
    twin = shutil.copytree(built, tmp_path / "twin")
    first, again = tmp_path / "a", tmp_path / "b"
    pretrain(f"{built}:2", first, f"{twin}:1", *setting(*TINY), "--recipe", "small")
    kept = tomllib.loads((first / "run.toml").read_text())["run"]
    assert kept["shares"] == [2, 1]
    pretrain(built, again, twin, "--recipe", first / "run.toml")
    assert losses(again) == losses(first)
    done = pretrain(built, tmp_path / "c", "--recipe", first / "run.toml", check=False)
    assert (done.returncode, errors(done)) == (2, 1)
    assert "mixes 2 sets by shares and 1 are named; name as many" in done.stderr
    pretrain(built, tmp_path / "even", twin, *setting(*TINY), "--recipe", "small")
    assert "shares" not in tomllib.loads((tmp_path / "even" / "run.toml").read_text())["run"]


def test_every_field_is_documented():
    rows = list(documented())
    assert [row[0] for row in rows] == [each.name for each in fields(Recipe)]
    assert all(len(text) > 5 and "|" not in text for *_, text in rows)
