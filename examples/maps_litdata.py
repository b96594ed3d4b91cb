"""KAMIM on litData's chunks of images and their names: python maps_litdata.py CHUNKS MAPS STEPS."""

import io
import sys
from itertools import chain, islice, repeat

import litdata
import torch
from PIL import Image
from torchvision.transforms import v2

import shards
from train.loss import masked_l1
from train.masking import block_masks
from train.models import SimMIM


def weighted(sample, *_):
    """A crop of torchvision's, with the density of its image, found by its name, and its box."""
    image = v2.functional.to_image(Image.open(io.BytesIO(sample["image"])).convert("RGB"))
    box = v2.RandomResizedCrop.get_params(image, (0.67, 1), (3 / 4, 4 / 3))
    crop = v2.functional.resized_crop(image, *box, [96, 96], antialias=False) / 64 - 2
    density = torch.from_numpy(maps.density(sample["name"], "fast"))
    return crop, density, torch.tensor(box) / torch.tensor([*image.shape[1:]] * 2)


maps = shards.open(sys.argv[2])
torch.manual_seed(0)
weigh = shards.WeightedCrops(maps, "fast", size=96).weigh
model = SimMIM("vit_tiny_patch16_224", 96, {"embed_dim": 128, "depth": 4, "num_heads": 4})
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
data = litdata.StreamingDataset(sys.argv[1], shuffle=True, transform=weighted)
loader = litdata.StreamingDataLoader(data, batch_size=64, num_workers=1)
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
