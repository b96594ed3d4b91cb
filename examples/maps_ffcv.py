"""KAMIM on a .beton as it is, of square images: python maps_ffcv.py BETON MAPS STEPS."""

import sys
from itertools import count, islice

import torch
from ffcv.loader import Loader, OrderOption

import shards
from train.loss import masked_l1
from train.masking import block_masks
from train.models import MEAN, STD, SimMIM


def batches(beton, maps, plan):
    """Batches for WeightedCrops, without end; the field index says which image of MAPS' source."""
    order = OrderOption.RANDOM
    loader = Loader(beton, plan.batch, 2, order=order, seed=0, drop_last=True)
    if [*loader.reader.handlers] != ["image", "index"]:
        raise SystemExit(f"{beton} needs the fields image and index; FFCV gives no index itself")
    for epoch in count():
        for frames, index in loader:
            numbers = index.flatten().tolist()
            density = torch.from_numpy(maps.densities(numbers, "fast"))
            sides = maps.index["height"][numbers], maps.index["width"][numbers]
            drawn = shards.draw_crops(plan, epoch, numbers, *sides)
            yield {"frames": frames, "maps": {"fast": density}, "labels": index[:, 0], **drawn}


if __name__ == "__main__":
    maps = shards.open(sys.argv[2])
    torch.manual_seed(0)
    crops = shards.WeightedCrops(maps, "fast", size=96, mean=MEAN, std=STD)
    model = SimMIM("vit_tiny_patch16_224", 96, {"embed_dim": 128, "depth": 4, "num_heads": 4})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = batches(sys.argv[1], maps, shards.Plan(len(maps), batch=64))
    for step, batch in enumerate(islice(found, int(sys.argv[3]))):
        images, weights, *_ = crops(batch)
        mask = block_masks(0, step, len(images), 3, 0.6, images.device)
        loss = masked_l1(model(images, mask), images, mask, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(loss.item())
