"""Training with labels: a head on a frozen encoder (the paper's probe, or one that attends), or
all of it.

A run folder holds metrics.jsonl and a checkpoint per epoch. Killed, a run goes on from there, to
the same numbers.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.drop import DropPath
from torch import Tensor, nn

from kamim.evaluate.augment import Augment, augment, mixed
from shards import Plan, ShardSet, Windows
from shards.errors import UserError
from shards.files import sweep
from shards.progress import progress
from shards.rng import Purpose, mix
from shards.spec import AREA
from train import checkpoint
from train.estimate import largest_part, memory_of
from train.features import Encoder, Pool, frames_of, tokens
from train.metrics import METRICS, trim
from train.models import MEAN, STD, Colour, in_bf16
from train.schedule import learning_rate
from train.setup import WINDOW, decays
from train.step import compiled


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelRecipe:
    """How to train with labels. The defaults are KAMIM's (For GPUs/utils/config.py).

    peak, floor, start: learning rates. epochs: of all, the warm-up and `level`, the share at the
    floor after the cosine, within. layer_decay: of the rate, for each layer from the head down.
    clip: of the gradient's norm; 0: none. head: deviation of its first weights; None: torch's own.
    area: of random crops, with horizontal flips; None: whole frames. mixup, cutmix: alpha.
    """

    frozen: bool = False
    epochs: float = 110
    warmup: float = 10
    level: float = 10 / 110
    batch: int = 2048
    peak: float = 5e-3
    floor: float = 2.5e-6
    start: float = 2.5e-6
    weight_decay: float = 0.05
    decay_all: bool = True
    layer_decay: float = 1.0
    clip: float = 0.0
    head: float | None = None
    drop_path: float = 0.0
    smoothing: float = 0.0
    augment: Augment = "trivial"
    area: tuple[float, float] | None = None
    mixup: float = 1.0
    cutmix: float = 1.0


# SimMIM: config.py, configs/vit_base__800ep/simmim_finetune__vit_base__img224__800ep.yaml and
# models/vision_transformer.py. Rates are for a batch of 512.
SIMMIM = LabelRecipe(
    epochs=100,
    warmup=20,
    level=0.0,
    peak=1.25e-3,
    floor=2.5e-7,
    start=2.5e-7,
    decay_all=False,
    layer_decay=0.65,
    clip=5.0,
    head=0.02 * 0.001,
    drop_path=0.1,
    smoothing=0.1,
    augment="rand",
    area=(0.08, 1.0),
    mixup=0.8,
)
# Of our own choice: random crops and flips alone, as attentive probes have them.
ATTENTIVE = LabelRecipe(
    frozen=True,
    epochs=20,
    warmup=1,
    level=0.0,
    peak=1e-3,
    floor=0.0,
    start=1e-6,
    weight_decay=0.01,
    decay_all=False,
    clip=1.0,
    augment="none",
    area=(0.08, 1.0),
    mixup=0.0,
    cutmix=0.0,
)
RECIPES = {
    "paper-probe": LabelRecipe(frozen=True),
    "attentive-probe": ATTENTIVE,
    "kamim": LabelRecipe(),
    "simmim": SIMMIM,
}
Pooling = Pool | Literal["attention"]


def recipe_for(
    name: str, is_swin: bool, batch: int, epochs: float = 0, peak: float = 0
) -> LabelRecipe:
    """The recipe called `name` for a batch, and what is Swin's own in it; epochs, peak 0: its own.

    The warm-up keeps its share of the epochs.
    SimMIM's rates are in proportion to the batch, and its layers of Swin decay by 0.9; KAMIM clips
    Swin's gradient, not a ViT's.
    """
    recipe = replace(RECIPES[name], batch=batch)
    if epochs:
        recipe = replace(recipe, epochs=epochs, warmup=recipe.warmup * epochs / recipe.epochs)
    if peak:
        recipe = replace(recipe, peak=peak)
    if name == "attentive-probe":
        return recipe
    if name != "simmim":
        return replace(recipe, clip=1.0) if is_swin else recipe
    times = batch / 512
    rates = {each: getattr(recipe, each) * times for each in ("peak", "floor", "start")}
    return replace(recipe, **rates, layer_decay=0.9 if is_swin else recipe.layer_decay)


class Classifier(nn.Module):
    """Pooled tokens of a block through one linear layer; images [b, 3, S, S] to logits [b, n].

    Pooled by attention, a query that is learned attends to the normalised patch tokens, by heads of
    64, and an MLP follows: one block of cross-attention. A frozen Swin's tokens are those before
    its final norm, as published.
    """

    def __init__(
        self, encoder: Encoder, block: int, pool: Pooling, classes: int, recipe: LabelRecipe
    ) -> None:
        super().__init__()
        self.trunk, self.block, self.pool = encoder.model, block, pool
        self.frozen = recipe.frozen
        self.norm = not (encoder.is_swin and recipe.frozen)
        self.encoder = [encoder]  # in a list: the trunk is the one that is registered
        width = _width(encoder, block)
        self.attend = _attention(width) if pool == "attention" else None
        self.head = nn.Linear(width, classes)
        if recipe.head is not None:
            nn.init.trunc_normal_(self.head.weight, std=recipe.head)
            nn.init.zeros_(self.head.bias)
        set_drop_path(encoder, recipe.drop_path)
        self.trunk.requires_grad_(not recipe.frozen)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        with torch.set_grad_enabled(not self.frozen and torch.is_grad_enabled()):
            patches, cls = tokens(self.encoder[0], images, self.block, self.norm)
        if self.attend is not None:
            features = self.attend(patches)
        else:
            features = patches.mean(1) if self.pool == "mean" else cls
        logits: Tensor = self.head(features)
        return logits

    def train(self, mode: bool = True) -> "Classifier":
        """A frozen trunk stays as it is evaluated."""
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self


def _attention(width: int) -> nn.Sequential:
    """Tokens [b, n, width] in, one [b, width] out."""
    heads = math.gcd(width, max(1, width // 64))
    pool = AttentionPoolLatent(width, num_heads=heads, norm_layer=nn.LayerNorm)
    return nn.Sequential(nn.LayerNorm(width), pool)


def set_drop_path(encoder: Encoder, rate: float) -> None:
    """Drop paths of `encoder` in training: of its first block none, of its last `rate`."""
    stages = encoder.model.layers if encoder.is_swin else [encoder.model]
    blocks = [block for stage in stages for block in stage.blocks]
    for number, block in enumerate(blocks):
        share = rate * number / max(1, len(blocks) - 1)
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(share) if share else nn.Identity())


def _width(encoder: Encoder, block: int) -> int:
    device = next(encoder.model.parameters()).device
    with torch.inference_mode():
        blank = torch.zeros(1, 3, encoder.size, encoder.size, device=device)
        return int(tokens(encoder, blank, block)[0].shape[-1])


def parameter_groups(model: Classifier, recipe: LabelRecipe) -> list[dict[str, Any]]:
    """A group a layer, or two by their weight decay: its rate is layer_decay to the power of its
    distance from the head.
    """
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    begins = _begins(model.encoder[0])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            layer, decay = _layer(name, begins), recipe.decay_all or decays(name, parameter)
            groups.setdefault((layer, decay), []).append(parameter)
    return [
        {
            "params": parameters,
            "scale": recipe.layer_decay ** (begins[-1] - layer),
            "weight_decay": recipe.weight_decay * decay,
        }
        for (layer, decay), parameters in sorted(groups.items(), key=lambda each: each[0])
    ]


def _begins(encoder: Encoder) -> list[int]:
    """The layer of each first block, of a ViT's blocks or a Swin's stages, then the head's: the
    embedding is layer 0, and each block one.
    """
    stages = encoder.model.layers if encoder.is_swin else ()
    counts = [len(stage.blocks) for stage in stages] or [1] * encoder.blocks
    return [1 + sum(counts[:number]) for number in range(len(counts) + 1)]


def _layer(name: str, begins: list[int]) -> int:
    """The layer of a parameter; what joins two stages is of the one before, the last norm the
    head's; all before the blocks is of layer 0.
    """
    module, part, *rest = name.split(".")
    if part == "blocks":
        return begins[int(rest[0])]
    if part == "layers":
        begin = begins[int(rest[0])]
        return begin - 1 if rest[1] == "downsample" else begin + int(rest[2])
    return begins[-1] if module != "trunk" or part in ("norm", "fc_norm", "attn_pool") else 0


def augmented(
    frames: Tensor,
    batch: Mapping[str, Tensor],
    classes: int,
    recipe: LabelRecipe,
    seed: int,
    step: int,
    normal: tuple[Colour, Colour] = (MEAN, STD),
) -> tuple[Tensor, Tensor]:
    """A step's images, normalised by `normal`, a mean and a deviation, and its soft labels
    [b, classes]. frames: of 0 to 255.
    """
    pixels = frames.round().to(torch.uint8)
    images = augment(pixels, batch["samples"], batch["epochs"], recipe.augment, seed, *normal)
    return mixed(images, batch["labels"], classes, recipe.mixup, recipe.cutmix, seed, step)


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
        for frames, batch in frames_of(batches, size, device):
            logits = model(model.encoder[0].normalised(frames))
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch["labels"][:, None]
            right += torch.stack([best[:, 0].sum(), best.any(1).sum()]).cpu()
            bar.update(len(frames))
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
    plan = Plan(
        len(learn),
        min(recipe.batch, len(learn)),
        seed,
        area=recipe.area or AREA,
        vertical=0.0,
        windows=windows_of(learn, seed),
    )
    recipe = replace(recipe, batch=plan.batch)
    total, epoch = max(1, plan.steps(recipe.epochs)), max(1, len(learn) // plan.batch)
    falling = round(total * (1 - recipe.level))  # the steps of the cosine
    warmup = min(round(recipe.warmup * len(learn) / plan.batch), total - 1)
    optimizer = torch.optim.AdamW(parameter_groups(model, recipe), lr=recipe.peak)
    facts = facts | {
        "supervised": asdict(recipe),
        "seed": seed,
        "train": learn.manifest.fingerprint,
    }
    first = _restore(out, facts, model, optimizer)
    model.train()
    cuda, part = device.type == "cuda", micro_batch or plan.batch
    if cuda and not micro_batch:
        part = largest_part(0, 0, device, memory_of(model, (), model.encoder[0].size, device))
    forward = compiled(model) if cuda else model
    size, cropped = model.encoder[0].size, recipe.area is not None
    normal = model.encoder[0].mean, model.encoder[0].std
    batches = learn.loader(plan, first, total, device=device.type)
    stream = frames_of(batches, size, device, cropped)
    done = first * plan.batch
    with progress(f"training, seed {seed}", total * plan.batch, initial=done) as bar:
        for step, (frames, batch) in enumerate(stream, start=first):
            images, soft = augmented(frames, batch, classes, recipe, seed, step, normal)
            torch.manual_seed(int(mix(Purpose.LAYERS, seed, step)) >> 1)
            rate = learning_rate(step, falling, warmup, recipe.peak, recipe.floor, recipe.start)
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


def _restore(out: Path, facts: dict[str, Any], model: nn.Module, optimizer: Any) -> int:
    path = checkpoint.newest(out / "checkpoints")
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    if path is None:
        trim(out, 0)
        return 0
    state = checkpoint.load(path)
    changed = _differing("run", state["run"], facts)
    if changed:
        raise UserError(f"{out} holds another run: {', '.join(changed[:3])}; name another --out")
    model.load_state_dict(state["model"])
    checkpoint.restore_optimizer(optimizer, state["optimizer"], path)
    trim(out, state["step"] + 1)
    return int(state["step"])


def _differing(name: str, then: Any, now: Any) -> list[str]:
    """A line for each fact of `now` that `then` has otherwise."""
    if isinstance(then, dict) and isinstance(now, dict):
        return [line for each in now for line in _differing(each, then.get(each), now[each])]
    if then == now:
        return []
    line = f"{name} was {then}, is {now}"
    return [line if len(line) < 80 else f"other {name}"]  # a hash says nothing
