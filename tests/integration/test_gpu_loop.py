"""The GPU loop where there is no GPU: devices by fake tensors, one graph, no waits, what is allocated.

What it cannot see: values on a card, and kernels. `kamim bench --gpu` runs those.
"""

import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import settings

torch = pytest.importorskip("torch")
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

import preprocess
import train.cuda
from train import checkpoint
from train.cuda import PEAK_FLOPS, peak_flops, warn_of_what_is_missing
from train.estimate import MOST_PART, Memory, largest_part, memory_of
from train.masking import ATTENTION, Masking
from train.models import Cells, make_model
from train.recipes import find_recipe, recipe_names
from train.schedule import learning_rate
from train.setup import find_device, make_optimizer, weighted_crops
from train.step import Pace, Step

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 4}
SWIN = {"embed_dim": 24, "depths": (2, 2, 2, 2)}
FEW = ("small", "small_simmim", "small_mae_kamim", "small_amt", "small_mae_famt", "small_famt_bf16",
       "swin_tiny", "swin_tiny_bf16", "vit_tiny_mae_kamim_bf16")  # fmt: skip
REST = [name for name in recipe_names() if name not in FEW]


class Facts:
    """What crops and masking ask of a set."""

    detectors = ("fast", "frequency")
    settings = settings(crop=96, grid=54, detectors=tuple(
        preprocess.detector_settings(name) for name in ("fast", "frequency")))  # fmt: skip
    count = 40

    def find_maps(self, names, bank=False):
        return [self.detectors.index(name) for name in names]

    @property
    def manifest(self):
        return self


def batch_of(images, size):
    """A batch's tensors as to_device gives them, of noise, on the device in force."""
    square = torch.tensor([[0.1, 0.1, 0.8, 0.8]]).repeat(images, 1)
    return {
        "frames": torch.randint(256, (images, size, size, 3), dtype=torch.uint8),
        "maps": {name: torch.randint(256, (images, 54, 27), dtype=torch.uint8)
                 for name in Facts.detectors},
        "counts": {},
        "boxes": square,
        "flips": torch.zeros(images, 2, dtype=torch.bool),
        **{name: torch.arange(images) for name in ("labels", "samples", "epochs")},
    }  # fmt: skip


def reduced(name):
    """The recipe with a model of few and narrow layers, and of few images."""
    options = SWIN if name.startswith("swin") else SMALL
    recipe = replace(find_recipe(name), options=options, batch=4)
    return replace(recipe, decoder=(32, 1, 2)) if recipe.method == "mae" else recipe


def parts_of(recipe, device=CPU):
    """(step, masking) of a recipe, as the trainer makes them, with attention of all records."""
    torch.manual_seed(0)
    facts = Facts()
    model = make_model(recipe)
    masking = Masking(recipe, 0, facts, model.encoder, 1, CPU)
    if ATTENTION in masking.guides:
        levels = torch.randint(256, (facts.count, masking.patches_a_side**2), dtype=torch.uint8)
        masking.attention = levels
    detector = "fast" if recipe.temperature else None
    return Step(model, weighted_crops(recipe, facts, detector)), masking


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


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(n, marks=pytest.mark.slow) for n in REST)])
def test_a_step_meets_no_tensor_of_another_device(name, fake_cuda):
    recipe = reduced(name)
    with unset_fake_temporarily():
        step, masking = parts_of(recipe)
    step, masking.device = faked(step, fake_cuda), CUDA
    masking.visible = {k: fake_cuda.from_tensor(v).to("cuda") for k, v in masking.visible.items()}
    if masking.attention is not None:
        masking.attention = fake_cuda.from_tensor(masking.attention).to("cuda")
    tensors = batch_of(4, recipe.size)
    tensors = {k: {n: m.to("cuda") for n, m in v.items()} if isinstance(v, dict) else v.to("cuda")
               for k, v in tensors.items()}  # fmt: skip
    noise = torch.rand(4, masking.side**2, device="cuda")
    loss, mean_weight = step(tensors, masking.hidden(noise, masking.begin, tensors))
    for each in (loss, mean_weight):
        assert (each.dtype, each.device.type, each.shape) == (torch.float32, "cuda", ())


def test_a_tensor_of_another_device_is_noticed(fake_cuda):
    with pytest.raises(RuntimeError, match="same device"):
        torch.empty(3, device="cuda") + torch.empty(3)


# One graph.


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["small", "small_mae_kamim", "small_famt", "swin_tiny_bf16"])
def test_a_step_is_one_graph_that_is_made_once(name):
    """Of crops, weights, forward, loss and backward, over steps whose boxes and masks differ."""
    recipe = reduced(name)
    step, masking = parts_of(recipe)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    graph = torch.compile(step, dynamic=False, fullgraph=True, backend=counter)
    for number in range(masking.begin, masking.begin + 3):
        tensors = batch_of(2, recipe.size)
        begin = 2 * (number % 2)  # both halves of a step's noise
        noise = masking.noise(number)[begin : begin + 2]
        cells = masking.hidden(noise, number, tensors)
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


def to_fake(tensors):
    return {k: {n: m.to("cuda") for n, m in v.items()} if isinstance(v, dict) else v.to("cuda")
            for k, v in tensors.items()}  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_a_step_waits_for_nothing(name, fake_cuda, monkeypatch):
    """Masking, forward and loss; backward and the optimizer are torch's."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    recipe = reduced(name)
    with unset_fake_temporarily():
        step, masking = parts_of(recipe)
    step, masking.device = faked(step, fake_cuda), CUDA
    masking.visible = {k: fake_cuda.from_tensor(v).to("cuda") for k, v in masking.visible.items()}
    if masking.attention is not None:
        masking.attention = fake_cuda.from_tensor(masking.attention).to("cuda")
    tensors = to_fake(batch_of(4, recipe.size))
    plain = recipe.method == "simmim" and not (masking.guides or recipe.throw_ratio)
    with waits() as found:
        if plain:  # its generator is on the card
            noise = torch.rand(4, masking.side, masking.side, device="cuda") < 0.6
        else:
            noise = masking.noise(masking.begin)
        step(tensors, masking.hidden(noise, masking.begin, tensors))
    assert found == []


def test_waits_are_noticed(fake_cuda):
    there = torch.rand(3, device="cuda")
    with waits() as found:
        there.new_tensor([1.0, 2.0, 3.0])
        there.cpu()
        torch.rand(3).to("cuda", non_blocking=True)
        there.to("cuda", torch.bfloat16)
    assert found == ["_to_copy ['cpu'] to cuda", "_to_copy ['cuda'] to cpu"]
