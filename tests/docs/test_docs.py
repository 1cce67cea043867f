"""Every example of docs/ and README.md runs unchanged.

The blocks of a page run in order in one folder. Fences: `sh` (with `exits=2` for a mistake that
is shown on purpose, `exits=3` for a check that finds something), `python`, `output` (lines that
the block before prints; `...` is what varies), `text` (not run).
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import torch

import phi3_lora
from phi3_lora.config.adapter import LoraConfig
from phi3_lora.config.data import DataConfig
from phi3_lora.config.schema import RunConfig
from phi3_lora.config.training import TrainingConfig
from phi3_lora_cli.faults import run_reporting_faults
from phi3_lora_cli.main import COMMANDS, group
from tests.docs.family_table import table
from tests.hub_stand_in import running_hub

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
KINDS = {"sh", "sh exits=2", "sh exits=3", "python", "output", "text"}
DECIMAL = r"\d+\.\d+(?:e[+-]?\d+)?"
TOLERANCE = 0.02
"""Largest relative difference of printed decimals, whose last digit depends on the machine."""
PAGE_OF = {"data": "data-commands", "doctor": "backends", "inspect": "convert"}
"""Commands that the page of another command describes."""
Capture = pytest.CaptureFixture[str]


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return the fence and the content of each block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def commands(block: str) -> Iterator[str]:
    """Return the commands of a shell block, with continued lines and here-documents."""
    lines = iter(block.replace("\\\n", " ").splitlines())
    for line in lines:
        command = line
        if line.endswith("<<'EOF'"):
            for part in lines:
                command += f"\n{part}"
                if part == "EOF":
                    break
        if command and not command.startswith("#"):
            yield command


def run_command(command: str) -> int:
    """Run phi3-lora in this process, which imports the frameworks once, and the rest in a shell."""
    if command.startswith("phi3-lora "):
        return run_reporting_faults(group, shlex.split(command, comments=True)[1:])
    shell = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    print(shell.stdout, shell.stderr)
    return shell.returncode


def has_line(printed: str, expected: str) -> bool:
    """Return whether a line was printed: equal words and integers, decimals within TOLERANCE."""
    parts = re.split(rf"(\.\.\.|{DECIMAL})", " ".join(expected.split()))
    numbers = [float(part) for part in parts[1::2] if part != "..."]
    parts[0::2] = map(re.escape, parts[0::2])
    parts[1::2] = [".*" if part == "..." else f"({DECIMAL})" for part in parts[1::2]]
    pattern = re.compile("".join(parts))
    for line in printed.splitlines():
        match = pattern.fullmatch(" ".join(line.split()))
        if match and all(
            math.isclose(float(found), number, rel_tol=TOLERANCE)
            for found, number in zip(match.groups(), numbers, strict=True)
        ):
            return True
    return False


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: the built-in model is small, and threads wait on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_examples_run_and_print_what_the_page_shows(
    folder: Path, capsys: Capture, page: Path
) -> None:
    names: dict[str, object] = {}
    printed = ""
    for kind, block in blocks(page):
        assert kind in KINDS, f"{page.name} has a block of kind {kind!r}"
        if kind == "output":
            for line in filter(None, block.splitlines()):
                assert has_line(printed, line), f"not printed: {line}\n{printed}"
        elif kind == "python":
            exec(compile(block, page.name, "exec"), names)
            printed = "".join(capsys.readouterr())
        elif kind.startswith("sh"):
            codes = [run_command(command) for command in commands(block)]
            printed = "".join(capsys.readouterr())
            _, _, code = kind.partition("exits=")
            assert set(codes) == {int(code or 0)}, f"{codes}\n{block}\n{printed}"


def test_readme_commands_run(folder: Path, capsys: Capture) -> None:
    """Commands run with the built-in model on the CPU, each new run in a new folder."""
    words = ("Hello", "What now", "Where to", "Why not")
    rows = [f'{{"prompt": "{word}?", "completion": "Good day, {word}."}}\n' for word in words]
    for name in ("chats.jsonl", "test.jsonl"):
        (folder / name).write_text("".join(rows))
    text = "".join(block for _, block in blocks(ROOT / "README.md"))
    found = [c for c in commands(text) if c.startswith("phi3-lora ")]
    assert len(found) >= 8
    for command in found:
        arguments = shlex.split(command, comments=True)[1:]
        arguments = ["demo" if "microsoft/" in a else a for a in arguments]
        if arguments[0] in ("train", "evaluate", "generate", "verify", "parity"):
            arguments += ["--device", "cpu"]
        if arguments[0] == "train" and "--resume" not in arguments and Path("runs/a").exists():
            arguments += ["--output", "runs/b"]
        if arguments[0] == "push":
            with running_hub() as hub:
                assert hub.run(folder / "cache", arguments).returncode == 0
            continue
        code = run_reporting_faults(group, arguments)
        assert code == 0, f"{arguments}\n{capsys.readouterr().err}"


def test_index_links_every_page_and_every_link_leads_somewhere() -> None:
    for page in DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (DOCS / link).exists(), f"{page.name}: {link}"
        assert page.name == "index.md" or f"]({page.name})" in (DOCS / "index.md").read_text()


def test_every_function_has_an_example_that_runs() -> None:
    page = blocks(DOCS / "python.md")
    python = "".join(block for kind, block in page if kind == "python")
    # An example must not send anything to the hub.
    not_run = "".join(block for kind, block in page if kind == "text")
    for name in phi3_lora.__all__:
        found = not_run if name == "push" else python
        assert f"phi3_lora.{name}" in found or name == "LoadedModel", name


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_option_is_documented(name: str) -> None:
    command = group.get_command(click.Context(group), name)
    assert command is not None
    pages = ("index", "backends", PAGE_OF.get(name, name))
    text = "".join((DOCS / f"{page}.md").read_text() for page in pages)
    parts = command.commands.values() if isinstance(command, click.Group) else [command]
    for parameter in (parameter for part in parts for parameter in part.params):
        if isinstance(parameter, click.Option):
            assert f"{parameter.opts[-1]}" in text, parameter.opts


def test_every_setting_is_documented_with_its_default() -> None:
    text = (DOCS / "train.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `([\w.]+)` \| (\S+) \|", text, re.MULTILINE))
    sections = {"training_config": TrainingConfig, "peft_config": LoraConfig, "data": DataConfig}
    for section, kind in {**sections, "": RunConfig}.items():
        for field in dataclasses.fields(kind):
            if field.name not in sections:
                name = f"data.{field.name}" if section == "data" else field.name
                is_made = field.default_factory is not dataclasses.MISSING
                value = field.default_factory() if is_made else field.default
                default = "none" if value in ("", None) else json.dumps(value)
                assert table[name] == default.strip('"'), name


def test_family_page_holds_the_records() -> None:
    assert table() in (DOCS / "family.md").read_text(encoding="utf-8")
