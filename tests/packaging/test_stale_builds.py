"""A build folder of an earlier build has no influence on the next build."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow_build
BUILT_FOR = re.compile(r"-DTXL_VERSIONS_\w+")


def cache(sources: Path) -> str:
    (file,) = sources.glob("build/cmake-*/CMakeCache.txt")
    return file.read_text("utf-8")


def test_options_of_an_earlier_build_do_not_persist(setup_build, fake_environment, sources):
    options = f"--torch-python={fake_environment}/bin/python"
    setup_build(options, CMAKE_ARGS="-DTXL_CUDA=OFF -DTXL_WERROR=ON")
    assert "TXL_CUDA:STRING=OFF" in cache(sources)
    setup_build(options)
    assert "TXL_CUDA:STRING=AUTO" in cache(sources)
    assert "TXL_WERROR:BOOL=OFF" in cache(sources)


@pytest.mark.parametrize("transfer", [shutil.move, shutil.copytree])
def test_a_moved_or_copied_checkout_builds(setup_build, fake_environment, sources, transfer):
    environment = {"VIRTUAL_ENV": str(fake_environment)}
    setup_build(**environment)
    elsewhere = sources.with_name("else where")
    transfer(sources, elsewhere)
    assert str(sources) in cache(elsewhere)
    done, record = setup_build(checkout=elsewhere, **environment)
    assert done.returncode == 0, done.stderr
    assert "2.0.1" in record["reason"]
    assert f"CMAKE_HOME_DIRECTORY:INTERNAL={elsewhere}\n" in cache(elsewhere)


def test_a_compiler_that_has_vanished_is_replaced(setup_build, fake_environment, tool, tmp_path):
    compiler = tmp_path / "compiler" / "g++"
    compiler.parent.mkdir()
    compiler.symlink_to(tool("g++"))
    environment = {"VIRTUAL_ENV": str(fake_environment)}
    done, _ = setup_build(CXX=str(compiler), **environment)
    assert str(compiler) in done.stdout
    compiler.unlink()
    done, record = setup_build(**environment)
    assert done.returncode == 0, done.stderr
    assert str(compiler) not in done.stdout
    assert "2.0.1" in record["reason"]


def test_another_torch_at_the_same_path_compiles_everything_again(configure, tmp_path):
    """Its files may be older than the objects, so that ninja must see another command."""

    def commands() -> dict[str, str]:
        entries = json.loads((tmp_path / "build" / "compile_commands.json").read_text("utf-8"))
        return {
            entry["output"]: BUILT_FOR.findall(entry["command"])
            for entry in entries
            if not entry["file"].endswith(("module.cpp", "build_record.cpp"))  # no torch header
        }

    configure(version="2.13.0")
    first = commands()
    configure(version="2.13.0")
    assert commands() == first
    configure(version="2.13.1+cu130")
    assert first.keys() == commands().keys()
    assert all(first.values())
    assert not any(first[name] == command for name, command in commands().items())
