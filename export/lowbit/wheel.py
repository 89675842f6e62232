"""Write the wheel `onnxruntime-ep-lowbit`: the provider's library and one small module."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import re
import zipfile
from pathlib import Path

from export.atomic import replace_file
from export.lowbit import deployed
from export.lowbit.build import SOURCES

NAME = "onnxruntime-ep-lowbit"
FOLDER = NAME.replace("-", "_")
OLDEST = (1980, 1, 1, 0, 0, 0)  # in a zip file; the same library gives the same wheel
README = """`pip install onnxruntime onnxruntime-ep-lowbit`, then:

```python
import onnxruntime
import onnxruntime_ep_lowbit as lowbit

name = lowbit.get_ep_name()
onnxruntime.register_execution_provider_library(name, lowbit.get_library_path())
options = onnxruntime.SessionOptions()
if devices := [device for device in onnxruntime.get_ep_devices() if device.ep_name == name]:
    options.add_provider_for_devices(devices, {})
session = onnxruntime.InferenceSession("student.onnx", options)
```

Models are standard ONNX files with 2-bit convolutions (QuantizeLinear, DequantizeLinear, Conv), such as qkd-toolkit
writes them; their outputs are the same with and without the provider. Where it gains nothing (processors whose 8-bit
dot products are as fast) it offers no device. The library holds LLVM's C++ runtime (Apache-2.0 WITH LLVM-exception).
"""


def write_wheel(library: Path, tag: str, folder: Path) -> Path:
    """Write the wheel of a library, whole or not at all.

    Args:
        library: The provider's library.
        tag: Tag of the platform, such as ``manylinux_2_28_aarch64``.
        folder: Where the wheel is written; it must exist.

    Returns:
        The wheel's path; a file of that name is replaced.

    Raises:
        OSError: If the library cannot be read, or the wheel not written.
        ValueError: If something other than a file has the wheel's name.
    """
    info = f"{FOLDER}-{version()}.dist-info"
    files = {
        f"{FOLDER}/__init__.py": Path(deployed.__file__).read_bytes(),
        f"{FOLDER}/py.typed": b"",
        f"{FOLDER}/{deployed.LIBRARY}": library.read_bytes(),
        **{f"{info}/{name}": text.encode() for name, text in metadata(tag).items()},
    }
    files[f"{info}/RECORD"] = record(files, info).encode()
    path = folder / f"{FOLDER}-{version()}-py3-none-{tag}.whl"
    replace_file(path, zipped(files))
    return path


def version() -> str:
    """Return the provider's version, which its sources hold."""
    text = (SOURCES / "runtime" / "provider.cc").read_text(encoding="utf-8")
    found = re.search(r'kVersion = "(.+?)"', text)
    if found is None:
        raise RuntimeError("the provider's sources do not say their version")
    return found[1]


def metadata(tag: str) -> dict[str, str]:
    """Return the files of the wheel's own folder, except its list of files."""
    about = [
        "Metadata-Version: 2.4", f"Name: {NAME}", f"Version: {version()}",
        "Summary: 2-bit convolutions by look-up tables: a plugin execution provider for ONNX Runtime",
        "License-Expression: Apache-2.0", "License-File: LICENSE",
        "Keywords: onnxruntime,quantization,execution provider", "Classifier: Operating System :: POSIX :: Linux",
        "Requires-Python: >=3.10", "Description-Content-Type: text/markdown", "", README,
    ]  # fmt: skip
    kind = ["Wheel-Version: 1.0", "Generator: qkd lowbit wheel", "Root-Is-Purelib: false", f"Tag: py3-none-{tag}", ""]
    return {"METADATA": "\n".join(about), "WHEEL": "\n".join(kind), "licenses/LICENSE": license_text()}


def license_text() -> str:
    """Return the toolkit's license: of the checkout, or of the installed distribution."""
    checkout = Path(__file__).resolve().parents[2] / "LICENSE"
    if checkout.is_file():
        return checkout.read_text(encoding="utf-8")
    text = importlib.metadata.distribution("qkd-toolkit").read_text("licenses/LICENSE")
    if text is None:
        raise RuntimeError("the license of qkd-toolkit is not installed with it: install it again")
    return text


def record(files: dict[str, bytes], info: str) -> str:
    """Return the list of files with hashes and sizes."""

    def line(name: str, content: bytes) -> str:
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        return f"{name},sha256={digest},{len(content)}\n"

    return "".join(line(name, content) for name, content in files.items()) + f"{info}/RECORD,,\n"


def zipped(files: dict[str, bytes]) -> bytes:
    """Return the files as a zip archive that depends on nothing but them."""
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, OLDEST)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    return whole.getvalue()
