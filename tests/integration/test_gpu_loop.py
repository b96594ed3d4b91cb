"""The GPU loop where there is no GPU: devices by fake tensors, one graph, no waits, memory.

What it cannot see: values on a card, and kernels. `kamim bench --gpu` runs those.
"""

import json
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
from conftest import settings

torch = pytest.importorskip("torch")
from timm.utils import ModelEmaV3
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import preprocess
import train.cuda
from kamim.bench.throw import Facts
from train import checkpoint
from train.cuda import PEAK_FLOPS, peak_flops, warn_of_what_is_missing
from train.estimate import MOST_PART, Memory, largest_part, memory_of, memory_told
from train.log import make_rows
from train.masking import ATTENTION, Masking
from train.models import make_model
from train.recipes import changed, find_recipe, recipe_names
from train.request import compiler_missing
from train.setup import find_device, make_optimizer, weighted_crops
from train.step import Pace, Step, in_parallel, weighed

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 4}
SWIN = {"embed_dim": 24, "depths": (2, 2, 2, 2)}
FEW = (
    "small",
    "small_simmim",
    "small_mae_kamim",
    "small_amt",
    "small_mae_famt",
    "small_famt_bf16",
    "small:permuted",
    "small:contrast",
    "swin_tiny",
    "swin_tiny_bf16",
    "vit_tiny_mae_kamim_bf16",
)
REST = [name for name in recipe_names() if name not in FEW]


DETECTORS = ("fast", "frequency")


def facts():
    """What crops and masking ask of a set."""
    chosen = tuple(map(preprocess.detector_settings, DETECTORS))
    return Facts(settings(crop=96, grid=54, detectors=chosen), 40)


def batch_of(images, size):
    """A batch's tensors as to_device gives them, of noise, on the device in force."""
    square = torch.tensor([[0.1, 0.1, 0.8, 0.8]]).repeat(images, 1)
    return {
        "frames": torch.randint(256, (images, size, size, 3), dtype=torch.uint8),
        "maps": {
            name: torch.randint(256, (images, 54, 54), dtype=torch.uint8) for name in DETECTORS
        },
        "counts": {},
        "boxes": square,
        "flips": torch.zeros(images, 2, dtype=torch.bool),
        **{name: torch.arange(images) for name in ("labels", "samples", "epochs")},
    }


def reduced(name):
    """The recipe `name`, or name:weights, with few and narrow layers, and of few images."""
    name, _, more = name.partition(":")
    weights, words = ("", [more]) if "=" in more else (more, [])
    options = SWIN if name.startswith("swin") else SMALL
    recipe = changed(find_recipe(name), words)
    recipe = replace(recipe, options=options, batch=4, weights=weights or "detector")
    return replace(recipe, decoder=(32, 1, 2)) if recipe.method == "mae" else recipe


def parts_of(recipe):
    """(step, masking) of a recipe, as the trainer makes them, with attention of all records."""
    torch.manual_seed(0)
    records = facts()
    model = make_model(recipe)
    masking = Masking(recipe, 0, records, model.encoder, 1, CPU)
    if ATTENTION in masking.guides:
        levels = torch.randint(256, (len(records), masking.patches_a_side**2), dtype=torch.uint8)
        masking.attention = levels
    detector = "fast" if recipe.temperature else None
    return Step(model, weighted_crops(recipe, records, detector)), masking


# Every tensor of a step is on the device.


@pytest.fixture
def fake_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode


def faked(module, mode):
    """`module`, made on the CPU, with its tensors as those of a card that is not there."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None:
                fake = mode.from_tensor(parameter).detach().to("cuda")
                each._parameters[name] = torch.nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = mode.from_tensor(buffer).to("cuda")
    return module


def on_fake_cuda(recipe, mode):
    """(step, masking, a batch's tensors), on a card that is not there."""
    with unset_fake_temporarily():
        step, masking = parts_of(recipe)
    masking.device = CUDA
    for edge in masking.edges.values():
        faked(edge, mode)
    if masking.attention is not None:
        masking.attention = mode.from_tensor(masking.attention).to("cuda")
    with torch.device("cuda"):
        return faked(step, mode), masking, batch_of(4, recipe.size)


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in REST)])
def test_a_step_meets_no_tensor_of_another_device(name, fake_cuda):
    recipe = reduced(name)
    step, masking, tensors = on_fake_cuda(recipe, fake_cuda)
    noise = torch.rand(4, masking.side**2, device="cuda")
    loss, of_weights = step(tensors, masking.cells(noise, masking.begin, tensors))
    for each, shape in ((loss, ()), (of_weights, (2,))):
        assert (each.dtype, each.device.type, each.shape) == (torch.float32, "cuda", shape)


