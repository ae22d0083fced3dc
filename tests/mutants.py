"""Can the tests fail? Plants each error of planted.py in a copy of the repository, runs its tests.

    python tests/mutants.py                              all; what stands in --out is not done again
    python tests/mutants.py --only grpo_kl_sign sft_lr   these, also if they are done

An error is caught by a test that fails with it and passes without it. Exit code 1 where more than 2
survive, or where a test fails without any error.
"""

import argparse
import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent
SURVIVORS = 2
NO_WORLD = 71  # exit code: the tests need the miniature world
CAUGHT, SURVIVED, GONE, UNSOUND = "caught", "SURVIVED", "no longer applies", "fails without it, too"
MAKE_WORLD = "test_make_world.py"
MADE_BY = """
import os, shutil
def test_make(world, policy):
    ready = os.environ["READY"]
    shutil.copytree(world, ready, ignore=shutil.ignore_patterns("cache"))
"""


class Watch:
    """A plugin of pytest: the miniature world is a copy of one made before. Notes what failed."""

    def __init__(self, ready, told, making):
        self.ready, self.told = ready, told
        self.making = making  # conftest.py makes it now

    def pytest_fixture_setup(self, fixturedef, request):
        import pytest

        if fixturedef.argname not in ("world", "policy") or self.making:
            return None
        if not self.ready.exists():
            os._exit(NO_WORLD)
        folder = request.getfixturevalue("tmp_path_factory").getbasetemp() / "ready"
        if not folder.exists():
            shutil.copytree(self.ready, folder)
        value = folder if fixturedef.argname == "world" else folder / "runs/sft/policy_s0/final"
        fixturedef.cached_result = value, fixturedef.cache_key(request), None
        assert pytest.__version__.split(".")[0] == "9"  # the line above is part of its inside
        return value

    def pytest_collectreport(self, report):
        self.pytest_runtest_logreport(report)

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.told.exists():
            self.told.write_text(report.nodeid)


class Place:
    """A copy of the repository; pytest in forked processes: libraries are imported once, here."""

    def __init__(self, folder, limit):
        self.folder, self.limit = folder, limit
        self.copy, self.ready = folder / "copy", folder / "world"
        command = ["git", "-C", str(REPO), "ls-files", "-zco", "--exclude-standard"]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        shutil.rmtree(self.copy, ignore_errors=True)
        for name in filter(None, listed.split("\0")):
            if (REPO / name).is_file():
                (self.copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(REPO / name, self.copy / name)
        os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", READY=str(self.ready))
        sys.dont_write_bytecode = True  # of two versions within a second and of one length
        sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (HERE, REPO)]
        self.import_libraries()

    def import_libraries(self):
        """Whatever the scripts import that is not theirs, and pytest."""
        scripts = "sft, reward_model, ppo_rlaif, dpo_iter_w2s, grpo_rank, evaluate, pytest"
        code = f"import sys, {scripts}; print(*sys.modules)"
        listed = subprocess.run([sys.executable, "-c", code], cwd=self.copy, check=True,
                                capture_output=True, text=True).stdout.split()
        ours = {"__main__", *(file.stem for file in self.copy.glob("*.py"))}
        for name in [name for name in listed if name.split(".")[0] not in ours]:
            with contextlib.suppress(Exception):  # parts that only their own package can import
                importlib.import_module(name)
        sys.modules["torch"].set_num_threads(1)

    def make_world(self):
        print("the miniature world ...", flush=True)
        (self.copy / "tests" / MAKE_WORLD).write_text(MADE_BY)
        if self.run([MAKE_WORLD])[0]:
            sys.exit((self.folder / "said").read_text()[-3000:])

    def run(self, tests):
        """-> exit code of pytest (None: out of time), the test that failed first or None."""
        told, done = self.folder / "failed", (0, 0)
        told.unlink(missing_ok=True)
        pid = os.fork()
        if not pid:
            self.inside(tests, told)
        end = time.monotonic() + self.limit
        try:
            while not (done := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < end:
                time.sleep(0.05)
        finally:  # also where this process is stopped
            if not done[0]:
                os.killpg(pid, signal.SIGTERM)  # torchrun ends its processes
                time.sleep(5)
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(done[1]) if done[0] else None
        return code, told.read_text() if told.exists() else None

    def inside(self, tests, told):
        """The forked process. It ends here."""
        code = 70
        try:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.chdir(self.copy)
            log = os.open(self.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0), os.dup2(log, 1), os.dup2(log, 2)
            for name in ("planted", "conftest"):
                sys.modules.pop(name, None)
            import pytest

            flags = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o",
                     "faulthandler_timeout=0", f"--basetemp={self.folder / 'tmp'}",
                     f"--rootdir={self.copy}", *(f"tests/{test}" for test in tests)]
            watch = Watch(self.ready, told, making=tests == [MAKE_WORLD])
            code = pytest.main(flags, plugins=[watch])
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(int(code))


