"""The order of the images: a function of (seed, step), and the micro-batches that follow it.

This makes resuming exact, for any number of processes.
"""

import signal
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.dataset import Broken, Images
from training.device import Device
from training.run_config import TrainConfig
from training.step import Batch

Read = tuple[NDArray[np.uint8], int, list[Broken]]  # pixels, label, and the images that could not be read


class Order:
    """Which images make up which micro-batch: each epoch is a new permutation, and a step may span two epochs.

    With `together`, the shards are permuted, and then the images of so many of them at a time: nearly as random, and
    read nearly in sequence. shards [num_images]: the shard of each image.

    With `labels` [num_images] the classes take turns: each has the same number of places in an epoch, plus or minus
    one, so images of rare classes are repeated.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        shards: NDArray[np.int64] | None = None,
        together: int = 0,
        labels: NDArray[np.int64] | None = None,
    ) -> None:
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.shards, self.together = shards, together
        self.members = [] if labels is None else [np.flatnonzero(labels == label) for label in np.unique(labels)]
        self.epoch = -1
        self.permutation = np.empty(0, np.int64)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Indices [batch_size] of the images of a step, over all processes."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(positions, self.num_images)
        indices = np.empty(self.batch_size, np.int64)
        for epoch in np.unique(epochs):
            indices[epochs == epoch] = self.permuted(int(epoch))[offsets[epochs == epoch]]
        return indices

    def permuted(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self.epoch:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self.permutation, self.epoch = self.shuffle(generator), epoch
        return self.permutation

    def shuffle(self, generator: np.random.Generator) -> NDArray[np.int64]:
        if self.members:
            return self.balanced(generator)
        if self.shards is None or not self.together:
            return generator.permutation(self.num_images)
        names = np.unique(self.shards)
        place = np.empty(names[-1] + 1, np.int64)
        place[names] = generator.permutation(len(names)) // self.together
        # one random key for each image, sorted within the group that its shard is in
        return np.lexsort((generator.permutation(self.num_images), place[self.shards]))

    def balanced(self, generator: np.random.Generator) -> NDArray[np.int64]:
        """An epoch in rounds: each holds one image of every class, in an order of its own."""
        rounds = -(-self.num_images // len(self.members))
        turns = np.stack([repeated(images, rounds, generator) for images in self.members], axis=1)
        return generator.permuted(turns, axis=1).ravel()[: self.num_images]


def repeated(images: NDArray[np.int64], count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """`count` of the images: permutations of all of them, one after another."""
    permutations = [generator.permutation(images) for _ in range(-(-count // len(images)))]
    return np.concatenate(permutations)[:count]


def micro_batches(
    images: Images,
    order: Order,
    first_step: int,
    last_step: int,
    micro: int,
    rank: int,
    world: int,
    num_workers: int,
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yield (step, number of the micro-batch, pixels uint8 [micro, 3, S, S], labels [micro]) of one process.

    The micro-batches of a step go to the processes in turn, so their contents do not depend on the number of
    processes.
    """
    per_step = order.batch_size // micro
    keys = [(step, number) for step in range(first_step, last_step) for number in range(rank, per_step, world)]

    def indices(key: tuple[int, int]) -> list[int]:
        step, number = key
        return order.indices(step)[number * micro : (number + 1) * micro].tolist()

    batches: Iterator[tuple[Tensor, Tensor, list[Broken]]]
    if images.pixels is not None:
        batches = (gather(images, indices(key)) for key in keys)
    else:
        sampler = (indices(key) for key in keys)
        loader = DataLoader(
            Reader(images),
            batch_sampler=Batches(sampler, len(keys)),
            collate_fn=collate,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=leave_signals,
        )
        batches = iter(loader)
    for (step, number), (pixels, labels, broken) in zip(keys, batches, strict=True):
        images.note(broken)
        yield step, number, pixels, labels


class Reader(Dataset[Read]):
    """Images that are decoded on demand, by the worker processes of a loader."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __getitem__(self, index: int) -> Read:
        return self.images.read(index)


def collate(items: list[Read]) -> tuple[Tensor, Tensor, list[Broken]]:
    pixels = torch.from_numpy(np.stack([pixels for pixels, _, _ in items]))
    labels = torch.tensor([label for _, label, _ in items])
    return pixels, labels, [one for _, _, broken in items for one in broken]


def leave_signals(worker: int) -> None:
    """Ignore Ctrl-C and a SIGTERM to the process group: the training process saves, then ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Batches:
    """A batch sampler over given lists of indices."""

    def __init__(self, lists: Iterator[list[int]], length: int) -> None:
        self.lists, self.length = lists, length

    def __iter__(self) -> Iterator[list[int]]:
        return self.lists

    def __len__(self) -> int:
        return self.length


def gather(images: Images, indices: list[int]) -> tuple[Tensor, Tensor, list[Broken]]:
    assert images.pixels is not None
    pixels, labels = torch.from_numpy(images.pixels[indices]), torch.from_numpy(images.labels[indices])
    if torch.cuda.is_available():  # a copy from other memory waits for all that the GPU still has to do
        pixels, labels = pixels.pin_memory(), labels.pin_memory()
    return pixels, labels, []


def open_batches(training: Images, config: TrainConfig, where: Device, first_step: int) -> Iterator[Batch]:
    """The micro-batches of this process from a step on, even in the middle of an epoch."""
    optim, data = config.optim, config.data
    labels = training.labels if data.balance else None
    order = Order(len(training), optim.batch_size, config.run.seed, training.shards(), data.shuffle_shards, labels)
    return micro_batches(
        training, order, first_step, optim.steps, optim.micro_batch_size, where.rank, where.world, data.num_workers
    )
