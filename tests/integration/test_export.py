"""Encoders that load anywhere, and runs that start from them, as typed."""

import json
import tomllib

import pytest

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_recipe_file import TINY, kamim, losses, pretrain, setting

from kamim.evaluate.encoder import load_encoder
from train import checkpoint

CPU = torch.device("cpu")
SMALL = ("--recipe", "small", *setting(*TINY))


@pytest.fixture
def trained(built, tmp_path):
    """A run of ViTs of 32 channels, with a mean of its weights."""
    pretrain(built, tmp_path / "run", *SMALL, "--set", "ema=0.5", "--steps", 3)
    return tmp_path / "run"


def features(model, images):
    with torch.no_grad():
        return model.eval().forward_features(images)


def exported(run, out, to, *flags):
    return kamim("export", run, out, "--to", to, *flags).stdout.strip()


def test_timm_loads_what_is_exported_for_it(trained, tmp_path):
    images = torch.randn(2, 3, 96, 96)
    line = exported(trained, tmp_path / "timm", "timm")
    wanted = features(load_encoder(str(trained), CPU).model, images)
    model = eval(line.partition("load it into ")[2], {"timm": timm})
    assert torch.equal(features(model, images), wanted)
    assert (model.num_classes, model.pretrained_cfg["input_size"]) == (0, (3, 96, 96))
    assert tuple(model.pretrained_cfg["mean"]) == (0.485, 0.456, 0.406)
    assert torch.equal(features(load_encoder(str(tmp_path / "timm"), CPU).model, images), wanted)
    left = {path.name for path in tmp_path.iterdir()} - {"source", "built"}
    assert left == {"run", "timm"}
    again = kamim("export", trained, tmp_path / "timm", "--to", "timm", check=False)
    assert (again.returncode, "name another folder" in again.stderr) == (2, True)


def test_transformers_loads_what_is_exported_for_it(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    images = torch.randn(2, 3, 96, 96)
    exported(trained, tmp_path / "hf", "hf")
    wanted = features(load_encoder(str(trained), CPU).model, images)
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    with torch.no_grad():
        found = theirs(images).last_hidden_state
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    back = load_encoder(str(tmp_path / "hf"), CPU)
    torch.testing.assert_close(features(back.model, images), wanted)
    shape = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())["size"]
    assert shape == {"height": 96, "width": 96}


def test_an_encoder_of_other_cells_than_simmims_is_loaded_and_exported(built, tmp_path):
    words = (*SMALL, *setting("size=80", "cell=16", "w_ps=16"), "--steps", 1)
    pretrain(built, tmp_path / "run", *words)
    exported(tmp_path / "run", tmp_path / "e.safetensors", "safetensors")
    exported(tmp_path / "run", tmp_path / "timm", "timm")
    assert {
        load_encoder(str(tmp_path / n), CPU).size for n in ("run", "e.safetensors", "timm")
    } == {80}


def test_a_swin_with_a_window_of_its_own_is_read_again(built, tmp_path):
    tiny = ("options.depths=[1,1,1,1]", "options.embed_dim=24", "options.num_heads=[1,1,1,1]")
    words = ("model=swin_tiny_patch4_window7_224", *tiny, "options.window_size=2")
    pretrain(built, tmp_path / "run", *SMALL, *setting("options={}", *words), "--steps", 1)
    wanted = load_encoder(str(tmp_path / "run"), CPU).model.state_dict()
    kamim("export", tmp_path / "run", tmp_path / "swin.safetensors")
    found = load_encoder(str(tmp_path / "swin.safetensors"), CPU).model.state_dict()
    assert wanted["layers.0.blocks.0.attn.relative_position_bias_table"].shape == (9, 1)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_the_mean_of_the_weights_is_exported_by_an_option(trained, tmp_path):
    exported(trained, tmp_path / "plain.safetensors", "safetensors")
    exported(trained, tmp_path / "mean.safetensors", "safetensors", "--ema")
    state = checkpoint.load(checkpoint.chosen(trained))
    name = "blocks.0.attn.qkv.weight"
    for file, part in (("plain", "model"), ("mean", "ema")):
        found = load_file(tmp_path / f"{file}.safetensors")[name]
        assert torch.equal(found, state[part][f"encoder.{name}"])
    del state["ema"]
    torch.save(state, tmp_path / "without.pt")
    refused = kamim(
        "export", tmp_path / "without.pt", tmp_path / "x.safetensors", "--ema", check=False
    )
    assert (refused.returncode, "has no moving average" in refused.stderr) == (2, True)


