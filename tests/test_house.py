"""The house: what stands at the root, which file may import which, how long a line and a script
are."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent
LINES = dict(  # of each script, as planned; 10 % more is allowed
    sft=330, reward_model=460, ppo_rlaif=600, dpo_iter_w2s=540, grpo_rank=330, oracle=600,
             video_llm=610, evaluate=530)
FOLDERS = ("model", "inputs", "plumbing", "evaluation", "embedded_world", "benchmarks",
           "experiments", "docs", "tests")
USE_EVALUATION = ("evaluate.py", "evaluation", "benchmarks", "experiments", "docs", "tests",
                  "embedded_world")
COLUMNS = 100


def files_of(*places):
    """Python files of the root (".") and of folders, as paths below the repository."""
    found = (sorted((REPO / place).glob("*.py")) for place in places)
    return [path.relative_to(REPO) for files in found for path in files]


def imports_of(source):
    """First names of all modules that a source imports, inside functions too: {"torch", "plumbing",
    ..}."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the whole path"
            names.add(node.module)
        elif (isinstance(node, ast.Call)
              and ast.unparse(node.func).endswith(("import_module", "__import__"))):
            first = node.args[0]
            names |= {str(first.value)} if isinstance(first, ast.Constant) else set()
    return {name.split(".")[0] for name in names}


def allowed(path):
    """The names of this repository that the file may import: the arrows of the house."""
    scripts, lowest, place = set(LINES), {"model", "inputs", "plumbing"}, path.parts[0]
    if path == Path("model/compose.py"):  # it makes a VideoLLM, so it stands above it
        return lowest | {"video_llm"}
    if place in ("model", "inputs"):
        return lowest
    if place == "plumbing":
        return lowest | {"video_llm"}
    if place == "video_llm.py":
        return lowest
    if place == "oracle.py":
        return lowest | {"video_llm"}
    if place in USE_EVALUATION:
        return scripts | set(FOLDERS)
    return lowest | {"oracle", "video_llm"}  # a training script


def wrong_imports(path, source):
    return (imports_of(source) & (set(LINES) | set(FOLDERS))) - allowed(path) - {path.stem}


def long_lines(source):
    return [n for n, line in enumerate(source.splitlines(), 1) if len(line) > COLUMNS]


def test_the_root_has_the_eight_scripts():
    assert {path.stem for path in files_of(".")} == set(LINES)


@pytest.mark.parametrize("path", files_of(".", *FOLDERS), ids=str)
def test_arrows_go_down_only(path):
    assert not wrong_imports(path, (REPO / path).read_text())


@pytest.mark.parametrize("place, line, wrong", [
    ("sft.py", "from evaluation.metrics import spread", {"evaluation"}),
    ("grpo_rank.py", "def late():\n    import evaluate", {"evaluate"}),
    ("oracle.py", "import evaluation.judges", {"evaluation"}),
    ("video_llm.py", "from oracle import ranks_of", {"oracle"}),
    ("dpo_iter_w2s.py", "from ppo_rlaif import gae", {"ppo_rlaif"}),
    ("model/packing.py", "from video_llm import Prefix", {"video_llm"}),
    ("inputs/frames.py", "import oracle", {"oracle"}),
    ("plumbing/zoo.py", "from oracle import judge_prompt", {"oracle"}),
    ("plumbing/run.py", "from video_llm import load_model", set()),
    ("evaluation/judges.py", "from oracle import JudgeOracle", set()),
])
def test_a_planted_import_is_found(place, line, wrong):
    assert wrong_imports(Path(place), line) == wrong


@pytest.mark.parametrize("path", files_of(".", *FOLDERS), ids=str)
def test_no_line_is_longer_than_100_columns(path):
    assert not long_lines((REPO / path).read_text())


def test_a_planted_line_is_found():
    assert long_lines(f"{'x' * 100}\n{'x' * 101}\n") == [2]


@pytest.mark.parametrize("script", LINES)
def test_scripts_are_as_long_as_planned(script):
    assert len((REPO / f"{script}.py").read_text().splitlines()) <= 1.1 * LINES[script]
