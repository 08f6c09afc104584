#!/bin/sh
# pandas.read_json(lines=True) changes texts: the ids "007" and "7" become one id, the answer "1e3" becomes 1000.0.
#
# By default it makes numbers of a column whose texts all look like numbers, although JSON tells texts from numbers; ids
# fall together (a join or groupby by id merges two documents), and answers no longer match what a model writes. One other
# text in the column and nothing happens, so the first thousand rows may differ from the whole. A null beside whole numbers
# makes them floats, and large ids lose their last digits, also with dtype=False.
#
# Needs a network for pip. Exit code 0: as described; 1: another behaviour; 2: pip failed.
set -u
place=$(mktemp -d) && trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv" && "$place/venv/bin/pip" install -q pandas==3.1.1 || exit 2
cat > "$place/try.py" <<'PY'
import io
import json
import sys

import pandas as pd


def read(*rows, **options):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    found = pd.read_json(io.StringIO(lines), lines=True, **options).to_dict("list")
    print(f"{list(rows)} {options or ''} is read as {found}")
    return found


print(f"pandas {pd.__version__}")
rows = {"id": "007", "answer": "1e3"}, {"id": "7", "answer": "05"}
same = read(*rows) == {"id": [7, 7], "answer": [1000.0, 5.0]}
same &= read(*rows, {"id": "x", "answer": "y"})["id"] == ["007", "7", "x"]
same &= read(*rows, dtype=False) == {"id": ["007", "7"], "answer": ["1e3", "05"]}
large = read({"id": 9007199254740993}, {"id": None}, dtype=False)
same &= large["id"][0] == 9007199254740992
print("as described" if same else "the behaviour has changed")
sys.exit(not same)
PY
"$place/venv/bin/python" -W ignore "$place/try.py"
