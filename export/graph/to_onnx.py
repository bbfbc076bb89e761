"""The network as one ONNX graph whose weights are the bytes of model.safetensors.

Weights lie on disk once: a tensor of the graph points into the safetensors file, through a Cast where they are stored
as float16 and a Transpose where the exporter wants them the other way round. ONNX Runtime folds both when it loads.
"""

import json
import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxscript import opset20 as op
from torch.export import Dim

from dsd_serve.network import DSD
from dsd_serve.rows import INPUT_NAMES, OUTPUT_NAMES

OPSET = 20  # 17 and below come out invalid; 23 gains the fused Attention operator but loses readers
INLINE_BYTES = 1024  # smaller tensors stay in the graph
MAX_ROWS = 65536
STORED = "safetensors:"  # prefix of the tensors that lie in the safetensors file


def to_onnx(model: DSD) -> onnx.ModelProto:
    """Export the unified forward with dynamic row counts, each of which may be 0; opset 20, float32, weights inline."""
    config = model.config
    latents = torch.zeros(3, *config.latent_shape)
    example = (
        torch.zeros(2, *config.pixel_shape, dtype=torch.uint8),
        latents,
        torch.linspace(0, 0.9, 3),
        torch.arange(3),
        torch.zeros(4, *config.latent_shape),
    )
    encode, denoise, decode = (Dim(name, min=0, max=MAX_ROWS) for name in ("E", "M", "D"))
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)  # it warns of operators of packages that we do not use
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model.eval(),
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=INPUT_NAMES,
                output_names=OUTPUT_NAMES,
                dynamic_shapes=({0: encode}, {0: denoise}, {0: denoise}, {0: denoise}, {0: decode}),
                custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: attention},
                external_data=False,
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)
    assert program is not None
    proto = program.model_proto
    proto.producer_name = "dsd-export"
    for node in proto.graph.node:
        node.ClearField("metadata_props")  # stack traces of the machine that exported
        node.ClearField("doc_string")
    return proto


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):  # type: ignore[no-untyped-def]
    """softmax(q k') v, as the network calls it. The exporter's own form is general: it computes shapes in the graph."""
    if attn_mask is not None or dropout_p or is_causal or enable_gqa or scale != 1.0:
        raise NotImplementedError("only plain attention with scale 1 is exported")
    products = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(products, axis=-1), value)


def share_weights(proto: onnx.ModelProto, weights: Path, state: dict[str, NDArray[np.float32]]) -> onnx.ModelProto:
    """Let the graph's tensors point into a safetensors file that holds `state`.

    state: the network's weights as float32, rounded to what the file stores. Tensors that match none stay inline.
    """
    places = safetensors_places(weights)
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
    tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def safetensors_places(path: Path) -> dict[str, tuple[int, list[int], int, int]]:
    """Where the tensors of a safetensors file lie: name -> (ONNX type, shape, offset, length in bytes)."""
    types = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16, "I8": TensorProto.INT8}
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    places: dict[str, tuple[int, list[int], int, int]] = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            places[name] = types[entry["dtype"]], entry["shape"], 8 + size + begin, end - begin
    return places
