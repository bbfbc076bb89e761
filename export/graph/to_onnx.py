"""The network as one ONNX graph, exported by torch."""

import logging
import warnings

import onnx
import torch
from onnxscript import opset20 as op
from torch.export import Dim

from dsd_serve.network import DSD
from dsd_serve.rows import INPUT_NAMES, OUTPUT_NAMES

OPSET = 20  # 17 and below come out invalid; 23 gains the fused Attention operator but loses readers
MAX_ROWS = 65536


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
    exporter_log.setLevel(logging.ERROR)  # it warns about packages that are not used here
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
        node.ClearField("metadata_props")  # stack traces, with paths of this machine
        node.ClearField("doc_string")
    return proto


def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):  # type: ignore[no-untyped-def]
    """softmax(q k') v, as the network calls it. The exporter's own form is general: it computes shapes in the graph."""
    if attn_mask is not None or dropout_p or is_causal or enable_gqa or scale != 1.0:
        raise NotImplementedError("only plain attention with scale 1 is exported")
    products = op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2]))
    return op.MatMul(op.Softmax(products, axis=-1), value)
