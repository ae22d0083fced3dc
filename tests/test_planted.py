"""Every planted error can still be planted, and the tests that must notice it are there."""

import ast
import functools
import re
from pathlib import Path

from planted import PLANTED

TESTS = Path(__file__).resolve().parent
SCRIPTS = ("sft", "reward_model", "ppo_rlaif", "dpo_iter_w2s", "grpo_rank")


@functools.cache
def source(file):
    """Its text, and where its top-level statements begin and end."""
    text = (TESTS.parent / file).read_text()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return text, [(starts[n.lineno - 1], starts[n.end_lineno]) for n in ast.parse(text).body]


@functools.cache
def names_in(file):
    return set(re.findall(r"^def (test_\w+)\(", (TESTS / file).read_text(), re.M))


def problem(planted):
    """Why it cannot be planted, or None."""
    text, places = source(planted.file)
    if text.count(planted.old) != 1:
        return f"{planted.file} holds the old text {text.count(planted.old)} times"
    at, behind = text.index(planted.old), text.index(planted.old) + len(planted.old)
    (start, end), = [(a, b) for a, b in places if a <= at < b]  # only this is parsed again
    try:
        ast.parse(text[start:at] + planted.new + text[behind : max(end, behind)])
    except SyntaxError as e:
        return f"the new text is no Python: {e}"
    tests = [test.partition("::") for test in planted.tests]
    gone = [file + name for file, _, name in tests
            if not (TESTS / file).exists() or name and name.split("[")[0] not in names_in(file)]
    return f"there is no {gone[0]}" if gone else None


def test_every_planted_error_still_applies():
    problems = {p.id: problem(p) for p in PLANTED}
    assert not [f"{id}: {why}" for id, why in problems.items() if why]


def test_there_are_enough_for_every_script():
    files, ids = [p.file for p in PLANTED], [p.id for p in PLANTED]
    assert len(PLANTED) >= 64 and all(files.count(f"{name}.py") >= 8 for name in SCRIPTS)
    assert len(set(ids)) == len(ids)
    assert all(p.breaks and p.tests and p.old != p.new for p in PLANTED)
