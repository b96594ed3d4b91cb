"""Online detection as people run it: PyTorch datasets that detect on every crop, in the workers.

`Published` does what the published code does, step by step; `Optimised` is the same idea without
its waste.
"""

import io
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from preprocess import detector_settings
from preprocess.densities import crop_counts, published_grey
from preprocess.rings import mark
from preprocess.source import Source
from shards import Detector, Plan, ShardSet

SIZE = 192
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
CREATE: dict[str, Any] = {
    "fast": cv2.FastFeatureDetector_create,
    "orb": cv2.ORB_create,
    "sift": cv2.SIFT_create,
}
AUGMENT = v2.Compose(
    [
        v2.ToImage(),
        v2.RandomResizedCrop(SIZE, scale=(0.67, 1.0), ratio=(3 / 4, 4 / 3), antialias=False),
        v2.RandomHorizontalFlip(),
        v2.RandomVerticalFlip(),
    ]
)
NORMALISE = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


class Published(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The published loader (KAMIM For GPUs/utils/dataset_loaders.py), item by item.

    Pillow decodes the photograph, torchvision crops, resizes and flips it, a new detector detects,
    drawKeypoints draws, the crop is normalised. Items: float32 [3, 192, 192] and the map of marked
    pixels, float32 [1, 192, 192]. `detector` None: no detection, as plain SimMIM. `frames` gives
    the JPEGs of a set in place of the photographs; without `drawing`, marks are one dilation;
    without `cropping`, items are the decoded picture, uint8 [3, H, W], and nothing else.
    """

    def __init__(
        self,
        source: Source,
        detector: str | None,
        frames: ShardSet | None = None,
        drawing: bool = True,
        cropping: bool = True,
    ) -> None:
        self.source, self.detector, self.frames = source, detector, frames
        self.drawing, self.cropping = drawing, cropping

    def __len__(self) -> int:
        return len(self.frames or self.source.entries)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        if self.frames is None:
            data = self.source.read(self.source.entries[number])
        else:
            data = self.frames[number].frame
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if not self.cropping:
            return v2.functional.pil_to_tensor(image), torch.zeros(1)
        crop = AUGMENT(image)
        if self.detector is None:
            return NORMALISE(crop), torch.zeros(1)
        pixels = np.ascontiguousarray(crop.permute(1, 2, 0).numpy())
        marks = torch.from_numpy(self.marks(pixels)).float()
        return NORMALISE(crop), marks[None]

    def marks(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Marked pixels of a crop, uint8 0 or 1 [192, 192], from its RGB pixels."""
        assert self.detector is not None
        keypoints = CREATE[self.detector]().detect(pixels)
        if not self.drawing:
            points = np.asarray(cv2.KeyPoint_convert(keypoints), np.float32).reshape(-1, 2)
            return mark(points, SIZE, SIZE, "ring")
        canvas = np.zeros_like(pixels)
        drawn = cv2.drawKeypoints(canvas, keypoints, None, color=(255, 0, 0))[:, :, 0]
        return np.asarray(np.sign(drawn))


class Optimised(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Online detection without its waste: our frames, our boxes, one detector per worker, dilation.

    Items: the crop, uint8 [192, 192, 3], and counts, uint8 [24, 24].
    """

    def __init__(self, records: ShardSet, detector: str | None) -> None:
        self.records, self.plan = records, Plan(len(records), 1)
        self.detector: Detector | None = detector_settings(detector) if detector else None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        cv2.setNumThreads(1)
        record = self.records[number]
        frame = simplejpeg.decode_jpeg(record.frame, "RGB")
        one, side = np.array([number]), len(frame)
        size = np.array([record.height]), np.array([record.width])
        boxes, flips = self.plan.boxes(np.array([0]), one, *size)
        top, left, tall, wide = np.rint(boxes[0] * side).astype(int).tolist()
        crop = cv2.resize(frame[top : top + tall, left : left + wide], (SIZE, SIZE))
        crop = crop[:: -1 if flips[0, 1] else 1, :: -1 if flips[0, 0] else 1]
        crop = np.ascontiguousarray(crop)
        if self.detector is None:
            return torch.from_numpy(crop), torch.zeros(1, dtype=torch.uint8)
        counts = crop_counts(self.detector, published_grey(crop), "ring")
        return torch.from_numpy(crop), torch.from_numpy(counts)
