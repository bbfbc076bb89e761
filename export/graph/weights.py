"""Weights on disk: safetensors files, and ONNX tensors that point into them.

Weights lie on disk once: a tensor of a graph points into the safetensors file, through a Cast where they are stored as
float16 and a Transpose where the exporter has them transposed. ONNX Runtime folds both when it loads.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from dsd_serve.precision import PRECISIONS

INLINE_BYTES = 1024  # smaller tensors stay in the graph
STORED = "safetensors:"  # prefix of the tensors that lie in a safetensors file


def dtype_of(precision: str) -> np.dtype[Any]:
    """The numpy type of weights in a precision."""
    name = PRECISIONS[precision].dtype
    return np.dtype(getattr(ml_dtypes, name, name))


def onnx_type(precision: str) -> int:
    """The ONNX type of weights in a precision, a value of TensorProto.DataType."""
    return int(helper.np_dtype_to_tensor_dtype(dtype_of(precision)))


def write_weights(path: Path, weights: Mapping[str, NDArray[Any]]) -> None:
    """Write a safetensors file."""
    from safetensors.numpy import save

    # Not `save_file`: only their owner can read its files, and a server often runs as another user.
    path.write_bytes(save({name: np.ascontiguousarray(array) for name, array in weights.items()}))


def share_weights(proto: onnx.ModelProto, weights: Path, state: dict[str, NDArray[np.float32]]) -> onnx.ModelProto:
    """Make the graph's tensors point into a safetensors file that holds `state`.

    state: the network's weights as float32, rounded to what the file stores. Tensors that match none stay inline.
    """
    places = stored_tensors(weights)
    by_value: dict[bytes, tuple[str, bool]] = {}
    for name, array in state.items():
        by_value[key_of(array)] = (name, False)
        if array.ndim == 2:
            by_value.setdefault(key_of(array.T), (name, True))
    graph = proto.graph
    kept, used, nodes = [], {}, []
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        found = by_value.get(key_of(array)) if array.nbytes >= INLINE_BYTES else None
        if found is None:
            kept.append(tensor)
            continue
        name, transposed = found
        dtype, shape, offset, length = places[name]
        stored = STORED + name
        used[stored] = external(stored, dtype, shape, weights.name, offset, length)
        if dtype == TensorProto.FLOAT and not transposed:
            nodes.append(helper.make_node("Identity", [stored], [tensor.name]))
            continue
        current = stored
        if dtype != TensorProto.FLOAT:
            target = f"{tensor.name}:float" if transposed else tensor.name
            nodes.append(helper.make_node("Cast", [current], [target], to=TensorProto.FLOAT))
            current = target
        if transposed:
            nodes.append(helper.make_node("Transpose", [current], [tensor.name], perm=[1, 0]))
    first = list(graph.node)
    del graph.initializer[:]
    del graph.node[:]
    graph.initializer.extend([*kept, *used.values()])
    graph.node.extend([*nodes, *first])
    return proto


def key_of(array: NDArray[np.generic]) -> bytes:
    """The type, shape and bytes of an array, for looking it up by value."""
    return f"{array.dtype}{array.shape}".encode() + np.ascontiguousarray(array).tobytes()


def external(name: str, dtype: int, shape: list[int], location: str, offset: int, length: int) -> TensorProto:
    """An ONNX tensor whose bytes lie in the file `location`, next to the graph."""
    tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def stored_tensors(path: Path) -> dict[str, tuple[int, list[int], int, int]]:
    """The tensors of a safetensors file: name -> (ONNX type, shape, offset, length in bytes)."""
    types = {row.safetensors: onnx_type(name) for name, row in PRECISIONS.items()}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    places: dict[str, tuple[int, list[int], int, int]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            places[name] = types[entry["dtype"]], entry["shape"], 8 + size + begin, end - begin
    return places
