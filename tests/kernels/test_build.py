"""The build: cached, rebuilt when its key changes, and a machine without a compiler still right."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from penstock.kernels import native
from penstock.kernels.linear import pack, pack_gated
from penstock.kernels.native import bind, build
from penstock.kernels.rmsnorm import rms_norm


@pytest.fixture
def undecided() -> Iterator[None]:
    bind._load.cache_clear()
    yield
    bind._load.cache_clear()


@pytest.mark.usefixtures("undecided")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("PENSTOCK_CC", str(tmp_path / "missing"))
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    with caplog.at_level(logging.WARNING, "penstock.kernels"):
        assert native.library() is None
        assert native.library() is None
    assert len(caplog.records) == 1
    assert f"no C compiler found: PENSTOCK_CC={tmp_path / 'missing'} is no program" in native.describe()
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.randn(5, 20).to(dtype), torch.randn(30, 20).to(dtype)
        layer = pack(weight)
        assert layer.packed is None
        truth = x.double() @ weight.double().T
        torch.testing.assert_close(layer(x).double(), truth, rtol=2**-7, atol=1e-3)
        assert layer(x, out_dtype=torch.float32).dtype == torch.float32
        assert pack_gated(weight, weight, "silu")(x).shape == (5, 30)
        assert rms_norm(x, x[0].clone(), 1e-5).shape == x.shape


@pytest.mark.usefixtures("undecided")
def test_unknown_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_KERNELS", "foo")
    with pytest.raises(ValueError, match="must be one of native, avx2, avx512, avx512bf16, reference, but is 'foo'"):
        native.library()


@pytest.mark.usefixtures("undecided")
def test_a_failing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\n[ \"$1\" = --version ] && echo broken 1.0 && exit 0\necho 'fatal: out of cheese' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PENSTOCK_CC", str(broken))
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    assert native.library() is None
    assert "out of cheese" in native.describe()
    assert not list((tmp_path / "cache").rglob("*.so"))
    assert not list((tmp_path / "cache" / "kernels").iterdir())


def test_the_cache_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not build.compilers():
        pytest.skip("no C compiler")
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", ("-O0", *build.FLAGS[1:]))
    first = build.build()
    assert first.parent == tmp_path / "kernels"
    assert oct(first.parent.stat().st_mode & 0o777) == "0o700"
    stamp = first.stat().st_mtime_ns
    assert build.build() == first
    assert first.stat().st_mtime_ns == stamp
    assert os.listdir(first.parent) == [first.name]
    bind.Native(str(first))


def test_an_open_cache_is_not_trusted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels").chmod(0o777)
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path))
    assert build.cache_directory() != tmp_path / "kernels"


@pytest.mark.usefixtures("compiled")
def test_callers_on_several_threads() -> None:
    """Two callers at once (the second works alone), and thread counts that change: the same bits."""
    layer, x = pack(torch.randn(300, 200)), torch.randn(40, 200)
    wanted = layer(x)
    with concurrent.futures.ThreadPoolExecutor(4) as workers:
        for result in workers.map(lambda _: layer(x), range(400)):
            assert torch.equal(result, wanted)


@pytest.mark.usefixtures("compiled")
def test_after_a_fork() -> None:
    """A forked child has no helper threads and makes its own."""
    layer, x = pack(torch.randn(300, 200)), torch.randn(40, 200)
    wanted = layer(x)
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = os.fork()
    if child == 0:
        try:
            os.write(write, b"same" if all(torch.equal(layer(x), wanted) for _ in range(20)) else b"differ")
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 10) == b"same"
    os.close(read)
    assert os.waitpid(child, 0)[1] == 0
