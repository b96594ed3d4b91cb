"""KAMIM on the stock webdataset library: python stock_webdataset.py SHARDS STEPS."""

import itertools
import sys
from pathlib import Path

import torch
import webdataset

import shards
from train.loss import masked_l1
from train.masking import block_masks
from train.models import MEAN, STD, SimMIM


def batches(folder, plan):
    """Batches for WeightedCrops, without end."""
    tars = sorted(map(str, Path(folder).glob("shard-*.tar")))
    for epoch in itertools.count():
        data = webdataset.WebDataset(tars, shardshuffle=False).shuffle(1000, seed=epoch)
        data = data.decode("rgb8").to_tuple("__key__", "jpg", "json", "fast.density.npy", "cls")
        loader = torch.utils.data.DataLoader(data, plan.batch, num_workers=1, drop_last=True)
        for keys, frames, source, density, labels in loader:
            drawn = shards.draw_crops(
                plan, epoch, [int(k) for k in keys], source["height"], source["width"]
            )
            yield {"frames": frames, "maps": {"fast": density}, "labels": labels, **drawn}


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
