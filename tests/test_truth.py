"""What the sources say about themselves: flags are read, tags are explained, files stay readable in
one sitting."""

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
FOLDERS = ("model", "inputs", "plumbing", "evaluation", "embedded_world")
SOURCES = sorted([*REPO.glob("*.py"),
                  *(p for folder in FOLDERS for p in (REPO / folder).glob("*.py"))])
FILES = sorted([*SOURCES, *Path(__file__).parent.glob("*.py")])
SCRIPTS = [p for p in SOURCES if re.search(r"^class Args", p.read_text(), re.M)]
# in plumbing/flags.py
SHARED_FLAGS = ("ApiArgs", "OracleArgs", "ModelArgs", "ShardArgs", "RolloutArgs")
FLAGS = REPO / "plumbing/flags.py"
SHARED_READERS = ("oracle.py", "plumbing/run.py", "plumbing/flags.py")
name_of = lambda path: path.stem


def test_there_is_something_to_check():
    assert {p.stem for p in SCRIPTS} >= {
        "moving_shapes",
        "pretrain_tiny",
        "sft",
        "grpo_rank",
        "evaluate",
        "agreement",
    }


def fields_of(cls):
    return {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign)}


def class_of(path, name):
    return next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)
                and n.name == name)


def names_read(tree):
    """x of args.x, self.args.x, run.args.x anywhere."""
    holders = lambda node: isinstance(node, ast.Name) and node.id == "args" or (
        isinstance(node, ast.Attribute) and node.attr == "args")
    read = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and holders(n.value)}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)
             and getattr(n.func, "id", "") == "getattr"]
    return read | {n.args[1].value
                   for n in calls if holders(n.args[0]) and isinstance(n.args[1], ast.Constant)}


def flags_and_reads(path):
    """Fields of `Args`, and the names read from it: args.x anywhere; self.x in __post_init__ where
    something is derived from it, not where it is only checked; and what the shared code reads that
    the script calls."""
    tree = ast.parse(path.read_text())
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args")
    derives = [n.value for n in ast.walk(cls) if isinstance(n, ast.Assign)]
    read = names_read(tree) | {a.attr for value in derives for a in ast.walk(value)
                               if isinstance(a, ast.Attribute) and isinstance(a.value, ast.Name)
                               and a.value.id
                               == "self"}
    shared = {"Run(": "run", "choose_questions(": "questions", "usable_questions(": "questions",
              "choose_labels(": "questions", "build_zoo(": "zoo", "Reading(": "pairs",
              "Validation(": "validation"}
    for call, file in shared.items():
        if call in path.read_text():
            read |= names_read(ast.parse((REPO / f"plumbing/{file}.py").read_text()))
    return fields_of(cls), read


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_every_flag_is_read(path):
    flags, read = flags_and_reads(path)
    if "PRESETS" in path.read_text():
        assert "cls.PRESETS" in FLAGS.read_text()
        read.add("preset")
    if "args.raters" in path.read_text():  # a property of OracleArgs that splits --oracle
        assert 'self.oracle.split(",")' in FLAGS.read_text()
        read.add("oracle")
    assert not flags - read, f"flags that do nothing: {sorted(flags - read)}"
    assert not (read & {f"no_{f}" for f in flags})


@pytest.mark.parametrize("name", SHARED_FLAGS)
def test_every_shared_flag_is_read_where_it_is_shared(name):
    """Or in every script that has it."""
    heirs = [flags_and_reads(path)[1]
             for path in SCRIPTS if name in map(ast.unparse, class_of(path, "Args").bases)]
    read = set.intersection(*heirs) if heirs else set()
    for file in SHARED_READERS:
        read |= names_read(ast.parse((REPO / file).read_text()))
    cls = class_of(FLAGS, name)
    assert fields_of(cls) and not fields_of(cls) - read - {"oracle"}


@pytest.mark.parametrize("path, name", [*((path, "Args") for path in SCRIPTS),
                                        *((FLAGS, name) for name in SHARED_FLAGS)])
def test_every_flag_has_a_help_text(path, name):
    for field in class_of(path, name).body:
        if isinstance(field, ast.AnnAssign):
            call = ast.unparse(field.value)
            told = call.startswith("flag(") and isinstance(
                field.value.args[1], ast.Constant | ast.JoinedStr
            )
            assert told or "init=False" in call, field.target.id


def deviations(path):
    """[Dn] that the header explains, [Dn] that the rest of the file mentions."""
    text = path.read_text()
    header = ast.get_docstring(ast.parse(text), clean=False)
    body = text[text.index(header) + len(header) :]
    explained = set(re.findall(r"^(?:Differs)? *D(\d+)  ", header, re.M))
    used = {int(d) for d in re.findall(r"\bD(\d+)\b", body)}
    for first, last in re.findall(r"\bD(\d+)-D(\d+)\b", body):
        used |= set(range(int(first), int(last) + 1))
    return {int(d) for d in explained}, used


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_deviations_are_explained_and_used(path):
    explained, used = deviations(path)
    assert explained == used
    assert explained == set(range(1, len(explained) + 1))


def test_deviations_are_found():
    assert (
        deviations(REPO / "grpo_rank.py")[0]
        >= {1, 2, 3, 4, 5, 6}
        <= deviations(REPO / "grpo_rank.py")[1]
    )


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_file_is_too_long(path):
    assert len(path.read_text().splitlines()) <= 670


def test_nothing_about_this_machine():
    """In code, pages, and the results with the commands that made them."""
    others = [path for part in ("docs", "benchmarks", "experiments")
              for path in sorted((REPO / part).rglob("*"))]
    texts = [p for p in [*FILES, REPO / "README.md", *others]
             if p.suffix in (".py", ".sh", ".md", ".json", ".diff")]
    found = [p.name for p in texts
             if re.search(r"/(home|root|work|mnt|scratch|Users|tmp)/\w", p.read_text())]
    assert len(texts) > 100 and found == []
