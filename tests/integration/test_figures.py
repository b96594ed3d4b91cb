"""Figures of the log: the effective share of weights, the clip rate, the error by density."""

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from test_look import looks
from test_pretrain import TINY, run

from shards import ShardSet, WeightedCrops, to_device
from train import checkpoint
from train.deciles import SEED, by_density
from train.loss import effective_share
from train.masking import Masking
from train.metrics import DECILES, read_metrics
from train.models import MEAN, STD, Cells, make_model
from train.recipes import find_recipe


@pytest.fixture
def shards(built):
    return built


def slow_share(weights, hidden):
    """effective_share, pixel by pixel."""
    count, shares = 48, []
    for w, m in zip(weights.tolist(), hidden.tolist(), strict=True):
        of = [
            w[y * len(w) // count][x * len(w) // count]
            for y in range(count)
            for x in range(count)
            if m[y * len(m) // count][x * len(m) // count]
        ]
        shares.append(sum(of) ** 2 / (len(of) * sum(each**2 for each in of)))
    return sum(shares) / len(shares)


@pytest.mark.parametrize(("cells", "grid"), [(12, 3), (12, 6), (4, 6), (3, 12)])
def test_the_effective_share_is_that_of_its_formula(cells, grid):
    weights = torch.rand(5, cells, cells) ** 4 + 0.01
    hidden = torch.rand(5, grid, grid) < 0.6
    hidden[:, 0, 0] = True
    assert float(effective_share(weights, hidden)) == pytest.approx(slow_share(weights, hidden))


def test_the_effective_share_of_weights_that_are_alike_and_of_a_single_one():
    hidden = torch.ones(2, 6, 6, dtype=torch.bool)
    assert float(effective_share(torch.full((2, 12, 12), 7.0), hidden)) == pytest.approx(1)
    one = torch.zeros(2, 12, 12)
    one[:, 3, 3] = 5
    assert float(effective_share(one, hidden)) == pytest.approx(1 / 144)
    hidden[:, 3:] = False  # of the masked alone
    assert float(effective_share(one, hidden)) == pytest.approx(1 / 72)


def test_rows_say_how_often_the_gradient_was_clipped_and_how_even_weights_are(shards, tmp_path):
    recipe = replace(TINY, clip=2.0)
    run(shards, tmp_path / "clipped", recipe)
    rows = read_metrics(tmp_path / "clipped")
    norms, told = [], 0
    for row in rows:
        norms.append(row["grad_norm"])
        assert 0 < row["effective_share"] < 1
        if "clip_rate" in row:
            assert row["clip_rate"] == sum(norm > 2 for norm in norms) / len(norms)
            norms, told = [], told + 1
    assert (told, norms) == (5, [])  # the first step, every four, and the last
    assert {row["grad_norm"] > 2 for row in rows} == {True, False}
    run(shards, tmp_path / "free", replace(TINY, clip=0.0, temperature=None), steps=2)
    for row in read_metrics(tmp_path / "free"):
        assert "clip_rate" not in row
        assert row["effective_share"] == 1


@pytest.mark.parametrize("name", ["small", "small_mae", "small_mae_kamim"])
def test_the_error_of_a_tenth_is_the_mean_over_its_pixels(name):
    """A slow twin: each masked pixel with its density, sorted, in ten parts."""
    recipe = replace(find_recipe(name), options=TINY.options, size=96, w_ps=8)
    model = make_model(recipe).eval()
    images, density = torch.randn(3, 3, 96, 96), torch.rand(3, 12, 12)
    masking = Masking(recipe, 0, [], model.encoder, 1, torch.device("cpu"))
    cells = masking.fixed(3)
    with torch.no_grad():
        output = model(images, *cells)
        found = by_density(model, output, images, cells, density)
        whole = float(model.loss(output, images, cells, None))
        error = errors_of(model, recipe, output, images, cells)
    pixels = density.repeat_interleave(8, 1).repeat_interleave(8, 2)
    masked = error.isfinite()
    values = error[masked][pixels[masked].argsort(stable=True)]
    tenths = [float(part.mean()) for part in values.tensor_split(10)]
    # Cells of 64 pixels are not cut in two.
    assert found.tolist() == pytest.approx(tenths, rel=0.05)
    assert float(found.mean()) == pytest.approx(whole, rel=0.01)
    assert max(tenths) > 1.02 * min(tenths)


def errors_of(model, recipe, output, images, cells):
    """The error of each pixel, [b, 96, 96], mean of the colours; nan where nothing is masked."""
    if recipe.method == "simmim":
        error = (images - output).abs().mean(1)
        mask = cells.masked.repeat_interleave(32, 1).repeat_interleave(32, 2)
        return error.masked_fill(~mask, float("nan"))
    error = torch.full((len(images), 96, 96), float("nan"))
    for one, places in enumerate(cells.masked.tolist()):
        for number, place in enumerate(places):
            top, left = 16 * (place // 6), 16 * (place % 6)
            patch = images[one, :, top : top + 16, left : left + 16]
            if recipe.norm_pix:
                patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            wrong = (output[one, number].view(3, 16, 16) - patch) ** 2
            error[one, top : top + 16, left : left + 16] = wrong.mean(0)
    return error


def test_equal_densities_are_shared_out_and_no_tenth_is_empty():
    recipe = replace(find_recipe("small"), options=TINY.options)
    model = make_model(recipe).eval()
    images, mask = torch.randn(1, 3, 96, 96), torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[0, 0, 0] = True
    with torch.no_grad():
        output = model(images, mask)
        found = by_density(model, output, images, Cells(mask), torch.zeros(1, 12, 12))
        whole = float(model.loss(output, images, Cells(mask), None))
    sizes = torch.tensor([2.0] * 6 + [1.0] * 4)  # of 16 cells
    assert (found > 0).all()
    assert float((found * sizes).sum() / 16) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("words", [{}, {"temperature": None}], ids=["weighted", "plain"])
def test_a_look_has_the_error_by_density_of_the_same_crops(words, shards, tmp_path, capsys):
    recipe = replace(TINY, **words)
    run(shards, tmp_path / "run", recipe, probe_every=1, seed=5)
    rows = looks(tmp_path / "run")
    assert all(set(DECILES) <= set(row) for row in rows.values())
    said = capsys.readouterr().err
    row = rows[15]
    assert f"error {row[DECILES[0]]:.3f} where density is least, {row[DECILES[9]]:.3f}" in said
    # Again, by the model of the last checkpoint.
    records, cpu = ShardSet(shards), torch.device("cpu")
    model = make_model(recipe).eval()
    model.load_state_dict(
        checkpoint.load(checkpoint.newest(tmp_path / "run" / "checkpoints"))["model"]
    )
    crops = WeightedCrops(records, "fast", size=96, mean=MEAN, std=STD)
    loader = records.loader(records.plan(40, SEED), 0, 1, maps=["fast"])
    _, tensors = next(to_device(loader, cpu))
    cells = Masking(recipe, SEED, records, model.encoder, 1, cpu).fixed(40)
    with torch.no_grad():
        images, *_ = crops(tensors)
        output = model(images, *cells)
        found = by_density(model, output, images, cells, crops.density(tensors))
    assert [row[name] for name in DECILES] == pytest.approx(found.tolist(), rel=1e-5)
    page = (tmp_path / "run" / "index.html").read_text()
    assert "error by density" in page
    assert "share of steps whose gradient was clipped" in page
    assert ("effective share of an image" in page) == (not words)


def test_without_densities_a_look_says_so(shards, tmp_path, capsys):
    plain = replace(TINY, temperature=None)
    run(shards, tmp_path / "run", plain, detector=None, probe_every=3, steps=1)
    said = capsys.readouterr().err
    assert "no error by density: the shards have maps of fast, orb; choose one by --det" in said
    assert DECILES[0] not in looks(tmp_path / "run")[1]