def test_what_is_no_encoder_of_hugging_faces_is_one_line(trained, tmp_path):
    pytest.importorskip("transformers")
    for option in ('"act_layer": "relu"', '"no_embed_class": true', '"qkv_bias": false'):
        out = tmp_path / option[1:7]
        small = f'options={{"embed_dim": 32, "depth": 2, "num_heads": 2, {option}}}'
        pretrain(trained.parent / "built", out, *SMALL, *setting(small), "--steps", 1)
        done = kamim("export", out, tmp_path / "none", "--to", "hf", check=False)
        assert (done.returncode, "is only for models with gelu" in done.stderr) == (2, True)
        assert not (tmp_path / "none").exists()
    exported(trained, tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    for change, words in (("relu", "its activation is relu"), ("gelu_new", "its activation is")):
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"hidden_act": change}))
        with pytest.raises(ValueError, match=words):
            load_encoder(str(tmp_path / "hf"), CPU)


def test_weights_of_other_heads_or_activations_are_refused_though_shapes_agree(trained, tmp_path):
    for option in ('"num_heads": 4', '"num_heads": 2, "act_layer": "relu"'):
        other = (*SMALL, *setting(f'options={{"embed_dim": 32, "depth": 2, {option}}}'))
        words = (trained.parent / "built", tmp_path / "x", *other, "--init", trained)
        done = pretrain(*words, check=False)
        assert (done.returncode, "heads and activations" in done.stderr) == (2, True), done.stderr


def test_an_ending_that_is_not_that_of_the_form_is_refused(trained, tmp_path):
    done = kamim("export", trained, tmp_path / "x", check=False)
    assert (done.returncode, "does not end in .safetensors" in done.stderr) == (2, True)
    done = kamim("export", trained, tmp_path / "x.safetensors", "--to", "timm", check=False)
    assert (done.returncode, "is a file's name; give another" in done.stderr) == (2, True)


def test_timm_adds_a_head_and_all_may_read_it(trained, tmp_path):
    exported(trained, tmp_path / "timm", "timm")
    modes = {path.stat().st_mode for path in (tmp_path / "timm").iterdir()}
    assert len(modes) == 1
    place = f"local-dir:{tmp_path / 'timm'}"
    plain, headed = (
        timm.create_model(place, pretrained=True, **k) for k in ({}, {"num_classes": 7})
    )
    images = torch.rand(2, 3, 96, 96)
    assert headed.eval()(images).shape == (2, 7)
    torch.testing.assert_close(
        headed.forward_features(images), plain.eval().forward_features(images)
    )


def test_the_card_says_what_the_run_knows_and_its_recipe_repeats_it(trained, built, tmp_path):
    exported(trained, tmp_path / "mine", "timm", "--ema")
    card = (tmp_path / "mine" / "README.md").read_text()
    head, body = card.split("---\n")[1:3]
    assert "library_name: timm" in head
    assert "license: unknown" in head
    loss = losses(trained)[-1]
    fingerprint = json.loads((built / "manifest.json").read_text())["fingerprint"]
    for words in (f"| loss | {loss:.4g} |", fingerprint, "KAMIM (arXiv", "`fast`", "of decay 0.5"):
        assert words in body
    assert str(tmp_path) not in card  # no path of this machine
    (tmp_path / "again.toml").write_text(body.split("```toml\n")[1].split("```")[0])
    words = ("--recipe", tmp_path / "again.toml", "--steps", 3)
    pretrain(built, tmp_path / "again", *words)
    assert losses(tmp_path / "again") == losses(trained)


