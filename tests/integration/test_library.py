"""The public library, as docs/library.md describes it, with nothing but the names of `shards`."""

import ast
from importlib.util import find_spec

import numpy as np
import oracle
import pytest
from conftest import REPOSITORY
from stores import HttpStore

torch = pytest.importorskip("torch")

import shards
from shards import Plan, PlanSampler, UserError, WeightedCrops

SIZE, W_PS, CELLS, BATCH = 64, 8, 8, 10
DETECTORS = ("fast", "orb")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, demo_images):
    """40 records with maps of two detectors and a bank, built from Python."""
    import cv2

    root = tmp_path_factory.mktemp("library")
    for number, image in enumerate(demo_images[::7][:40]):
        path = root / "photos" / f"class{number % 4}" / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), cv2.resize(image, (110, 90))[:, :, ::-1])
    small = {"frame": 96, "crop": SIZE, "grid": 16, "map_crops": 1, "bank": 3, "shard_size": 8}
    manifest = shards.build(str(root / "photos"), root / "set", DETECTORS, jobs=1, **small)
    assert (manifest.count, manifest.detectors) == (40, list(DETECTORS))
    assert shards.verify(root / "set", "checksum") == []
    return root / "set"


@pytest.fixture(scope="module")
def records(folder):
    return shards.open(folder)


@pytest.fixture(scope="module")
def beton(folder, tmp_path_factory):
    """The same set as raw FFCV; it is made without FFCV, and skips where that cannot read it."""
    from shards.beton import convert_to_ffcv  # behind `kamim shards convert`

    if find_spec("ffcv") is None:  # to import it here would set torch's number of threads
        pytest.skip("FFCV is not installed: make ffcv")
    target = tmp_path_factory.mktemp("beton") / "raw"
    convert_to_ffcv(folder, target, "raw")
    return target


@pytest.fixture(scope="module")
def decoded(records):
    """Frames, float64 [40, F, F, 3], 0 to 255."""
    return np.stack([shards.decode_frame(records[n].frame) for n in range(40)]).astype(float)


def batches(records, **changes):
    """All of an epoch's batches on the CPU, kept."""
    usual = {"size": SIZE, "batch": BATCH, "weights": "fast", "device": "cpu"}
    return list(records.batches(**(usual | changes)))


# The slow twins: plain loops over pixels and cells, in float64.


def slow_crop(frame, box, flips, size):
    """The bilinear crop of a frame, [size, size, 3], each pixel from its four neighbours."""
    side = len(frame)
    top, left, height, width = (float(value) for value in box)

    def places(begin, length, turned):
        at = (np.arange(size) + 0.5) / size
        at = 1 - at if turned else at
        begin, length = begin * side, length * side
        return np.clip(begin + length * at, begin + 0.5, begin + length - 0.5) - 0.5

    out = np.zeros((size, size, 3))
    for i, y in enumerate(places(top, height, flips[1])):
        for j, x in enumerate(places(left, width, flips[0])):
            row, column = min(int(y), side - 2), min(int(x), side - 2)
            b, a = y - row, x - column
            near, far = frame[row], frame[row + 1]
            above = (1 - a) * near[column] + a * near[column + 1]
            out[i, j] = (1 - b) * above + b * ((1 - a) * far[column] + a * far[column + 1])
    return out


def slow_density(density, box, flips, name):
    """Mean of a map over each cell of a crop, cell by cell, by the detector's edge rule."""
    grid = len(density)
    edge = oracle.seen(name, SIZE).reshape(CELLS, W_PS).mean(1)
    top, left, height, width = (float(value) * grid for value in box)
    out = np.zeros((CELLS, CELLS))
    for i in range(CELLS):
        for j in range(CELLS):
            low_y, high_y = top + height * i / CELLS, top + height * (i + 1) / CELLS
            low_x, high_x = left + width * j / CELLS, left + width * (j + 1) / CELLS
            total = 0.0
            for row in range(int(low_y), min(grid, int(np.ceil(high_y)))):
                for column in range(int(low_x), min(grid, int(np.ceil(high_x)))):
                    tall = min(high_y, row + 1) - max(low_y, row)
                    wide = min(high_x, column + 1) - max(low_x, column)
                    total += max(0, tall) * max(0, wide) * density[row, column] / 255
            out[i, j] = total / ((high_y - low_y) * (high_x - low_x)) * edge[i] * edge[j]
    out = out[:, ::-1] if flips[0] else out
    return out[::-1] if flips[1] else out


