"""KAMIM on WebDataset tars as they are: python maps_webdataset.py TARS MAPS STEPS."""

import sys
from itertools import count, islice
from pathlib import Path

import torch
import webdataset
from torchvision.transforms import v2

import shards
from train.loss import masked_l1
from train.masking import block_masks
from train.models import SimMIM


def weighted(sample):
    """A crop of torchvision's, with the density of its image, found by its key, and its box."""
    image = v2.functional.to_image(sample["jpg"])
    box = v2.RandomResizedCrop.get_params(image, (0.67, 1), (3 / 4, 4 / 3))
    crop = v2.functional.resized_crop(image, *box, [96, 96], antialias=False) / 64 - 2
    density = maps.density(sample["__key__"], "fast")
    return crop, density, torch.tensor(box) / torch.tensor([*image.shape[1:]] * 2)


def batches(tars):
    """Batches without end, each epoch in another order."""
    for epoch in count():
        data = webdataset.WebDataset(tars, shardshuffle=False).shuffle(1000, seed=epoch)
        data = data.decode("pil").map(weighted)
        yield from torch.utils.data.DataLoader(data, 64, num_workers=1)


maps = shards.open(sys.argv[2])
torch.manual_seed(0)
weigh = shards.WeightedCrops(maps, "fast", size=96).weigh
model = SimMIM("vit_tiny_patch16_224", 96, {"embed_dim": 128, "depth": 4, "num_heads": 4})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
tars = sorted(map(str, Path(sys.argv[1]).glob("*.tar")))
for step, (images, density, boxes) in enumerate(islice(batches(tars), int(sys.argv[3]))):
    flips = torch.zeros(len(images), 2, dtype=torch.bool)
    weights = weigh({"maps": {"fast": density}, "boxes": boxes, "flips": flips})
    mask = block_masks(0, step, len(images), 3, 0.6, images.device)
    loss = masked_l1(model(images, mask), images, mask, weights)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item())
