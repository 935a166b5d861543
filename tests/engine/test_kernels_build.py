"""Compiling once, in however many processes; and what happens where it cannot be done."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tandem.config import DecodeConfig
from tandem.engine.attention.torch_paged import TorchPagedAttention
from tandem.engine.build import build_engine
from tandem.engine.kernels import build, choose
from tandem.engine.kernels.build import Compiler, KernelsUnavailable, build_library, find_compiler
from tandem.engine.kernels.choose import choose_kernels
from tandem.engine.kernels.ops import TorchOps
from tandem.errors import ConfigError
from tandem.testing.checkpoints import CheckpointSpec, make_checkpoint

CPU = torch.device("cpu")
COMPILER = find_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler on this machine")


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile at once."""
    folder = tmp_path / "cpu"
    folder.mkdir()
    (folder / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    monkeypatch.setattr(build, "SOURCES", folder)
    return folder


@needs_compiler
def test_a_library_is_compiled_once_and_again_when_anything_changes(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert COMPILER is not None
    cache = tmp_path / "cache"
    with caplog.at_level(logging.INFO):
        first = build_library(COMPILER, cache)
        assert build_library(COMPILER, cache) == first
    assert [record.message.partition(" with ")[0] for record in caplog.records][:1] == ["compiling the CPU kernels"]
    assert len(caplog.records) == 2
    (small / "one.cpp").write_text('extern "C" int one() { return 2; }\n')
    second = build_library(COMPILER, cache)
    third = build_library(Compiler(COMPILER.path, COMPILER.version + "1"), cache)
    monkeypatch.setattr(build, "cpu_features", lambda: ("another",))
    fourth = build_library(COMPILER, cache)
    assert len({first, second, third, fourth}) == 4
    assert {file.name for file in cache.iterdir()} == {
        "kernels.lock", *(each.name for each in (first, second, third, fourth))
    }  # fmt: skip


@needs_compiler
def test_processes_that_start_together_compile_once(small: Path, tmp_path: Path) -> None:
    script = (
        "import logging, sys; from pathlib import Path; logging.basicConfig(level=20)\n"
        "from tandem.engine.kernels import build\n"
        "build.SOURCES = Path(sys.argv[1])\n"
        "print(build.build_library(build.find_compiler(), Path(sys.argv[2])))\n"
    )
    command = [sys.executable, "-c", script, str(small), str(tmp_path / "cache")]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    outputs = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0] * 4
    assert len({out for out, _ in outputs}) == 1
    assert sum("compiling" in said for _, said in outputs) == 1


@needs_compiler
def test_a_failed_compilation_is_told_in_one_line_and_leaves_nothing(small: Path, tmp_path: Path) -> None:
    assert COMPILER is not None
    (small / "two.cpp").write_text("int two() { return nothing; }\n")
    with pytest.raises(KernelsUnavailable, match=r"failed: .*two.cpp.*nothing"):
        build_library(COMPILER, tmp_path / "cache")
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["kernels.lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KernelsUnavailable, match=f"{tmp_path}/file/cache cannot be written: Not a directory"):
        build_library(Compiler("/bin/false", "0"), tmp_path / "file" / "cache")


def test_names_that_are_no_compilers_are_passed_over() -> None:
    assert find_compiler(["no-such-compiler", "false"]) is None


@pytest.mark.parametrize("program", ["\x7fELF of another machine", "#!/bin/sh\nexec sleep 60\n"])
def test_a_compiler_that_cannot_run_or_hangs_is_passed_over(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, text in (("first++", program), ("second++", "#!/bin/sh\nprintf 'version \\377'\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(build, "VERSION_S", 0.5)
    assert find_compiler(["first++", "second++"]) == Compiler(str(tmp_path / "second++"), "version \ufffd")
    assert [f"{tmp_path}/first++ is no compiler" in record.message for record in caplog.records] == [True]


def test_a_user_without_a_home_is_served_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    kernels = choose_kernels("auto", CPU)
    assert kernels.name == "torch" and "set XDG_CACHE_HOME" in kernels.detail


@pytest.fixture
def none_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "find_compiler", lambda: None)


@pytest.mark.usefixtures("none_here")
def test_without_a_compiler_torch_is_used_and_said(caplog: pytest.LogCaptureFixture) -> None:
    kernels = choose_kernels("auto", CPU)
    assert kernels.name == "torch"
    assert "no C++ compiler" in kernels.detail
    assert isinstance(kernels.ops, TorchOps)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.usefixtures("none_here")
def test_native_kernels_that_are_demanded_and_cannot_be_had_are_an_error() -> None:
    with pytest.raises(ConfigError, match="kernels is native; no C"):
        choose_kernels("native", CPU)
    with pytest.raises(ConfigError, match="kernels is native; they are for CPUs"):
        choose_kernels("native", torch.device("meta"))


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "kernels.so"
    broken.write_text("not a library")
    monkeypatch.setattr(choose, "build_library", lambda compiler, cache: broken)
    with pytest.raises(ConfigError, match=r"kernels.so cannot be loaded"):
        choose_kernels("native", CPU)


@needs_compiler
@pytest.mark.parametrize("kernels", ["auto", "native", "torch"])
def test_the_setting_reaches_the_engine(kernels: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, CheckpointSpec(layers=1))
    _, model = build_engine(DecodeConfig(model=str(folder), kernels=kernels, pages=4))
    assert model.kernels.name == ("torch" if kernels == "torch" else "native")
    assert isinstance(model.kernels.ops, TorchOps) == (kernels == "torch")
    assert (model.kernels.library is None) == (kernels == "torch")


def test_torch_kernels_come_with_torch_attention(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, CheckpointSpec(layers=1))
    config = DecodeConfig(model=str(folder), kernels="torch", pages=4)
    engine, _ = build_engine(config)
    assert isinstance(vars(engine)["_runner"].attention, TorchPagedAttention)
