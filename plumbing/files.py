"""Files that a kill never leaves half written, and long work that goes on where it stopped."""

import json
import os
import secrets
import sys
from pathlib import Path

from inputs.records import DataError
from plumbing import processes


def write(file, text):
    """A text file that is there as a whole or, after a kill, as it was."""
    # process numbers repeat in containers
    aside = file.with_name(f"{file.name}.{secrets.token_hex(8)}.tmp")
    aside.parent.mkdir(parents=True, exist_ok=True)
    # bytes in a file name that are no text
    aside.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(aside, file)


def read_lines(file):
    """The JSON lines of a file that may not exist, or end in half a line."""
    for line in Path(file).read_text().split("\n") if Path(file).exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def in_chunks(items, size):
    """A list in lists of `size`; the last one may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def collect_rows(run, file, parts, rows_of, answered=lambda row: True, flags=None, ids=None):
    """All rows of a JSON-lines file that is made part by part. What a killed run wrote is kept up
    to the last whole part.

    run: rank and world. parts: [(source, items, rows per item), ..]. rows_of(source, items) -> a
    list of rows for each item. The items of a part are shared out over the processes, whose number
    therefore changes nothing. answered(row): True, False, or None if nobody was asked. A source
    that answers nothing in three parts in a row, or in all its parts if they are fewer, ends the
    run; these parts are not kept. flags: how the rows are made, the first line of the file;
    DataError if a file was made with others. ids: `id` of the rows to come; a file with others ends
    the run."""
    first_line = [] if flags is None else [json.dumps(dict(flags=flags)) + "\n"]
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    # a kill may leave half a line at the end
    lines = [line for line in lines if line.endswith("\n")]
    if first_line and lines:
        check_flags(file, json.loads(lines[0])["flags"], flags)
    lines = lines[len(first_line) :]
    sizes = [len(items) * per_item for _, items, per_item in parts]
    done = sum(sum(sizes[: n + 1]) <= len(lines) for n in range(len(parts)))
    rows = [json.loads(line) for line in lines[: sum(sizes[:done])]]
    if ids and [row["id"] for row in rows] != ids[: len(rows)]:
        sys.exit(f"{file}: its answers are to other questions (videos or labels have changed); "
                 "remove it")

    def rewrite():
        write(file, "".join(first_line + [json.dumps(row) + "\n" for row in rows]))

    # every process has read before the first one writes
    processes.check_same(f"{file}: its rows", rows)
    if run.rank == 0 and done < len(parts):
        rewrite()
    silent = []  # parts of this source in a row in which it answered nothing
    for n, (source, items, _) in enumerate(parts[done:], done):
        mine = items[run.rank :: run.world]
        shares = processes.all_gather(rows_of(source, mine) if mine else [])
        new = [row for i in range(len(items)) for row in shares[i % run.world][i // run.world]]
        if run.rank == 0:
            with open(file, "a") as f:
                f.write("".join(json.dumps(row) + "\n" for row in new))
        rows += new
        if run.rank == 0 and ids:
            done = len(rows)
            print(f"\r{file.name}: {done} of {len(ids)}", end="" if done < len(ids) else "\n",
                  flush=True)
        replies = {answered(row) for row in new}
        if True in replies or source != parts[n - 1][0]:
            silent = []
        if False in replies and True not in replies:
            silent.append(n)
        if len(silent) == min(3, sum(part[0] == source for part in parts)):
            lost = sum(sizes[silent[0] : n + 1])
            rows = rows[:-lost]
            if run.rank == 0:
                rewrite()
            sys.exit(f"{file}: {source or 'the oracle'} has answered nothing in {lost} rows; when "
                     f"it can again: {processes.resume_command()}")
    return rows


def check_flags(file, then, now):
    """DataError if a file was made with other flags."""
    if changed := [name for name, value in now.items() if then.get(name) != value]:
        name = changed[0]
        raise DataError(f"{file} was collected with another --{name} ({then.get(name)}): use the "
                        "same, or another --preferences file")
