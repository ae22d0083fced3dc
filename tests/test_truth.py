"""What the sources say about themselves: flags are read, tags are explained, files stay readable in one sitting."""

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
SOURCES = sorted(REPO.glob("*.py"))
FILES = sorted([*SOURCES, *Path(__file__).parent.glob("*.py")])
SCRIPTS = [p for p in SOURCES if re.search(r"^class Args", p.read_text(), re.M)]
LIMITED = ("flags", "video_llm", "compose", "harness", "data", "frames", "check_videos", "rollouts", "packing",
           "oracle", "api_oracle", "ranks", "evaluate", "sft", "grpo_rank", "questions",
           "reward_model", "preferences", "ppo_rlaif", "roles", "dpo_iter_w2s", "preference_zoo")
# dataclasses that an Args can inherit from
SHARED_FLAGS = dict.fromkeys(("ApiArgs", "OracleArgs", "ModelArgs", "ShardArgs", "RolloutArgs"), "flags.py")
READ_IN = ("api_oracle.py", "oracle.py", "harness.py", "rollouts.py")
name_of = lambda path: path.stem


def test_there_is_something_to_check():
    assert {p.stem for p in SCRIPTS} >= {"moving_shapes", "pretrain_tiny", "sft", "grpo_rank", "evaluate", "oracle"}


def fields_of(cls):
    return {n.target.id for n in cls.body if isinstance(n, ast.AnnAssign)}


def class_of(path, name):
    return next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name)


def inherited(cls):
    """The fields of the shared dataclasses that a class inherits from, and theirs."""
    names, out = [ast.unparse(base).rpartition(".")[2] for base in cls.bases], set()
    for name in names:
        base = class_of(REPO / SHARED_FLAGS[name], name)
        out |= fields_of(base) | inherited(base)
    return out


def flags_and_reads(path):
    """Fields of `Args`, and the names read from it: args.x anywhere; self.x in __post_init__ where something is derived
    from it, not where it is only checked."""
    tree = ast.parse(path.read_text())
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Args")
    flags = fields_of(cls)
    derives = [n.value for n in ast.walk(cls) if isinstance(n, ast.Assign)]
    read = {a.attr for value in derives for a in ast.walk(value)
            if isinstance(a, ast.Attribute) and isinstance(a.value, ast.Name) and a.value.id == "self"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "args":
            read.add(node.attr)
    return flags, read


@pytest.mark.parametrize("path", SCRIPTS, ids=name_of)
def test_every_flag_is_read(path):
    flags, read = flags_and_reads(path)
    if "harness.open_run" in path.read_text():
        assert "args.resume" in (REPO / "harness.py").read_text()
        read.add("resume")
    for call, file in (("choose_questions(args", "questions.py"), ("build_zoo(args", "preference_zoo.py")):
        if call in path.read_text():  # the shared module reads its share of the flags
            shared = {n.attr for n in ast.walk(ast.parse((REPO / file).read_text()))
                      if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "args"}
            known = flags | inherited(class_of(path, "Args")) | {"raters"}  # `raters`: a property of OracleArgs
            assert shared <= known, f"{file} reads {sorted(shared - known)}"
            read |= shared
    if "Roles(args" in path.read_text():  # and the four roles of PPO read theirs
        read |= {n.attr for n in ast.walk(ast.parse((REPO / "roles.py").read_text()))
                 if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "args"}
    loads = path.read_text() + ((REPO / "roles.py").read_text() if "Roles(args" in path.read_text() else "")
    if "load_options(args" in loads:  # how what is trained lies in memory
        assert "quantize=args.quantize" in (REPO / "harness.py").read_text()
        read.add("quantize")
    if "PRESETS" in path.read_text():
        assert "cls.PRESETS" in (REPO / "flags.py").read_text()
        read.add("preset")
    if "args.raters" in path.read_text():  # a property of OracleArgs that splits --oracle
        read.add("oracle")
    assert not flags - read, f"flags that do nothing: {sorted(flags - read)}"
    assert not (read & {f"no_{f}" for f in flags})


@pytest.mark.parametrize("name", SHARED_FLAGS)
def test_every_shared_flag_is_read_where_it_is_shared(name):
    """Or in every script that has it."""
    heirs = [flags_and_reads(path)[1] for path in SCRIPTS if name in map(ast.unparse, class_of(path, "Args").bases)]
    read = set.intersection(*heirs) if heirs else set()
    for file in READ_IN:
        read |= {n.attr for n in ast.walk(ast.parse((REPO / file).read_text()))
                 if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "args"}
    if "args.raters" in (REPO / "oracle.py").read_text():
        assert 'self.oracle.split(",")' in (REPO / "flags.py").read_text()
        read.add("oracle")
    cls = class_of(REPO / SHARED_FLAGS[name], name)
    assert fields_of(cls) and not fields_of(cls) - read


@pytest.mark.parametrize("path, name", [*((path, "Args") for path in SCRIPTS),
                                        *((REPO / file, name) for name, file in SHARED_FLAGS.items())])
def test_every_flag_has_a_help_text(path, name):
    for field in class_of(path, name).body:
        if isinstance(field, ast.AnnAssign):
            call = ast.unparse(field.value)
            assert "help=" in call or "init=False" in call, field.target.id


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
    assert deviations(REPO / "grpo_rank.py")[0] >= {1, 2, 3, 4, 5, 6} <= deviations(REPO / "grpo_rank.py")[1]


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_line_over_120_columns(path):
    long = [n for n, line in enumerate(path.read_text().split("\n"), 1) if len(line) > 120]
    assert not long, f"{path.name}: lines {long}"


@pytest.mark.parametrize("name", LIMITED)
def test_no_file_is_too_long(name):
    assert len((REPO / f"{name}.py").read_text().splitlines()) <= 660


def test_nothing_about_this_machine():
    """In code, pages, and the results with the commands that made them."""
    others = [path for part in ("docs", "benchmarks") for path in sorted((REPO / part).rglob("*"))]
    texts = [p for p in [*FILES, REPO / "README.md", *others] if p.suffix in (".py", ".sh", ".md", ".json", ".diff")]
    found = [p.name for p in texts if re.search(r"/(home|root|work|mnt|scratch|Users|tmp)/\w", p.read_text())]
    assert len(texts) > 100 and found == []
