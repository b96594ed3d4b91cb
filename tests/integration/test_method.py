"""Masking and throwing, MAE, attention maps: counts, chances, corners, and whole runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import settings

import preprocess

torch = pytest.importorskip("torch")
import timm
from test_pretrain import kills_at, losses

from kamim.bench.throw import Facts
from train import checkpoint
from train.attention import class_attention, read_attention, write_attention
from train.distributed import Process
from train.loop import pretrain
from train.loss import masked_mse, take
from train.masking import Masking, counts, drawn, races
from train.models import MAE, Cells, SimMIM, make_model
from train.patches import patchify, sincos, unpatchify
from train.recipes import Recipe, famt, find_recipe, recipe_names, recipe_of, simmim
from train.request import Run
from train.tokens import embed, encode

VIT = "vit_tiny_patch16_224"
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cells", "mask", "throw", "method", "expected"),
    [
        (196, 0.45, 0.40, "mae", (88, 78, 30)),
        (196, 0.75, 0, "mae", (147, 0, 49)),
        (36, 0.75, 0, "mae", (27, 0, 9)),
        (196, 0.6, 0, "mae", (118, 0, 78)),  # int(196 * (1 - 0.6)) are kept, as MAE has it
        (36, 0.45, 0.40, "mae", (16, 14, 6)),
        (49, 0.44, 0.26, "simmim", (22, 13, 14)),
        (49, 0.6, 0, "simmim", (30, 0, 19)),
        (9, 0.44, 0.26, "simmim", (4, 3, 2)),
        (25, 0.28, 0, "simmim", (8, 0, 17)),  # np.ceil(25 * 0.28), as the masks
    ],
)
def test_cells_are_counted_as_published(cells, mask, throw, method, expected):
    assert counts(cells, mask, throw, method) == expected


def test_impossible_shares_are_refused():
    for mask, throw in ((1.0, 0.0), (0.5, 0.5), (0.0, 0.5)):
        with pytest.raises(ValueError, match="at least one must be masked and one visible"):
            counts(36, mask, throw, "mae")


def in_order(weights):
    """The chance of every order of drawing without replacement, by the definition."""
    from itertools import permutations

    chances = {}
    for order in permutations(range(len(weights))):
        left, chance = list(weights), 1.0
        for cell in order:
            chance *= left[cell] / sum(left)
            left[cell] = 0
        chances[order] = chance
    return chances


def test_orders_are_drawn_as_often_as_their_weights_say():
    """Chi-square of all 24 orders of four cells, 20,000 draws: 23 degrees, 49.7 at 0.1 %."""
    weights, times = [0.1, 0.5, 1.0, 2.4], 20_000
    order = drawn(races(0, 0, times, 4), torch.tensor(weights).expand(times, 4))
    found = np.bincount((order.numpy() * [64, 16, 4, 1]).sum(1), minlength=256)
    statistic, uniform = 0.0, 0.0
    for each, chance in in_order(weights).items():
        seen = found[(np.array(each) * [64, 16, 4, 1]).sum()]
        statistic += (seen - times * chance) ** 2 / (times * chance)
        uniform += (seen - times / 24) ** 2 / (times / 24)
    assert statistic < 49.7
    assert uniform > 1000  # the test can fail


def test_degenerate_weights_give_a_full_order():
    some = torch.zeros(64, 49)
    some[:, [3, 40]] = torch.tensor([1e-6, 1.0])
    order = drawn(races(1, 2, 64, 49), some)
    assert (order.sort(1).values == torch.arange(49)).all()
    assert (order[:, :2].sort(1).values == torch.tensor([3, 40])).all()
    assert len({tuple(row) for row in order[:, 2:].tolist()}) == 64  # the rest at random
    none = drawn(races(1, 3, 64, 49), torch.zeros(64, 49))
    assert (none.sort(1).values == torch.arange(49)).all()
    assert torch.equal(none, drawn(races(1, 3, 64, 49)))
    ties = torch.zeros(64, 49)  # in their order, or each processor would draw its own
    assert torch.equal(drawn(ties), torch.arange(49).expand(64, -1))
    ties[:, 40:] = -1
    first = torch.tensor([*range(40, 49), *range(40)])
    assert torch.equal(drawn(ties), first.expand(64, -1))
    assert not torch.equal(races(1, 3, 8, 49), races(1, 4, 8, 49))
    assert not torch.equal(races(1, 3, 8, 49), races(2, 3, 8, 49))


def test_patches_go_there_and_back_and_embed_as_the_convolution():
    images = torch.randn(2, 3, 96, 96)
    patches = patchify(images, 16)
    assert torch.equal(patches[1, 8], images[1, :, 16:32, 32:48].flatten())
    assert torch.equal(unpatchify(patches, 16), images)
    encoder = timm.create_model(VIT, img_size=96, num_classes=0, **SMALL).eval()
    torch.testing.assert_close(embed(encoder, patches), encoder.patch_embed(images))
    every = torch.stack([torch.randperm(36) for _ in range(2)])
    tokens = encode(encoder, embed(encoder, take(patches, every)), every)
    expected = encoder.forward_features(images)
    torch.testing.assert_close(tokens[:, 0], expected[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(tokens[:, 1:], take(expected[:, 1:], every), atol=1e-5, rtol=1e-4)


def test_positions_are_maes():
    """util/pos_embed.py of facebookresearch/mae, restated: columns first, sine before cosine."""
    table = sincos(6, 32).numpy()
    rates = 1 / 10000 ** (np.arange(8) / 8)
    for place in (0, 7, 35):
        row, column = divmod(place, 6)
        expected = [f(at * rates) for at in (column, row) for f in (np.sin, np.cos)]
        np.testing.assert_allclose(table[place], np.concatenate(expected), rtol=1e-5, atol=1e-6)


def changed(model, images, hidden, cells, patch):
    """By how much the output changes when the pixels of `cells` of patch px do."""
    other = patchify(images, patch).clone()
    other.scatter_(1, cells[:, :, None].expand(-1, -1, other.shape[2]), 5.0)
    with torch.no_grad():
        return (model(unpatchify(other, patch), *hidden) - model(images, *hidden)).abs().max()


def test_thrown_and_masked_patches_reach_nothing():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 96, 96)
    order = torch.stack([torch.randperm(36) for _ in range(2)])
    masked, thrown, visible = order[:, :16], order[:, 16:30], order[:, 30:]
    model = MAE(VIT, 96, SMALL, (32, 1, 2)).eval()
    assert model(images, masked, visible).shape == (2, 16, 768)
    for cells, reaches in ((masked, False), (thrown, False), (visible, True)):
        assert (changed(model, images, (masked, visible), cells, 16) > 0) == reaches
    loss = [masked_mse(model(images, masked, visible), patchify(images, 16), masked)]
    pixels = patchify(images, 16).clone()
    pixels.scatter_(1, thrown[:, :, None].expand(-1, -1, 768), 9.0)
    loss.append(
        model.loss(
            model(images, masked, visible), unpatchify(pixels, 16), Cells(masked, visible), None
        )
    )
    assert loss[0] == loss[1]

    cells = torch.stack([torch.randperm(9) for _ in range(2)])
    mask = torch.zeros(2, 9, dtype=torch.bool).scatter(1, cells[:, :4], True).view(2, 3, 3)
    kept = torch.cat([cells[:, :4], cells[:, 7:]], dim=1)
    model = SimMIM(VIT, 96, SMALL).eval()
    for which, reaches in ((cells[:, :4], 0), (cells[:, 4:7], 0), (cells[:, 7:], 1)):
        assert (changed(model, images, (mask, kept), which, 32) > 0) == reaches
    output = patchify(model(images, mask, kept), 32)
    assert (take(output, cells[:, 4:7]) == 0).all()
    assert (take(output, kept) != 0).all()
    # All kept: SimMIM as it ever was.
    torch.testing.assert_close(model(images, mask, cells), model(images, mask))
    pasted, shown, seen = model.picture(model(images, mask, kept), images, Cells(mask, kept))
    assert pasted.shape == images.shape
    assert (shown.sum((1, 2)) == 4).all()
    assert (seen.sum((1, 2)) == 2).all()


def test_throwing_saves_the_operations_of_what_is_thrown():
    from train.models import model_flops

    whole = SimMIM(VIT, 224, {"depth": 1})
    mask = torch.ones(1, 7, 7, dtype=torch.bool)
    kept = model_flops(whole, 224, Cells(mask, torch.arange(36)[None]))
    assert kept / model_flops(whole, 224, Cells(mask)) < 0.75  # 36 of 49 cells, and less attention


@pytest.mark.parametrize("w_ps", [8, 16, 32])
def test_maes_loss_is_the_published_formula_with_kamims_weights(w_ps):
    """models_mae.py's forward_loss over all patches and a mask, pixel by pixel."""
    images, output = torch.randn(3, 3, 96, 96), torch.randn(3, 16, 768)
    order = torch.stack([torch.randperm(36) for _ in range(3)])
    masked, patches = order[:, :16], patchify(images, 16)
    weights = 1 + torch.rand(3, 96 // w_ps, 96 // w_ps)
    pixelwise = weights.repeat_interleave(w_ps, 1).repeat_interleave(w_ps, 2)[:, None]
    of_pixels = patchify(pixelwise.expand(-1, 3, -1, -1), 16)
    mask = torch.zeros(3, 36).scatter(1, masked, 1)
    whole = torch.zeros(3, 36, 768).scatter(1, masked[:, :, None].expand(-1, -1, 768), output)
    for norm_pix in (False, True):
        target = patches
        if norm_pix:
            mean, spread = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
            target = (patches - mean) / (spread + 1.0e-6) ** 0.5
        error = (whole - target) ** 2
        for chosen, factor in ((None, 1.0), (weights, of_pixels)):
            expected = ((error * factor).mean(-1) * mask).sum() / mask.sum()
            found = masked_mse(output, patches, masked, chosen, norm_pix)
            assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_attention_is_the_last_blocks_by_head():
    torch.manual_seed(0)
    encoder = timm.create_model(VIT, img_size=96, num_classes=0, **SMALL).eval()
    images, seen = torch.randn(2, 3, 96, 96), []
    attn = encoder.blocks[-1].attn
    attn.fused_attn = False
    attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        found = class_attention(encoder, images)
        encoder.forward_features(images)
    row = seen[0][:, :, 0, 1:]
    low, high = row.amin(-1, keepdim=True), row.amax(-1, keepdim=True)
    torch.testing.assert_close(found, ((row - low) / (high - low)).mean(1), atol=1e-5, rtol=1e-4)
    assert found.shape == (2, 36)


def masking(recipe):
    detectors = tuple(preprocess.detector_settings(n) for n in ("fast", "frequency"))
    facts = Facts(settings(crop=96, grid=54, detectors=detectors), 4)
    return Masking(recipe, 0, facts, make_model(recipe).encoder, 4, CPU)


@pytest.mark.parametrize("flips", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_a_marked_corner_is_where_the_crop_shows_it(flips):
    """The published code reads the top-left cells of every crop; here the mark is bottom right."""
    recipe = replace(find_recipe("small_mae_amt"), options=SMALL, batch=2)
    chooser = masking(recipe)
    levels = np.zeros((4, 6, 6), np.uint8)
    levels[2, 4:, 4:] = 255
    chooser.attention = torch.from_numpy(levels).reshape(4, 36)
    boxes = torch.tensor([[0.25, 0.25, 0.75, 0.75], [0.0, 0.0, 0.6, 0.6]])
    turned = torch.tensor([flips, flips], dtype=torch.bool)
    tensors = {"boxes": boxes, "flips": turned, "samples": torch.tensor([2, 2])}
    found = chooser.guide_scores(tensors).view(2, 6, 6)
    assert (found[1] == 0).all()  # this crop does not show it
    across, down = flips
    straight = found[0].flip([axis for axis, on in ((0, down), (1, across)) if on])
    # The mark covers from 2 / 3 on: in the crop from (2 / 3 - 1 / 4) / 0.75 = 5 / 9, cell 3.33.
    assert (straight[4:, 4:] > 0.999).all()
    assert straight[3, 5] == pytest.approx(2 / 3, abs=1e-3)
    assert (straight[:3] == 0).all()
    assert (straight[:, :3] == 0).all()
    step = chooser.begin
    masked, visible = chooser.cells(chooser.noise(step), step, tensors)
    place = found[0].flatten()[masked[0]]
    assert (place[:9] > 0).all()  # the marked cells are drawn, and masked, before all others
    assert not set(masked[0].tolist()) & set(visible[0].tolist())


def test_guides_multiply_and_the_frequency_map_sees_to_the_edge():
    recipe = replace(find_recipe("small_famt"), options=SMALL, batch=1)
    chooser = masking(recipe)
    attention = np.zeros((4, 6, 6), np.uint8)
    attention[:, :, 3:] = 255
    chooser.attention = torch.from_numpy(attention).reshape(4, 36)
    frequency = np.zeros((1, 54, 54), np.uint8)
    frequency[:, 27:] = 255
    whole = {
        "boxes": torch.tensor([[0.0, 0.0, 1.0, 1.0]]),
        "flips": torch.zeros(1, 2).bool(),
        "maps": {"frequency": torch.from_numpy(frequency)},
        "samples": torch.tensor([0]),
    }
    found = chooser.guide_scores(whole).view(3, 3)
    expected = torch.tensor([[0, 0, 0], [0, 0.25, 0.5], [0, 0.5, 1]])
    torch.testing.assert_close(found, expected)
    assert chooser.counts == (4, 3, 2)
    step = chooser.begin
    mask, encoded = chooser.cells(chooser.noise(step), step, whole)
    assert torch.equal(mask[0], expected > 0)  # drawn before those of weight 0
    assert encoded.shape == (1, 6)  # and two that are visible
    assert set(encoded[0, :4].tolist()) == {4, 5, 7, 8}
    for cells, masked in (
        (chooser.example(), 4),
        (chooser.example(early=True), 6),
        (chooser.fixed(1), 6),
    ):
        assert cells.masked.shape == (1, 3, 3)
        assert cells.masked.sum() == masked
    by_density = masking(replace(recipe, sample_by="fast"))
    fast = np.full((1, 54, 54), 255, np.uint8)
    maps = {"fast": torch.from_numpy(fast)}
    edge = by_density.guide_scores(whole | {"maps": maps})
    assert edge[0, 4].item() == pytest.approx(1)
    assert edge[0, 4] > edge[0, 1] > edge[0, 0]


def test_phases_begin_where_the_recipe_says():
    recipe = replace(
        find_recipe("small_mae_famt"), options=SMALL, batch=4, random_epochs=1, refresh_epochs=2.5
    )
    chooser = masking(recipe)
    assert [step for step in range(40) if chooser.due(step)] == [4, 14, 24, 34]
    assert [step for step in range(1000, 1030) if chooser.due(step)] == [1004, 1014, 1024]
    often = masking(replace(recipe, refresh_epochs=0.3))  # every 1.2 steps
    assert [step for step in range(14) if often.due(step)] == [4, 6, 7, 8, 9, 10, 12, 13]
    assert [chooser.in_force(step) for step in (0, 3, 4, 13, 14, 33, 39)] == [
        None,
        None,
        4,
        4,
        14,
        24,
        34,
    ]
    early = chooser.cells(chooser.noise(3), 3, {})
    assert [each.shape[1] for each in early] == [27, 9]
    # SimMIM's random phase is SimMIM, bit for bit.
    from train.masking import block_masks

    plain = masking(replace(find_recipe("small_simmim_famt"), options=SMALL, batch=4))
    mask, encoded = plain.cells(plain.noise(0), 0, {})
    assert encoded is None
    assert torch.equal(mask, block_masks(0, 0, 4, 3, 0.6, CPU))


def test_recipes_differ_in_what_their_names_say():
    base, ours = find_recipe("vit_base_224_mae"), find_recipe("vit_base_224_mae_famt")
    assert (base.mask_ratio, base.throw_ratio, base.decoder) == (0.75, 0, (512, 8, 16))
    assert ours == replace(
        base,
        mask_ratio=0.45,
        throw_ratio=0.4,
        random_epochs=41,
        random_mask_ratio=0.75,
        sample_by="attention*frequency",
    )
    assert find_recipe("vit_base_famt") == famt(find_recipe("vit_base"))
    assert find_recipe("vit_base_famt").temperature == 0.25
    assert find_recipe("vit_base_simmim_amt").temperature is None
    assert find_recipe("vit_base_mae_kamim_famt").temperature == 0.25
    short = find_recipe("small_mae_famt")
    assert (short.random_epochs, short.refresh_epochs) == (1, 5)
    assert not [name for name in recipe_names() if "swin" in name and "mae" in name]
    facts = json.loads(json.dumps({"model": VIT, "area": [0.67, 1.0], "size": 96}))
    assert recipe_of(facts) == Recipe(model=VIT, size=96)
    with pytest.raises(ValueError, match=r"\['soon'\], of a newer kamim"):
        recipe_of(facts | {"soon": 1})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "swin_tiny_patch4_window7_224"}, "Swin's windows need every patch"),
        ({"options": SMALL | {"class_token": False, "global_pool": "avg"}}, "has no class token"),
    ],
)
def test_what_an_encoder_cannot_do_is_refused(changes, words):
    for name in ("small_famt", "small_mae_famt"):
        with pytest.raises(ValueError, match=words):
            masking(replace(find_recipe(name), **{"options": {}} | changes))
    swin = replace(simmim(Recipe(model="swin_tiny_patch4_window7_224")), sample_by="frequency")
    assert masking(swin).counts == (22, 0, 14)


