"""KAMIM with your own model (from timm) and loss: python own_model.py SHARDS STEPS."""

import itertools
import sys

import timm
import torch
from torch import nn

import shards

SIZE, PATCH = 96, 16


def batches(folder, plan):
    """Batches for WeightedCrops, without end, from a Dataset that any trainer's loader takes."""
    dataset = shards.open(folder).dataset(plan, maps=["fast"])
    order = shards.PlanSampler(plan, last=10**9)
    yield from torch.utils.data.DataLoader(dataset, batch_sampler=order)


def loss_of(output, images, hidden, weights):
    """Weighted L1 of hidden patches; output [b, n, 3 * PATCH**2], hidden [b, n, 1] of 0 and 1."""
    error = (nn.functional.unfold(images, PATCH, stride=PATCH).mT - output).abs().mean(2)
    return (error * weights.flatten(1) * hidden[..., 0]).sum() / hidden.sum()


if __name__ == "__main__":
    torch.manual_seed(0)
    records = shards.open(sys.argv[1])
    crops = shards.WeightedCrops(records, "fast", size=SIZE, w_ps=PATCH)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=SIZE, depth=4, num_classes=0)
    head = nn.Linear(vit.embed_dim, 3 * PATCH**2)
    optimizer = torch.optim.AdamW([*vit.parameters(), *head.parameters()], lr=1e-3)
    for batch in itertools.islice(
        batches(sys.argv[1], shards.Plan(len(records), batch=64)), int(sys.argv[2])
    ):
        images, weights, *_ = crops(batch)
        hidden = (torch.rand(len(images), (SIZE // PATCH) ** 2, 1) < 0.6).float()
        shown = nn.functional.interpolate(1 - hidden.view(-1, 1, 6, 6), scale_factor=PATCH)
        output = head(vit.forward_features(images * shown)[:, vit.num_prefix_tokens :])
        loss = loss_of(output, images, hidden, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(loss.item())
