"""The hash of Triton's compiler is made once, and again when a file of the compiler is another."""

import pytest

pytest.importorskip("triton")

import triton.runtime.cache

from theodora.kernels.triton import compiler_hash


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A folder in the place of Triton's; `compiler()` is the hash in a new process, made `compiler.count` times."""
    monkeypatch.setenv("THEODORA_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "triton"
    (folder / "_C").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "_C" / "libtriton.so").write_text("machine code")
    monkeypatch.setattr(compiler_hash.triton, "__file__", str(folder / "__init__.py"))

    def find():
        compiler.count += 1
        return f"hash {compiler.count}"

    def compiler():
        monkeypatch.setattr(triton.runtime.cache, "triton_key", find)
        compiler_hash.keep_compiler_hash()
        return triton.runtime.cache.triton_key()

    compiler.count, compiler.folder = 0, folder
    return compiler


def test_it_is_made_once(compiler):
    assert [compiler(), compiler()] == ["hash 1", "hash 1"]
    assert compiler.count == 1


@pytest.mark.parametrize("name", ["_C/libtriton.so", "language.py"])
def test_another_compiler_has_another(compiler, name):
    compiler()
    (compiler.folder / name).write_text("other machine code")
    assert compiler() == "hash 2"
