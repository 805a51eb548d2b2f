"""`theodora doctor`: what it says of this machine and of others, and when it fails."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from theodora import extras
from theodora.cli import doctor, this_machine
from theodora.cli.main import main
from theodora.cli.this_machine import GIB, Folder, Gpu, Here, look

H200 = Gpu(name="H200", memory=141 * GIB, free=100 * GIB, capability=(9, 0), bf16=True)
T4 = Gpu(name="T4", memory=16 * GIB, free=15 * GIB, capability=(7, 5), bf16=False)


@pytest.fixture(scope="module")
def here() -> Here:
    return look()


@pytest.fixture
def features(here, monkeypatch):
    """Of this machine, were it otherwise: feature → (state, why, mend)."""

    def features(*, packages=None, **otherwise):
        if packages is not None:
            monkeypatch.setattr(extras, "installed", packages.get)
            monkeypatch.setattr(doctor, "installed", packages.get)
        roomy = Folder(path="/somewhere", free=100 * GIB, writable=True)
        plain = {"gpu_unused": None, "cache": roomy, "temporary": roomy, "compiler": "/usr/bin/gcc", "headers": True}
        found = doctor._features(replace(here, **plain | otherwise))
        return {feature.name: (feature.state, feature.why, feature.mend) for feature in found}

    return features


def test_this_machine(here):
    assert here.memory > 0
    assert here.cores >= 1
    assert here.cache.free > 0
    assert here.python == sys.version.split()[0]


def test_the_command_names_every_extra_with_its_line(capsys):
    assert main(["doctor"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert all(f"theodora[{name}]" in out for name in extras.EXTRAS)
    assert all(name in out for name in extras.OTHERS)
    assert f"torch {extras.installed('torch')}" in out


def test_json_holds_all_of_it(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["works"]
    assert found["extras"].keys() == extras.EXTRAS.keys()
    assert found["extras"]["serve"]["pip"] == "pip install 'theodora[serve]'"
    assert {package["name"] for package in found["core"]} >= {"torch", "transformers", "trl"}
    assert found["machine"]["cache"].keys() == {"path", "free", "writable"}
    assert {feature["state"] for feature in found["features"]} <= {"yes", "slow", "no"}


def test_torch_alone_is_imported():
    script = "import sys; from theodora.cli.main import main; main(['doctor', '--json']);"
    script += "heavy = {'transformers', 'trl', 'datasets', 'triton', 'bitsandbytes', 'fastapi', 'shtab'};"
    script += "print(sorted(heavy & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "[]"


def test_a_core_that_cannot_work_is_the_exit_code(monkeypatch, capsys):
    versions = {**{name.split(">")[0]: "99" for name in extras.CORE}, "trl": None, "torch": "2.1.0"}
    monkeypatch.setattr(extras, "installed", versions.get)
    assert main(["doctor"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "torch: 2.1.0 is installed; expected >=2.11: pip install --upgrade 'torch>=2.11'" in out
    assert "trl: it is not installed" in out


def test_a_torch_that_breaks_is_told(monkeypatch, capsys):
    def broken():
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(this_machine, "look", broken)
    assert main(["doctor"]) == 1
    assert "libcudart" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["works"]
    assert found["machine"] is None


def test_gpus_and_what_they_can(features):
    new = features(gpus=(H200, H200), packages={"triton": "3.5", "liger-kernel": "0.8.5"})
    assert new["bfloat16"][0] == new["--base-dtype fp8"][0] == new["fast kernels"][0] == "yes"
    old = features(gpus=(T4,), packages={})
    assert old["bfloat16"][0] == "slow"
    assert "8.9" in old["--base-dtype fp8"][1]
    assert old["fast kernels"] == ("slow", "Triton is not installed", "pip install 'theodora[gpu]'")


def test_what_triton_builds_with(features):
    there = {"triton": "3.5"}
    without = features(gpus=(H200,), packages=there, compiler=None)
    assert without["fast kernels"][0] == without["--torch-compile"][0] == "no"
    assert "apt install" in without["fast kernels"][2]
    assert "headers" in features(gpus=(H200,), packages=there, headers=False)["fast kernels"][1]


def test_a_gpu_that_torch_does_not_see(features):
    assert features(gpu_unused="torch was built for CPUs")["GPU"][:2] == (
        "no",
        "there is one, and torch was built for CPUs",
    )
    assert "GPU" not in features()


def test_disks_that_are_full_or_closed(features):
    full = features(cache=Folder(path="/cache", free=GIB, writable=True))
    assert full["disk for models"] == ("slow", "/cache: 1.0 GiB are free", "HF_HOME=FOLDER")
    closed = features(temporary=Folder(path="/tmp", free=99 * GIB, writable=False))
    assert "cannot be written to" in closed["disk for rows while a run prepares them"][1]
    assert not [name for name in features() if name.startswith("disk")]


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"])
def test_the_cache_is_where_the_hub_has_it(variable, monkeypatch, tmp_path):
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "there"))
    script = "from huggingface_hub.constants import HF_HUB_CACHE; print(HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert str(this_machine._hub_cache()) == theirs.stdout.strip()
