"""The class of `triton_instance`, under the name by which Triton repositories of earlier exports import it."""

from dsd_serve.triton_instance import TritonPythonModel

__all__ = ["TritonPythonModel"]
