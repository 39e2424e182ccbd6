"""nanoGPT's configuration files (``config/*.py``): Python assignments, parsed and never executed.

They override the globals of nanoGPT's ``train.py``, so those are the base here, as a preset is for a YAML file (names
and values: karpathy/nanoGPT, train.py).
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ..documents import Entry
from ..keys import keys, nearest
from . import aliases
from .notes import Note, Reading, noted

DEFAULT_ORIGIN = "nanoGPT's default"
#: train.py's globals that decide what is trained. ``out_dir`` and ``dataset`` are left to the file.
DEFAULTS: dict[str, object] = {
    "eval_interval": 2000,
    "log_interval": 1,
    "eval_iters": 200,
    "always_save_checkpoint": True,
    "dataset": "openwebtext",
    "gradient_accumulation_steps": 40,
    "batch_size": 12,
    "block_size": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "dropout": 0.0,
    "bias": False,
    "learning_rate": 6e-4,
    "max_iters": 600000,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "grad_clip": 1.0,
    "decay_lr": True,
    "warmup_iters": 2000,
    "lr_decay_iters": 600000,
    "min_lr": 6e-5,
    "compile": True,
}
#: Folders that nanoGPT's own prepare scripts fill, and how zerofit makes the same tokens.
PREPARED = {"shakespeare_char": ("shakespeare", "char"), "shakespeare": ("shakespeare", "gpt2"),
            "openwebtext": ("openwebtext", "gpt2")}  # fmt: skip
#: What published weights bring with them.
_OF_THE_WEIGHTS = ("n_layer", "n_head", "n_embd", "bias")
_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
#: A power beyond this is a mistake, and would take all memory.
_LARGEST_EXPONENT = 64


class Unreadable:
    """An expression that would have to be executed; fine for a name that nothing depends on."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def read_nanogpt(text: str, source: Path) -> tuple[list[Entry], Reading]:
    """nanoGPT's defaults as settings, and what the file itself says.

    Raises:
        ConfigError: no Python, a statement that is no assignment, an expression that would have to be executed, an
            unknown name; with file and line.
    """
    assigned = {entry.name: entry for entry in _assignments(text, source)}
    used = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name) and _is_load(node)}
    reading = Reading()
    for entry in assigned.values():
        reading.add(_read(entry, used))
    published = "init_from" in assigned and str(assigned["init_from"].value).startswith("gpt2")
    left_out = _OF_THE_WEIGHTS if published else ()
    silent = [
        Entry(name, value, DEFAULT_ORIGIN)
        for name, value in DEFAULTS.items()
        if name not in assigned and name not in left_out
    ]
    base = Reading()
    for entry in silent:
        base.add(_read(entry, set()))
    dataset = str(assigned["dataset"].value if "dataset" in assigned else DEFAULTS["dataset"])
    _prepare(base, dataset)
    if assigned.get("decay_lr") is not None and assigned["decay_lr"].value is False:
        # Without decay nanoGPT has no warm-up either.
        reading.entries = [entry for entry in reading.entries if entry.name != "schedule.warmup_steps"]
        reading.entries.append(Entry("schedule.warmup_steps", 0, assigned["decay_lr"].origin))
    return base.entries, reading


def _prepare(base: Reading, dataset: str) -> None:
    """How to make the tokens of nanoGPT's own data sets, and its padded vocabulary."""
    base.entries.append(Entry("model.kind", "gpt2", DEFAULT_ORIGIN))
    if dataset in PREPARED:
        what, tokenizer = PREPARED[dataset]
        settings = {"data.prepare": [what], "data.tokenizer": tokenizer}
        base.entries += [Entry(name, value, DEFAULT_ORIGIN) for name, value in settings.items()]
    if not dataset.endswith("_char"):
        base.entries.append(Entry("model.pad_vocab_to", 64, DEFAULT_ORIGIN))  # 50304 of 50257