@pytest.mark.parametrize(
    "to",
    ["run", "hf", *(pytest.param(to, marks=pytest.mark.slow) for to in ("safetensors", "timm"))],
)
def test_a_run_starts_from_any_form_and_goes_on_and_is_repeated(to, trained, built, tmp_path):
    if to == "hf":
        pytest.importorskip("transformers")
    name = {"run": "run", "safetensors": "e.safetensors"}.get(to, to)
    if to != "run":
        exported(trained, tmp_path / name, to)
    flags = (*SMALL, "--init", tmp_path / name)
    done = pretrain(built, tmp_path / "whole", *flags)
    assert f"the encoder starts from {tmp_path / name}, SHA-256" in done.stderr
    pretrain(built, tmp_path / "first", *flags, "--steps", 1)
    state = checkpoint.load(checkpoint.chosen(tmp_path / "first"))
    started = checkpoint.load(checkpoint.chosen(trained))["model"]
    name = "encoder.blocks.0.attn.qkv.weight"
    # One step at the rate that warming up begins with.
    torch.testing.assert_close(state["model"][name], started[name], atol=1e-4, rtol=1e-3)
    assert len(state["run"]["init_sha256"]) == 64
    pretrain(built, tmp_path / "first", *SMALL, "--resume")
    assert losses(tmp_path / "first") == losses(tmp_path / "whole")
    kept = tomllib.loads((tmp_path / "first" / "run.toml").read_text())["run"]
    assert kept["init"] == str(flags[-1])
    if to == "run":
        kamim("pretrain", built, "--device", "cpu", "--recipe", tmp_path / "whole" / "run.toml")
        assert losses(tmp_path / "whole-again") == losses(tmp_path / "whole")
        other = pretrain(
            built,
            tmp_path / "first",
            *SMALL,
            "--resume",
            "--init",
            trained,
            check=False,
        )
        assert other.returncode == 0  # the same, and finished


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["size=64", "w_ps=16"], "is for 96 px, the recipe's crops have 64; --set size=96"),
        (['options={"embed_dim": 64, "depth": 2, "num_heads": 2}'], "of another architecture"),
    ],
)
def test_weights_that_do_not_fit_are_refused(words, said, trained, built, tmp_path):
    flags = (*SMALL, *setting(*words), "--init", trained)
    done = pretrain(built, tmp_path / "out", *flags, check=False)
    assert (done.returncode, said in done.stderr.splitlines()[-1]) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_starts_from_weights_of_timm(built, tmp_path, monkeypatch):
    """From the copy that its client keeps here: nothing is fetched."""
    name = "vit_tiny_patch16_224.augreg_in21k"
    torch.manual_seed(7)
    model = timm.create_model(name)
    folder = tmp_path / "hub" / f"models--timm--{name}"
    (folder / "snapshots" / "main1").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("main1")
    save_file(model.state_dict(), folder / "snapshots" / "main1" / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    flags = ("--recipe", "vit_tiny", *setting("batch=8", "epochs=1", "size=96", "decay_all=true"))
    pretrain(built, tmp_path / "out", *flags, "--init", f"timm:{name}", "--steps", 1)
    state = checkpoint.load(checkpoint.chosen(tmp_path / "out"))["model"]
    found, wanted = state["encoder.blocks.3.mlp.fc1.weight"], model.blocks[3].mlp.fc1.weight
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    nothing = pretrain(built, tmp_path / "x", *flags, "--init", "random:small", check=False)
    assert (nothing.returncode, "without --init" in nothing.stderr) == (2, True)
