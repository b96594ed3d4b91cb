"""Model, masks, loss and schedule against the published formulas."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from shards.errors import UserError
from train.loss import masked_l1
from train.masking import block_masks
from train.models import MAE, SimMIM, make_encoder, model_flops
from train.recipes import BASES, Recipe, find_recipe, recipe_names, simmim
from train.schedule import learning_rate, temperature

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
CPU = torch.device("cpu")


def published_loss(x, x_hat, weights, mask):
    """KAMIM vit.py, with every factor at full size, one image after the other."""
    side = x.shape[-1]
    total, hidden = 0.0, 0.0
    for image, output, weight, cells in zip(x, x_hat, weights, mask, strict=True):
        w = np.kron(weight, np.ones((side // weight.shape[-1],) * 2))
        m = np.kron(cells, np.ones((side // cells.shape[-1],) * 2))
        total += (np.abs(image * w - output * w) * m).sum()
        hidden += m.sum()
    return total / (hidden + 1e-5) / 3


def simmim_loss(x, x_rec, mask, patch_size):
    """microsoft/SimMIM models/simmim.py's formula in torch, at full size."""
    mask = mask.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    mask = mask.unsqueeze(1).contiguous()
    recon = torch.nn.functional.l1_loss(x, x_rec, reduction="none")
    return (recon * mask).sum() / (mask.sum() + 1e-5) / 3


@pytest.mark.parametrize("w_ps", [8, 16, 32])
def test_the_loss_equals_the_published_formula(w_ps):
    x, x_hat = torch.randn(3, 3, 96, 96), torch.randn(3, 3, 96, 96)
    weights = 1 + torch.rand(3, 96 // w_ps, 96 // w_ps) * 50
    mask = block_masks(0, 0, 3, 3, 0.6, CPU)
    expected = published_loss(*(t.double().numpy() for t in (x, x_hat, weights, mask)))
    assert masked_l1(x_hat, x, mask, weights).item() == pytest.approx(expected, rel=1e-5)


def test_weights_of_one_are_simmims_loss_bit_for_bit():
    x, x_hat = torch.randn(5, 3, 192, 192), torch.randn(5, 3, 192, 192)
    mask = block_masks(3, 4, 5, 6, 0.6, CPU)
    plain = masked_l1(x_hat, x, mask)
    assert torch.equal(masked_l1(x_hat, x, mask, torch.ones(5, 24, 24)), plain)
    assert torch.equal(simmim_loss(x, x_hat, mask.float(), 32), plain)


def test_w_ps_8_differs_inside_a_token_and_32_does_not():
    """The gradient at the pixels of one 16-px token shows the weights."""
    x = torch.zeros(1, 3, 96, 96)
    mask = torch.ones(1, 3, 3, dtype=torch.bool)
    for w_ps, distinct in ((8, 4), (16, 1), (32, 1)):
        output = torch.ones(1, 3, 96, 96, requires_grad=True)
        cells = 96 // w_ps
        weights = torch.arange(1.0, cells * cells + 1).view(1, cells, cells)
        masked_l1(output, x, mask, weights).backward()
        assert len(output.grad[0, 0, :16, :16].unique()) == distinct


def test_masks_hide_22_of_36_and_30_of_49_cells_evenly():
    masks = block_masks(0, 1, 4000, 6, 0.6, CPU)
    assert (masks.sum((1, 2)) == 22).all()
    assert (block_masks(0, 1, 9, 7, 0.6, CPU).sum((1, 2)) == 30).all()
    share = masks.float().mean(0)
    assert (share - 22 / 36).abs().max() < 4 * math.sqrt(0.61 * 0.39 / 4000)
    assert torch.equal(masks, block_masks(0, 1, 4000, 6, 0.6, CPU))
    for seed, step in ((0, 2), (1, 1)):
        assert not torch.equal(masks, block_masks(seed, step, 4000, 6, 0.6, CPU))


def test_the_schedule_is_timms_cosine_with_warm_up():
    """timm's CosineLRScheduler, t_initial of all steps, warm-up inside, as the paper uses it."""
    timm_scheduler = pytest.importorskip("timm.scheduler")
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=8e-4)
    scheduler = timm_scheduler.CosineLRScheduler(
        optimizer, t_initial=1000, lr_min=1e-5, warmup_t=100, warmup_lr_init=1e-6, t_in_epochs=False
    )
    for step in range(0, 1000, 7):
        scheduler.step_update(step)
        ours = learning_rate(step, 1000, 100, 8e-4, 1e-5, 1e-6)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("size", [192, 224])
