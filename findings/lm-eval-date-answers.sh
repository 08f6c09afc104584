#!/bin/sh
# A right answer that is a date scores 0 in lm-evaluation-harness, because `datasets` turned its text into a timestamp.
#
# JSON has no dates. If every text of a column looks like 1969-07-20, the "json" loader of `datasets` (pyarrow's reader)
# makes the column timestamps all the same; the target is then the text "1969-07-20 00:00:00", and exact_match of
# "1969-07-20" is 0. One answer of another form in the file, and all of them stay texts.
#
# Needs a network for pip. Exit code 0: as described; 1: another behaviour; 2: pip failed.
set -u
place=$(mktemp -d) && trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv" && "$place/venv/bin/pip" install -q lm_eval==0.4.13 datasets==5.2.0 pyarrow==25.0.1 || exit 2
export HF_HUB_OFFLINE=1 HF_HOME="$place/home"
cat > "$place/try.py" <<'PY'
import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path

logging.disable(logging.CRITICAL)
import datasets
from lm_eval.api.task import ConfigurableTask

datasets.disable_progress_bars()
place = Path(sys.argv[1])


def score(name, *answers):
    """What the first answer's text became, and exact_match of a model that says it to the letter."""
    file = place / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"question": "When?", "answer": a}) + "\n" for a in answers))
    files = {"data_files": {"test": str(file)}, "cache_dir": str(place / "cache")}
    task = ConfigurableTask(config={
        "task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test",
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"]}, "metric_list": [{"metric": "exact_match"}],
    })
    document = task.eval_docs[0]
    found = task.doc_to_target(document), float(task.process_results(document, [answers[0]])["exact_match"])
    print(f"{name}: the file says {answers[0]!r}, the target is {found[0]!r}, exact_match of the right answer {found[1]}")
    return found


print(*(f"{name} {version(name)}" for name in ("lm_eval", "datasets", "pyarrow")), sep=", ")
same = score("dates", "1969-07-20", "1815-06-18") == ("1969-07-20 00:00:00", 0.0)
same &= score("dates_and_a_year", "1969-07-20", "1815") == ("1969-07-20", 1.0)
print("as described" if same else "the behaviour has changed")
sys.exit(not same)
PY
"$place/venv/bin/python" -W ignore "$place/try.py" "$place"
