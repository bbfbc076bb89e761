"""The network as one ONNX graph, exported by torch."""

import logging
import warnings

import numpy as np
import onnx
import torch
from onnxscript import opset20 as op
from torch.export import Dim

from dsd_serve.network import DSD
from dsd_serve.rows import RowCounts, inputs_of, outputs_of

OPSET = 20  # 17 and below come out invalid; 23 gains the fused Attention operator but loses readers
MAX_ROWS = 65536
COUNTS = RowCounts(2, 3, 4)  # of the example


def to_onnx(model: DSD) -> onnx.ModelProto:
    """Export the unified forward with dynamic row counts, each of which may be 0; opset 20, float32, weights inline."""
    inputs = inputs_of(model.config)
    example = tuple(torch.from_numpy(np.zeros((COUNTS[one.kind], *one.shape), one.dtype)) for one in inputs)
    dims = [Dim(name, min=0, max=MAX_ROWS) for name in ("E", "M", "D")]
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)  # it warns about packages that are not used here
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model.eval(),
                example,
                dynamo=True,
                opset_version=OPSET,
                input_names=[one.name for one in inputs],
                output_names=[one.name for one in outputs_of(model.config)],
                dynamic_shapes=tuple({0: dims[one.kind]} for one in inputs),
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
        node.ClearField("metadata_props")  # stack traces, with paths of this machine
        node.ClearField("doc_string")
    return proto


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):  # type: ignore[no-untyped-def]
    """softmax(q k') v, as the network calls it. The exporter's own form is general: it computes shapes in the graph."""
    if attn_mask is not None or dropout_p or is_causal or enable_gqa or scale != 1.0:
        raise NotImplementedError("only plain attention with scale 1 is exported")
    products = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(products, axis=-1), value)
