"""Training with labels: a head on a frozen encoder (the paper's probe), or all of it.

A run folder holds metrics.jsonl and a checkpoint per epoch. Killed, a run goes on from there, to
the same numbers.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from shards import Plan, ShardSet, Windows
from shards.errors import UserError
from shards.progress import progress
from shards.rng import Purpose, mix
from train import checkpoint
from train.estimate import largest_part, memory_of
from train.features import Encoder, Pool, tokens, whole_frames
from train.metrics import METRICS, trim
from train.models import in_bf16, normalised
from train.schedule import learning_rate
from train.setup import WINDOW
from train.step import compiled


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRecipe:
    """How to train with labels. The defaults are KAMIM's (For GPUs/utils/config.py): peak, floor
    and start are learning rates; epochs include the warm-up; layer_decay below 1 is SimMIM's.
    """

    frozen: bool = False
    epochs: float = 100
    warmup: float = 10
    batch: int = 2048
    peak: float = 5e-3
    floor: float = 2.5e-6
    start: float = 2.5e-6
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    clip: float = 0.0  # of the gradient's norm; 0: none
    smoothing: float = 0.0
    mixup: float = 1.0  # alpha; each batch is mixed up or cut-mixed, at random
    cutmix: float = 1.0


# SimMIM: configs/vit_base__800ep/simmim_finetune__vit_base__img224__800ep.yaml.
SIMMIM = LabelRecipe(
    warmup=20,
    peak=1.25e-3,
    start=2.5e-7,
    floor=2.5e-7,
    layer_decay=0.65,
    clip=5.0,
    smoothing=0.1,
    mixup=0.8,
)
RECIPES = {"paper-probe": LabelRecipe(frozen=True), "kamim": LabelRecipe(), "simmim": SIMMIM}


class Classifier(nn.Module):
    """Pooled tokens of a block through one linear layer; images [b, 3, S, S] to logits [b, n]."""

    def __init__(
        self, encoder: Encoder, block: int, pool: Pool, classes: int, frozen: bool
    ) -> None:
        super().__init__()
        self.trunk, self.block, self.pool, self.frozen = encoder.model, block, pool, frozen
        self.encoder = [encoder]  # in a list: the trunk is the one that is registered
        width = _width(encoder, block)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.trunk.requires_grad_(not frozen)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        with torch.set_grad_enabled(not self.frozen and torch.is_grad_enabled()):
            patches, cls = tokens(self.encoder[0], images, self.block)
        features = patches.mean(1) if self.pool == "mean" else cls
        logits: Tensor = self.head(features)
        return logits

    def train(self, mode: bool = True) -> "Classifier":
        """A frozen trunk stays as it is evaluated."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self


def _width(encoder: Encoder, block: int) -> int:
    device = next(encoder.model.parameters()).device
    with torch.inference_mode():
        blank = torch.zeros(1, 3, encoder.size, encoder.size, device=device)
        return int(tokens(encoder, blank, block)[0].shape[-1])


def parameter_groups(model: Classifier, recipe: LabelRecipe) -> list[dict[str, Any]]:
    """A group a layer: its rate is layer_decay to the power of its distance from the head."""
    layers: dict[int, list[nn.Parameter]] = {}
    depth = model.encoder[0].blocks + 1
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layers.setdefault(_layer(name, depth), []).append(parameter)
    return [
        {"params": parameters, "scale": recipe.layer_decay ** (depth - layer)}
        for layer, parameters in sorted(layers.items())
    ]


def _layer(name: str, depth: int) -> int:
    """0 for the embedding, 1.. for blocks or stages, `depth` for the head and the last norm."""
    parts = name.split(".")
    if parts[0] == "trunk" and parts[1] in ("blocks", "layers"):
        return int(parts[2]) + 1
    return 0 if parts[1] in ("patch_embed", "cls_token", "pos_embed") else depth


