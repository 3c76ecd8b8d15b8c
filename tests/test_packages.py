"""Installed packages against the ranges of requirements.txt."""

import gc

import pytest
from packaging.requirements import Requirement
from tiny import ROOT, pretend, run_apart

from utils.errors import InputError
from utils.packages import REQUIREMENTS, check_packages, importing, installed_version


@pytest.mark.parametrize(
    ("version", "fits"),
    [("1.0.9", True), ("1.4", True), ("1.0.9a0+nv25", True), ("1.0.8", False), ("2.0.0", False), ("2.0.0rc1", False)],
)
def test_ranges(tmp_path, monkeypatch, version, fits):
    pretend(tmp_path, "some_nets", version)
    monkeypatch.syspath_prepend(tmp_path)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("# a comment\n\nnot-installed>=3\nsome-nets>=1.0.9,<2  # why\n")
    if fits:
        check_packages(requirements)
    else:
        with pytest.raises(InputError) as caught:
            check_packages(requirements)
        assert f"some-nets {version} " in str(caught.value) and "some-nets>=1.0.9,<2;" in str(caught.value)
    check_packages(tmp_path / "absent.txt")
    assert (installed_version("some-nets"), installed_version("not-installed")) == (version, None)


def test_this_environment_is_in_range():
    assert REQUIREMENTS.is_file()
    check_packages()


def test_all_lists_have_the_same_ranges():
    ranges: dict[str, set[str]] = {}
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if wanted := line.partition("#")[0].strip():
                requirement = Requirement(wanted)
                ranges.setdefault(requirement.name, set()).add(str(requirement.specifier))
    assert all(len(found) == 1 for found in ranges.values()), ranges


@pytest.mark.parametrize("script", ["train_pc.py", "predict.py"])
def test_a_script_says_so_in_one_line_before_anything_else(tmp_path, script):
    pretend(tmp_path, "timm", "0.9.16")
    code, out, err = run_apart(ROOT / script, "--no-such-flag", folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert code == 2 and not out
    assert err.startswith("error: timm 0.9.16 is installed, but this program needs timm>=1.") and err.count("\n") == 1


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_after_imports_as_before(enabled):
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), importing():
            assert not gc.isenabled()
            with importing():  # of a module that imports a large one itself
                pass
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
