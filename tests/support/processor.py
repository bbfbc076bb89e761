"""Features of this machine's processor."""

import pytest


def has_int8() -> bool:
    """Whether this machine computes int8 products correctly. x86 without VNNI does not, and the engine rejects it."""
    from dsd_serve.engines import onnx_engine
    from dsd_serve.errors import EngineUnavailableError

    try:
        onnx_engine.check_integers(onnx_engine.import_onnxruntime())
    except EngineUnavailableError:
        return False
    return True


needs_int8 = pytest.mark.skipif(not has_int8(), reason="this CPU adds 8-bit products wrongly (x86 without VNNI)")
