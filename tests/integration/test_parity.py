"""What claims to be as published, held to twins of the published code that are written out here.

docs/parity.md says which line of it each of these tests holds.
"""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import settings

torch = pytest.importorskip("torch")

from PIL import ImageOps
from timm.data import create_transform
from timm.layers.drop import DropPath
from torch import nn
from torchvision.transforms import v2

from kamim.evaluate.augment import augment, posterized, rand_augment
from kamim.evaluate.encoder import load_encoder
from kamim.evaluate.features import extract
from kamim.evaluate.supervised import (
    Classifier,
    LabelRecipe,
    parameter_groups,
    recipe_for,
    train_supervised,
)
from preprocess import build_shards, open_source
from shards import ShardSet
from shards.errors import UserError
from train import checkpoint
from train.features import Encoder, tokens
from train.models import MAE, SimMIM, make_model
from train.recipes import find_recipe
from train.schedule import learning_rate
from train.setup import clipped
from train.setup import parameter_groups as pretrain_groups

CPU = torch.device("cpu")
SWIN = "swin_tiny_patch4_window7_224"
SMALL = {"embed_dim": 24, "depths": (2, 2, 2, 2)}


def swin(size: int = 96) -> Encoder:
    torch.manual_seed(0)
    return Encoder("swin", SimMIM(SWIN, size, SMALL).encoder.eval(), size)


def vit() -> Encoder:
    return load_encoder("random:vit_tiny_patch16_224", CPU, 96)


def drops(model: nn.Module) -> list[float]:
    return [each.drop_prob for each in model.modules() if isinstance(each, DropPath)]


def test_pretraining_drops_no_paths():
    assert drops(SimMIM(SWIN, 96, SMALL)) == []
    assert drops(make_model(find_recipe("small"))) == []


def test_first_parameters_are_spread_as_published():
    """Transformers' ViT: class token, positions, embedding and decoder 0.02, biases 0."""
    torch.manual_seed(0)
    model = SimMIM("vit_small_patch16_224", 192)
    encoder = model.encoder
    for parameter in (
        encoder.cls_token,
        encoder.pos_embed,
        encoder.patch_embed.proj.weight,
        model.decoder[0].weight,
        model.mask_token,
    ):
        assert parameter.std().item() == pytest.approx(0.02, rel=0.15)
    assert not encoder.patch_embed.proj.bias.any()
    assert not model.decoder[0].bias.any()


def test_mae_is_maes():
    recipe = find_recipe("vit_small_mae")
    assert (recipe.norm_pix, recipe.beta2, recipe.mask_ratio) == (True, 0.95, 0.75)
    model = MAE("vit_small_patch16_224", 96, {"depth": 1})
    norms = [each for each in model.modules() if isinstance(each, nn.LayerNorm)]
    assert {each.eps for each in norms} == {1e-6}
    for name, least in (("vit_small_mae", 100.0), ("vit_small", 1.0)):
        plain = nn.Linear(4, 1)
        plain(torch.full((1, 4), 1e3)).backward()
        norm = clipped(plain, find_recipe(name))
        assert norm > 1000
        left = plain.weight.grad.norm()
        assert left == pytest.approx(norm.item() if least > 1 else 1.0, rel=1e-3)


def test_amt_begins_after_the_epochs_that_are_at_random():
    """mae-AMT: `epoch > 40` of epochs from 0 draws by attention, looked at after epochs 40, 80."""
    recipe = find_recipe("vit_base_mae_amt")
    published = next(epoch for epoch in range(100) if epoch > 40)
    assert recipe.random_epochs == published
    assert recipe.random_epochs + recipe.refresh_epochs == 80 + 1


def test_swins_probe_has_no_final_norm(tmp_path):
    encoder, images = swin(), torch.rand(2, 3, 96, 96)
    model = encoder.model
    with torch.inference_mode():
        by_hand = model.layers(model.patch_embed(images)).flatten(1, 2)
        bare, _ = tokens(encoder, images, 4, norm=False)
        torch.testing.assert_close(bare, by_hand)
        torch.testing.assert_close(tokens(encoder, images, 4)[0], model.norm(by_hand))
        for frozen, wanted in ((True, by_hand), (False, model.norm(by_hand))):
            head = Classifier(swin(), 4, "mean", 5, LabelRecipe(frozen=frozen)).eval()
            torch.testing.assert_close(head(images), head.head(wanted.mean(1)))


def test_heads_begin_as_published():
    width = 192
    for name, spread in (("kamim", 1 / (3 * width) ** 0.5), ("simmim", 2e-5)):
        head = Classifier(vit(), 12, "mean", 1000, recipe_for(name, False, 2048)).head
        assert head.weight.std().item() == pytest.approx(spread, rel=0.02)


