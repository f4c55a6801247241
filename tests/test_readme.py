"""Every code block of the documents: Python runs, commands exist and their arguments are understood."""

import pathlib
import re
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "docs/mixing.md", "docs/token_mixing.md", "docs/evaluation.md"]
BLOCKS = [
    (f"{name}:{number}", language, code)
    for name in DOCUMENTS
    for number, (language, code) in enumerate(re.findall(r"```(\w+)\n(.*?)```", (ROOT / name).read_text(), re.DOTALL))
]


def test_there_are_blocks():
    assert {language for _, language, _ in BLOCKS} == {"bash", "python"}


@pytest.mark.parametrize(
    "code", [pytest.param(code, id=name) for name, language, code in BLOCKS if language == "python"]
)
def test_python_blocks_run(code):
    exec(compile(code, "README", "exec"), {})


COMMANDS = [
    pytest.param(line.split(" #")[0].strip(), id=f"{name}: {line.strip()[:40]}")
    for name, language, code in BLOCKS
    if language == "bash"
    for line in code.splitlines()
    if line.strip()
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command):
    words = shlex.split(command.split(" > ")[0])
    if words[0] == "make":
        for target in words[1:]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    elif words[0] == "bash":
        assert subprocess.run(["bash", "-n", ROOT / words[1]], check=False).returncode == 0
    else:
        from foveal.cli import _parser

        assert words[0] == "foveal"
        _parser().parse_args(words[1:])


def test_links_lead_somewhere():
    for name in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            if not target.startswith("http"):
                assert (ROOT / target).exists(), f"{name}: {target}"


def test_the_table_of_mixers_is_complete():
    from foveal.mix import MIXERS

    named = re.findall(r"^\| `([\w+]+)` \|", (ROOT / "docs/mixing.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(MIXERS)
