"""KAMIM on a folder of images as it is: python maps_imagefolder.py IMAGES MAPS STEPS."""

import os
import sys
from itertools import chain, islice, repeat

import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import shards
from train.loss import masked_l1
from train.masking import block_masks
from train.models import SimMIM


class Weighted(ImageFolder):
    """Crops of torchvision's, each with its image's density, found by its path, and its box."""

    def __getitem__(self, number):
        path, _ = self.samples[number]
        image = v2.functional.to_image(self.loader(path))
        box = v2.RandomResizedCrop.get_params(image, (0.67, 1), (3 / 4, 4 / 3))
        crop = v2.functional.resized_crop(image, *box, [96, 96], antialias=False) / 64 - 2
        density = maps.density(os.path.relpath(path, self.root), "fast")
        return crop, density, torch.tensor(box) / torch.tensor([*image.shape[1:]] * 2)


maps = shards.open(sys.argv[2])
torch.manual_seed(0)
weigh = shards.WeightedCrops(maps, "fast", size=96).weigh
model = SimMIM("vit_tiny_patch16_224", 96, {"embed_dim": 128, "depth": 4, "num_heads": 4})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
loader = torch.utils.data.DataLoader(Weighted(sys.argv[1]), 64, shuffle=True, num_workers=2)
batches = islice(chain.from_iterable(repeat(loader)), int(sys.argv[3]))
for step, (images, density, boxes) in enumerate(batches):
    flips = torch.zeros(len(images), 2, dtype=torch.bool)
    weights = weigh({"maps": {"fast": density}, "boxes": boxes, "flips": flips})
    mask = block_masks(0, step, len(images), 3, 0.6, images.device)
    loss = masked_l1(model(images, mask), images, mask, weights)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(loss.item())
