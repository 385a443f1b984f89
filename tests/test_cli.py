"""The command, and errors of importing a source tree without the extension."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import corrmatch
from corrmatch import _C, cli

pytestmark = pytest.mark.slow


def run(*arguments, cwd=None, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def test_info_as_a_command(tmp_path):
    done = run("-m", "corrmatch", "info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"corrmatch {corrmatch.__version__}\n")


def test_info(monkeypatch):
    monkeypatch.setenv("CORRMATCH_BACKEND", "reference")
    lines = cli.info().splitlines()
    assert lines[0] == f"corrmatch {corrmatch.__version__}"
    table = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines if line.split()[:1]}
    for name, backend in corrmatch.backends().items():
        available, note = table[name]
        assert available == ("yes" if backend.available else "no")
        assert note == (", ".join(sorted(backend.ops)) if backend.available else backend.missing)
    assert table["CORRMATCH_BACKEND"] == ["reference"]
    assert table["CORRMATCH_CHECK"] == ["not", "set"]


def test_info_names_what_the_trainer_lacks(monkeypatch):
    find = importlib.util.find_spec
    for missing, line in {(): "yes", ("timm", "tqdm"): "needs timm, tqdm: pip install 'corrmatch[train]'"}.items():
        monkeypatch.setattr(cli.importlib.util, "find_spec", lambda n, m=missing: None if n in m else find("torch"))
        assert f"trainer    {line}" in cli.info().splitlines()


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == corrmatch.__version__


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["info", "--unknown"]])
def test_wrong_command(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: corrmatch" in capsys.readouterr().err


def test_main_returns_the_exit_code(capsys):
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out == cli.info() + "\n"


def test_source_tree_without_a_build(tmp_path):
    source = Path(corrmatch.__file__).parent
    shutil.copytree(source, tmp_path / "corrmatch", ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    # The import hook of an editable installation would find the extension.
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; import corrmatch"
    done = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert message.startswith("ImportError: corrmatch's compiled extension is missing")
    assert "pip install -c constraints.txt ." in message


def importing(tmp_path, spoil):
    """The last line of `import corrmatch` from a copy of the package, after `spoil` has changed its extension."""
    folder = tmp_path / "corrmatch"
    shutil.copytree(Path(corrmatch.__file__).parent, folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(_C.__file__, folder)
    spoil(folder / Path(_C.__file__).name)
    code = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]; import corrmatch"
    done = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    return done.stderr.splitlines()[-1]


def rename_a_library(path):
    path.write_bytes(path.read_bytes().replace(b"libstdc++.so.6", b"libstdc--.so.6"))


@pytest.mark.skipif(sys.platform != "linux", reason="the messages are those of its loader")
@pytest.mark.parametrize(
    ("spoil", "reason"),
    {
        "a missing library": (rename_a_library, "libstdc--.so.6: cannot open shared object file"),
        "no library": (lambda path: path.write_bytes(b"rubbish" * 100), "invalid ELF header"),
        "empty": (lambda path: path.write_bytes(b""), "file too short"),
    }.values(),
)
def test_extension_that_cannot_be_loaded(tmp_path, spoil, reason):
    """The message is that of the loader, and names the file."""
    message = importing(tmp_path, spoil)
    assert message.startswith("ImportError: corrmatch's compiled extension is there and cannot be loaded: ")
    assert reason in message
    assert str(tmp_path / "corrmatch" / Path(_C.__file__).name) in message
    assert "source tree" not in message


def test_extension_of_another_python(tmp_path):
    message = importing(tmp_path, lambda path: path.rename(path.with_name("_C.cpython-39-x86_64-linux-gnu.so")))
    assert message.startswith(
        "ImportError: corrmatch's compiled extension is there for another Python or platform: _C."
    )
    assert sys.executable in message


def test_import_is_light(tmp_path):
    """An import and a first call compile nothing, do not start the CUDA driver and do not import the compiler."""
    code = """
import sys, torch
def woken(*_): raise AssertionError("a process forked after this could not use the GPU")
torch.cuda.is_available = torch._C._cuda_getDeviceCount = woken
before = set(sys.modules)
import corrmatch
maps = [torch.randn(1, 3, 4, 5, requires_grad=True) for _ in range(3)]
corrmatch.ops.pixel_propagate(*maps, threshold=0.4).sum().backward()
assert not torch.cuda.is_initialized()
heavy = {"triton", "scipy", "cv2", "PIL", "torchvision", "matplotlib", "sympy", "torch._dynamo", "torch._inductor"}
heavy |= {"timm", "accelerate", "torchmetrics", "omegaconf", "tensorboard", "tqdm", "corrmatch.training"}
found = heavy & (set(sys.modules) - before)
assert not found, found
"""
    done = run("-c", code, cwd=tmp_path, TRITON_INTERPRET="")  # the setting of users
    assert done.returncode == 0, done.stderr
