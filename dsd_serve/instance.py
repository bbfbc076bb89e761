"""The class of `triton_instance`, under the name that Triton repositories of earlier exports import."""

from dsd_serve.triton_instance import TritonPythonModel

__all__ = ["TritonPythonModel"]