def test_a_tensor_of_another_device_is_noticed(fake_cuda):
    with pytest.raises(RuntimeError, match="same device"):
        torch.empty(3, device="cuda") + torch.empty(3)


# One graph.


@pytest.mark.parametrize(
    "name",
    ["small", "small:permuted", "small_mae_kamim", "small_famt", "small:checkpoint=true"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("small:inverse", "swin_tiny_bf16", "small_mae_kamim:checkpoint=true")
    ],
)
def test_a_step_is_one_graph_that_is_made_once(name):
    """Of crops, weights, forward, loss and backward, over steps whose boxes, masks and temperatures
    differ.
    """
    recipe = reduced(name)
    step, masking = parts_of(recipe)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(step, dynamic=False, fullgraph=True, backend=counter)
    for number in range(masking.begin, masking.begin + 3):
        tensors = batch_of(2, recipe.size) | weighed(1 / (1 + number), CPU)
        begin = 2 * (number % 2)  # both halves of a step's noise
        noise = masking.noise(number)[begin : begin + 2]
        cells = masking.cells(noise, number, tensors)
        (loss, _), (plain, _) = graph(tensors, cells), step(tensors, cells)
        loss.backward()
        if not name.startswith("swin"):  # its layers are dropped at random
            assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert counter.frame_count == 1


# No waits.


class Waits(TorchDispatchMode):
    """Notes each operation that would wait for a device: values read, copies that block."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = op.overloadpacket.__name__
        if name in ("_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero", "unique"):
            self.found.append(name)
        before = [each.device.type for each in args if isinstance(each, torch.Tensor)]
        given = op(*args, **kwargs)
        if name in ("_to_copy", "copy_") and isinstance(given, torch.Tensor):
            kinds = {given.device.type, *before[-1:]}
            asynchronous = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
            if len(kinds) > 1 and not asynchronous:
                self.found.append(f"{name} {before[-1:]} to {given.device.type}")
        return given


@contextmanager
def waits():
    with Waits() as mode:
        yield mode.found


@pytest.mark.parametrize("name", FEW)
def test_a_step_waits_for_nothing(name, fake_cuda, monkeypatch):
    """Masking, forward and loss; backward and the optimizer are torch's."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    recipe = reduced(name)
    step, masking, tensors = on_fake_cuda(recipe, fake_cuda)
    plain = recipe.method == "simmim" and not (masking.guides or recipe.throw_ratio)
    with waits() as found:
        tensors |= weighed(0.5, CUDA)
        if plain:  # its generator is on the card
            noise = torch.rand(4, masking.side, masking.side, device="cuda") < 0.6
        else:
            noise = masking.noise(masking.begin)
        step(tensors, masking.cells(noise, masking.begin, tensors))
    assert found == []


def test_a_mean_of_the_weights_waits_for_nothing(fake_cuda):
    with unset_fake_temporarily():
        step, _ = parts_of(reduced("small_mae"))
        average = ModelEmaV3(step.model, 0.99, use_warmup=True)
    faked(step, fake_cuda), faked(average.module, fake_cuda)
    with waits() as found:
        average.update(step.model, 3)
    assert found == []


def test_waits_are_noticed(fake_cuda):
    there = torch.rand(3, device="cuda")
    with waits() as found:
        there.new_tensor([1.0, 2.0, 3.0])
        there.cpu()
        torch.rand(3).to("cuda", non_blocking=True)
        there.to("cuda", torch.bfloat16)
    assert found == ["_to_copy ['cpu'] to cuda", "_to_copy ['cuda'] to cpu"]


