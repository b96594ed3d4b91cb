"""Attention diagnostics on attention whose figures are known."""

import pytest

torch = pytest.importorskip("torch")

from kamim.evaluate.encoder import load_encoder
from train import diagnosis as attention


def test_uniform_attention_has_the_published_distance_and_no_information():
    distances = attention.pixel_distances(12, 16)
    uniform = torch.full((2, 3, 144, 144), 1 / 144)
    assert attention.mean_distance(uniform, distances) == pytest.approx(99.75, abs=0.05)
    assert attention.mutual_information(uniform) == pytest.approx(0, abs=1e-5)


def test_attention_to_oneself_reaches_nowhere_and_tells_all():
    same = torch.eye(144).expand(1, 2, 144, 144)
    assert attention.mean_distance(same, attention.pixel_distances(12, 16)) == 0
    assert attention.mutual_information(same) == pytest.approx(1, abs=1e-5)


def test_attention_to_one_key_tells_nothing():
    alike = torch.zeros(1, 1, 16, 16)
    alike[..., 5] = 1
    assert attention.mutual_information(alike) == pytest.approx(0, abs=1e-5)


def test_smooth_tokens_have_low_frequencies():
    ramp = torch.arange(8.0).repeat(8, 1).flatten()[None, :, None]
    noise = torch.randn(1, 64, 1, generator=torch.Generator().manual_seed(0))
    assert attention.high_frequency(ramp + 5, 8) < attention.high_frequency(noise, 8)


def test_the_blocks_are_timms_own():
    """Attention times values, projected, is what the block adds."""
    model = load_encoder("random:vit_tiny_patch16_224", torch.device("cpu"), 96).model
    tokens = torch.randn(1, 37, 192)
    block = model.blocks[3]
    weights = attention.attention_of(block, tokens, 0)
    normed = block.norm1(tokens)
    value = block.attn.qkv(normed).reshape(1, 37, 3, 3, 64)[:, :, 2].permute(0, 2, 1, 3)
    ours = block.attn.proj((weights @ value).transpose(1, 2).reshape(1, 37, 192))
    torch.testing.assert_close(ours, block.attn(normed), atol=1e-5, rtol=1e-4)
    rows = attention.diagnose(model, torch.randn(2, 3, 96, 96))
    assert [row["block"] for row in rows] == list(range(1, 13))
    assert all(row["uniform"] == pytest.approx(49.9, abs=1.5) for row in rows)