# Whole runs.

SHORT = {"batch": 8, "epochs": 3, "warmup": 0.5, "random_epochs": 0.6, "refresh_epochs": 1.0}
TINY = {
    name: replace(find_recipe(name), options=SMALL, decoder=(32, 1, 2), **SHORT)
    for name in ("small_mae", "small_mae_famt", "small_famt")
}


@pytest.fixture
def shards(small_source, tmp_path, build_once):
    detectors = tuple(preprocess.detector_settings(n) for n in ("fast", "frequency"))
    chosen = settings(frame=112, detectors=detectors, crop=96, map_crops=0, grid=24)
    return build_once(small_source, tmp_path / "shards", chosen)


def run(shards, out, recipe, **changes):
    changes = {"device": "cpu", "log_every": 4, "checksum": False} | changes
    pretrain(Run(shards=shards, out=out, recipe=recipe, **changes))
    return losses(out)


@pytest.mark.parametrize(
    "name", ["small_mae_famt", pytest.param("small_famt", marks=pytest.mark.slow)]
)
def test_stopped_before_at_and_after_a_refresh_it_goes_on_bitwise(name, shards, tmp_path, capsys):
    whole = run(shards, tmp_path / "whole", TINY[name])
    written = sorted(path.name for path in (tmp_path / "whole").glob("attention-*"))
    assert written == [f"attention-{step:08d}.npy" for step in (3, 8, 13)]
    assert len(whole) == 15
    for stop in (3, 6):  # at a refresh, and between two
        run(shards, tmp_path / "parts", TINY[name], steps=stop, save_every=2, resume=True)
    assert run(shards, tmp_path / "parts", TINY[name], resume=True, workers=1) == whole
    a, b = (
        checkpoint.load(checkpoint.newest(tmp_path / each / "checkpoints"))
        for each in ("whole", "parts")
    )
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
    for each in written:
        first, second = ((tmp_path / part / each).read_bytes() for part in ("whole", "parts"))
        assert first == second
    maps = np.load(tmp_path / "whole" / written[1], allow_pickle=False)
    assert (maps.dtype, maps.shape) == (np.uint8, (40, 36))
    assert (maps.min(1) < maps.max(1)).all()
    assert not list((tmp_path / "whole").glob("*.tmp"))
    assert "attention of 40 records" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_across_refreshes_losses_and_attention_are_those_of_a_calm_run(shards, tmp_path):
    command = [sys.executable, "-m", "kamim", "pretrain", str(shards), "--recipe", "small_mae_famt"]
    command += ["--epochs", "5", "--batch", "8", "--save-every", "2", "--log-every", "1"]
    command += ["--workers", "1", "--resume", "--check", "size", "--out"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    subprocess.run([*command, calm], check=True, capture_output=True)
    names = sorted(path.name for path in calm.glob("attention-*.npy"))
    assert len(names) == 2
    assert kills_at([*command, killed], killed, names) >= 3
    subprocess.run([*command, killed], check=True, capture_output=True)
    assert losses(killed) == losses(calm)
    for name in names:
        assert (killed / name).read_bytes() == (calm / name).read_bytes()


def test_seconds_of_training_go_on_and_lost_attention_is_told(shards, tmp_path):
    from train.metrics import read_metrics

    out, recipe = tmp_path / "run", TINY["small_mae_famt"]
    run(shards, out, recipe, steps=6)
    before = read_metrics(out)[-1]["seconds"]
    run(shards, out, recipe, steps=12, resume=True)
    seconds = [row["seconds"] for row in read_metrics(out) if "seconds" in row]
    assert seconds == sorted(seconds)
    assert seconds[-1] > before > 0
    state = checkpoint.load(checkpoint.newest(out / "checkpoints"))
    assert state["seconds"] == pytest.approx(seconds[-1])
    (out / "attention-00000008.npy").unlink()
    with pytest.raises(ValueError, match=r"attention-00000008.npy is missing or damaged"):
        run(shards, out, recipe, resume=True)
    np.save(out / "attention-00000008.npy", np.array([Facts], object), allow_pickle=True)
    with pytest.raises(ValueError, match="missing or damaged"):
        run(shards, out, recipe, resume=True)


def test_a_run_of_mae_is_probed_analysed_and_exported(shards, tmp_path):
    from safetensors.torch import load_file

    from kamim.evaluate.analyse import reconstruction
    from kamim.evaluate.encoder import load_encoder
    from train.export import export
    from train.models import encoder_options

    recipe = replace(TINY["small_mae_famt"], temperature=0.25, norm_pix=True)
    run(shards, tmp_path / "run", recipe)
    assert (tmp_path / "run" / "reconstructions.png").stat().st_size > 5000
    source = checkpoint.newest(tmp_path / "run" / "checkpoints")
    export(source, tmp_path / "encoder.safetensors")
    encoder = timm.create_model(VIT, **encoder_options(VIT, 96, SMALL))
    encoder.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    loaded = load_encoder(str(tmp_path / "run"), CPU)
    images = torch.randn(4, 3, 96, 96)
    with torch.no_grad():
        expected = loaded.model.forward_features(images)
        assert torch.equal(encoder.eval().forward_features(images), expected)
    found = reconstruction(source, images, seed=0)
    assert set(found) == {"psnr_masked", "ssim_masked"}
    assert np.isfinite(list(found.values())).all()


@pytest.mark.parametrize("name", ["small_famt", "small_mae"])
def test_a_picture_that_is_right_where_it_is_hidden_is_as_similar_as_can_be(
    name, shards, tmp_path, monkeypatch
):
    """What is visible does not count, though SSIM's windows reach into it."""
    from kamim.evaluate import analyse

    run(shards, tmp_path / "run", TINY[name], steps=1)
    make = analyse.make_model

    def right(recipe):
        model = make(recipe)
        picture = model.picture

        def drawn(outputs, images, shown):
            made, masks, weights = picture(outputs, images, shown)
            cell = images.shape[-1] // masks.shape[-1]
            where = masks.repeat_interleave(cell, 1).repeat_interleave(cell, 2)[:, None]
            return torch.where(where, images, made), masks, weights

        model.picture = drawn
        return model

    monkeypatch.setattr(analyse, "make_model", right)
    images = torch.rand(4, 3, 96, 96)
    source = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert analyse.reconstruction(source, images, seed=0)["ssim_masked"] == 1


@pytest.mark.slow
def test_two_processes_agree_with_one_across_a_refresh(shards, tmp_path):
    words = ["--recipe", "small_mae_famt", "--batch", "8", "--epochs", "1", "--device", "cpu"]
    words += ["--log-every", "4", "--check", "size"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    quiet = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, start in (("one", []), ("two", launcher)):
        line = [sys.executable, *start, "-m", "kamim", "pretrain", str(shards), *words]
        done = subprocess.run(
            [*line, "--out", str(tmp_path / name)], capture_output=True, text=True, env=quiet
        )
        assert done.returncode == 0, done.stderr
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 5
    assert two == pytest.approx(one, rel=2e-4)
    maps = [
        np.load(tmp_path / name / "attention-00000001.npy").astype(int) for name in ("one", "two")
    ]
    assert np.abs(maps[0] - maps[1]).max() <= 1


def test_what_the_shards_lack_is_one_line(shards, tmp_path):
    cases = [
        ({"sample_by": "orb"}, {}, "draws cells by 'orb'.* has maps of fast, frequency only"),
        ({"sample_by": ""}, {}, "draws cells by ''"),
        ({"refresh_epochs": 0}, {}, "refresh_epochs must be above 0"),
    ]
    for changes, words, message in cases:
        recipe = replace(TINY["small_famt"], **changes)
        with pytest.raises(ValueError, match=message):
            run(shards, tmp_path / "out", recipe, **words)
    assert not (tmp_path / "out").exists()


def test_attention_of_records_that_were_skipped_is_even(tmp_path):
    """A loader that shows three of four records leaves the fourth as AMT begins: all alike."""
    encoder = timm.create_model(VIT, img_size=96, num_classes=0, **SMALL)
    from shards.loader import Batch

    frames, three = (
        np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8),
        np.arange(3),
    )
    blank = np.zeros((3, 0), np.uint8)
    whole, flips = np.zeros((3, 4), np.float32), np.ones((3, 2), bool)
    batch = Batch(0, frames, blank, three, three, three, whole, flips, blank)
    encoder.train()
    write_attention(tmp_path / "a.npy", encoder, [batch], 4, 96, Process(), CPU)
    maps = read_attention(tmp_path / "a.npy", 4, 36).numpy()
    assert (maps[3] == 255).all()
    assert (maps[:3].min(1) < 255).all()
    assert encoder.training
    with pytest.raises(ValueError, match=r"is uint8 \(4, 36\), the run's is uint8 \(5, 36\)"):
        read_attention(tmp_path / "a.npy", 5, 36)