class Clock:
    """Events of a card whose time is `now`, in seconds."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Clock.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


def test_a_device_is_said_to_wait_only_while_it_has_nothing_to_do(monkeypatch):
    """A loader that is slower than the device by a tenth keeps the host waiting all the time."""
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    host = iter(range(0, 1000, 10))  # each question takes the host ten seconds
    monkeypatch.setattr("train.step.time.perf_counter", lambda: float(next(host)))

    def batches():
        while True:
            Clock.now += 1.0  # since the micro-step before was done
            yield None, {}

    pace = Pace(batches(), CUDA)
    for _ in range(12):
        pace.next()
        Clock.now += 9.0
    assert pace.take() == pytest.approx(10 * 1.0)  # two are still open
    assert pace.second == pytest.approx(9.0)
    assert pace.take() == 0


def test_on_a_cpu_the_process_waits(monkeypatch):
    times = iter([0.0, 0.0, 3.0, 3.0] + [10.0, 10.0, 12.0, 12.0] + [20.0] * 8)
    monkeypatch.setattr("train.step.time.perf_counter", lambda: next(times))
    pace = Pace(iter([(None, {})] * 4), CPU)
    for _ in range(4):
        pace.next()
    assert pace.take() == pytest.approx(5.0)
    assert pace.second == pytest.approx(8.0)


# Memory.


def kept_by(work):
    """Bytes that autograd keeps of `work`."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = work()
    del loss
    return sum(size for size, _ in kept.values())


# MB for each image, kept for the backward pass in bfloat16; compiled, a card allocated as much to
# within a tenth (13, 26, 53 and 44).
MEGABYTES = {"vit_tiny": 12.91, "vit_small": 25.12, "vit_base": 49.55, "swin_tiny": 43.50}


@pytest.mark.parametrize("name", MEGABYTES)
def test_an_image_takes_no_more_memory_than_it_did_and_no_more_than_is_reckoned_with(
    name, monkeypatch
):
    def in_bf16(device):
        return torch.autocast("cpu", torch.bfloat16)

    monkeypatch.setattr("train.step.in_bf16", in_bf16)
    monkeypatch.setattr("train.estimate.in_bf16", in_bf16)
    recipe = replace(find_recipe(name), batch=2)
    step, masking = parts_of(recipe)
    sizes = []
    for images in (1, 2):
        tensors = batch_of(images, 256)
        cells = masking.cells(masking.noise(0)[:images], 0, tensors)
        sizes.append(kept_by(lambda tensors=tensors, cells=cells: step(tensors, cells)))
    image = (sizes[1] - sizes[0]) / 1e6
    assert image <= 1.05 * MEGABYTES[name]
    memory = memory_of(step.model, masking.example(), recipe.size, CPU)
    assert 0.9 < memory.image / 1e6 / image < 1.1


def test_micro_batches_fill_a_card_unless_it_is_said_how_large_they_are(monkeypatch):
    monkeypatch.setattr("train.estimate.memory_free", lambda device: 80e9)
    base, tiny = Memory(1.6e9, 50e6), Memory(0.1e9, 13e6)
    assert largest_part(0, 1e9, CUDA, base) == MOST_PART == largest_part(0, 1e9, CUDA, tiny)
    assert largest_part(0, 1e9, CUDA, Memory(1.6e9, 200e6)) == 281
    assert largest_part(0, 1e9, CUDA, Memory(90e9, 1e6)) == 1  # memory_lines warns
    assert largest_part(64, 1e9, CUDA, base) == 64
    assert largest_part(0, 1e9, CUDA) == 256  # to the last bit, whatever is free
    assert largest_part(0, 1e6, CPU, base) == 256


