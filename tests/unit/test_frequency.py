"""The frequency map: what it shows, that it is exact, and that a set with one is a set like any."""

import numpy as np
import pytest
from conftest import contents, settings

import preprocess
import shards
from preprocess import build_shards, detector_settings, measure_fidelity, open_source
from preprocess.densities import density_maps
from preprocess.frequency import frequency_map
from shards.crops import visible_cells

FREQUENCY = detector_settings("frequency")
BOTH = (detector_settings("fast"), FREQUENCY)


def test_it_is_the_low_pass_of_the_image_and_nothing_else():
    """A fine checkerboard and a flat grey have none; a blob has it where it lies."""
    y, x = np.mgrid[:192, :288]
    fine = np.repeat((((y + x) % 2) * 255).astype(np.uint8)[:, :, None], 3, axis=2)
    assert frequency_map(fine, FREQUENCY, 14).max() < 0.02
    assert frequency_map(np.full((60, 80, 3), 200, np.uint8), FREQUENCY, 14).max() < 1e-6
    blob = np.zeros((192, 288, 3), np.uint8)
    blob[20:60, 200:270] = 255
    wide = shards.Detector("frequency", FREQUENCY.options | {"scale": 480.0})  # nothing is clipped
    found = frequency_map(blob, wide, 14)
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert (row, column) == pytest.approx((40 / 192 * 14, 235 / 288 * 14), abs=1)
    assert 0.1 < found.max() < 1
    assert frequency_map(blob, FREQUENCY, 14).max() == 1


def test_the_wave_at_the_cutoff_has_half_the_power():
    """A cosine that the mirrored square holds whole, by the definition of the gain."""
    place = (np.arange(96) + 0.5) / 96
    means = []
    for cycles in (3.5, 7.0):
        wave = np.rint(127.5 + 100 * np.cos(2 * np.pi * cycles * place)).astype(np.uint8)
        found = frequency_map(np.tile(wave[:, None, None], (1, 96, 3)), FREQUENCY, 2)
        means.append((found**2).mean() * 120**2)
    assert means[1] / 5000 == pytest.approx(0.5, rel=0.02)
    assert means[0] / 5000 == pytest.approx(2**-0.25, rel=0.02)


def test_maps_beside_it_stay_and_bytes_do_not_depend_on_jobs(small_source, tmp_path):
    source = open_source(str(small_source))
    chosen = settings(detectors=BOTH)
    build_shards(source, tmp_path / "both", chosen, 1)
    build_shards(source, tmp_path / "again", chosen, 2)
    assert contents(tmp_path / "both") == contents(tmp_path / "again")
    build_shards(source, tmp_path / "fast", settings(), 1)
    both, fast = shards.ShardSet(tmp_path / "both"), shards.ShardSet(tmp_path / "fast")
    assert all(np.array_equal(both[n].maps["fast"], fast[n].maps["fast"]) for n in range(len(fast)))
    assert np.median([len(np.unique(both[n].maps["frequency"])) for n in range(len(fast))]) > 6
    options = both.manifest.settings.detectors[1].options
    assert options == {"cutoff": 7.0, "scale": 120.0}
    assert "numpy" in both.manifest.versions
    assert "numpy" not in fast.manifest.versions
    # Added to a finished set: the bytes of one build.
    build_shards(source, tmp_path / "added", chosen, 1, reuse=tmp_path / "fast")
    assert contents(tmp_path / "added") == contents(tmp_path / "both")


def test_verify_redetect_fidelity_and_inspect_take_it(small_source, tmp_path):
    source = open_source(str(small_source))
    build_shards(source, tmp_path / "both", settings(detectors=BOTH), 1)
    records = shards.ShardSet(tmp_path / "both")
    assert shards.verify(tmp_path / "both", "decode") == []
    assert preprocess.redetect_maps(records, source, 5) == []
    assert set(measure_fidelity(records, source, 3, jobs=1)) == {"fast"}
    assert preprocess.draw_fidelity(records, source, 2).shape[0] == 2 * 214
    page = shards.inspect_page(records, 0.25, 8, 2)
    assert page.count("frequency: the frame, bright") == 2
    assert "weights of fast" in page
    assert "weights of frequency" not in page
    build_shards(source, tmp_path / "only", settings(detectors=(FREQUENCY,)), 1)
    with pytest.raises(ValueError, match="has no keypoint maps"):
        measure_fidelity(shards.ShardSet(tmp_path / "only"), source, 3, jobs=1)


def test_it_sees_to_the_edge_and_lies_as_densities_lie():
    assert (visible_cells(FREQUENCY, 192, 24, "ring") == 1).all()
    assert (visible_cells(FREQUENCY, 192, 24, "point") == 1).all()
    image = np.zeros((80, 96, 3), np.uint8)
    image[:40, 48:] = 255
    maps = density_maps(image, 0, settings(detectors=(FREQUENCY,), grid=16))["frequency"]
    assert maps[:6, 10:].mean() > maps[10:, :6].mean()


def test_what_it_cannot_do_is_one_line(small_source, tmp_path):
    with pytest.raises(ValueError, match="frequency has none: build it without a bank"):
        build_shards(
            open_source(str(small_source)), tmp_path / "x", settings(detectors=BOTH, bank=2), 1
        )
    assert not (tmp_path / "x").exists()
    for text, words in (("0", "out of range"), ("30", "give above 0 to 24"), ("-1", "at least 0")):
        with pytest.raises(ValueError, match=words):
            detector_settings("frequency", {"cutoff": text})
    with pytest.raises(ValueError, match="not positive"):
        detector_settings("frequency", {"scale": "0"})
