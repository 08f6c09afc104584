#!/bin/sh
# lm-evaluation-harness scores the word "None" for a null, and the letters of a text that stands where choices belong.
#
# Both are valid JSON lines that `datasets` loads as they are. A null text of a perplexity task is scored as the four
# characters "None", and counts as a document; "options": "Ada" becomes the choices A, d, a.
# Neither is said by a warning or an error.
#
# Needs a network for pip. Exit code 0: as described; 1: another behaviour; 2: pip failed.
set -u
place=$(mktemp -d) && trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv" && "$place/venv/bin/pip" install -q lm_eval==0.4.13 datasets==5.2.0 || exit 2
export HF_HUB_OFFLINE=1 HF_HOME="$place/home"
cat > "$place/try.py" <<'PY'
import json
import logging
import sys
from importlib.metadata import version
from pathlib import Path

told = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: told.append(record.getMessage())
import datasets
from lm_eval.api.task import ConfigurableTask

logging.getLogger("lm_eval").addHandler(handler)
datasets.disable_progress_bars()
place = Path(sys.argv[1])


def requests(name, rows, **fields):
    """The arguments of all requests to the model."""
    file = place / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"data_files": {"test": str(file)}, "cache_dir": str(place / "cache")}
    task = ConfigurableTask(config={
        "task": name, "dataset_path": "json", "dataset_kwargs": files, "test_split": "test", **fields,
    })
    del told[:]
    task.build_all_requests()
    print(f"{name}: {rows} is asked as {[one.args for one in task.instances]}; warnings: {told or 'none'}")
    return [one.args for one in task.instances]


print(*(f"{name} {version(name)}" for name in ("lm_eval", "datasets")), sep=", ")
texts = requests(
    "texts", [{"text": None}, {"text": "A tale."}], output_type="loglikelihood_rolling", doc_to_text="",
    doc_to_target="{{text}}",
)
choices = requests(
    "choices", [{"question": "Who?", "options": "Ada", "label": 0}], output_type="multiple_choice",
    doc_to_text="{{question}}", doc_to_choice="options", doc_to_target="label",
)
same = texts == [("None",), ("A tale.",)] and choices == [("Who?", " A"), ("Who?", " d"), ("Who?", " a")]
print("as described" if same else "the behaviour has changed")
sys.exit(not same)
PY
"$place/venv/bin/python" -W ignore "$place/try.py" "$place"
