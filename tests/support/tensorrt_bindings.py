"""python tests/support/tensorrt_bindings.py WHEEL: the names in NVIDIA's own TensorRT bindings, as JSON.

The bindings need gigabytes of libraries and a GPU to work, but to be inspected they only need libraries of these
names. So empty ones are built with gcc in a temporary folder. Class or enumeration -> names of its members.
"""

import ctypes
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NEEDED = (
    "createInferBuilder_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)


def names(wheel: Path, folder: Path) -> dict[str, list[str]]:
    major = wheel.name.split("-")[1].split(".")[0]
    functions = "\n".join(f"void *{name}(void) {{ return 0; }}" for name in NEEDED)
    for library, source in (("libnvinfer", functions), ("libnvinfer_plugin", ""), ("libnvonnxparser", "")):
        code, target = folder / f"{library}.c", folder / f"{library}.so.{major}"
        code.write_text(source)
        command = ["gcc", "-shared", "-fPIC", "-o", str(target), f"-Wl,-soname,{target.name}", str(code)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(target), ctypes.RTLD_GLOBAL)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/tensorrt.so"))
        loader = importlib.machinery.ExtensionFileLoader("tensorrt", archive.extract(name, folder))
    spec = importlib.util.spec_from_loader("tensorrt", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return {name: dir(getattr(module, name)) for name in dir(module)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        print(json.dumps(names(Path(sys.argv[1]), Path(temporary))))
