"""Batches for training and evaluation: the same samples and draws for any number of processes and workers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from foveal.data.config import ImageConfig
from foveal.data.decode import decode
from foveal.data.errors import DataError
from foveal.data.framing import Augment, FileFrame, View, frame_pixels
from foveal.data.images import Images
from foveal.data.order import Micro, evaluation_plan, permutation, step_sizes, training_plan

Framed = tuple[Tensor, Tensor]  # images uint8 (B, 3, h, w), views (B, 5)


@dataclass(frozen=True, eq=False)
class Batch:
    """images: (B, 3, h, w) float32, normalised.  labels: (B,) int64.  masks: (B, h, w) bool or None.
    index: (B,) int64 on the CPU, position in the set.  micro: number of the batch among all ranks' batches.
    weight: of this batch's mean in the mean over its step, n_m M / n_step; 1 in a full step.
    view: which part of its image each sample shows; None in evaluation and with RandAugment.
    """

    images: Tensor
    labels: Tensor
    index: Tensor
    masks: Tensor | None
    micro: int
    weight: float
    view: View | None = None

    def __len__(self) -> int:
        return len(self.labels)


class Batches:
    """The batches of one rank, epoch by epoch.

    Training: the epoch's permutation, contiguous and unpadded (see foveal.data.order), each image cropped
    (crop_scale: share of its area) and, where flip allows, mirrored; chance is keyed by seed, epoch, sample.
    Evaluation (train=False): every image once, in order, without chance; rank r has a contiguous share.
    Pixels go to the device once and are augmented there; files are decoded by `workers` processes (0: here).
    Call set_epoch before each training epoch: the same epoch gives the same batches.
    Raises DataError for an empty set, for one too small for world * accumulate, and for an unreadable file.
    """

    def __init__(
        self,
        images: Images,
        config: ImageConfig,
        batch_size: int,
        *,
        train: bool,
        seed: int = 0,
        flip: bool = False,
        crop_scale: tuple[float, float] = (0.2, 1.0),
        randaugment: bool = False,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if len(images) == 0:
            raise DataError("there are no images to make batches of")
        if batch_size < 1 or accumulate < 1 or workers < 0 or not 0 <= rank < world:
            raise ValueError(
                f"batch_size={batch_size}, accumulate={accumulate}, workers={workers}, rank={rank} of"
                f" {world}: sizes must be at least 1, workers at least 0, rank in [0, world)"
            )
        if not 0 < crop_scale[0] <= crop_scale[1] <= 1:
            raise ValueError(f"crop_scale={crop_scale} must be two shares of the area, 0 < from <= to <= 1")
        self.images, self.config, self.batch_size = images, config, batch_size
        self.train, self.seed = train, seed
        self.rank, self.world, self.accumulate = rank, world, accumulate
        self.device = torch.device(device)
        self.epoch = 0
        self.augment = Augment(seed, flip, crop_scale, randaugment) if train else None
        self._steps = step_sizes(len(images), batch_size, world, accumulate) if train else []
        self._labels = images.labels.to(self.device)
        self._held: Images | None = None
        self._loader: DataLoader[Framed] | None = None
        self._turn = _Turn()
        if images.pixels is not None:
            masks = None if images.masks is None else images.masks.to(self.device)
            self._held = replace(images, pixels=images.pixels.to(self.device), masks=masks)
        else:
            self._loader = DataLoader(
                _Decoded(images, FileFrame(config, self.augment)),
                batch_sampler=self._turn,
                num_workers=workers,
                collate_fn=_first,
                generator=torch.Generator(),  # else the loader draws its workers' seeds from the global one
                pin_memory=self.device.type == "cuda",
                persistent_workers=workers > 0,
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order and draws the next iteration gives."""
        self.epoch = epoch

    def plan(self) -> list[Micro]:
        """Which samples this rank sees in the current epoch, batch by batch."""
        if not self.train:
            return evaluation_plan(len(self.images), self.batch_size, rank=self.rank, world=self.world)
        order = permutation(len(self.images), self.seed, self.epoch)
        return training_plan(order, self.batch_size, rank=self.rank, world=self.world, accumulate=self.accumulate)

    def __len__(self) -> int:
        if self.train:
            return len(self._steps) * self.accumulate
        return len(self.plan())

    def __iter__(self) -> Iterator[Batch]:
        plan = self.plan()
        if self._held is not None:
            held, epoch = self._held, self.epoch
            framed = (frame_pixels(held, m.index, self.config, self.augment, epoch) for m in plan)
        else:
            assert self._loader is not None
            self._turn.keys = [[(self.epoch, i) for i in m.index.tolist()] for m in plan]
            framed = (self._decoded(rows) for rows in self._loader)
        for micro, (images, masks, view) in zip(plan, framed, strict=True):
            yield Batch(
                images=self.config.normalise(images),
                labels=self._labels[micro.index.to(self.device)],
                index=micro.index,
                masks=masks,
                micro=micro.micro,
                weight=micro.weight,
                view=view,
            )

    def _decoded(self, rows: "Framed | DataError") -> tuple[Tensor, None, View | None]:
        if isinstance(rows, DataError):  # raised here: a worker's own traceback would bury the message
            raise rows
        images, views = rows
        sheared = self.augment is None or self.augment.randaugment
        view = None if sheared else View(views[:, :4], views[:, 4] > 0)
        return images.to(self.device, non_blocking=True), None, view


class _Turn:
    """The (epoch, sample) keys of the coming epoch, batch by batch; workers live on and are handed these."""

    def __init__(self) -> None:
        self.keys: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _Decoded(Dataset[Framed]):
    """Decoded and framed files, a batch at a time: uint8 (B, 3, h, w) and views (B, 5)."""

    def __init__(self, images: Images, frame: FileFrame) -> None:
        assert images.files is not None
        self.files, self.frame = images.files, frame

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Framed | DataError]:
        try:
            framed = [self.frame(decode(self.files[i]), epoch, i) for epoch, i in keys]
            images, views = zip(*framed, strict=True)
            return [(torch.stack(images), torch.stack(views))]
        except DataError as error:
            return [error]


def _first(rows: list[Framed | DataError]) -> Framed | DataError:
    return rows[0]
