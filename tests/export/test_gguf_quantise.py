"""GGUF in few bits: by llama.cpp where it is installed, and by a stand-in for its program everywhere."""

import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest

from exports import adapter_folder
from theodora.cli.main import main
from theodora.errors import CheckpointError, ConfigError, UsageError
from theodora.export import VerificationFailed, export_adapter, verify
from theodora.export import gguf_quantise as own
from theodora.export.comparison import BOUNDS_OF_BITS
from theodora.export.forms import kind_of
from theodora.export.gguf_files import FILE_TYPES, read_gguf_header

STAND_IN = Path(__file__).parent / "quantises.py"


@pytest.fixture
def adapter(tiny_model_dir, tmp_path):
    return adapter_folder(tmp_path / "adapter", tiny_model_dir())


@pytest.fixture
def nothing_here(monkeypatch, tmp_path):
    """A machine without llama.cpp."""
    monkeypatch.delenv(own.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(
        own.importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else SimpleNamespace()
    )


def program(folder: Path, lines: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "llama-quantize").write_text(f"#!/bin/sh\n{lines}\n")
    (folder / "llama-quantize").chmod(0o755)
    return folder


@pytest.fixture
def llama_cpp(tmp_path, nothing_here):
    program(tmp_path / "llama.cpp" / "build" / "bin", f'exec "{sys.executable}" "{STAND_IN}" "$@"')
    return tmp_path / "llama.cpp"


def test_every_kind_has_a_bound_and_llama_cpps_number():
    assert BOUNDS_OF_BITS.keys() == FILE_TYPES.keys()
    names = {f"MOSTLY_{kind.upper()}": number for kind, number in FILE_TYPES.items()}
    assert {name: int(getattr(gguf.LlamaFileType, name)) for name in names} == names
    assert all(logit > 0 and kl > 0 for logit, kl in BOUNDS_OF_BITS.values())


def test_a_file_in_few_bits(adapter, llama_cpp, tmp_path, capsys):
    output = tmp_path / "q.gguf"
    arguments = ["export", str(adapter), "--to", "gguf", "--output", str(output), "--quantize", "Q4_K_M"]
    assert main([*arguments, "--llama-cpp", str(llama_cpp)]) == 0
    assert "q4_k_m by llama.cpp" in " ".join(capsys.readouterr().out.split())
    header = read_gguf_header(output)
    assert (header.kind, header.precision) == ("q4_k_m", "quantised")
    found = verify(str(adapter), str(output))
    assert found.passed
    assert found.kl_bound == BOUNDS_OF_BITS["q4_k_m"][1]
    assert found.from_base.kl_mean > found.difference.kl_mean  # nearer to the adapter than to its base
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "llama.cpp", "q.gguf"}


def test_a_file_without_the_adapter_is_not_kept(adapter, tiny_model_dir, llama_cpp, tmp_path, monkeypatch):
    none = adapter_folder(tmp_path / "none", tiny_model_dir(), size=0.0)
    export_adapter(none, tmp_path / "base.gguf", "gguf", dtype="fp32")
    script = f'exec "{sys.executable}" "{STAND_IN}" "{tmp_path / "base.gguf"}" "$2" "$3"'
    monkeypatch.setenv(own.VARIABLE, str(program(tmp_path / "other", script)))
    with pytest.raises(VerificationFailed) as failure:
        export_adapter(adapter, tmp_path / "q.gguf", "gguf", quantize="q4_k_m", bound=1e9, kl_bound=1e9)
    assert failure.value.verification.lost
    assert not (tmp_path / "q.gguf").exists()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("echo no such type >&2; exit 3", "no such type"),
        ("exit 0", "has written no|not a GGUF file|damaged"),
        ('cp "$1" "$2"', "says that it is"),
    ],
)
def test_a_quantiser_that_fails_is_said(lines, says, adapter, nothing_here, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{program(tmp_path / 'bin', lines)}:/bin:/usr/bin")
    with pytest.raises(CheckpointError, match=says):
        export_adapter(adapter, tmp_path / "q.gguf", "gguf", quantize="q4_0")
    assert not (tmp_path / "q.gguf").exists()


def test_without_llama_cpp_it_is_said_how_to_get_it(adapter, nothing_here, tmp_path):
    with pytest.raises(UsageError, match="pip install llama-cpp-python"):
        export_adapter(adapter, tmp_path / "q.gguf", "gguf", quantize="q4_k_m")
    with pytest.raises(UsageError, match="cmake --build"):
        export_adapter(adapter, tmp_path / "q.gguf", "gguf", quantize="q4_k_m", llama_cpp=tmp_path)
    report = export_adapter(adapter, tmp_path / "q.gguf", "gguf", quantize="q8_0")  # which needs none
    assert report.verification.passed


def test_the_library_takes_the_programs_place(nothing_here, monkeypatch, tmp_path):
    calls = []
    library = SimpleNamespace(
        llama_model_quantize_default_params=lambda: SimpleNamespace(ftype=None),
        llama_model_quantize=lambda source, target, given: calls.append((source, target, given.ftype)) or 0,
    )
    monkeypatch.setattr(own.importlib.util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setitem(sys.modules, "llama_cpp", library)
    own.find_quantiser()(tmp_path / "a", tmp_path / "b", "q5_k_m")
    assert calls == [(bytes(tmp_path / "a"), bytes(tmp_path / "b"), 17)]


@pytest.mark.parametrize(
    ("form", "options", "says"),
    [
        ("gguf", {"quantize": "iq2_xs"}, "expected one of q2_k"),
        ("hf", {"quantize": "q4_k_m"}, "for the form gguf"),
        ("gguf", {"quantize": "q4_k_m", "dtype": "q8_0"}, "rounded twice"),
    ],
)
def test_what_makes_no_sense_is_refused(form, options, says, adapter, tmp_path):
    with pytest.raises((ConfigError, UsageError), match=says):
        export_adapter(adapter, tmp_path / "q", form, **options)


def test_llama_cpp_itself(adapter, tmp_path):
    try:
        own.find_quantiser()
    except UsageError as missing:
        pytest.skip(f"llama.cpp is not installed: {missing}")
    report = export_adapter(adapter, tmp_path / "q.gguf", "gguf", quantize="q4_k_m")
    assert report.verification.passed
    assert report.verification.difference.kl_mean > 0


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        kind_of(str(tmp_path / "model.gguf"))
