"""The CPU kernels' own build: vector widths, missing compilers, processes that build at once, memory."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from test_kernels_cpu import CODECS, assert_attends, assert_same_format, gaussian, segment_of

from polykv import kernels
from polykv.codecs.q8_0 import Q8_0
from polykv.codecs.turboquant import TurboQuantMSE
from polykv.errors import PolyKVError
from polykv.kernels import cpu
from polykv.kernels.cpu_build import BuildError, library

pytestmark = pytest.mark.skipif(cpu.available() is not None, reason=str(cpu.available()))


@pytest.fixture
def rebuilt(monkeypatch, tmp_path_factory):
    """A function that compiles with the given CXX into a folder of this session's."""

    def build(compiler, folder=None):
        folder = folder or tmp_path_factory.getbasetemp() / "kernels"
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
        monkeypatch.setenv("CXX", compiler)
        cpu.loaded_library.cache_clear()
        return cpu.available()

    yield build
    cpu.loaded_library.cache_clear()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the options are those of x86")
@pytest.mark.slow
@pytest.mark.parametrize("narrower", ["-mno-avx512f", "-mno-avx"])
def test_other_vector_widths_give_the_same(rebuilt, narrower):
    assert rebuilt(f"c++ {narrower}") is None
    for codec in CODECS:
        for dim in (80, 128):
            x = gaussian(1, 2, 50, dim)
            assert_same_format(codec, x)
            assert_same_format(codec, x.half())
            packed = codec.encode(x)
            assert torch.equal(cpu.decode_rotated(codec, packed), codec.decode_rotated(packed))
    for queries in (3, 5, 17, 40):
        assert_attends(gaussian(2, queries, 80), segment_of(Q8_0(), TurboQuantMSE(3), 2, 100, 80))


@pytest.mark.parametrize(
    "compiler,reason",
    [
        ("/nonexistent/c++", "CXX=/nonexistent/c++ is not a program"),
        ("c++ -include nowhere.h", "nowhere.h"),
        ("false", "failed"),
    ],
)
def test_without_a_working_compiler_there_is_one_reason(rebuilt, tmp_path, compiler, reason):
    found = rebuilt(compiler, tmp_path)
    assert reason in found and "\n" not in found
    with pytest.raises(PolyKVError, match="backend=cpu is not available"):
        kernels.pick_backend("cpu", torch.device("cpu"))
    assert not list(tmp_path.rglob("*.so*[!k]"))


def test_a_cache_folder_that_cannot_be_written_is_a_reason(rebuilt, tmp_path):
    (tmp_path / "file").touch()
    assert "file" in rebuilt("c++", tmp_path / "file")


def test_an_unknown_architecture_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("polykv.kernels.cpu_build.FLAGS", ("-shared", "-fPIC", "-fsyntax-only"))
    monkeypatch.setattr("polykv.kernels.cpu_build.ARCHITECTURES", (("-march=nonsense",),))
    with pytest.raises(BuildError, match="nonsense"):
        library()


def run_python(code, **environment):
    return subprocess.Popen(
        [sys.executable, "-W", "always", "-c", code],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_auto_falls_back_to_torch_with_one_warning(tmp_path):
    code = """if True:
        import torch
        from polykv import kernels
        for _ in range(3):
            print(kernels.pick_backend("auto", torch.device("cpu")))
    """
    out, err = run_python(code, CXX="/nonexistent", XDG_CACHE_HOME=str(tmp_path)).communicate()
    assert out.split() == ["torch"] * 3
    assert err.count("CXX=/nonexistent is not a program") == 1


@pytest.mark.slow
def test_two_processes_that_compile_at_once_share_the_build(tmp_path):
    code = "from polykv.kernels import cpu, cpu_build; assert cpu.available() is None; print(cpu_build.library())"
    both = [run_python(code, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    paths = {out.strip() for out, _ in outputs}
    files = [file for file in (tmp_path / "polykv").iterdir() if file.suffix != ".lock"]
    assert paths == {str(file) for file in files} and len(files) == 1


@pytest.mark.slow
def test_memory_beyond_the_results_does_not_grow_with_the_context():
    code = """if True:
        import resource, torch
        from polykv.codecs.int8 import Int8
        from polykv.codecs.turboquant import TurboQuantMSE
        from polykv.kernels import cpu
        from polykv.segment import Segment
        torch.set_num_threads(1)
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        def run(tokens):
            x = torch.ones(1, 2, tokens, 128)
            before = peak()
            k, v = (cpu.encode(codec, x) for codec in (Int8(), TurboQuantMSE(3)))
            encoded = peak()
            cpu.attend(torch.ones(2, 60, 128), Segment(Int8(), TurboQuantMSE(3), k, v), 0.1)
            return encoded - before - (k.nbytes + v.nbytes) / 2**20, peak() - encoded
        run(64)
        print(*run(60_000))
    """
    out, err = run_python(code).communicate()
    encoding, attending = map(float, out.split())
    assert encoding < 2 and attending < 2, (out, err)  # MiB, beside inputs of 59