def _is_load(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _assignments(text: str, source: Path) -> Iterator[Entry]:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise ConfigError(
            f"{source}:{line} is no Python that could be read: {getattr(error, 'msg', error)}. Mend that line."
        ) from error
    known: dict[str, object] = {}
    for statement in tree.body:
        origin = f"{source}:{statement.lineno}"
        name, value = _target(statement)
        if name is None:
            if _does_nothing(statement):
                continue
            raise ConfigError(
                f"{origin}: `{ast.unparse(statement).splitlines()[0]}` is no assignment to a name. A nanoGPT file is "
                f"read, not executed: only `name = value` lines count. Take it out."
            )
        assert value is not None
        known[name] = _value(value, known, origin, name)
        yield Entry(name, known[name], origin)


def _target(statement: ast.stmt) -> tuple[str | None, ast.expr | None]:
    """Name and expression of a plain assignment."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1 and isinstance(statement.targets[0], ast.Name):
        return statement.targets[0].id, statement.value
    if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and statement.value is not None:
        return statement.target.id, statement.value
    return None, None


def _does_nothing(statement: ast.stmt) -> bool:
    """A docstring, ``pass``, or an import, which is not carried out."""
    if isinstance(statement, ast.Pass | ast.Import | ast.ImportFrom):
        return True
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _value(node: ast.expr, known: dict[str, object], origin: str, name: str) -> object:
    """The value of literals, names given above, and arithmetic of both."""
    try:
        return _evaluate(node, known)
    except _NotPlain as error:
        if _is_ignored(name):
            return Unreadable(ast.unparse(node))
        raise ConfigError(
            f"{origin}: {name} is set to `{ast.unparse(node)}`, and `{error}` would have to be executed. A nanoGPT "
            f"file is read, not executed: write a number, a text, true or false, or arithmetic of names given above."
        ) from None
    except (ArithmeticError, TypeError, ValueError) as error:
        raise ConfigError(f"{origin}: {name} is set to `{ast.unparse(node)}`, which fails: {error}.") from error


class _NotPlain(Exception):
    """The part of an expression that is no literal, name or arithmetic."""


def _evaluate(node: ast.expr, known: dict[str, object]) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Name() if node.id in known and not isinstance(known[node.id], Unreadable):
            return known[node.id]
        case ast.List() | ast.Tuple():
            return [_evaluate(element, known) for element in node.elts]
        case ast.UnaryOp() if type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](_evaluate(node.operand, known))
        case ast.BinOp() if type(node.op) in _OPERATORS:
            left, right = _evaluate(node.left, known), _evaluate(node.right, known)
            numbers = all(isinstance(side, int | float) for side in (left, right))
            texts = isinstance(node.op, ast.Add) and isinstance(left, str) and isinstance(right, str)
            if not (numbers or texts) or (isinstance(node.op, ast.Pow) and abs(right) > _LARGEST_EXPONENT):
                raise _NotPlain(ast.unparse(node))
            return _OPERATORS[type(node.op)](left, right)
    raise _NotPlain(ast.unparse(node))


def _is_ignored(name: str) -> bool:
    alias = aliases.find_alias(name)
    return alias is not None and alias.read is None and name != "gradient_accumulation_steps"


def _read(entry: Entry, used: set[str]) -> Reading:
    """One assignment as settings."""
    value = entry.value
    if entry.name == "device":
        return _device(entry)
    aliases.refuse_of_generate(entry.name, entry.origin)
    alias = aliases.find_alias(entry.name)
    if alias is not None:
        return aliases.read_alias(alias, entry, aliases.NANOGPT)
    own = [key.name for key in keys().values() if key.leaf == entry.name]
    # nanoGPT trains GPT-2: a name that other architectures have too is GPT-2's.
    if own:
        name = own[0]
        note = Note(entry.name, value, entry.origin, "used", (name,), "", (value,))
        return Reading([Entry(name, value, entry.origin)], notes=[note])
    if entry.name in used:
        return noted(entry, "used", "in the file's own arithmetic")
    spellings = [*DEFAULTS, *aliases.aliases(), *(key.leaf for key in keys().values())]
    near = nearest(entry.name, spellings)
    guess = f" The nearest known name is {near}." if near else ""
    raise ConfigError(
        f"{entry.origin}: {entry.name!r} is no setting of nanoGPT's train.py, and nothing in the file uses it.{guess}"
    )


def _device(entry: Entry) -> Reading:
    word = str(entry.value).partition(":")[0]
    if word not in ("cuda", "cpu"):
        raise ConfigError(f"{entry.origin}: device {entry.value!r}: zerofit trains on cuda or cpu. Choose one of them.")
    note = Note("device", entry.value, entry.origin, "used" if word == entry.value else "translated", ("device",))
    return Reading([Entry("device", word, entry.origin)], notes=[note])