@pytest.mark.parametrize(
    ("fits", "said"),
    [
        (100, "--micro-batch 100 fits, or --set checkpoint=true"),
        (300, "--micro-batch 128 takes less"),
        (0, "take a smaller model"),
    ],
)
def test_full_memory_is_told_with_the_number_that_fits(fits, said):
    with pytest.raises(ValueError, match=f"GPU's memory is full with 256 .*; {said}"):  # noqa: SIM117
        with memory_told(256, fits):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(ValueError, match=f"the memory is full with 256 .*; {said}"):  # noqa: SIM117
        with memory_told(256, fits):
            torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="another"), memory_told(256, fits):
        raise RuntimeError("another")


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("vit_small", 0.6),
        ("vit_small_mae", 0.75),
        pytest.param("swin_tiny", 0.6, marks=pytest.mark.slow),
    ],
)
def test_activations_that_are_computed_again_are_not_kept(name, share):
    """The loss and its gradients are the same to the last bit; memory is a fraction, of MAE a
    larger one: its decoder keeps its own.
    """
    found = []
    for words in ((), ("checkpoint=true",)):
        recipe = replace(changed(find_recipe(name), words), batch=2)
        step, masking = parts_of(recipe)
        tensors, cells = batch_of(2, 256), masking.cells(masking.noise(0), 0, {})
        torch.manual_seed(1)
        tensors["frames"] = torch.randint(256, (2, 256, 256, 3), dtype=torch.uint8)
        loss, _ = step(tensors, cells)
        loss.backward()
        grads = [p.grad for p in step.model.parameters() if p.grad is not None]
        memory = memory_of(step.model, masking.example(), recipe.size, CPU, recipe.checkpoint)
        found.append((loss, grads, memory.image))
    (loss, grads, plain), (again, theirs, less) = found
    assert torch.equal(loss, again)
    assert all(map(torch.equal, grads, theirs))
    assert less < share * plain


def test_a_run_of_attention_is_measured_as_it_begins():
    """Until its random phase ends nothing is thrown, and all cells take memory."""
    _, masking = parts_of(replace(reduced("small_famt"), random_epochs=1.0))
    assert masking.example(early=True).encoded is None
    assert masking.example().encoded is not None


# The residual stream in bfloat16.


@pytest.mark.parametrize(
    "name", ["small_bf16", "small_famt_bf16", "small_mae_kamim_bf16", "swin_tiny_bf16"]
)
def test_a_narrow_residual_stream_differs_by_rounding(name):
    recipe = reduced(name)
    step, masking = parts_of(recipe)
    wide = make_model(replace(recipe, bf16_residual=False)).eval()
    narrow = step.model.eval()
    wide.load_state_dict(narrow.state_dict())
    tensors = batch_of(4, recipe.size)
    images, *_ = step.crops(tensors)
    cells = masking.cells(masking.noise(masking.begin), masking.begin, tensors)
    blocks = (
        narrow.encoder.layers[0].blocks
        if narrow.encoder.__class__.__name__.startswith("Swin")
        else narrow.encoder.blocks
    )
    seen = []
    blocks[1].register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    with torch.no_grad():
        torch.testing.assert_close(narrow(images, *cells), wide(images, *cells))
        with torch.autocast("cpu", torch.bfloat16):
            one, two = (model(images, *cells).float() for model in (narrow, wide))
    assert seen == [torch.float32, torch.bfloat16]
    assert one.shape == two.shape
    assert (one - two).norm() < 0.03 * two.norm()


# Checkpoints.


def test_a_checkpoint_holds_what_was_when_it_was_saved(tmp_path):
    weight = torch.ones(4)
    with checkpoint.Saver(tmp_path, 0, CPU) as saver:
        for step in (1, 2):
            state = {"model": {"w": weight}, "optimizer": {"param_groups": [{"params": [0]}]}}
            saver.save(step, state | {"run": {}, "seconds": 1.0})
            weight += 1
    found = [checkpoint.load(tmp_path / f"step-{step:08d}.pt") for step in (1, 2)]
    assert [each["model"]["w"].tolist() for each in found] == [[1] * 4, [2] * 4]
    assert found[0]["optimizer"]["param_groups"] == [{"params": [0]}]


def test_a_gradient_without_end_stops_the_run_before_its_weights_are_saved():
    row = (3, {"lr": 1e-3}, torch.tensor([0.5, 1.0, 1.0, math.inf]))
    with pytest.raises(ValueError, match="norm of its gradient inf; lower the peak"):
        make_rows([row], 10, 1)


