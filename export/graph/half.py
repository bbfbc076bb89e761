"""The graph in fp16 or bf16, for GPUs, with the same inputs and outputs.

Both start from the float32 graphs of `to_onnx` and `fuse`, so a model directory is enough. The matrix products of the
blocks, nearly all of the work, are computed in the half type. An island is a part of the graph that stays in float32.
The islands were chosen by measurement (docs/precision.md): each lowers the error except the softmax, because the
products before and after it round anyway.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from dsd_serve.precision import PRECISIONS
from export.graph.onnx_graph import Graph, Loader, rebuilt
from export.graph.weights import dtype_of, onnx_type

HALVES = tuple(name for name, row in PRECISIONS.items() if row.arithmetic == "half")
PARTS = ("conditioning", "norms", "softmax", "residual", "heads")  # candidates for islands, see `Graph.find_parts`
ISLANDS = frozenset(PARTS) - {"softmax"}
Weights = Mapping[str, NDArray[np.float32]]


def to_half(
    proto: onnx.ModelProto, precision: str, weights: Path, islands: Collection[str] = ISLANDS
) -> onnx.ModelProto:
    """The graph with everything outside the islands, above all the blocks' matrix products, in fp16 or bf16.

    weights: the safetensors file, written from `half_weights`, that the new graph points into and lies next to. A value
    that crosses the edge of an island passes through a Cast.
    """
    half, graph = onnx_type(precision), Graph(proto)
    floats, ends = graph.floats(), {value.name for value in proto.graph.output}
    loader = Loader(graph, weights)
    nodes: list[NodeProto] = []
    halved: set[str] = set()  # values that are half in the new graph
    crossed: dict[str, str] = {}  # value -> the same value in its other type

    def cross(name: str, to_half: bool) -> str:
        """The value `name` in half (or not), through a Cast if it has the other type."""
        if name in graph.weights:
            return loader.load(name, half if to_half else TensorProto.FLOAT)
        if name not in floats or (name in halved) == to_half:
            return name
        if name not in crossed:
            crossed[name] = f"{name}:{precision if to_half else 'fp32'}"
            nodes.append(helper.make_node("Cast", [name], [crossed[name]], to=half if to_half else TensorProto.FLOAT))
        return crossed[name]

    for node in graph.nodes:
        (output, *_), part = node.output, graph.parts[node.output[0]]
        is_half = part not in islands and output in floats and output not in ends and node.op_type != "Cast"
        inputs = [cross(name, is_half) for name in node.input]
        halved.update(name for name in node.output if is_half)
        changed = NodeProto()
        changed.CopyFrom(node)
        changed.input[:] = inputs
        nodes.append(changed)
    return rebuilt(proto, [*loader.nodes, *nodes], [*graph.constants.values(), *loader.stored.values()])


def emulated(proto: onnx.ModelProto, precision: str) -> onnx.ModelProto:
    """A graph of `to_half` that a CPU runs: each half operator computes in float32 and its result is rounded.

    GPUs do the same: their matrix products sum in float32. On the CPU, ONNX Runtime has no bf16 operators, and it runs
    fp16 operators in float32 without rounding between two of them.
    """
    half = onnx_type(precision)
    nodes: list[NodeProto] = []
    halved = {tensor.name for tensor in proto.graph.initializer if tensor.data_type == half}
    for node in proto.graph.node:
        casts = next((a.i for a in node.attribute if a.name == "to"), None) if node.op_type == "Cast" else None
        if casts is not None or not halved.intersection(node.input):
            nodes.append(node)
            halved.update(node.output if casts == half else ())
            continue
        changed = NodeProto()
        changed.CopyFrom(node)
        for number, name in enumerate(node.input):
            if name in halved:
                changed.input[number] = f"{node.output[0]}:in{number}"
                nodes.append(helper.make_node("Cast", [name], [changed.input[number]], to=TensorProto.FLOAT))
        changed.output[:] = [f"{name}:exact" for name in node.output]
        nodes.append(changed)
        nodes += [helper.make_node("Cast", [f"{name}:exact"], [name], to=half) for name in node.output]
        halved.update(node.output)
    return rebuilt(proto, nodes, list(proto.graph.initializer))


def half_weights(state: Weights, precision: str, products: Collection[str]) -> dict[str, NDArray[np.generic]]:
    """The weights that a graph of `to_half` reads: those of the blocks' products in its type, all others in fp16.

    The others are used in float32, and bf16 would round them eight times as coarsely.
    """
    kind = dtype_of(precision)
    return {name: array.astype(kind if name in products else np.float16, copy=False) for name, array in state.items()}