def augmented(
    frames: Tensor, labels: Tensor, classes: int, recipe: LabelRecipe, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """A step's images, normalised, and soft labels [b, classes]: TrivialAugmentWide, erasing, then
    MixUp or CutMix. frames: uint8 [b, 3, S, S]. All drawn from (seed, step).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(mix(Purpose.AUGMENT, seed, step)) >> 1)
        trivial, erase = v2.TrivialAugmentWide(), v2.RandomErasing()
        images = normalised(torch.stack([trivial(frame) for frame in frames]).float())
        images = torch.stack([erase(image) for image in images])
        mixup = v2.MixUp(alpha=recipe.mixup, num_classes=classes)
        cutmix = v2.CutMix(alpha=recipe.cutmix, num_classes=classes)
        mixed: tuple[Tensor, Tensor] = v2.RandomChoice([mixup, cutmix])(images, labels)
    return mixed


def windows_of(records: ShardSet, seed: int) -> Windows | None:
    """Of a large set at a URL, WINDOW shards are fetched and shuffled together, as in pretrain."""
    if records.copies is None or len(records.shards) <= WINDOW:
        return None
    return Windows([shard.count for shard in records.shards], WINDOW, seed)


def accuracy(model: Classifier, records: ShardSet, device: torch.device) -> dict[str, float]:
    """top-1 and top-5 of `model` on a set, shares of 0 to 1."""
    model.eval()
    order, size = Plan(len(records), 256, in_order=True), model.encoder[0].size
    batches = records.loader(order, 0, order.steps(), device=device.type)
    right = torch.zeros(2)
    with torch.inference_mode(), progress("test", len(records)) as bar:
        for frames, labels in whole_frames(batches, size, device):
            logits = model(normalised(frames))
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            right += torch.stack([best[:, 0].sum(), best.any(1).sum()]).cpu()
            bar.update(len(labels))
    top1, top5 = (right / len(records)).tolist()
    return {"top1": round(top1, 4), "top5": round(top5, 4)}


def train_supervised(
    model: Classifier,
    recipe: LabelRecipe,
    learn: ShardSet,
    test: ShardSet,
    out: Path,
    seed: int,
    device: torch.device,
    facts: dict[str, Any],
    micro_batch: int = 0,
) -> dict[str, float]:
    """Train `model` on `learn`, test it on `test`, or finish that; returns the accuracies.

    A checkpoint an epoch; raises UserError if `out` holds another run's. micro_batch: most images
    in a forward pass; 0: a step's on a CPU, on CUDA as many as free memory allows.
    """
    classes = model.head.out_features
    plan = Plan(len(learn), min(recipe.batch, len(learn)), seed, windows=windows_of(learn, seed))
    recipe = replace(recipe, batch=plan.batch)
    total, epoch = max(1, plan.steps(recipe.epochs)), max(1, len(learn) // plan.batch)
    warmup = min(round(recipe.warmup * len(learn) / plan.batch), total - 1)
    groups = parameter_groups(model, recipe)
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak, weight_decay=recipe.weight_decay)
    facts = facts | {
        "supervised": asdict(recipe),
        "seed": seed,
        "train": learn.manifest.fingerprint,
    }
    first = _restore(out, facts, model, optimizer, device)
    model.train()
    cuda, part = device.type == "cuda", micro_batch or plan.batch
    if cuda and not micro_batch:
        part = largest_part(0, 0, device, memory_of(model, (), model.encoder[0].size, device))
    forward = compiled(model) if cuda else model
    batches = learn.loader(plan, first, total, device=device.type)
    stream = whole_frames(batches, model.encoder[0].size, device)
    done = first * plan.batch
    with progress(f"training, seed {seed}", total * plan.batch, initial=done) as bar:
        for step, (frames, labels) in enumerate(stream, start=first):
            pixels = frames.round().to(torch.uint8)
            images, soft = augmented(pixels, labels, classes, recipe, seed, step)
            torch.manual_seed(int(mix(Purpose.LAYERS, seed, step)) >> 1)
            rate = learning_rate(step, total, warmup, recipe.peak, recipe.floor, recipe.start)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=device)
            for some, wanted in zip(images.split(part), soft.split(part), strict=True):
                with in_bf16(device):
                    logits = forward(some)
                error = F.cross_entropy(logits.float(), wanted, label_smoothing=recipe.smoothing)
                error = error * (len(some) / plan.batch)
                error.backward()
                loss += error.detach()
            if recipe.clip:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            optimizer.step()
            bar.update(plan.batch)
            if (step + 1) % epoch == 0 or step + 1 == total:
                # The row first: what a kill leaves too much of, the next start trims.
                row = {"step": step + 1, "loss": loss.item(), "lr": rate}
                with (out / METRICS).open("a") as file:
                    file.write(json.dumps(row) + "\n")
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                checkpoint.save(out / "checkpoints", step + 1, state | {"run": facts})
    return accuracy(model, test, device)


def _restore(
    out: Path, facts: dict[str, Any], model: nn.Module, optimizer: Any, device: torch.device
) -> int:
    path = checkpoint.newest(out / "checkpoints")
    out.mkdir(parents=True, exist_ok=True)
    if path is None:
        trim(out, 0)
        return 0
    state = checkpoint.load(path, device)
    changed = [name for name, value in facts.items() if state["run"].get(name) != value]
    if changed:
        raise UserError(f"{out} holds another run (another {changed[0]}); name another --out")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    trim(out, state["step"] + 1)
    return int(state["step"])