def test_a_write_that_fails_is_raised_at_the_next_save_or_at_the_end(tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space")

    monkeypatch.setattr(checkpoint, "save", full)
    saver = checkpoint.Saver(tmp_path, 0, CPU)
    saver.save(1, {})
    with pytest.raises(OSError, match="no space"):
        saver.save(2, {})
    with pytest.raises(OSError, match="no space"), checkpoint.Saver(tmp_path, 0, CPU) as saver:
        saver.save(1, {})
    with pytest.raises(KeyError), checkpoint.Saver(tmp_path, 0, CPU) as saver:
        saver.save(1, {}) or {}["what went wrong first"]


def test_a_state_of_a_cpu_goes_on_fused_on_a_card(tmp_path):
    """AdamW's own loading would keep the switch of the run before, and be slow from then on."""
    from train.request import Run

    recipe = reduced("small_simmim")
    model = make_model(recipe)
    plain = make_optimizer(model, recipe, CPU)
    sum(p.sum() for p in model.parameters()).backward()
    plain.step()
    state = {"model": model.state_dict(), "optimizer": plain.state_dict()}
    run = Run(shards=tmp_path, out=tmp_path, recipe=recipe, resume=True)
    facts = {"recipe": json.loads(json.dumps(checkpoint.asdict(recipe)))}
    checkpoint.save(tmp_path / "checkpoints", 3, state | {"run": facts, "seconds": 2.0})
    fused = torch.optim.AdamW([{"params": g["params"]} for g in plain.param_groups], fused=True)
    assert checkpoint.restore(run, facts, model, fused) == (3, 2.0, recipe.epochs)
    assert [group["fused"] for group in fused.param_groups] == [True] * len(fused.param_groups)
    fused.step()


# Cards.


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("", None),
    ],
)
def test_the_peak_is_that_of_the_very_card(name, peak):
    assert peak_flops(name) == peak
    assert set(PEAK_FLOPS.values()) >= {peak} - {None}


def test_a_process_that_sees_one_card_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert find_device("cuda").index == 0


def test_a_card_that_torch_does_not_see_is_told_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.cuda, "Path", lambda name: tmp_path)
    warn_of_what_is_missing(CPU)
    assert capsys.readouterr().err == ""
    (tmp_path / "nvidia0").touch()
    warn_of_what_is_missing(CPU)
    assert "torch sees no CUDA" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old card")
    warn_of_what_is_missing(CUDA)
    assert "Old card has no bfloat16" in capsys.readouterr().err


def test_what_compiling_needs_is_told_with_what_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("train.request.shutil.which", lambda name: "/usr/bin/gcc")
    monkeypatch.setattr("train.request.sysconfig.get_path", lambda name: str(tmp_path))
    assert compiler_missing() == "apt-get install python3-dev"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    warn_of_what_is_missing(CUDA, compiles=False)
    assert capsys.readouterr().err == ""
    warn_of_what_is_missing(CUDA)
    assert "not compiled, and slow; type: apt-get install python3-dev" in capsys.readouterr().err
    (tmp_path / "Python.h").touch()
    assert compiler_missing() == ""
    monkeypatch.setattr("train.request.shutil.which", lambda name: None)
    assert compiler_missing() == "apt-get install gcc"


# Several processes.


def test_a_step_compiles_inside_ddp(tmp_path):
    """DDP cuts the graph where its buckets end; loss and gradients are those of one process."""
    recipe = reduced("small_mae_kamim")
    step, masking = parts_of(recipe)
    tensors = batch_of(4, recipe.size)
    cells = masking.cells(masking.noise(0), 0, tensors)
    loss, _ = step(tensors, cells)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in step.named_parameters() if p.requires_grad}
    step.zero_grad()
    meeting = f"file://{tmp_path / 'meeting'}"
    torch.distributed.init_process_group("gloo", meeting, rank=0, world_size=1)
    try:
        parallel = in_parallel(step)
        torch._dynamo.reset()
        graph = torch.compile(parallel, dynamic=False, backend="aot_eager")
        for apart in (True, False):
            with parallel.no_sync() if apart else nullcontext():
                found, _ = graph(tensors, cells)
                (found / 2).backward()
            assert found.item() == pytest.approx(loss.item(), rel=1e-5)
        for name, parameter in step.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()
