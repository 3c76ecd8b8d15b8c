"""The pages agree with the code: every flag is described, every command takes its flags, every link leads somewhere."""

import re
import shutil

import numpy as np
import pytest
import torch
from stand_in import noise
from tiny import ROOT, run_in_process

from models import Branch

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("[!.]*/README.md")]
SCRIPTS = ("train_ma_clu", "train_ma2patch", "train_pc", "test_fusion", "predict", "reproduce_tables")
OTHERS = ("export_onnx", "predict_onnx", "make_demo_data")
FLAG = re.compile(r"--[a-z][a-z0-9-]+")


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """By script, what its --help lists."""
    helps = {script: run_in_process(script, "--help").out.partition("options:")[2] for script in (*SCRIPTS, *OTHERS)}
    return {script: set(FLAG.findall(text)) for script, text in helps.items()}


@pytest.mark.parametrize("page", ["docs/flags.md", "docs/zh-CN/flags.md"])
def test_every_flag_is_described(flags, page):
    assert set(FLAG.findall((ROOT / page).read_text(encoding="utf-8"))) == set().union(*flags.values())


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


# The README's own programs


@pytest.fixture
def run_program(trained, tmp_path, monkeypatch):
    """Runs the program of README.md that begins with the given words, where the trained belt is called coal_demo."""
    shutil.copytree(trained / "data" / "belt", tmp_path / "data" / "coal_demo")
    shutil.copytree(trained / "models" / "belt", tmp_path / "saved_models" / "coal_demo")
    monkeypatch.chdir(tmp_path)

    def run_program(beginning: str) -> dict:
        text = (ROOT / "README.md").read_text(encoding="utf-8")
        (code,) = re.findall(rf"```python\n({beginning}.*?)```", text, re.DOTALL)
        exec(code, names := {})
        return names

    return run_program


def test_the_call_in_the_readme(run_program, capsys):
    names = run_program("from models import USAD")
    shape, verdict, branches = "(56, 72)", "None None", "['ma_clu', 'ma2patch', 'pc']"
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == lines[5:] == [shape, verdict, branches]
    alone = names["usad"]("data/coal_demo/test/good/000.png")[0].score
    assert float(lines[4]) == names["prediction"].score == pytest.approx(alone, rel=1e-6)  # float32, batches of 2 and 1


def test_the_fourth_branch_of_the_readme(run_program):
    usad = run_program("# A fourth branch")["usad"]
    assert len(usad.branches) == 4
    fourth = usad.branches[-1]
    assert type(fourth).__base__ is Branch
    parts = usad.predict_parts(noise(usad.image_size))
    scores, maps, *_ = parts["fusion"]
    product = torch.stack([parts[branch.name].scaled() for branch in usad.branches]).prod(0)
    weights = usad.rule.score_weights
    expected = sum(weights[name] * parts[name].scores.double() for name in weights)
    np.testing.assert_allclose(scores, expected + product.amax((1, 2)).double(), rtol=1e-6)
    assert maps.shape == (2, usad.image_size, usad.image_size)
    assert weights[fourth.name] > 0
