"""An exported graph for the passes `half` and `int8`: its weights, its parts, and its reconstruction."""

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import NodeProto, TensorProto, helper

from export.graph.weights import STORED, external, stored_tensors

NORMS = ("Pow", "ReduceMean", "Sqrt", "Reciprocal", "SimplifiedLayerNormalization")


class Graph:
    """A graph of `to_onnx` or `fuse`, taken apart.

    weights: value -> (name of the stored weight, whether it is transposed). parts: first output of a node -> part;
    "product" stands for the matrix products of the blocks and the operators between them.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.weights = {
            tensor.name: (tensor.name.removeprefix(STORED), False)
            for tensor in proto.graph.initializer
            if tensor.name.startswith(STORED)
        }
        self.constants = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.name not in self.weights}
        self.nodes = []
        for node in proto.graph.node:
            if node.op_type == "Constant":  # as `fuse` writes them
                tensor = TensorProto()
                tensor.CopyFrom(node.attribute[0].t)
                tensor.name = node.output[0]
                self.constants[tensor.name] = tensor
            elif node.input[0] in self.weights and node.op_type in ("Identity", "Cast", "Transpose"):
                name, transposed = self.weights[node.input[0]]
                self.weights[node.output[0]] = name, transposed or node.op_type == "Transpose"
            else:
                self.nodes.append(node)
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.parts = self.find_parts()

    def is_block_weight(self, value: str) -> bool:
        return value in self.weights and self.weights[value][0].startswith("blocks.")

    def is_product(self, node: NodeProto) -> bool:
        """Whether a node is a matrix product of a block: by one of its weights, or of the attention."""
        if node.op_type == "MultiHeadAttention":
            return True
        return node.op_type == "MatMul" and (node.input[1] in self.producers or self.is_block_weight(node.input[1]))

    def find_parts(self) -> dict[str, str]:
        """The part of each node, by its first output."""
        before, after = self.reached_by_products(), self.reaching_products()
        parts: dict[str, str] = {}
        for node in self.nodes:
            of_inputs = [parts[self.producers[name].output[0]] for name in node.input if name in self.producers]
            kinds = [self.producers[name].op_type for name in node.input if name in self.producers]
            output = node.output[0]
            if self.is_product(node):
                part = "product"
            elif output not in after:
                part = "heads"
            elif node.op_type in NORMS or (
                node.op_type in ("Add", "Mul") and {"ReduceMean", "Reciprocal"}.intersection(kinds)
            ):
                part = "norms"
            elif output not in before:
                part = "conditioning"
            elif node.op_type == "Softmax":
                part = "softmax"
            elif node.op_type in ("Add", "Mul") and {"conditioning", "residual"}.intersection(of_inputs):
                part = "residual"
            else:
                part = of_inputs[0]
            parts[output] = part
        return parts

    def reached_by_products(self) -> set[str]:
        found: set[str] = set()
        for node in self.nodes:
            if self.is_product(node) or found.intersection(node.input):
                found.update(node.output)
        return found

    def reaching_products(self) -> set[str]:
        """Values that a product depends on, and the products themselves."""
        found: set[str] = set()
        for node in reversed(self.nodes):
            if self.is_product(node) or found.intersection(node.output):
                found.update((*node.input, *node.output))
        return found

    def floats(self) -> set[str]:
        """The values of type float32. Every operator except Cast and Shape has the type of its first input."""
        types = {value.name: value.type.tensor_type.elem_type for value in self.proto.graph.input}
        types |= {name: tensor.data_type for name, tensor in self.constants.items()}
        types |= dict.fromkeys(self.weights, TensorProto.FLOAT)
        for node in self.nodes:
            kind = types.get(node.input[0], TensorProto.UNDEFINED)
            if node.op_type == "Shape":
                kind = TensorProto.INT64
            elif node.op_type == "Cast":
                kind = next(attribute.i for attribute in node.attribute if attribute.name == "to")
            types |= dict.fromkeys(node.output, kind)
        return {name for name, kind in types.items() if kind == TensorProto.FLOAT}


class Loader:
    """Nodes that bring stored weights into a graph. weights: the safetensors file next to the graph."""

    def __init__(self, graph: Graph, weights: Path) -> None:
        self.graph, self.file, self.places = graph, weights.name, stored_tensors(weights)
        self.stored: dict[str, TensorProto] = {}
        self.nodes: list[NodeProto] = []
        self.done: set[str] = set()

    def store(self, name: str) -> str:
        """The value of the stored tensor `name`, unchanged."""
        dtype, shape, offset, length = self.places[name]
        self.stored[name] = external(STORED + name, dtype, shape, self.file, offset, length)
        return STORED + name

    def load(self, value: str, kind: int) -> str:
        """The weight `value` of the float32 graph in the ONNX type `kind`. Returns the name of the value."""
        name, transposed = self.graph.weights[value]
        if value not in self.done:
            self.done.add(value)
            current = self.store(name)
            if self.places[name][0] != kind:
                target = f"{value}:typed" if transposed else value
                self.nodes.append(helper.make_node("Cast", [current], [target], to=kind))
                current = target
            if transposed:
                self.nodes.append(helper.make_node("Transpose", [current], [value], perm=[1, 0]))
            elif current != value:
                self.nodes.append(helper.make_node("Identity", [current], [value]))
        return value


def rebuilt(proto: onnx.ModelProto, nodes: Sequence[NodeProto], tensors: Sequence[TensorProto]) -> onnx.ModelProto:
    """`proto` with other nodes and tensors. Readers infer the types and shapes between them."""
    new = onnx.ModelProto()
    new.CopyFrom(proto)
    for field in (new.graph.node, new.graph.initializer, new.graph.value_info):
        del field[:]
    new.graph.node.extend(nodes)
    needed = {name for node in nodes for name in node.input}
    new.graph.initializer.extend(tensor for tensor in tensors if tensor.name in needed)
    return new


def block_products(proto: onnx.ModelProto) -> set[str]:
    """Names of the stored weights that the products of the blocks read."""
    graph = Graph(proto)
    return {
        graph.weights[node.input[1]][0]
        for node in graph.nodes
        if graph.is_product(node) and node.op_type == "MatMul" and node.input[1] in graph.weights
    }