def test_simmims_fine_tuning_is_simmims():
    """Rates by batch / 512, drop path from 0 to 0.1 over the blocks, layer decay, no decay of
    vectors.
    """
    recipe = recipe_for("simmim", False, 2048)
    assert (recipe.peak, recipe.floor, recipe.start) == pytest.approx((5e-3, 1e-6, 1e-6))
    assert recipe_for("simmim", False, 512).peak == pytest.approx(1.25e-3)
    model = Classifier(vit(), 12, "mean", 4, recipe)
    rates = np.linspace(0, 0.1, 12)[1:]
    assert drops(model) == pytest.approx(rates.repeat(2).tolist())
    scales = {}
    for group in parameter_groups(model, recipe):
        for parameter in group["params"]:
            scales[parameter] = group["scale"], group["weight_decay"]
    assert len(scales) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        scale, decay = scales[parameter]
        parts = name.removeprefix("trunk.").split(".")
        layer = 13
        if parts[0] in ("cls_token", "pos_embed", "patch_embed"):
            layer = 0
        elif parts[0] == "blocks":
            layer = int(parts[1]) + 1
        assert scale == pytest.approx(0.65 ** (13 - layer))
        free = parameter.ndim == 1 or parts[0] in ("cls_token", "pos_embed")
        assert decay == (0 if free else 0.05)


def test_a_swins_layers_decay_block_by_block():
    recipe = recipe_for("simmim", True, 512)
    assert recipe.layer_decay == 0.9
    model = Classifier(swin(), 4, "mean", 4, recipe)
    assert len(drops(model)) == 2 * 7
    found = {p: g["scale"] for g in parameter_groups(model, recipe) for p in g["params"]}
    named = dict(model.named_parameters())
    for name, layer in (
        ("trunk.patch_embed.proj.weight", 0),
        ("trunk.layers.0.blocks.0.norm1.weight", 1),
        ("trunk.layers.1.downsample.reduction.weight", 2),
        ("trunk.layers.1.blocks.1.mlp.fc1.weight", 4),
        ("trunk.layers.3.blocks.1.norm1.weight", 8),
        ("trunk.norm.weight", 9),
        ("head.weight", 9),
    ):
        assert found[named[name]] == pytest.approx(0.9 ** (9 - layer)), name


def test_kamims_heads_train_ten_epochs_at_the_floor():
    assert recipe_for("kamim", False, 2048, epochs=11).warmup == 1
    recipe = recipe_for("kamim", False, 2048)
    assert (recipe.epochs, recipe.clip, recipe_for("kamim", True, 64).clip) == (110, 0, 1)
    steps = round(1100 * (1 - recipe.level))
    assert steps == 1000
    rates = recipe.peak, recipe.floor, recipe.start
    assert learning_rate(999, steps, 100, *rates) > recipe.floor
    assert {learning_rate(n, steps, 100, *rates) for n in range(1000, 1100)} == {recipe.floor}