def cpu_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def try_one(place, planted, sound):
    """-> status, the test that caught it. sound: tests that pass without an error."""
    file = place.copy / planted.file
    text = file.read_text() if file.exists() else ""
    if text.count(planted.old) != 1:
        return GONE, None
    try:
        file.write_text(text.replace(planted.old, planted.new))
        code, failed = place.run(planted.tests)
    finally:
        file.write_text(text)
    if code == NO_WORLD:
        place.make_world()
        return try_one(place, planted, sound)
    if code == 0:
        return SURVIVED, None
    if code not in (None, 1, 2) and code >= 0:  # 4: no such test
        sys.exit(f"{planted.id}: {(place.folder / 'said').read_text()[-3000:]}")
    failed = failed and failed.removeprefix("tests/")
    by = failed or ("the time limit" if code is None else f"its end with {code}")
    again = (failed,) if failed else planted.tests
    key = "\n".join(again)
    if key not in sound and place.run(again)[0] == 0:
        sound.append(key)
    return CAUGHT if key in sound else UNSOUND, by


def read_flags():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    flag("--out", type=Path, default=Path("runs/mutants.json"), help="results, kept one by one")
    flag("--only", nargs="+", default=[], metavar="ID", help="only these, also if they are done")
    flag("--limit", type=float, default=300, help="seconds that the tests of an error may take")
    flag("--folder", type=Path, help="keep the copy and its miniature world here for the next time")
    return parser.parse_args()


def main():
    from planted import PLANTED

    args, known = read_flags(), {p.id for p in PLANTED}
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if not set(args.only) <= known:
        sys.exit(f"--only: there is no {', '.join(sorted(set(args.only) - known))}")
    kept = json.loads(args.out.read_text()) if args.out.exists() else dict(results={}, sound=[])
    results, sound = kept["results"], kept["sound"]
    same = lambda p: results.get(p.id, {}).get("planted") == json.loads(json.dumps(p))
    todo = [p for p in PLANTED if (p.id in args.only if args.only else not same(p))]
    out = args.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)).resolve()
        place = Place(folder, args.limit) if todo else None
        for n, planted in enumerate(todo, 1):
            began = cpu_seconds()
            status, by = try_one(place, planted, sound)
            seconds = round(cpu_seconds() - began, 1)
            results[planted.id] = dict(status=status, by=by, seconds=seconds, planted=planted)
            out.write_text(json.dumps(kept, indent=1))
            said = f"{status} by {by}" if by else status
            print(f"[{n}/{len(todo)}] {planted.id}: {said} ({seconds:.0f} s of CPU)", flush=True)
    shown = args.only or known
    done = {p.id: results[p.id] for p in PLANTED if p.id in shown and p.id in results}
    wide = max(map(len, done), default=0)
    print()
    for id, r in done.items():
        print(f"{id:{wide}}  {r['by'] if r['status'] == CAUGHT else r['status']}")
    with_status = lambda status: [id for id, r in done.items() if r["status"] == status]
    lost = {status: with_status(status) for status in (SURVIVED, GONE, UNSOUND)}
    counts = "; ".join(f"{status}: {len(ids)}" for status, ids in lost.items())
    print(f"\n{len(done)} planted errors; {counts}")
    for id in lost[SURVIVED]:
        print(f"    {id}: {done[id]['planted'][4]}")
    sys.exit(len(lost[SURVIVED]) > SURVIVORS or bool(lost[UNSOUND]))


if __name__ == "__main__":
    main()
