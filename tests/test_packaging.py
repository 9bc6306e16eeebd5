"""What users install: build archive and wheel, install them where nothing else of this checkout is, and look."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILT_FROM = ["pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"]
BUILT_FROM += ["cggr_compile", "passes"]
EXTRAS = {"demo", "dev", "docs", "finetune", "flash", "lightning", "trl"}


def call(*command: object, cwd: Path, path: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": path}
    command = tuple(str(part) for part in command)
    run = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the sources, so that building leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def archive(source: Path, tmp_path_factory) -> Path:
    """The source archive, with the wheel that is built from it beside it."""
    out = tmp_path_factory.mktemp("archive")
    call(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ".", cwd=source)
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(archive: Path) -> Path:
    (path,) = archive.parent.glob("*.whl")
    return path


def clean_python(folder: Path, *install: object, cwd: Path) -> Path:
    """Python of a new environment: the package as given, everything else (torch) from the running environment.

    The .pth line appends the running environment's packages *after* the new environment's own, and the .pth files
    over there are not read: an editable install of this checkout stays invisible.
    """
    call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=cwd)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-build-isolation"]
    paths = json.loads(call(python, "-c", "import json, sysconfig; print(json.dumps(sysconfig.get_paths()))", cwd=cwd))
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(paths["purelib"]) / "zz_running_environment.pth").write_text("\n".join(sorted(here)) + "\n")
    call(*pip, *install, cwd=cwd)
    return python


PROBE = """
import json, importlib.resources, pathlib, torch
listed = "cggr" in torch.compiler.list_backends(), "cggr" in torch._dynamo.list_backends()
import cggr_compile, cggr_compile.passes, cggr_compile.backend, cggr_compile.pipeline
print(json.dumps({
    "listed": listed,
    "package": cggr_compile.__file__,
    "passes": str(pathlib.Path(cggr_compile.passes.__file__).resolve()),
    "typed": importlib.resources.files("cggr_compile").joinpath("py.typed").is_file(),
    "version": cggr_compile.__version__,
}))
"""


def passes_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_wheel_holds_the_passes_as_files(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    prefix = "cggr_compile/passes/"
    held = {name.removeprefix(prefix) for name in names if name.startswith(prefix) and name.endswith(".py")}
    assert held == passes_in(ROOT / "passes")
    assert {"cggr_compile/py.typed", "cggr_compile/templates/report.html.j2"} <= set(names)
    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"cggr_compile"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_archive_holds_the_sources(archive: Path):
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    held = {name.removeprefix("cggr_compile/passes/") for name in names if name.startswith("cggr_compile/passes/")}
    assert {name for name in held if name.endswith(".py")} == passes_in(ROOT / "passes")
    assert {
        "pyproject.toml",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "cggr_compile/templates/report.html.j2",
    } <= names
    assert not [name for name in names if name.startswith("tests")]


def test_metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as files:
        (path,) = (name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(files.read(path))
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {metadata['Version']}\n" in citation
    assert f"\n## {metadata['Version']}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_installed_wheel_lists_the_backend(wheel: Path, tmp_path: Path):
    environment = tmp_path / "venv"
    python = clean_python(environment, wheel, cwd=tmp_path)
    found = json.loads(call(python, "-c", PROBE, cwd=tmp_path).splitlines()[-1])
    assert found["listed"] == [True, True]
    assert Path(found["package"]).is_relative_to(environment)
    assert Path(found["passes"]).is_relative_to(environment.resolve())
    assert passes_in(Path(found["passes"]).parent) == passes_in(ROOT / "passes")
    assert found["typed"]
    assert found["version"] in wheel.name
    told = call(environment / "bin" / "cggr-compile", "--version", cwd=tmp_path)
    assert told == f"cggr_compile {found['version']}\n"


@pytest.mark.slow
def test_editable_install_resolves_the_passes(source: Path, tmp_path: Path):
    python = clean_python(tmp_path / "venv", "--editable", source, cwd=tmp_path)
    found = json.loads(call(python, "-c", PROBE, cwd=tmp_path).splitlines()[-1])
    assert found["listed"] == [True, True]
    assert Path(found["package"]) == source / "cggr_compile" / "__init__.py"
    assert Path(found["passes"]).parent == source.resolve() / "passes"


def test_import_is_light(tmp_path: Path):
    code = (
        "import sys, torch; before = set(sys.modules); import cggr_compile; "
        "print(sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    new = call(sys.executable, "-c", code, cwd=tmp_path, path=str(ROOT))
    assert "cggr_compile" in new
    assert not [name for name in ("triton", "transformers", "tokenizers", "matplotlib") if f"'{name}'" in new], new


SETTINGS = """
import logging, warnings, torch, torch._dynamo.config, torch._functorch.config, torch._inductor.config
def settings():
    return {
        **{f"dynamo.{k}": repr(v) for k, v in torch._dynamo.config.get_config_copy().items()},
        **{f"functorch.{k}": repr(v) for k, v in torch._functorch.config.get_config_copy().items()},
        **{f"inductor.{k}": repr(v) for k, v in torch._inductor.config.get_config_copy().items()},
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "sdp": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(),
                torch.backends.cuda.mem_efficient_sdp_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": torch.is_grad_enabled(),
        "rng": hash(bytes(torch.get_rng_state().tolist())),
        "logging": (logging.getLogger().level, logging.getLogger().handlers, logging.getLogger("torch").level),
        "warnings": list(warnings.filters),
    }
before = settings()
import cggr_compile
for name in cggr_compile.__all__: getattr(cggr_compile, name)
after = settings()
print({key: (before[key], after[key]) for key in before if before[key] != after[key]})
"""


def test_import_changes_no_setting_of_torch(tmp_path: Path):
    assert call(sys.executable, "-c", SETTINGS, cwd=tmp_path, path=str(ROOT)).strip() == "{}"
