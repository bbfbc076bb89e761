"""The graph for ONNX Runtime, with two of its own operators: fused attention and fused RMS normalisation.

They read the activations once; the plain graph writes and reads them for every step of a formula, which is slow when
memory bandwidth is the limit. Other runtimes do not have these operators: they read model.onnx.
"""

import logging

import numpy as np
import onnx
from onnxscript import ir
from onnxscript.rewriter import pattern

log = logging.getLogger(__name__)

DOMAIN = "com.microsoft"


def fuse(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A graph of `to_onnx`, fused. Patterns that are not recognised are kept, with a warning."""
    model = ir.from_proto(proto)
    for name, rules, mark in (
        ("attentions", [pattern.RewriteRule(attention, multi_head_attention)], "Softmax"),
        (
            "normalisations",
            [pattern.RewriteRule(scaled_norm, fused_scaled_norm), pattern.RewriteRule(norm, fused_norm)],
            "Pow",
        ),
    ):
        before = count(model, mark)
        pattern.RewriteRuleSet(rules).apply_to_model(model)
        if left := count(model, mark):
            log.warning("%d of %d %s are not fused, because torch exports them in another form", left, before, name)
    model.opset_imports[DOMAIN] = 1
    return ir.to_proto(model)


def count(model: ir.Model, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph)


# onnxscript reads the following functions as patterns and their replacements, in pairs; they carry no types.
# mypy: disable-error-code="no-untyped-def"


def attention(op, q, k, v, heads, width):
    """q and k normalised [B, L, H, W / H], v [B, L, W] -> [B, L, W], as `to_onnx` writes it."""
    q, k = op.Transpose(q, perm=[0, 2, 1, 3]), op.Transpose(k, perm=[0, 2, 3, 1])
    v = op.Transpose(op.Reshape(v, heads), perm=[0, 2, 1, 3])
    shares = op.Softmax(op.MatMul(q, k), axis=-1)
    return op.Reshape(op.Transpose(op.MatMul(shares, v), perm=[0, 2, 1, 3]), width)


def multi_head_attention(op, q, k, v, heads, width):
    q, k = (op.Reshape(part, width) for part in (q, k))
    num_heads = int(heads.const_value.numpy()[2])
    return op.MultiHeadAttention(q, k, v, num_heads=num_heads, scale=1.0, _domain=DOMAIN, _version=1)


def norm(op, x, two, axes, eps):
    return op.Mul(x, op.Reciprocal(op.Sqrt(op.Add(op.ReduceMean(op.Pow(x, two), axes), eps))))


def fused_norm(op, x, two, axes, eps):
    ones = op.Constant(value=ir.tensor(np.ones(x.shape[-1], np.float32)))
    return fused_scaled_norm(op, x, two, axes, eps, ones)


def scaled_norm(op, x, two, axes, eps, scale):
    return op.Mul(norm(op, x, two, axes, eps), scale)


def fused_scaled_norm(op, x, two, axes, eps, scale):
    """scale: [W], or [B, 1, W] of the modulation."""
    epsilon = float(eps.const_value.numpy())
    return op.SimplifiedLayerNormalization(x, scale, axis=-1, epsilon=epsilon, stash_type=1)
