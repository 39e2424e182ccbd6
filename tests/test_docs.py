"""What README and docs say can be followed: links lead somewhere, commands parse, files and targets exist."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from zerofit.cli.keys_help import flag_rows
from zerofit.cli.main import VERBS, load_verb
from zerofit.cli.plan import NO_DATA
from zerofit.cli.plan_arguments import SWITCHES, read_plan_arguments
from zerofit.cli.usage import CommandLineError
from zerofit.config.arguments import parse_arguments
from zerofit.config.dialects.aliases import find_alias
from zerofit.config.keys import find_key
from zerofit.config.load import load_config
from zerofit.errors import ConfigError

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for pattern in ("*.md", "docs/*.md", "docs/decisions/*.md") for path in ROOT.glob(pattern))
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"(`+)(.+?)\1", re.DOTALL)
FILE = re.compile(r"(?:docs|tests|benchmarks|scripts|src)/[\w./*{},-]*[\w}*]")
#: What stands for something of the reader's: a value that parses in its place.
PLACEHOLDERS = {"N": "4", "F": "0.5", "T": "char"}


@dataclass(frozen=True)
class Page:
    """A page: its prose, and its blocks of code."""

    path: Path
    prose: str
    code: tuple[str, ...]
    """Lines of fenced and indented blocks; options on a line of their own belong to the one before."""

    @staticmethod
    def read(path: Path) -> Page:
        prose, code, fenced, after_blank = [], [], False, True
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.lstrip().startswith("```"):
                fenced = not fenced
            elif fenced or (line.startswith("    ") and after_blank):
                goes_on = code and line.startswith(" ") and line.lstrip().startswith(("[--", "--"))
                code[len(code) - bool(goes_on) :] = [f"{code[-1]} {line.strip()}" if goes_on else line.strip()]
                continue
            else:
                prose.append(line)
            after_blank = not line.strip()
        return Page(path, "\n".join(prose), tuple(line.replace("\\ ", "") for line in code))

    @property
    def spans(self) -> list[str]:
        """Code inside the prose, a broken line put together."""
        return [" ".join(found[1].split()) for found in SPAN.findall(self.prose)]

    def anchors(self) -> set[str]:
        """What GitHub makes of the headings."""
        found: dict[str, int] = {}
        names = set()
        for heading in re.findall(r"^#{1,6} +(.+?) *#*$", self.prose, re.MULTILINE):
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
            name = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
            count = found.get(name, 0)
            found[name] = count + 1
            names.add(f"{name}-{count}" if count else name)
        return names


READ = {path: Page.read(path) for path in PAGES}
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]


def broken_links(page: Page) -> list[str]:
    """Relative links to files and headings that are not there."""
    broken = []
    for target in LINK.findall(SPAN.sub("", page.prose)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.path.parent / file).resolve() if file else page.path
        if not path.exists() or (anchor and anchor not in Page.read(path).anchors()):
            broken.append(target)
    return broken


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name: str) -> None:
    assert not broken_links(READ[ROOT / name])


def test_what_is_wrong_on_a_page_is_found(tmp_path: Path) -> None:
    """The checks of this file would pass on a page that they cannot read."""
    (tmp_path / "other.md").write_text("# One, `two`: three\n\n## Twice\n\n## Twice\n")
    text = """# A page
        [fine](other.md#one-two-three) [also](other.md#twice-1) [here](#a-page) [web](https://x.y) `[code](no.md)`
        [gone](gone.md) [nowhere](other.md#twice-2) [not here](#b-page)
        ```
        zerofit train \\
        _ --preset gpt2   # [in code](no.md)
        ```
        `--no-such` and `make nothing`
        """
    path = tmp_path / "page.md"
    path.write_text("\n".join(line.strip().replace("_ ", " ") for line in text.splitlines()))
    page = Page.read(path)
    assert broken_links(page) == ["gone.md", "other.md#twice-2", "#b-page"]
    assert [" ".join(line.split()) for line in page.code] == ["zerofit train --preset gpt2 # [in code](no.md)"]
    assert page.spans == ["[code](no.md)", "--no-such", "make nothing"]
    assert not is_known("--no-such")
    assert is_known("--max_steps")


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name: str) -> None:
    page = READ[ROOT / name]
    named = {path for text in (*page.spans, *page.code) for match in FILE.findall(text) for path in braces(match)}
    assert not {path for path in named if not list(ROOT.glob(path))}


def braces(path: str) -> list[str]:
    """``a-{b,c}`` as a shell reads it."""
    found = re.search(r"\{([^{}]*)\}", path)
    if found is None:
        return [path]
    return [each for word in found[1].split(",") for each in braces(path.replace(found[0], word))]


@pytest.mark.parametrize("name", NAMES)
def test_make_targets_exist(name: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    page = READ[ROOT / name]
    named = {text.split()[1] for text in (*page.spans, *page.code) if re.match(r"make [a-z-]+( |$)", text)}
    assert not named - targets


def commands() -> Iterator[tuple[str, str, bool]]:
    """(page, command, whether it is whole) of every ``zerofit …``: in blocks of code, whole but for dots; in prose,
    where a sentence may leave out the rest. Alternatives one by one."""
    for path, page in READ.items():
        found = [(line.removeprefix("$ "), "…" not in line) for line in page.code]
        for text, whole in (*found, *((span, False) for span in page.spans)):
            if text.startswith("zerofit "):
                for command in alternatives(re.sub(r"\s+# .*", "", text)):
                    yield str(path.relative_to(ROOT)), command, whole


def alternatives(command: str) -> list[str]:
    """``--to pt|safetensors`` and ``list, verify`` are two commands; what stands in brackets may be there."""
    command = re.sub(r"(?<=[a-z]), (?=[a-z])", "|", re.sub(r"[\[\]]", "", command))
    choice = re.search(r"[^\s|]+(?:\|[^\s|]+)+", command)
    if choice is None:
        return [command]
    head, tail = command[: choice.start()], command[choice.end() :]
    return [found for word in choice[0].split("|") for found in alternatives(f"{head}{word}{tail}")]


COMMANDS = sorted(set(commands()))


def test_commands_are_found() -> None:
    """The checks below would pass on nothing."""
    assert len({command for _, command, _ in COMMANDS}) > 60
    assert {command.split()[1] for _, command, _ in COMMANDS} >= VERBS.keys() - {"version", "estimate-memory"}
    assert alternatives("zerofit x [--to a|b]") == ["zerofit x --to a", "zerofit x --to b"]
    assert alternatives("zerofit x a, b") == ["zerofit x a", "zerofit x b"]


@pytest.mark.parametrize(("page", "command", "whole"), COMMANDS)
def test_commands_parse(page: str, command: str, whole: bool) -> None:
    words = shlex.split(command)[1:]
    assert words[0] in VERBS
    verb, arguments = words[0], [PLACEHOLDERS.get(word, word) for word in words[1:] if word != "…"]
    if VERBS[verb].configured:
        check_configured(verb, arguments, None if whole else "gpt2")
        return
    parser: Any = load_verb(verb)
    try:
        while hasattr(parser, "commands") and arguments:
            context = parser.make_context("zerofit", list(arguments))
            _, parser, arguments = parser.resolve_command(context, list(arguments))
        if not hasattr(parser, "commands"):
            parser.make_context("zerofit", list(arguments))
    except CommandLineError as error:
        if whole or type(error).__name__ != "MissingParameter":
            raise


def check_configured(verb: str, arguments: list[str], preset: str | None) -> None:
    """Options, and values where no file of the reader's decides about them.

    Args:
        preset: what to take for what was left out.
    """
    if "--help" in arguments or not arguments:
        return
    if verb != "train":
        arguments = list(read_plan_arguments(arguments).rest)
    arguments = [word for word in arguments if word != "--check-memory"]
    request = parse_arguments(arguments)
    files = request.source is not None or any(name == "deepspeed_config" for name, _ in request.overrides)
    if not files:
        load_config(None, request.preset or preset, request.overrides, () if verb == "train" else NO_DATA)


def options() -> set[str]:
    """Every option of a verb, by its own name."""
    found = {option for row, _ in flag_rows() for option in re.findall(r"--[\w-]+", row)}
    found |= {f"--{switch}" for switch in SWITCHES}
    waiting: list[Any] = [load_verb(name) for name, verb in VERBS.items() if not verb.configured]
    while waiting:
        command = waiting.pop()
        waiting += getattr(command, "commands", {}).values()
        found |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return found


KNOWN = options()


@pytest.mark.parametrize("name", [name for name in NAMES if not name.endswith(("experiments.md", "aliases.md"))])
def test_options_in_prose_exist(name: str) -> None:
    """`--like this`, alone in the text. Measurements and the table of aliases name other programs' options."""
    unknown = []
    for span in READ[ROOT / name].spans:
        if re.match(r"--[a-z]", span):
            unknown += [option for option in re.findall(r"(?:^| )(--[a-z][\w.-]*)", span) if not is_known(option)]
    assert not unknown


def is_known(option: str) -> bool:
    name = option.removeprefix("--").replace("-", "_")
    if option in KNOWN or find_alias(name) is not None:
        return True
    try:
        return find_key(name.removeprefix("no_"), "docs") is not None
    except ConfigError:
        return False


SCRIPTS = sorted(
    {
        (name, text)
        for name in NAMES
        for text in (*READ[ROOT / name].code, *READ[ROOT / name].spans)
        if re.match(r"python (benchmarks|tests|scripts)/", text)
    }
)


@pytest.mark.parametrize(("page", "command"), SCRIPTS)
def test_scripts_have_the_options_that_are_named(page: str, command: str) -> None:
    words = shlex.split(re.sub(r"\s+# .*", "", command))
    source = (ROOT / words[1]).read_text(encoding="utf-8")
    names = {word.partition("=")[0] for word in words[2:] if word.startswith("--")}
    assert not {name for name in names if f'"{name}"' not in source}
