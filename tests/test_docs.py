"""The documentation says what the code does: metric keys, command lines, annotation examples and
links."""

import ast
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from inputs.records import read_records
from oracle import COUNTERS
from plumbing.flags import Parser

REPO = Path(__file__).resolve().parent.parent
PAGES = [p for p in [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))] if p.exists()]


# --- metric keys ----------------------------------------------------------------------------------
def loop_values(loop, constants):
    """{variable: [its values]} of a `for` over literals, over a module constant, or over
    zip(literals, ...)."""
    over, target = loop.iter, loop.target
    if (
        isinstance(over, ast.Call)
        and getattr(over.func, "id", "") == "zip"
        and isinstance(target, ast.Tuple)
    ):
        over, target = over.args[0], target.elts[0]
    if isinstance(target, ast.Name):
        if isinstance(over, ast.Name) and over.id in constants:
            return {target.id: constants[over.id]}
        if isinstance(over, ast.Tuple) and all(isinstance(e, ast.Constant) for e in over.elts):
            return {target.id: ast.literal_eval(over)}
    return {}


def logged_keys(source):
    """All keys that a script hands to log.add(key, ...), f-strings over a loop's values
    included."""
    tree, keys, constants = ast.parse(source), set(), {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            if all(isinstance(e, ast.Constant) for e in node.value.elts):
                constants[node.targets[0].id] = ast.literal_eval(node.value)

    def walk(node, values):
        if isinstance(node, ast.For):
            values = values | loop_values(node, constants)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "log.add":
            key = node.args[0]
            if isinstance(key, ast.JoinedStr):
                (name,) = [part.value.id for part in key.values
                           if isinstance(part, ast.FormattedValue)]
                keys.update(eval(compile(ast.Expression(key), "", "eval"), {name: v})
                            for v in values[name])
            else:
                keys.add(ast.literal_eval(key))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "log.mark" and node.args:
            keys.add(f"time/{ast.literal_eval(node.args[0])}_s")
        for child in ast.iter_child_nodes(node):
            walk(child, values)

    walk(tree, {})
    assert '"time/step_s"' in (REPO / "plumbing/run.py").read_text()
    return keys | {"time/step_s"}  # which Log.step adds for everyone


def documented_keys(page):
    """The keys of the first column of the table in the section `## Logged metrics`, each once."""
    section = page.split("\n## Logged metrics\n")[1].split("\n## ")[0]
    keys = re.findall(r"^\| `([^`]+)` \|", section, re.M)
    # all rows but head and rule
    assert len(keys) == len(set(keys)) == len(re.findall(r"^\|", section, re.M)) - 2
    return set(keys)


def test_keys_are_found_in_loops():
    source = """
KINDS = ("a", "b")
for step in range(3):
    for kind in KINDS:
        log.add(f"x/{kind}", 1)
    for key, s, e in zip(("p", "q"), clock, clock[1:]):
        log.add(f"time/{key}_s", e - s)
    log.add("plain", 1)
    log.mark("rollout")
"""
    assert logged_keys(source) == {"x/a", "x/b", "time/p_s", "time/q_s", "plain", "time/rollout_s",
                                   "time/step_s"}


@pytest.mark.parametrize("script",
                         ["sft", "grpo_rank", "reward_model", "ppo_rlaif", "dpo_iter_w2s"])
def test_metrics_of_the_page_are_those_of_the_script(script):
    page = REPO / "docs" / f"{script}.md"
    if not page.exists():
        pytest.skip(f"{page.name} is not there")
    source = (REPO / f"{script}.py").read_text()
    if "Validation(" in source:
        source += (REPO / "plumbing/validation.py").read_text()
    assert documented_keys(page.read_text()) == logged_keys(source)
    if "log_counts(" in source:  # what a server costs is explained once
        assert "(oracle.md#logged-metrics)" in page.read_text()


def test_metrics_of_servers_are_explained_once():
    assert (documented_keys((REPO / "docs" / "oracle.md").read_text())
            == {f"oracle/{key}" for key in COUNTERS})


# --- equations and departures ---------------------------------------------------------------------
SCRIPTS = ["sft", "grpo_rank", "reward_model", "ppo_rlaif", "dpo_iter_w2s", "oracle", "evaluate"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_equation_names_a_function_and_a_test_that_knows_it(script):
    """| equation | function | test (tests/test_x.py) |: functions are defined here, the test file
    speaks of each."""
    section = (REPO / "docs"
               / f"{script}.md").read_text().split("\n## Equations\n")[1].split("\n## ")[0]
    (tests,) = re.findall(r"\| tests? \((tests/\w+\.py(?:, tests/\w+\.py)*)\) \|", section)
    tested = "\n".join((REPO / file).read_text() for file in tests.split(", "))
    modules = "\n".join(path.read_text() for path in [*REPO.glob("*.py"), *REPO.glob("*/*.py")])
    rows = [row.strip("|").split(" | ") for row in re.findall(r"^\|.*\|$", section, re.M)[2:]]
    assert len(rows) >= 3 and all(len(row) == 3 for row in rows)
    for _, functions, _ in rows:
        names = re.findall(r"`(\w+)`", functions)
        assert names
        for name in names:
            assert re.search(rf"^ *def {name}\(", modules, re.M), name
            assert re.search(rf"\b{name}\b", tested), f"{name}: not in {tests}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_departure_stands_on_the_page(script):
    header = ast.get_docstring(ast.parse((REPO / f"{script}.py").read_text()), clean=False)
    explained = re.findall(r"^(?:Differs)? *(D\d+)  ", header, re.M)
    page = (REPO / "docs" / f"{script}.md").read_text()
    assert explained and [d for d in explained if not re.search(rf"\b{d}\b", page)] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_page_says_what_a_run_costs(script):
    assert "\n## Run time and memory\n" in (REPO / "docs" / f"{script}.md").read_text()


# --- command lines --------------------------------------------------------------------------------
def command_lines(text):
    """The words of every `python x.py ..` and `torchrun .. x.py ..`, in a fenced block or not."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"(?<!`)`((?:python|torchrun) [^`]+)`",
                        re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in (line.strip().removeprefix("$ ") for line in lines):
        if re.match(r"(\.venv/bin/)?python3? (?!-c|-m pytest)|torchrun ", line):
            yield shlex.split(line, comments=True)


COMMANDS = [(page.name, words) for page in PAGES for words in command_lines(page.read_text())]


@pytest.mark.parametrize("page, words", COMMANDS,
                         ids=[f"{page}: {' '.join(words)}" for page, words in COMMANDS])
def test_command_lines_are_valid(page, words, tmp_path, monkeypatch):
    if words[1] == "-m":  # a module of a folder
        words = [words[0], words[2].replace(".", "/") + ".py", *words[3:]]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, flags = words[at], words[at + 1 :]
    # a fork of docs/ablations.md has the flags of what it is a copy of
    copied = re.match(r"grpo_rank_\w+\.py", script)
    script = "grpo_rank.py" if copied else script
    assert (REPO / script).exists()
    processes = [word.partition("=")[2]
                 for word in words[:at] if word.startswith("--nproc_per_node=")]
    monkeypatch.setenv("WORLD_SIZE", processes[0] if processes else "1")
    other = script.split("/")[0] in ("benchmarks", "experiments", "docs", "tests")
    cls = None if other else getattr(importlib.import_module(script[:-3].replace("/", ".")), "Args",
                                     None)
    assert other or "__main__" in (REPO / script).read_text(), f"{page}: {script} runs nothing"
    if cls is None or flags == ["--help"]:
        return
    parser = Parser(cls, allow_abbrev=False)
    parser.error = lambda message: pytest.fail(f"{page}: {' '.join(words)}: {message}")
    if script == "evaluate.py":  # it looks for its runs: here they are, a glob matches two seeds
        given = parser.parse_args(flags)
        for run in [*given.runs, *given.compare, *filter(None, [given.checkpoint])]:
            for seed in "01":
                (tmp_path / run.replace("*", seed) / "final").mkdir(parents=True, exist_ok=True)
                (tmp_path / run.replace("*", seed) / "final" / "config.json").write_text("{}")
        monkeypatch.chdir(tmp_path)
    # a ValueError of __post_init__ fails the test with its message
    parser.parse_args_into_dataclasses(flags)


def test_commands_are_found_and_wrong_ones_noticed(tmp_path, monkeypatch):
    text = ("```bash\ntorchrun --nproc_per_node=4 sft.py \\\n  --lr 1  # why\npython -c 1\n```\n"
            "`python sft.py --help`")
    assert list(command_lines(text)) == [["torchrun", "--nproc_per_node=4", "sft.py", "--lr", "1"],
                                         ["python", "sft.py", "--help"]]
    for words in (["python", "sft.py", "--learning_rate", "1"], ["python", "nothing.py"],
                  ["torchrun", "--nproc_per_node=3", "sft.py"],
                  ["python", "oracle.py", "--oracle", "judge"]):
        with pytest.raises((pytest.fail.Exception, AssertionError, ValueError)):
            test_command_lines_are_valid("page", words, tmp_path, monkeypatch)


# --- annotation examples and links ----------------------------------------------------------------
def test_every_annotation_example_is_read(tmp_path):
    page = (REPO / "docs" / "sft.md").read_text()
    lines = [line for block in re.findall(r"^```json\n(.*?)^```", page, re.M | re.S)
             for line in block.splitlines()]
    (tmp_path / "cat").mkdir()
    for name in ("cat.mp4", "cat/01.jpg", "cat/02.jpg"):
        (tmp_path / name).touch()
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    records, report = read_records([str(tmp_path / "x.jsonl")])
    assert report["rows"] == len(lines) >= 7 and not report["skipped"]
    assert len(records) == len(lines) + 1  # one row has two answers
    assert all(json.loads(line) for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)", text) + re.findall(
        r"<img[^>]* src=\"([^\"]+)\"", text
    ):
        if not link.startswith(("http://", "https://", "#", "mailto:")):
            assert (page.parent / link.partition("#")[0]).exists(), f"{page.name} links to {link}"


# --- numbers --------------------------------------------------------------------------------------
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_files(page):
    sys.path.insert(0, str(REPO / "docs"))
    import fill

    text = page.read_text()
    assert (text.count("<!-- end -->") == len(fill.BLOCK.findall(text))
            == text.count("<!-- results/"))
    assert fill.filled(text) == text, (
        f"python docs/fill.py: {page.name} shows other numbers than docs/results")
