"""KAMIM on the stock FFCV loader: python stock_ffcv.py FFCV-SHARDS STEPS."""

import itertools
import sys

import torch
from ffcv.loader import Loader, OrderOption

import shards
from train.loss import masked_l1
from train.masking import block_masks
from train.models import MEAN, STD, SimMIM


def batches(folder, plan):
    """Batches for WeightedCrops, without end; of a set with one detector and no bank."""
    order = OrderOption.RANDOM
    loader = Loader(f"{folder}/records.beton", plan.batch, 2, order=order, seed=0, drop_last=True)
    for epoch in itertools.count():
        for frames, density, labels, *facts in loader:
            index, height, width = (fact.flatten().tolist() for fact in facts)
            drawn = shards.draw_crops(plan, epoch, index, height, width)
            yield {"frames": frames, "maps": {"fast": density}, "labels": labels[:, 0], **drawn}


if __name__ == "__main__":
    torch.manual_seed(0)
    records = shards.open(sys.argv[1])
    crops = shards.WeightedCrops(records, "fast", size=96, mean=MEAN, std=STD)
    model = SimMIM("vit_tiny_patch16_224", 96, {"embed_dim": 128, "depth": 4, "num_heads": 4})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    plan = shards.Plan(len(records), batch=64)
    for step, batch in enumerate(itertools.islice(batches(sys.argv[1], plan), int(sys.argv[2]))):
        images, weights, *_ = crops(batch)
        mask = block_masks(0, step, len(images), 3, 0.6, images.device)
        loss = masked_l1(model(images, mask), images, mask, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(loss.item())
