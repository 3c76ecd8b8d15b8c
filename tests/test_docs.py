"""The pages agree with the code: every flag is described, every command takes its flags, every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny import run_in_process

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")]
SCRIPTS = ("train_ma_clu", "train_ma2patch", "train_pc", "test_fusion", "predict", "reproduce_tables")
ON_THE_LINE = ("export_onnx", "predict_onnx")
FLAG = re.compile(r"--[a-z][a-z0-9-]+")


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """By script, what its --help lists."""
    helps = {
        script: run_in_process(script, "--help").out.partition("options:")[2] for script in (*SCRIPTS, *ON_THE_LINE)
    }
    return {script: set(FLAG.findall(text)) for script, text in helps.items()}


@pytest.mark.parametrize("page", ["docs/flags.md", "docs/zh-CN/flags.md"])
def test_every_flag_is_described(flags, page):
    known = set().union(*flags.values())
    negations = {flag for flag in known if flag.replace("--no-", "--") in known - {flag}}
    assert set(FLAG.findall((ROOT / page).read_text(encoding="utf-8"))) == known - negations


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_commands_take_their_flags(flags, page):
    commands = re.findall(r"^python (\w+)\.py([^#\n]*)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert {script for script, _ in commands} >= set(SCRIPTS)
    for script, rest in commands:
        assert set(FLAG.findall(rest)) <= flags.get(script, set()), f"{script}.py {rest}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_links_are_there(page):
    for path in re.findall(r"[`( ]((?:\w+/)+\w+\.py)", page.read_text(encoding="utf-8")):
        assert (ROOT / path).is_file(), path
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text(encoding="utf-8")):
        other = page.parent / target if target else page
        assert other.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
