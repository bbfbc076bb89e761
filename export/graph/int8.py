"""The graph with integer matrix products, for CPUs, with the same inputs and outputs."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.graph.fuse import DOMAIN
from export.graph.onnx_graph import Graph, Loader, rebuilt

LEAST = np.float32(1e-30)  # smallest scale, so that a token of zeros stays zero
Weights = Mapping[str, NDArray[np.float32]]


def scale_of(name: str) -> str:
    """The name of a quantised weight's scales."""
    return f"{name}:scale"


def int8_weights(state: Weights, quantised: Collection[str]) -> dict[str, NDArray[np.generic]]:
    """Weights in int8, symmetric, with one scale for each output channel; those that are not quantised in fp16."""
    stored: dict[str, NDArray[np.generic]] = {}
    for name, array in state.items():  # [out, in]
        if name in quantised:
            scale = np.maximum(np.abs(array).max(axis=1), LEAST) / np.float32(127)
            stored[name] = np.rint(array / scale[:, None]).astype(np.int8)
            stored[scale_of(name)] = scale.astype(np.float32)
        else:
            stored[name] = array.astype(np.float16)
    return stored


def to_int8(proto: onnx.ModelProto, weights: Path, quantised: Collection[str]) -> onnx.ModelProto:
    """The graph of `fuse` with integer products where the weight is in `quantised`; the rest computes in float32.

    weights: the safetensors file, written from `int8_weights`, that the new graph points into.

    Activations are quantised with one scale for each token, from its largest channel. One scale for the whole tensor,
    as in ONNX Runtime's DynamicQuantizeMatMul, would let a row's neighbours change its result. Activations are uint8
    around 128 and weights int8, the types that the instructions of x86 (VNNI) multiply.
    """
    graph = Graph(proto)
    loader, quantiser = Loader(graph, weights), Quantiser(proto)
    nodes: list[NodeProto] = []
    for node in graph.nodes:
        name = graph.weights[node.input[1]][0] if graph.is_product(node) and node.input[1] in graph.weights else ""
        if name in quantised:
            matrix, scale = loader.load(node.input[1], TensorProto.INT8), loader.store(scale_of(name))
            nodes += quantiser.product(node.input[0], matrix, scale, loader.places[name][1], node.output[0])
            continue
        for value in node.input:
            if value in graph.weights:
                loader.load(value, TensorProto.FLOAT)
        nodes.append(node)
    tensors = [*graph.constants.values(), *quantiser.constants.values(), *loader.stored.values()]
    return rebuilt(proto, [*loader.nodes, *nodes], tensors)


class Quantiser:
    """Nodes of integer products, and the constants that they share."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        (latents,) = (value for value in proto.graph.input if value.name == "denoise_latents")  # [M, L, C]
        self.num_tokens = latents.type.tensor_type.shape.dim[1].dim_value
        self.constants: dict[str, TensorProto] = {}
        self.done: set[str] = set()

    def constant(self, name: str, value: NDArray[np.generic]) -> str:
        self.constants[f"int8:{name}"] = numpy_helper.from_array(value, f"int8:{name}")
        return f"int8:{name}"

    def shape(self, *dims: int) -> str:
        return self.constant("x".join(map(str, dims)), np.array(dims, np.int64))

    def quantise(self, value: str, width: int) -> list[NodeProto]:
        """value [B, L, W] -> VALUE:uint8 [B L, W] and VALUE:scale [B L, 1], once for all its products."""
        if value in self.done:
            return []
        self.done.add(value)
        flat, least, negative, largest, step, scale, count, zeros = (
            f"{value}:{name}" for name in ("flat", "least", "negative", "largest", "step", "scale", "count", "zeros")
        )
        axis = self.constant("axis", np.array([1], np.int64))
        limits = [largest, negative, self.constant("least", np.array(127 * LEAST))]
        return [
            helper.make_node("Reshape", [value, self.shape(-1, width)], [flat]),
            helper.make_node("ReduceMax", [flat, axis], [largest], keepdims=0),
            helper.make_node("ReduceMin", [flat, axis], [least], keepdims=0),
            helper.make_node("Neg", [least], [negative]),
            helper.make_node("Max", limits, [f"{value}:size"]),
            helper.make_node("Mul", [f"{value}:size", self.constant("step", np.array(1 / 127, np.float32))], [step]),
            helper.make_node("Shape", [step], [count]),
            helper.make_node("Expand", [self.constant("zeros", np.array([128], np.uint8)), count], [zeros]),
            helper.make_node("QuantizeLinear", [flat, step, zeros], [f"{value}:uint8"], axis=0),
            helper.make_node("Unsqueeze", [step, axis], [scale]),
        ]

    def product(self, value: str, matrix: str, scale: str, size: list[int], output: str) -> list[NodeProto]:
        """value [B, L, W] times an int8 matrix [W, N] with a scale for each column -> output [B, L, N]. size: N, W."""
        one, zero = self.constant("one", np.array(1, np.float32)), self.constant("zero", np.array(128, np.uint8))
        products, tokens = f"{output}:products", f"{output}:tokens"
        inputs = [f"{value}:uint8", matrix, one, scale, zero]
        return [
            *self.quantise(value, size[1]),
            helper.make_node("MatMulIntegerToFloat", inputs, [products], domain=DOMAIN),
            helper.make_node("Mul", [products, f"{value}:scale"], [tokens]),
            helper.make_node("Reshape", [tokens, self.shape(-1, self.num_tokens, size[0])], [output]),
        ]
