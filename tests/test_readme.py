"""Every code block of the documents: Python runs, commands exist and their arguments are understood."""

import pathlib
import re
import shlex
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md"),
    *(f"docs/{name}.md" for name in ("mixing", "token_mixing", "evaluation", "transfer")),
]
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
                assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def test_the_table_of_mixers_is_complete():
    from foveal.mix import MIXERS

    named = re.findall(r"^\| `([\w+]+)` \|", (ROOT / "docs/mixing.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(MIXERS)


def test_the_table_of_rivals_is_complete_and_its_words_are_understood():
    from foveal.train.arms import arms_of
    from foveal.transfer import GUIDES

    text = (ROOT / "docs/transfer.md").read_text().partition("## Rivals")[2]
    words = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    arms = arms_of({"data": "digits"}, ["none"], words, [None])
    assert len(arms.settings) == len(words)
    assert {one.guide for one in arms.settings.values()} == set(GUIDES)


def test_weights_in_the_table_of_rivals():
    from foveal.train.guiding import default_weight

    text = (ROOT / "docs/transfer.md").read_text().partition("## Rivals")[2]
    for name, weight in re.findall(r"^\| `([a-z0-9_]+)[^`]*` \|[^|]+\| ([\d.]+)[,: ]", text, re.MULTILINE):
        assert float(weight) == default_weight(name), name


def test_options_in_the_table_are_those_of_gta():
    from foveal.train.guiding import options_of

    text = (ROOT / "docs/transfer.md").read_text().partition("## Options of GTA")[2].partition("\n## ")[0]
    named = [one for row in re.findall(r"^\| (`.+?`) \|", text, re.MULTILINE) for one in re.findall(r"`(\w+)`", row)]
    assert {*named, "average_pooled"} == set(options_of("gta"))  # global_pool says that one
