"""KAMIM in your own training loop: python trainer.py SHARDS STEPS [CACHE]."""

import sys

import torch

import shards
from train.loss import masked_l1
from train.masking import block_masks
from train.models import MEAN, STD, SimMIM
from train.schedule import learning_rate

records = shards.open(sys.argv[1], cache=sys.argv[3] if len(sys.argv) > 3 else None)
plan = shards.Plan(len(records), batch=64, seed=0)
crops = shards.WeightedCrops(records, "fast", size=96, temperature=0.25, mean=MEAN, std=STD)
torch.manual_seed(0)
model = SimMIM("vit_tiny_patch16_224", 96, {"embed_dim": 128, "depth": 4, "num_heads": 4})
optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
steps, warmup = plan.steps(epochs=10), round(len(records) / plan.batch)
loader = records.loader(plan, 0, int(sys.argv[2]), maps=["fast"])
for batch, tensors in shards.to_device(loader, torch.device("cpu")):
    images, weights, *_ = crops(tensors)  # [64, 3, 96, 96] and [64, 12, 12]
    mask = block_masks(0, batch.step, len(images), 3, 0.6, images.device)
    loss = masked_l1(model(images, mask), images, mask, weights)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = learning_rate(batch.step, steps, warmup, 1.5e-3, 1e-5, 1e-6)
    optimizer.step()
    print(loss.item())