def frames(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(60, 200, (count, 3, 64, 64), dtype=torch.uint8, generator=generator)


def states() -> list:
    """Of the global generators, one of which each of the libraries draws from."""
    of_numpy = np.random.get_state()[1]  # noqa: NPY002
    return [torch.get_rng_state().tolist(), random.getstate(), of_numpy.tolist()]


@pytest.mark.parametrize("kind", ["trivial", "rand"])
def test_an_images_augmentation_follows_from_seed_epoch_and_sample(kind):
    some, samples, epochs = frames(6), torch.tensor([4, 9, 2, 7, 1, 30]), torch.tensor([1] * 6)
    before = states()
    whole = augment(some, samples, epochs, kind, 5)
    turned = augment(some.flip(0), samples.flip(0), epochs, kind, 5)
    assert torch.equal(turned.flip(0), whole)
    for changed in ((samples + 1, epochs, kind, 5), (samples, epochs + 1, kind, 5)):
        assert not torch.equal(augment(some, *changed), whole)
    assert not torch.equal(augment(some, samples, epochs, kind, 6), whole)
    assert states() == before


def test_kamims_erasing_is_black_and_simmims_noise():
    count = 300
    some = frames(1).expand(count, -1, -1, -1)
    every, zero = torch.arange(count), torch.zeros(count)
    black = -torch.tensor([0.485, 0.456, 0.406]) / torch.tensor([0.229, 0.224, 0.225])
    found = augment(some, every, zero, "trivial", 0)
    erased = ((found - black[:, None, None]).abs().amax(1) < 1e-5).flatten(1).float().mean(1)
    share = (erased > 0.015).float().mean().item()
    assert 0.4 < share < 0.8  # half of them, and what TrivialAugment shifts in is black too
    found = augment(some, every, zero, "rand", 0)
    noisy = (found.abs().amax((1, 2, 3)) > 2.75).float().mean().item()  # pixels stay within 2.65
    assert 0.18 < noisy < 0.33  # a quarter of the images


def test_rand_augment_is_what_timms_transform_has():
    """SimMIM calls timm.data.create_transform: the same operations with the same arguments."""
    transform = create_transform(
        64, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", interpolation="bicubic"
    )
    theirs = next(each for each in transform.transforms if type(each).__name__ == "RandAugment")
    ours = rand_augment(64)
    assert [each.name for each in ours.ops] == [each.name for each in theirs.ops]
    for mine, other in zip(ours.ops, theirs.ops, strict=True):
        assert (mine.kwargs, mine.hparams) == (other.kwargs, other.hparams)
    picture = v2.functional.to_pil_image(frames(1)[0])
    for bits in range(1, 9):
        expected = ImageOps.posterize(picture, bits)
        assert np.array_equal(posterized(picture, bits), expected)
    assert not np.asarray(posterized(picture, 0)).any()


@pytest.fixture
def labelled(tmp_path, small_source):
    build_shards(open_source(str(small_source)), tmp_path / "set", settings(), 1)
    return ShardSet(tmp_path / "set")


@pytest.mark.parametrize("make", [swin, pytest.param(vit, marks=pytest.mark.slow)])
def test_simmims_fine_tuning_resumes_to_the_last_bit(labelled, tmp_path, make, monkeypatch):
    from kamim.evaluate import supervised

    recipe = recipe_for("simmim", make is swin, 10, epochs=2)
    classes = int(labelled.index["label"].max()) + 1

    def go(out):
        torch.manual_seed(0)
        encoder = make()
        model = Classifier(encoder, encoder.blocks, "mean", classes, recipe)
        train_supervised(model, recipe, labelled, labelled, out, 0, CPU, {})
        return model.state_dict()

    whole = go(tmp_path / "whole")
    real, steps = supervised.augmented, len(labelled) // 10 + 1

    def killed(*arguments):
        if arguments[5] == steps:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(supervised, "augmented", killed)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "parts")
    monkeypatch.setattr(supervised, "augmented", real)
    torch.rand(7)  # what was drawn before does not matter
    again = go(tmp_path / "parts")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_features_of_a_swin_are_kept_apart_by_their_norm(labelled):
    features, _ = extract(swin(), labelled, 4, "mean", CPU, batch=16)
    assert features.std(1).min() > 0
    normed = torch.nn.functional.layer_norm(features, features.shape[1:])
    assert not torch.allclose(features, normed, atol=1e-2)


def layer(x: torch.Tensor, block: nn.Module) -> torch.Tensor:
    """A transformer's layer by its equations: attention, then a perceptron, each behind a norm."""
    heads, width = block.attn.num_heads, x.shape[-1]
    y = nn.functional.layer_norm(x, (width,), block.norm1.weight, block.norm1.bias, 1e-6)
    q, k, v = (y @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=-1)
    q, k, v = (each.unflatten(2, (heads, -1)).transpose(1, 2) for each in (q, k, v))
    share = (q @ k.transpose(2, 3) / (width / heads) ** 0.5).softmax(3)
    seen = (share @ v).transpose(1, 2).flatten(2)
    x = x + seen @ block.attn.proj.weight.T + block.attn.proj.bias
    y = nn.functional.layer_norm(x, (width,), block.norm2.weight, block.norm2.bias, 1e-6)
    y = nn.functional.gelu(y @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return x + y @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def layers(x: torch.Tensor, blocks: nn.Module, norm: nn.Module) -> torch.Tensor:
    for block in blocks:
        x = layer(x, block)
    return nn.functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, 1e-6)


def cut_up(images: torch.Tensor) -> torch.Tensor:
    """Patches of 16 px in rows, each as a convolution's weights lie: [b, n, 768]."""
    rows = [
        images[:, :, y : y + 16, x : x + 16] for y in range(0, 96, 16) for x in range(0, 96, 16)
    ]
    return torch.stack([each.flatten(1) for each in rows], dim=1)


