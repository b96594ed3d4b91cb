"""KAMIM on Hugging Face datasets: python stock_datasets.py SHARDS STEPS."""

import itertools
import sys

import datasets
import torch

import shards
from train.loss import masked_l1
from train.masking import block_masks
from train.models import MEAN, STD, SimMIM


def batches(folder, plan):
    """Batches for WeightedCrops, without end."""
    files = f"{folder}/shard-*.tar"
    data = datasets.load_dataset("webdataset", data_files=files, split="train", streaming=True)
    data = data.shuffle(seed=0, buffer_size=1000).with_format("torch")
    for epoch in itertools.count():
        data.set_epoch(epoch)
        for batch in torch.utils.data.DataLoader(data, plan.batch, drop_last=True):
            numbers = [int(key) for key in batch["__key__"]]
            size = batch["json"]["height"], batch["json"]["width"]
            frames = batch["jpg"].permute(0, 2, 3, 1)
            maps, labels = {"fast": batch["fast.density.npy"]}, batch["cls"]
            drawn = shards.draw_crops(plan, epoch, numbers, *size)
            yield {"frames": frames, "maps": maps, "labels": labels, **drawn}


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