def test_hidden_pixels_do_not_reach_the_model(name, size):
    """Changing what is hidden changes nothing; changing what is seen changes the output."""
    torch.manual_seed(0)
    options = SMALL if "vit" in name else {"embed_dim": 24, "depths": (1, 1, 1, 1)}
    model = SimMIM(name, size, options).eval()
    torch.nn.init.normal_(model.mask_token)
    images, mask = torch.randn(2, 3, size, size), block_masks(0, 0, 2, size // 32, 0.6, CPU)
    hidden = mask.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    with torch.no_grad():
        output = model(images, mask)
        assert output.shape == images.shape
        torch.testing.assert_close(model(images + 9 * hidden, mask), output)
        assert (model(images + 9 * ~hidden, mask) - output).abs().max() > 1e-4
        assert (model(images, ~mask) - output).abs().max() > 1e-4


@pytest.mark.parametrize("options", [{"patch_size": 8}, {"depths": (1, 1), "num_heads": (3, 6)}])
def test_a_swin_of_other_strides_gives_whole_images(options):
    small = {"embed_dim": 24, "depths": (1, 1, 1, 1)} | options
    model = SimMIM("swin_tiny_patch4_window7_224", 192, small).eval()
    images, mask = torch.randn(1, 3, 192, 192), block_masks(0, 0, 1, 6, 0.6, CPU)
    with torch.no_grad():
        assert model(images, mask).shape == images.shape
    if "patch_size" in options:  # a token of 64 px
        with pytest.raises(ValueError, match="crop size 224 is no multiple of a token's 64 px"):
            SimMIM("swin_tiny_patch4_window7_224", 224, small)


@pytest.mark.parametrize("option", ["dynamic_img_size", "in_chans", "checkpoint_path"])
def test_what_is_no_option_of_a_model_is_one_line(option):
    with pytest.raises(ValueError, match=f"^options: {option} is not to be set for 'vit_tiny"):
        SimMIM("vit_tiny_patch16_224", 192, {option: 1})


def test_recipes_are_the_published_ones():
    assert set(BASES) <= set(recipe_names())
    base = find_recipe("vit_base")
    assert (base.peak, base.batch, base.epochs, base.warmup) == (8e-4, 2048, 100, 10)
    assert (base.temperature, base.w_ps, base.mask_ratio, base.clip) == (0.25, 8, 0.6, 1.0)
    assert find_recipe("vit_base_simmim") == simmim(base)
    for name in ("vit_large_patch16_224", "vit_base_patch16_224", "swin_tiny_patch4_window7_224"):
        assert find_recipe(name) == Recipe(model=name)
    with pytest.raises(ValueError, match="unknown recipe 'resnet'"):
        find_recipe("resnet")


def test_every_name_gives_the_recipe_it_has_always_given():
    """golden/recipes.json: by name, what differs from Recipe's defaults."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "recipes.json").read_text())
    usual = asdict(Recipe(model=""))
    for name, expected in golden.items():
        found = asdict(find_recipe(name))
        changed = {key: value for key, value in found.items() if value != usual[key]}
        assert json.loads(json.dumps(changed)) == expected, name
    assert recipe_names() == list(golden)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_bas", "did you mean vit_base"),
        ("vit_base_amt_mae", "did you mean vit_base_mae"),
        ("vit_base_mae_mae", "did you mean vit_base_mae"),
        ("vit_base_simmimm", "did you mean vit_base_simmim"),
        ("vit_based", "did you mean vit_base"),
        ("_mae", "unknown recipe '_mae'"),
        ("swin_tiny_mae", "Swin's windows need every patch"),
        ("swin_tiny_224_famt", "Swin's windows need every patch"),
    ],
)
def test_a_name_that_is_no_recipe_is_one_line_with_the_nearest(name, words):
    with pytest.raises(ValueError, match=words):
        find_recipe(name)


def test_every_recipes_encoder_can_be_made_and_counts_its_operations():
    for name in ("vit_tiny", "swin_tiny_224", "small"):
        recipe = find_recipe(name)
        model = SimMIM(recipe.model, recipe.size, recipe.options)
        flops = model_flops(model, recipe.size)
        parameters = (
            sum(p.numel() for p in model.encoder.blocks.parameters()) if "vit" in name else 0
        )
        tokens = (recipe.size // 16) ** 2 + 1
        assert flops > 6 * parameters * tokens
    for name, words in (("resnet50", "img_size|ViT"), ("vit_enormous", "no model")):
        with pytest.raises(ValueError, match=words):
            make_encoder(name, 192)
    with pytest.raises(ValueError, match="no multiple of the mask cell"):
        SimMIM("vit_tiny_patch16_224", 208)
    with pytest.raises(ValueError, match="mask cell, 24 px, is no multiple of the patches of"):
        SimMIM("vit_tiny_patch16_224", 192, cell=24)
    with pytest.raises(ValueError, match="patches divide 200 px"):
        make_encoder("vit_tiny_patch16_224", 200)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: MAE("deit_tiny_distilled_patch16_224", 96), "has a token of distillation"),
        (lambda: SimMIM("vit_small_patch16_rope_224", 96), "take more than tokens"),
        (lambda: MAE("vit_small_patch16_rope_ape_224", 96), "take more than tokens"),
        (lambda: MAE("vit_tiny_patch16_224", 96, decoder=(12, 1, 5)), "no 5 equal heads"),
        (lambda: SimMIM("vit_tiny_patch16_224", 96, {"foo": 1}), "with {'foo': 1}: .*'foo'"),
        (lambda: SimMIM("vit_tiny_patch16_224", 96, {"num_heads": 0}), "with {'num_heads': 0}"),
    ],
)
def test_an_encoder_that_cannot_serve_is_one_line(made, words):
    with pytest.raises(UserError, match=words):
        made()


def test_an_encoder_may_have_no_bias_of_patches():
    small = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    model = SimMIM("vit_base_patch16_clip_224", 32, small)
    assert model(torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 1, dtype=torch.bool)).shape[1] == 3


def test_two_images_can_be_learned_by_heart():
    torch.manual_seed(0)
    model = SimMIM("vit_tiny_patch16_224", 96, {"embed_dim": 96, "depth": 3, "num_heads": 3})
    images = torch.nn.functional.interpolate(torch.randn(2, 3, 6, 6), 96, mode="bilinear")
    mask = block_masks(0, 0, 2, 3, 0.6, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = masked_l1(model(images, mask), images, mask).item()
    for _ in range(300):
        loss = masked_l1(model(images, mask), images, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.25 * first:
            return
    pytest.fail(f"after 300 steps the loss is {loss.item() / first:.2f} of the first")


def test_the_temperature_goes_from_its_first_to_its_last_by_its_form():
    recipe = replace(find_recipe("small"), temperature=1.0, temperature_end=0.2)
    line = [temperature(s, 5, replace(recipe, temperature_form="linear")) for s in range(6)]
    assert line == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])
    turn = [temperature(s, 5, recipe) for s in range(5)]
    assert turn == pytest.approx([1.0, 0.882843, 0.6, 0.317157, 0.2])
    assert temperature(0, 1, recipe) == 1.0
    assert temperature(3, 5, find_recipe("small")) is None
