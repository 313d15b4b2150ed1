"""What is installed: every package and data file, and nothing imported before it is needed."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]

NO_SOCKETS = """
import socket
def refuse(*args, **kwargs):
    raise OSError("this test allows no sockets")
socket.socket.__init__ = refuse
"""


def package_files() -> set[str]:
    """Name each file of the package by its path in a wheel, through the links to the top-level folders."""
    package = ROOT / "gptoss_lite"
    return {
        Path(folder, name).relative_to(ROOT).as_posix()
        for folder, _, names in os.walk(package, followlinks=True)
        for name in names
        if "__pycache__" not in folder
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a wheel from a copy, so that no build folder is left in the checkout or taken from it."""
    source, built = tmp_path_factory.mktemp("source") / "copy", tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "tests", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", built, source], check=True)
    [path] = built.glob("*.whl")
    return path


def test_every_package_is_listed() -> None:
    found = {
        os.path.dirname(path).replace("/", ".") for path in package_files() if path.endswith("/__init__.py")
    }
    assert set(SETUPTOOLS["packages"]) == found


def test_links_lead_to_the_folders_that_are_packaged() -> None:
    folders = {
        name.removeprefix("gptoss_lite."): folder for name, folder in SETUPTOOLS["package-dir"].items()
    }
    links = {path.name: os.readlink(path) for path in (ROOT / "gptoss_lite").iterdir() if path.is_symlink()}
    assert links == {name: f"../{folder}" for name, folder in folders.items() if name != "gptoss_lite"}


def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    assert package_files() <= packed
    assert {path.split("/")[0] for path in packed if ".dist-info/" not in path} == {"gptoss_lite"}


def test_import_is_free() -> None:
    code = "import sys, gptoss_lite, gptoss_lite.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"numpy", "numba", "tiktoken", "rich", "safetensors", "cupy"}
    assert not heavy & set(done.stdout.split())


@pytest.mark.soak
def test_wheel_answers_in_an_empty_environment_without_sockets(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    commands = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    subprocess.run([commands / "python", "-m", "pip", "install", "--quiet", wheel], check=True)
    (tmp_path / "sitecustomize.py").write_text(NO_SOCKETS)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}

    def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)

    assert "no sockets" in run(commands / "python", "-c", "import socket; socket.socket()").stderr
    answered = run(commands / "gptoss-lite", "generate", "Hello", "--seed", "1", "--max-tokens", "200")
    assert answered.returncode == 0, answered.stderr
    assert answered.stdout.strip()