def planned(records, plan, epoch, sample):
    """(box, flips) that the plan has for a sample."""
    record = records[sample]
    one = [np.array([value]) for value in (epoch, sample, record.height, record.width)]
    boxes, flips = plan.boxes(*one)
    return boxes[0], flips[0]


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("temperature", [0.25, 1.0])
def test_crops_and_weights_of_the_map_equal_their_slow_twins(records, decoded, name, temperature):
    plan = Plan(len(records), BATCH, 3)
    options = {"weights": name, "temperature": temperature, "correct": False}
    found = batches(records, seed=3, epochs=1.5, **options)
    assert len(found) == 6
    for batch in (found[0], found[-1]):
        assert (batch.images.dtype, batch.images.shape) == (torch.float32, (BATCH, 3, SIZE, SIZE))
        assert (batch.weights.dtype, batch.weights.shape) == (torch.float32, (BATCH, CELLS, CELLS))
        assert batch.labels.tolist() == [records[n].label for n in batch.samples.tolist()]
        for place in range(0, BATCH, 3):
            epoch, sample = int(batch.epochs[place]), int(batch.samples[place])
            box, flips = planned(records, plan, epoch, sample)
            image = slow_crop(decoded[sample], box, flips, SIZE).transpose(2, 0, 1) / 255
            np.testing.assert_allclose(batch.images[place], image, atol=2e-4)
            density = records[sample].maps[name]
            expected = oracle.weights(slow_density(density, box, flips, name), temperature)
            np.testing.assert_allclose(batch.weights[place], expected, rtol=1e-4)


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("w_ps", [8, 16])
def test_crops_and_weights_of_the_bank_are_those_stored(records, decoded, name, w_ps):
    slots = set()
    for batch in batches(records, weights=name, bank=True, w_ps=w_ps, epochs=3):
        assert batch.weights.shape == (BATCH, SIZE // w_ps, SIZE // w_ps)
        for place in (0, 7):
            epoch, sample = int(batch.epochs[place]), int(batch.samples[place])
            record = records[sample]
            slot = int(Plan(40, BATCH).slots(np.array([epoch]), np.array([sample]), 3)[0])
            slots.add((sample, slot))
            size = [record.height, record.width] * 2
            box, flips = record.bank.boxes[slot] / np.array(size), record.bank.flips[slot]
            image = slow_crop(decoded[sample], box, flips, SIZE).transpose(2, 0, 1) / 255
            np.testing.assert_allclose(batch.images[place], image, atol=2e-4)
            part = w_ps // 8
            counts = record.bank.counts[name][slot] / 64
            density = counts.reshape(CELLS // part, part, CELLS // part, part).mean((1, 3))
            np.testing.assert_allclose(batch.weights[place], oracle.weights(density), rtol=1e-4)
    assert len({slot for _, slot in slots}) == 3


@pytest.mark.parametrize(("correct", "bank"), [(True, False), (False, False), (True, True)])
def test_weights_are_at_least_one_or_have_mean_one(correct, bank, records):
    """Those expected of a map are above one where its least cell may have been a greater one."""
    options = {"correct": correct, "bank": bank}
    least, mean = (batches(records, normalise=kind, **options) for kind in ("min", "mean"))
    for a, b in zip(least, mean, strict=True):
        minima = a.weights.amin((1, 2), keepdim=True)
        assert (minima >= 1).all() if correct and not bank else (minima == 1).all()
        torch.testing.assert_close(b.weights.mean((1, 2)), torch.ones(BATCH))
        ratios = b.weights / b.weights.amin((1, 2), keepdim=True)
        torch.testing.assert_close(ratios, a.weights / minima)
    assert all(batch.weights is None for batch in batches(records, weights=None))


def same(ours, theirs):
    """Whether batches show the same crops with the same weights, to the last bit."""
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        for name, left, right in zip(a._fields, a, b, strict=True):
            assert left is right is None or torch.equal(left, right), name


def test_a_url_gives_the_batches_of_its_folder(folder, records, tmp_path):
    store = HttpStore(folder, tmp_path / "log")
    try:
        remote = shards.open(store.url, cache=tmp_path / "cache")
        same(batches(remote, epochs=2), batches(records, epochs=2))
        same(batches(remote, bank=True), batches(records, bank=True))
        assert remote[7].key == records[7].key
        assert remote.manifest == records.manifest
    finally:
        store.kill()


@pytest.mark.parametrize("bank", [False, True])
def test_a_beton_gives_the_batches_of_the_tars(beton, records, bank):
    same(batches(shards.open(beton), bank=bank), batches(records, bank=bank))


def test_parts_of_all_ranks_are_the_batch_and_any_step_is_where_it_goes_on(records):
    whole = batches(records, epochs=2, seed=5)
    same(batches(records, epochs=2, seed=5, first=5), whole[5:])
    parts = [batches(records, epochs=2, seed=5, rank=rank, ranks=2) for rank in (0, 1)]
    for batch, *each in zip(whole, *parts, strict=True):
        assert torch.equal(torch.cat([part.samples for part in each]), batch.samples)
        torch.testing.assert_close(torch.cat([part.weights for part in each]), batch.weights)
    assert not torch.equal(batches(records, seed=6)[0].samples, whole[0].samples)


def test_area_and_flips_are_as_asked(records, decoded):
    (batch, *_) = batches(records, area=(1.0, 1.0), flips=(0.0, 1.0))
    plan = Plan(len(records), BATCH, area=(1.0, 1.0), horizontal=0.0, vertical=1.0)
    box, flips = planned(records, plan, 0, int(batch.samples[0]))
    assert flips.tolist() == [False, True]
    assert box[2] * box[3] > 0.85  # 110 x 90 is within the ratios, but for rounding
    image = slow_crop(decoded[int(batch.samples[0])], box, flips, SIZE).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(batch.images[0], image, atol=2e-4)


@pytest.mark.parametrize("bank", [False, True])
def test_loader_module_and_dataset_give_what_batches_does(records, bank):
    usual = batches(records, bank=bank, epochs=2)
    plan = Plan(len(records), BATCH)
    crops = WeightedCrops(records, "fast", size=SIZE, bank=bank)
    loader = records.loader(plan, 0, plan.steps(2), maps=["fast"], bank=bank)
    steps, ours = [], []
    for batch, tensors in shards.to_device(loader, "cpu"):
        steps.append(batch.step)
        ours.append(crops(tensors))
    assert steps == list(range(8))
    same(ours, usual)
    dataset = records.dataset(plan, maps=["fast"], bank=bank)
    assert len(dataset) == 40
    sampler = PlanSampler(plan, 2, 8)
    assert len(sampler) == 6
    for workers in (0, 1):
        own = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, num_workers=workers)
        same([crops(batch) for batch in own], usual[2:])
    one = dataset[7]
    assert (one["samples"], one["epochs"], one["labels"]) == (7, 0, records[7].label)
    parts = [list(PlanSampler(plan, 1, 3, rank, 2)) for rank in (0, 1)]
    joined = [a + b for a, b in zip(*parts, strict=True)]
    assert joined == list(PlanSampler(plan, 1, 3))


def test_images_are_normalised_where_that_is_asked_for(records):
    plan = Plan(len(records), BATCH)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    plain, normal = (
        WeightedCrops(records, size=SIZE),
        WeightedCrops(records, size=SIZE, mean=mean, std=std),
    )
    _, tensors = next(shards.to_device(records.loader(plan, 0, 1), torch.device("cpu")))
    expected = (plain(tensors).images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(
        3, 1, 1
    )
    torch.testing.assert_close(normal(tensors).images, expected, atol=1e-5, rtol=1e-5)
    assert plain(tensors).weights is None
    crop = shards.crop_frames(tensors["frames"], tensors["boxes"], tensors["flips"], SIZE)
    torch.testing.assert_close(crop / 255, plain(tensors).images)
    assert not list(plain.parameters())
    assert not plain.state_dict()


WRONG = [
    ({"weights": "superpoint"}, "has no maps of 'superpoint', only of fast, orb"),
    ({"weights": "superpoint", "bank": True}, "has no maps of 'superpoint'"),
    ({"normalise": "max"}, "normalise is 'max'; there are min, mean"),
    ({"normalise": "max", "weights": None}, "normalise is 'max'"),
    ({"temperature": 0}, "temperature 0 is out of range; published is 0.25"),
    ({"temperature": float("nan")}, "temperature nan is out of range"),
    ({"temperature": float("inf")}, "temperature inf is out of range"),
    ({"size": 60}, "w_ps 8 does not divide the crop size 60"),
    ({"w_ps": 7}, "w_ps 7 does not divide the crop size 64"),
    ({"w_ps": 0}, "w_ps 0 is out of range"),
    ({"size": 0}, "crop size 0 is out of range"),
    ({"w_ps": 2}, "maps of 16 cells per side cannot serve 32 weight cells .* build with --grid 64"),
    ({"bank": True, "w_ps": 4}, "w_ps 4 is no multiple of the bank's 8 px"),
    ({"bank": True, "size": 96}, "the bank's crops have 64 px, not 96"),
    ({"batch": 0}, "batch 0 is out of range; give 1 or more"),
    ({"epochs": 0}, "0 epochs of 40 records make no batch of 10; give more epochs"),
    ({"epochs": -1}, "epochs -1 is out of range"),
    ({"epochs": float("inf")}, "epochs inf is out of range"),
    ({"epochs": 0.1}, "0.1 epochs of 40 records make no batch of 10"),
    ({"area": (0.9, 0.1)}, "area 0.9 to 0.1 is out of range"),
    ({"area": (0, 1)}, "area 0 to 1 is out of range"),
    ({"flips": (2, 0)}, "horizontal 2 is no probability"),
    ({"flips": (0, -1)}, "vertical -1 is no probability"),
    ({"device": "gpu"}, "device 'gpu' is unknown"),
    ({"workers": -1}, "workers -1 is out of range"),
    ({"first": -1}, "there are no steps -1 to 4"),
    ({"first": 5}, "there are no steps 5 to 4"),
    ({"ranks": 3}, "does not split into 1 micro-steps on 3 processes"),
    ({"ranks": 0}, "there is no rank 0 of 0 processes"),
    ({"rank": 2, "ranks": 2}, "there is no rank 2 of 2 processes; give 0 to 1"),
]


@pytest.mark.parametrize(("changes", "line"), WRONG)
def test_a_wrong_argument_of_batches_is_one_line(records, changes, line):
    with pytest.raises(UserError, match=line) as caught:
        batches(records, **changes)
    assert len(str(caught.value).splitlines()) == 1


def test_a_set_without_a_bank_says_how_to_add_one(folder, tmp_path):
    small = {"frame": 64, "crop": SIZE, "grid": 16, "map_crops": 0}
    shards.build(str(folder.parent / "photos"), tmp_path / "bare", jobs=1, **small)
    with pytest.raises(UserError, match="has no bank; add one by `kamim shards build"):
        batches(shards.open(tmp_path / "bare"), bank=True)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"grid": 0}, "grid 0 is out of range; give 2 to 254"),
        ({"frame": 1}, "frame 1 is out of range"),
        ({"quality": 101}, "quality 101 is out of range"),
        ({"crop": 63}, "crop 63 is no multiple of 8; give 64"),
        ({"area": (0.9, 0.1)}, r"area \(0.9, 0.1\) is out of range"),
        ({"bank": 256}, "bank 256 is out of range"),
        ({"mark": "star"}, "mark is 'star'; there are ring, disc, point"),
        ({"detect_on": "photo"}, "detect_on is 'photo'; there are source, frame"),
        ({"shard_size": -1}, "shard_size -1 is out of range"),
        ({"gird": 48}, "there is no setting 'gird'; did you mean grid"),
        ({"detectors": ("superpoint",)}, "unknown detector 'superpoint'; there are fast, orb"),
        ({"detectors": "superpoint"}, "unknown detector 'superpoint'; there are fast, orb"),
        ({"detectors": ()}, "name one or more, each once"),
        ({"detectors": ("fast", "fast")}, "detectors fast, fast: name one or more, each once"),
        ({"jobs": -1}, "jobs -1 is out of range"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; there are quarantine and fail"),
        ({"max_rejected": 7}, "max_rejected 7 is out of range; give 0 to 1"),
        ({"backend": "slurm"}, "unknown backend 'slurm'; there are loky, dask, ray"),
        ({"source": "nowhere"}, "no source at nowhere"),
    ],
)
def test_a_wrong_argument_of_build_is_one_line(changes, line, folder, tmp_path):
    arguments = {"source": str(folder.parent / "photos"), "out": tmp_path / "out", **changes}
    with pytest.raises(UserError, match=line) as caught:
        shards.build(**arguments)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_wrong_places_and_plans_are_one_line(folder, records, tmp_path):
    other, plan = Plan(7, 7), Plan(len(records), BATCH)
    for ask, line in (
        (lambda: shards.open(tmp_path), "has no manifest.json: it is not a finished set"),
        (lambda: shards.open(folder.parent), f"holds the sets {folder.name}; name one"),
        (lambda: shards.open(folder, cache=tmp_path), "a cache is for shards at a URL"),
        (lambda: shards.open("https://example.org/set"), "needs a cache: a folder on a fast"),
        (lambda: shards.open("nosuch://place/set", cache=tmp_path), "give s3://, gs://, hf://"),
        (lambda: records.loader(other), "the plan is for 7 samples, the set has 40"),
        (lambda: records.loader(records.plan(64)), "1 epoch of 40 records make no batch of 64"),
        (lambda: PlanSampler(records.plan(64)), "1 epoch of 40 records make no batch of 64"),
        (lambda: records.dataset(other), "the plan is for 7 samples, the set has 40"),
        (lambda: records.loader(plan, maps=["sift"]), "has no maps of 'sift'"),
        (lambda: records.dataset(plan, maps=["sift"]), "has no maps of 'sift'"),
        (lambda: WeightedCrops(records, "sift"), "has no maps of 'sift'"),
        (lambda: list(PlanSampler(plan, ranks=3)), "does not split"),
        (lambda: PlanSampler(plan, 9), "there are no steps 9 to 4; give 0 <= first <= last"),
        (lambda: Plan(0, 8), "count 0 is out of range"),
        (lambda: Plan(8, 8, micro_steps=0), "micro_steps 0 is out of range"),
        (lambda: Plan(8, 8, area=0.5), "area 0.5 is no pair of numbers; give two"),
        (lambda: list(records.batches(batch=8, flips=1)), "flips 1 is no pair of numbers"),
        (lambda: Plan(8, 8, ratio=(2, 1)), "ratio 2 to 1 is out of range"),
        (lambda: shards.Windows([8], 0, 0), "window 0 is out of range; give 1 or more"),
        (lambda: shards.verify(folder, "everything"), "unknown level 'everything'"),
    ):
        with pytest.raises(UserError, match=line) as caught:
            ask()
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(IndexError, match="record 40 of a set of 40"):
        records[40]
    assert "has no manifest.json" in shards.verify(tmp_path)[0]


def test_every_public_name_is_there_and_the_library_is_all_that_the_example_needs():
    for name in shards.__all__:
        assert getattr(shards, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        shards.nothing  # noqa: B018
    nodes = list(ast.walk(ast.parse((REPOSITORY / "examples" / "trainer.py").read_text())))
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    modules += [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    assert "shards" in modules
    assert not [name for name in modules if name.startswith("shards.")]
