"""Training on a share of the samples, drawn by a score: the draw, what is read, stops and kills."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from stores import HttpStore
from test_pretrain import TINY, kills_at, losses, run
from test_several_sets import two  # noqa: F401

import shards as library
import train.loop
from shards import ShardSet, WeightedCrops, to_device
from shards.rng import Purpose, uniform
from train import checkpoint
from train.checkpoint import write_rows
from train.masking import Masking
from train.models import MEAN, STD, make_model
from train.recipe_file import read_recipe
from train.recipes import changed, find_recipe
from train.selection import (
    SEED,
    Selection,
    drawn,
    losses_of_all,
    path_of,
    read_scores,
)

CPU = torch.device("cpu")
HALF = replace(TINY, select=0.5, select_epochs=1.0, epochs=6)  # of 40: draws at 0, 3, 5, 8, 10, 13
BY = ("density", "loss", "weighted_loss")


@pytest.fixture
def shards(built):
    return built


@pytest.fixture
def shown(monkeypatch):
    """The samples of each step that the loop takes, by step."""
    found, real = {}, train.loop.Pace.next

    def noted(self):
        batch, tensors = real(self)
        found.setdefault(batch.step, []).extend(batch.samples.tolist())
        return batch, tensors

    monkeypatch.setattr(train.loop.Pace, "next", noted)
    return found


def slow_draw(scores, count, power, seed, number, begin=0):
    """As `drawn`: keys by the formula, sorted, the highest taken."""
    keys = []
    for sample, score in enumerate(scores):
        u = 1 - float(uniform(Purpose.CHOICE, seed, number, begin + sample))
        keys.append((u ** (1 / max(float(score), 1e-30) ** power), sample))
    return sorted(sample for _, sample in sorted(keys, reverse=True)[:count])


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("begin", [0, 1000])
def test_a_draw_is_that_of_its_formula(power, begin):
    scores = np.random.default_rng(1).random(300).astype(np.float32) + 0.1
    for number in range(3):
        args = scores, 70, power, 5, number, begin
        assert drawn(*args).tolist() == slow_draw(*args)
    assert drawn(scores, 70, power, 5, 0).tolist() != drawn(scores, 70, power, 5, 1).tolist()
    assert drawn(scores, 70, power, 6, 0).tolist() != drawn(scores, 70, power, 5, 0).tolist()
    assert drawn(scores, 300, power, 5, 0).tolist() == list(range(300))


def test_samples_are_drawn_as_often_as_their_scores_say():
    """Of one sample in many draws: in proportion; by a large power only the highest."""
    scores = np.array([1, 2, 5, 0], np.float32)
    first = [int(drawn(scores, 1, 1.0, 0, number)[0]) for number in range(4000)]
    shares = np.bincount(first, minlength=4) / 4000
    np.testing.assert_allclose(shares, scores / 8, atol=0.02)
    even = [int(drawn(scores, 1, 0.0, 0, number)[0]) for number in range(4000)]
    np.testing.assert_allclose(np.bincount(even) / 4000, 0.25, atol=0.02)
    many = np.random.default_rng(0).random(500).astype(np.float32)
    highest = sorted(np.argsort(many)[-50:].tolist())
    assert drawn(many, 50, 1e6, 0, 0).tolist() == highest


def selection_of(shards, recipe, seed=0):
    records = ShardSet(shards)
    order = partial(records.plan, recipe.batch, seed)
    return Selection(recipe, seed, records, order, "fast")


def test_a_batch_follows_from_seed_step_and_scores_alone(shards):
    scores = np.random.default_rng(2).random(40).astype(np.float32)
    one, other = (selection_of(shards, replace(HALF, select_by="loss")) for _ in range(2))
    one._use(scores), other._use(scores)
    forth = {step: one.plan(step).samples(step)[1].tolist() for step in range(15)}
    back = {step: other.plan(step).samples(step)[1].tolist() for step in reversed(range(15))}
    assert forth == back
    begins = [step for step in range(1, 15) if one.plan(step) is not one.plan(step - 1)]
    assert begins == [3, 5, 8, 10, 13] == [step for step in range(15) if one.due(step)]
    assert [one.end(step) for step in (0, 2, 3, 12)] == [3, 3, 5, 13]
    for number, begin in enumerate([0, *begins]):
        power = 1.0 if number else 0.0  # the first draw is at random
        chosen = set(slow_draw(scores, 20, power, 0, number))
        for step in range(begin, one.end(begin)):
            assert set(forth[step]) <= chosen


def test_a_share_of_one_is_the_run_that_it_was(shards, tmp_path):
    plain = run(shards, tmp_path / "plain")
    words = ("select=1.0", "select_by=loss", "select_epochs=1", "select_power=9")
    assert run(shards, tmp_path / "all", changed(TINY, words)) == plain
    assert not list((tmp_path / "all").glob("scores-*"))
    chosen = selection_of(shards, TINY)
    assert chosen.plan(3) is chosen.whole
    assert (chosen.describe(), chosen.epoch, chosen.due(0)) == ("", 40, False)


@pytest.mark.parametrize("by", BY)
def test_only_the_drawn_are_trained_on(by, shards, shown, tmp_path, capsys):
    recipe = replace(HALF, select_by=by, select_power=4.0)
    assert len(run(shards, tmp_path / "run", recipe)) == 15
    files = sorted(path.name for path in (tmp_path / "run").glob("scores-*"))
    steps = [0] if by == "density" else [3, 5, 8, 10, 13]
    assert files == [path_of(tmp_path, step).name for step in steps]
    begins = [0, 3, 5, 8, 10, 13, 15]
    for number, (begin, end) in enumerate(pairwise(begins)):
        trained = {sample for step in range(begin, end) for sample in shown[step]}
        if by == "density":
            scores = read_scores(path_of(tmp_path / "run", 0), 40)
            np.testing.assert_array_equal(scores, ShardSet(shards).mean_densities("fast", id))
        elif number:
            scores = read_scores(path_of(tmp_path / "run", begin), 40)
            assert len(set(scores.tolist())) > 30
        else:
            scores = np.ones(40, np.float32)
        chosen = slow_draw(scores, 20, 4.0, 0, number)
        assert trained <= set(chosen)
        assert len(trained) >= 12
    said = capsys.readouterr().err
    assert "20 records x 6 epochs / batch 8 = 15 steps; batch = 1 process x" in said
    assert f"trains on 20 of 40 samples, drawn by {by.replace('_', ' ')} to the power of 4" in said
    assert ("losses of 40 records looked at before step 4" in said) == (by != "density")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert rows[-1]["epoch"] == 6


@pytest.mark.parametrize("by", BY)
def test_stopped_before_at_and_after_a_draw_it_goes_on_bitwise(by, shards, tmp_path):
    recipe = replace(HALF, select_by=by)
    whole = run(shards, tmp_path / "whole", recipe)
    for stop in (3, 4, 9):  # at a draw, after one, and between two
        run(shards, tmp_path / "parts", recipe, steps=stop, save_every=2, resume=True)
    assert run(shards, tmp_path / "parts", recipe, resume=True, workers=1) == whole
    for path in (tmp_path / "whole").glob("scores-*"):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes()
    a, b = (
        checkpoint.load(checkpoint.newest(tmp_path / each / "checkpoints"))["model"]
        for each in ("whole", "parts")
    )
    assert all(torch.equal(a[key], b[key]) for key in a)
    for name in ("crop.jpg", "visible.jpg"):  # every save shows the same images
        files = [tmp_path / each / "pictures" / name for each in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ValueError, match=r"recipe.select was 0.5, is 0.25"):
        run(shards, tmp_path / "parts", replace(recipe, select=0.25), resume=True)


def test_looks_at_attention_and_at_losses_go_on_together(built, small_source, tmp_path):
    recipe = replace(
        find_recipe("small_mae_amt"),
        options=TINY.options,
        decoder=(32, 1, 2),
        batch=8,
        epochs=6,
        warmup=0.5,
        random_epochs=1.0,
        refresh_epochs=2.0,
        select=0.5,
        select_by="loss",
        select_epochs=1.0,
    )
    whole = run(built, tmp_path / "whole", recipe)
    for stop in (3, 9):
        run(built, tmp_path / "parts", recipe, steps=stop, save_every=2, resume=True)
    assert run(built, tmp_path / "parts", recipe, resume=True) == whole
    maps = np.load(tmp_path / "whole" / "attention-00000003.npy")
    assert maps.shape == (40, 36)  # of all records, drawn or not


def test_lost_and_foreign_scores_are_told(shards, tmp_path):
    recipe = replace(HALF, select_by="loss")
    run(shards, tmp_path / "run", recipe, steps=4)
    path = path_of(tmp_path / "run", 3)
    write_rows(path, np.ones(39, np.float32))
    with pytest.raises(ValueError, match=r"is float32 \(39,\), the run's is float32 \(40,\)"):
        run(shards, tmp_path / "run", recipe, resume=True)
    path.unlink()
    with pytest.raises(ValueError, match=r"scores-00000003.npy is missing or damaged"):
        run(shards, tmp_path / "run", recipe, resume=True)


@pytest.mark.parametrize("name", ["small", "small_mae", "small_mae_kamim"])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_of_a_record_is_that_of_its_frame_alone(name, weighted, shards):
    """Whole frames, one by one, under one mask; whatever the batches and the crops are."""
    recipe = replace(find_recipe(name), options=TINY.options, decoder=(32, 1, 2), temperature=0.25)
    records, process = ShardSet(shards), train.loop.this_process()
    torch.manual_seed(0)
    model = make_model(recipe)
    crops = WeightedCrops(records, "fast", size=96, mean=MEAN, std=STD)
    masking = Masking(recipe, 0, records, model.encoder, 5.0, CPU)
    found = []
    for batch, seed in ((8, 0), (10, 1)):
        loader = records.loader(records.plan(batch, seed), 0, 40 // batch, maps=["fast"])
        weighing = {} if weighted else None
        scores = losses_of_all(model, crops, masking, loader, weighing, process)
        found.append(scores)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert model.training
    model.eval()
    order = library.Plan(40, 1, in_order=True)
    cells = masking.fixed(1, SEED)
    for _, tensors in to_device(records.loader(order, 0, 40, maps=["fast"]), CPU):
        images, weights, *_ = crops(tensors)
        with torch.no_grad():
            by = weights if weighted else None
            loss = model.loss(model(images, *cells), images, cells, by)
        sample = int(tensors["samples"])
        assert float(found[0][sample]) == pytest.approx(float(loss), rel=1e-4)


def test_records_that_are_not_reached_or_diverge_come_last(shards):
    recipe = replace(TINY, select_by="loss")
    records, model = ShardSet(shards), make_model(recipe)
    masking = Masking(recipe, 0, records, model.encoder, 5.0, CPU)
    loader = records.loader(records.plan(8), 0, 2)
    scores = losses_of_all(model, None, masking, loader, None, train.loop.this_process())
    assert int((scores > 0).sum()) == 16
    assert set(drawn(scores.numpy(), 16, 1.0, 0, 0)) == set(scores.nonzero()[:, 0].tolist())
    with torch.no_grad():
        model.decoder[0].bias.fill_(float("nan"))
    loader = records.loader(records.plan(8), 0, 2)
    scores = losses_of_all(model, None, masking, loader, None, train.loop.this_process())
    assert (scores == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("converted", ["raw", "jpeg"], indirect=True)
@pytest.mark.parametrize("by", ["density", "loss"])
def test_an_ffcv_set_is_drawn_from_as_the_set_that_it_was_made_of(
    by, shards, converted, shown, tmp_path
):
    pytest.importorskip("ffcv")
    recipe, seen = replace(HALF, select_by=by, select_power=4.0), []
    for where in (shards, converted):
        run(where, tmp_path / f"run{len(seen)}", recipe)
        seen.append({step: list(samples) for step, samples in shown.items()})
        shown.clear()
    if by == "density":
        assert seen[0] == seen[1]
        return
    assert seen[0].keys() == seen[1].keys()  # frames are decoded by another library
    scores = [read_scores(path_of(tmp_path / f"run{n}", 3), 40) for n in range(2)]
    np.testing.assert_allclose(*scores, rtol=0.05)


@pytest.mark.parametrize("by", ["density", "loss"])
def test_a_set_at_a_url_gives_the_losses_of_its_folder(by, shards, tmp_path):
    recipe = replace(HALF, select_by=by, select=0.3, epochs=8)
    store = HttpStore(shards, tmp_path / "log")
    try:
        local = run(shards, tmp_path / "local", recipe, window=3)
        remote = run(store.url, tmp_path / "remote", recipe, window=3, cache=tmp_path / "cache")
    finally:
        store.kill()
    assert remote == local
    assert len(local) == 12


def test_shards_of_which_nothing_is_drawn_are_not_fetched(shards, tmp_path):
    store = HttpStore(shards, tmp_path / "log")
    try:
        records = library.open(store.url, cache=tmp_path / "cache")
        plan = records.plan(2, window=2, subset=np.array([1, 2, 17, 18, 39]))
        samples = [int(n) for b in records.loader(plan, 0, 25) for n in b.samples]
    finally:
        store.kill()
    assert set(samples) == {1, 2, 17, 18, 39}
    fetched = sorted(path.name for path in (tmp_path / "cache").glob("*/shard-*.tar"))
    assert fetched == [f"shard-00000{n}.tar" for n in (0, 4, 9)]


@pytest.mark.parametrize("by", ["density", "loss"])
def test_of_several_sets_the_same_share_is_drawn_of_each(by, two, shown, tmp_path):  # noqa: F811
    recipe = replace(HALF, select_by=by, select_power=4.0)
    whole = run(two, tmp_path / "whole", recipe)
    assert len(whole) == 18  # six epochs of 20 + 5
    for step in (0, 1, 2, 3):  # up to the next draw
        assert len(shown[step]) == 8
    trained = {sample for step in range(4) for sample in shown[step]}
    assert sum(sample < 40 for sample in trained) <= 20
    assert sum(sample >= 40 for sample in trained) <= 5
    for stop in (4, 9):
        run(two, tmp_path / "parts", recipe, steps=stop, save_every=2, resume=True)
    assert run(two, tmp_path / "parts", recipe, resume=True) == whole


def test_the_detector_that_draws_is_kept_in_what_repeats_the_run(shards, tmp_path):
    plain = replace(HALF, temperature=None)
    losses = run(shards, tmp_path / "run", plain, steps=4, detector="orb")
    _, kept = read_recipe(str(tmp_path / "run" / "run.toml"))
    assert kept["detector"] == "orb"
    assert run(shards, tmp_path / "again", plain, steps=4, detector=kept["detector"]) == losses
    assert run(shards, tmp_path / "other", plain, steps=4, detector="fast") != losses


def test_plain_simmim_is_drawn_by_a_density_that_it_does_not_weigh_by(shards, tmp_path):
    plain = replace(HALF, temperature=None)
    run(shards, tmp_path / "run", plain, steps=2)
    with pytest.raises(ValueError, match="maps of fast, orb; choose one by --detector"):
        run(shards, tmp_path / "x", plain, detector=None)
    run(shards, tmp_path / "y", replace(plain, select_by="loss"), detector=None, steps=4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["select=0"], "select 0 is out of range; give a share above 0, up to 1"),
        (["select=1.5"], "select 1.5 is out of range"),
        (["select=nan"], "select nan is out of range"),
        (["select_epochs=0"], "select_epochs 0 is out of range; give 1e-4 or more"),
        (["select_epochs=1e-10"], "select_epochs 1e-10 is out of range; give 1e-4 or more"),
        (["select_power=-1"], "select_power -1 is out of range; give 0 or more"),
        (["select_by=weighted_loss", "temperature=none"], "the recipe has no weights; use loss"),
        (
            ["select_by=weighted_loss", "normalise=batch"],
            "with normalise=batch the weights of an image",
        ),
        (
            ["select_by=weighted_loss", "weights=shuffled"],
            "with weights=shuffled the weights of an image",
        ),
        (["select=0.1", "epochs=1"], "1 epoch of 4 records make no batch of 8"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_before_the_first_step(words, said, shards, tmp_path):
    with pytest.raises(ValueError, match=said) as error:
        run(shards, tmp_path / "out", changed(HALF, words))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_bank_has_no_weights_of_whole_frames(shards, tmp_path):
    recipe = replace(HALF, select_by="weighted_loss")
    with pytest.raises(ValueError, match="--bank loads no maps, which select_by=weighted_loss"):
        run(shards, tmp_path / "out", recipe, bank=True)
    for by in ("density", "loss"):
        run(shards, tmp_path / by, replace(HALF, select_by=by), bank=True, steps=4)


COMMAND = ["-m", "kamim", "pretrain", "--recipe", "small_simmim", "--batch", "8", "--epochs", "6"]
COMMAND += ["--set", "select=0.5", "--set", "select_by=loss", "--set", "select_epochs=1"]
COMMAND += ["--log-every", "1", "--workers", "1", "--check", "size", "--device", "cpu"]


@pytest.mark.slow
def test_killed_across_draws_losses_and_scores_are_those_of_a_calm_run(shards, tmp_path):
    command = [sys.executable, *COMMAND, str(shards), "--save-every", "2", "--resume", "--out"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    subprocess.run([*command, calm], check=True, capture_output=True)
    names = sorted(path.name for path in calm.glob("scores-*.npy"))
    assert len(names) == 5
    assert kills_at([*command, killed], killed, names[::2]) >= 3
    subprocess.run([*command, killed], check=True, capture_output=True)
    assert losses(killed) == losses(calm)
    for name in names:
        assert (killed / name).read_bytes() == (calm / name).read_bytes()


@pytest.mark.slow
def test_two_processes_draw_and_train_on_what_one_does(shards, tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, start in (("one", []), ("two", launcher)):
        line = [sys.executable, *start, *COMMAND, str(shards), "--out", str(tmp_path / name)]
        done = subprocess.run(line, capture_output=True, text=True, env=quiet)
        assert done.returncode == 0, done.stderr
    alone, both = (losses(tmp_path / name) for name in ("one", "two"))
    assert len(alone) == 15
    assert both == pytest.approx(alone, rel=2e-4)
    for number, step in enumerate((3, 5, 8, 10, 13), 1):
        scores = [read_scores(path_of(tmp_path / name, step), 40) for name in ("one", "two")]
        np.testing.assert_allclose(*scores, rtol=1e-3)
        draws = [drawn(each, 20, 1.0, 0, number).tolist() for each in scores]
        assert draws[0] == draws[1]
