"""Rows: the unit of work, and the signature of the graph that runs them.

The network takes three kinds of rows in one call. The names and shapes below are the interface between the exported
graph, the engines and the programs, and are defined only here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from dsd_serve.config import ModelConfig
from dsd_serve.errors import InputError

Array = NDArray[Any]
Latents = NDArray[np.float32]
Pixels = NDArray[np.uint8]

OUTPUT_NAMES = ("encoded_latents", "denoised_latents", "decoded_pixels")


@dataclass(frozen=True)
class Cost:
    """Work of a task: rows of the network, and consecutive ticks."""

    rows: int
    ticks: int


class RowCounts(NamedTuple):
    """Numbers of rows of each kind."""

    encode: int
    denoise: int
    decode: int


ENCODE, DENOISE, DECODE = range(3)  # the places in RowCounts


class GraphTensor(NamedTuple):
    """An input or output of the graph. kind: the place of its rows in `RowCounts`. dtype, shape: of one row."""

    name: str
    kind: int
    dtype: type[np.generic]
    shape: tuple[int, ...]


def inputs_of(config: ModelConfig) -> tuple[GraphTensor, ...]:
    """The inputs of the graph, in its order."""
    latents, pixels = config.latent_shape, config.pixel_shape
    inputs = (
        GraphTensor("encode_pixels", ENCODE, np.uint8, pixels),
        GraphTensor("denoise_latents", DENOISE, np.float32, latents),
        GraphTensor("denoise_t", DENOISE, np.float32, ()),
        GraphTensor("denoise_labels", DENOISE, np.int64, ()),
        GraphTensor("decode_latents", DECODE, np.float32, latents),
    )
    return (*inputs, GraphTensor("denoise_r", DENOISE, np.float32, ())) if config.flow_map else inputs


def outputs_of(config: ModelConfig) -> tuple[GraphTensor, ...]:
    """The outputs of the graph, in its order."""
    encoded, denoised, decoded = OUTPUT_NAMES
    return (
        GraphTensor(encoded, ENCODE, np.float32, config.latent_shape),
        GraphTensor(denoised, DENOISE, np.float32, config.latent_shape),
        GraphTensor(decoded, DECODE, np.uint8, config.pixel_shape),
    )


class SingleRow:
    """A row as a task: its result is the row's output."""

    __slots__ = ()

    @property
    def cost(self) -> Cost:
        return Cost(1, 1)

    def program(self, config: ModelConfig, on_preview: OnPreview | None = None) -> Program:
        (output,) = yield [cast(Row, self)]
        return output


@dataclass(frozen=True, slots=True)
class Encode(SingleRow):
    """An image, uint8 [3, H, W], to be encoded into latents [L, C]."""

    pixels: Pixels


@dataclass(frozen=True, slots=True)
class Denoise(SingleRow):
    """Noised latents [L, C] at time t in [0, 1) with a label, for the clean estimate [L, C].

    r: the time to jump to in [t, 1], for flow maps alone; None: t, the clean estimate itself.
    """

    z_t: Latents
    t: float
    label: int
    r: float | None = None


@dataclass(frozen=True, slots=True)
class Decode(SingleRow):
    """Latents [L, C] to be decoded into an image, uint8 [3, H, W]."""

    z: Latents


Row = Encode | Denoise | Decode
Program = Generator[list[Row], list[Array], Any]
OnPreview = Callable[[int, Pixels], None]  # (step, counted from 1; clean estimate, uint8 [3, H, W])


def count_rows(rows: Sequence[Row]) -> RowCounts:
    """The numbers of encode, denoise and decode rows."""
    counted = Counter(map(type, rows))
    return RowCounts(counted[Encode], counted[Denoise], counted[Decode])


class Engine(Protocol):
    """One network on one device. `run` is called by one thread at a time."""

    config: ModelConfig

    def run(self, rows: Sequence[Row]) -> list[Array]:
        """One forward pass over rows of any kinds; one output per row, in their order.

        Encode -> latents float32 [L, C], Denoise -> z_hat float32 [L, C], Decode -> pixels uint8 [3, H, W].
        """
        ...

    def describe(self) -> dict[str, Any]:
        """The engine, its device, precision and version, as plain values for /model."""
        ...


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """An engine on a device that works while Python does something else."""

    def start(self, rows: Sequence[Row]) -> Callable[[], list[Array]]:
        """Begin a forward pass, and return the function that waits for its outputs, those of `run`.

        A second pass may be begun before the first is waited for; the device runs it next. Passes are waited for in
        their order, each once, by the thread that began them.
        """
        ...


def collate(rows: Sequence[Row], config: ModelConfig) -> dict[str, Array]:
    """The inputs of the graph for these rows: encode rows first, then denoise, then decode; each kind in its order.

    Raises InputError when a row does not have the shape of this network.
    """
    pixels = [row.pixels for row in rows if isinstance(row, Encode)]
    denoise = [row for row in rows if isinstance(row, Denoise)]
    latents = [row.z for row in rows if isinstance(row, Decode)]
    inputs = {
        "encode_pixels": stack(pixels, config.pixel_shape, np.uint8, "the pixels of an encode row"),
        "denoise_latents": stack(
            [row.z_t for row in denoise], config.latent_shape, np.float32, "the latents of a denoise row"
        ),
        "denoise_t": np.array([row.t for row in denoise], np.float32),
        "denoise_labels": np.array([row.label for row in denoise], np.int64),
        "decode_latents": stack(latents, config.latent_shape, np.float32, "the latents of a decode row"),
    }
    if config.flow_map:
        inputs["denoise_r"] = np.array([row.t if row.r is None else row.r for row in denoise], np.float32)
    elif any(row.r is not None for row in denoise):
        raise InputError("r, the time to jump to, is for models with a flow map, and this one has none; leave it out")
    return inputs


def stack(arrays: Sequence[Array], shape: tuple[int, ...], dtype: type[np.generic], what: str) -> Array:
    for array in arrays:
        if array.shape != shape or array.dtype != dtype:
            raise InputError(
                f"{what} must be {np.dtype(dtype).name} {list(shape)}, got {array.dtype.name} {list(array.shape)}"
            )
    return np.stack(arrays) if arrays else np.empty((0, *shape), dtype)


def distribute(rows: Sequence[Row], outputs: Sequence[Array]) -> list[Array]:
    """The inverse of `collate` for the three outputs of the graph: one array per row, in the order of the rows."""
    streams = dict(zip((Encode, Denoise, Decode), map(iter, outputs), strict=True))
    return [next(streams[type(row)]) for row in rows]