def test_simmims_forward_pass_is_that_of_its_equations():
    torch.manual_seed(0)
    model = SimMIM("vit_tiny_patch16_224", 96, {"depth": 2}).eval()
    encoder, images = model.encoder, torch.rand(2, 3, 96, 96)
    mask = torch.rand(2, 3, 3) < 0.5
    stem = encoder.patch_embed.proj
    tokens = cut_up(images) @ stem.weight.flatten(1).T + stem.bias
    for image, row, column in mask.nonzero().tolist():
        for y in (2 * row, 2 * row + 1):
            for x in (2 * column, 2 * column + 1):
                tokens[image, 6 * y + x] = model.mask_token
    tokens = torch.cat([encoder.cls_token.expand(2, -1, -1), tokens], dim=1) + encoder.pos_embed
    tokens = layers(tokens, encoder.blocks, encoder.norm)[:, 1:]
    widen = model.decoder[0]
    pixels = tokens @ widen.weight.flatten(1).T + widen.bias
    found = model(images, mask)
    for number in range(36):
        y, x = 16 * (number // 6), 16 * (number % 6)
        mine = found[:, :, y : y + 16, x : x + 16].flatten(1)
        torch.testing.assert_close(mine, pixels[:, number], rtol=1e-3, atol=1e-5)


def test_maes_forward_pass_is_that_of_its_equations():
    torch.manual_seed(0)
    model = MAE("vit_tiny_patch16_224", 96, {"depth": 2}, (64, 2, 2)).eval()
    encoder, images = model.encoder, torch.rand(2, 3, 96, 96)
    order = torch.stack([torch.randperm(36) for _ in range(2)])
    masked, visible = order[:, :27], order[:, 27:]
    stem, places = encoder.patch_embed.proj, encoder.pos_embed
    tokens = cut_up(images) @ stem.weight.flatten(1).T + stem.bias + places[:, 1:]
    tokens = torch.stack([each[kept] for each, kept in zip(tokens, visible, strict=True)])
    first = (encoder.cls_token + places[:, :1]).expand(2, -1, -1)
    tokens = layers(torch.cat([first, tokens], dim=1), encoder.blocks, encoder.norm)
    tokens = tokens @ model.widen.weight.T + model.widen.bias
    whole = model.mask_token.expand(2, 36, -1).clone()
    for number in range(2):
        whole[number, visible[number]] = tokens[number, 1:]
    whole = torch.cat([tokens[:, :1], whole + model.positions], dim=1)
    out = layers(whole, model.decoder, model.norm) @ model.head.weight.T + model.head.bias
    wanted = torch.stack([each[1:][gone] for each, gone in zip(out, masked, strict=True)])
    torch.testing.assert_close(model(images, masked, visible), wanted, rtol=1e-3, atol=1e-5)


def test_without_decay_all_what_decays_is_simmims():
    """SimMIM optimizer.py: no vectors, positions or class token; its mask token is [1, 1, d]."""
    recipe = replace(find_recipe("small"), decay_all=False)
    model = make_model(recipe)
    decayed, free = pretrain_groups(model, recipe)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert "mask_token" in {names[each].rpartition(".")[2] for each in decayed["params"]}
    kept = {names[each] for each in free["params"]}
    assert {"pos_embed", "cls_token"} <= {name.rpartition(".")[2] for name in kept}
    assert all(p.ndim == 1 or names[p].endswith(("pos_embed", "cls_token")) for p in free["params"])


@pytest.mark.parametrize(
    ("name", "options", "extra"),
    [
        (SWIN, SMALL, {"mask_token", "relative_position_bias_table"}),
        ("swinv2_tiny_window8_256", SMALL, {"mask_token", "logit_scale", "cpb_mlp"}),
        ("vit_tiny_patch16_224", {"reg_tokens": 4}, {"pos_embed", "cls_token", "reg_token"}),
    ],
)
def test_without_decay_all_tokens_and_tables_of_attention_do_not_decay(name, options, extra):
    """SimMIM optimizer.py and no_weight_decay of its swin_transformer.py; timm's of each model."""
    recipe = replace(find_recipe("small"), model=name, options=options, decay_all=False)
    model = make_model(recipe)
    _, free = pretrain_groups(model, recipe)
    unseen = {id(parameter) for parameter in free["params"]}
    kept = {n: p for n, p in model.named_parameters() if id(p) in unseen}
    ends = {
        "cpb_mlp" if "cpb_mlp" in n else n.rpartition(".")[2]
        for n, p in kept.items()
        if p.ndim > 1 or n == "mask_token"
    }
    assert ends == extra
    theirs = {f"encoder.{n}" for n in model.encoder.no_weight_decay()}
    assert theirs & {n for n, _ in model.named_parameters()} <= set(kept)


def test_a_checkpoint_of_other_groups_of_weight_decay_is_one_line():
    model = nn.Linear(2, 2)
    both = torch.optim.AdamW([{"params": [each]} for each in model.parameters()])
    one = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match=r"^step-1\.pt was written when .* name another --out$"):
        checkpoint.restore_optimizer(one, both.state_dict(), Path("step-1.pt"))


def test_kamim_lets_all_parameters_decay():
    from train.setup import make_optimizer

    model = make_model(find_recipe("small"))
    (group,) = make_optimizer(model, find_recipe("small"), CPU).param_groups
    assert len(group["params"]) == len(list(model.parameters()))
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.05, (0.9, 0.999), 1e-8)
