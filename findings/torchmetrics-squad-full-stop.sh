#!/bin/sh
# torchmetrics' SQuAD gives a model that says nothing full marks on answerable questions of SQuAD 2.0.
#
# Some annotators of SQuAD 2.0's dev set typed a full stop: beside "interventionism" the accepted answers of one question
# hold ".", and two more are like it in the half of the set that was read. Normalisation (lower case, no punctuation, no
# articles) turns "." into nothing. The dataset's own script drops accepted answers of which nothing is left;
# torchmetrics.text.SQuAD keeps them, and counts whatever is nothing after normalisation ("", "the", "!") as exact match
# 100 and F1 100. A model whose memory is empty and which therefore writes nothing, or one article, gains by it, and one
# that answers with a wrong word does not. Drop such answers before handing them over.
#
# Needs a network for pip. Exit code 0: as described; 1: another behaviour; 2: pip failed.
set -u
place=$(mktemp -d) && trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv" && "$place/venv/bin/pip" install -q torch==2.13.0 torchmetrics==1.9.0 || exit 2
cat > "$place/try.py" <<'PY'
import sys

import torchmetrics
from torchmetrics.text import SQuAD

EXPECTED = {"": (100, 100), "the": (100, 100), "!": (100, 100), "imperialism": (0, 0), "interventionism": (100, 100)}


def scored(said, accepted):
    """Exact match and F1 of one question."""
    target = {"id": "1", "answers": {"text": accepted, "answer_start": [0] * len(accepted)}}
    found = SQuAD()([{"id": "1", "prediction_text": said}], [target])
    return round(float(found["exact_match"])), round(float(found["f1"]))


print("torchmetrics", torchmetrics.__version__)
with_stop = {said: scored(said, ["interventionism", "."]) for said in EXPECTED}
without = scored("", ["interventionism"])
for said, marks in with_stop.items():
    print(f"said {said!r}: exact match {marks[0]}, F1 {marks[1]}")
print(f"said '' where the full stop is no accepted answer: exact match {without[0]}, F1 {without[1]}")
sys.exit(0 if with_stop == EXPECTED and without == (0, 0) else 1)
PY
"$place/venv/bin/python" "$place/try.py"
