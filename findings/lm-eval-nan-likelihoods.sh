#!/bin/sh
# lm-evaluation-harness gives a model whose likelihoods are not numbers an accuracy, and no word about it.
#
# A diverged model, or one that overflows in half precision, answers NaN for every choice. The multiple-choice score
# takes the largest of them, which is then the first: the accuracy is the share of questions whose right choice stands
# first, with a standard error, and no warning. Where the first choice is finite and the right one NaN, the NaN wins.
#
# Needs a network for pip. Exit code 0: as described; 1: another behaviour; 2: pip failed.
set -u
place=$(mktemp -d) && trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv" && "$place/venv/bin/pip" install -q lm_eval==0.4.13 datasets==5.2.0 || exit 2
export HF_HUB_OFFLINE=1 HF_HOME="$place/home"
cat > "$place/try.py" <<'PY'
import json
import logging
import math
import sys
from importlib.metadata import version
from pathlib import Path

logging.disable(logging.CRITICAL)
import datasets
import lm_eval
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask

datasets.disable_progress_bars()
place = Path(sys.argv[1])
file = place / "questions.jsonl"
rows = [{"question": f"Question {i}?", "choices": ["yes", "no"], "right": int(i >= 7)} for i in range(10)]
file.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Diverged(LM):
    """Every likelihood is NaN; or only that of the second choice."""

    def __init__(self, second_alone):
        super().__init__()
        self.second_alone = second_alone

    def loglikelihood(self, requests):
        fine = [self.second_alone and request.args[1].strip() == "yes" for request in requests]
        return [(-1.0 if ok else math.nan, False) for ok in fine]

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError


def accuracy(second_alone):
    files = {"data_files": {"test": str(file)}, "cache_dir": str(place / "cache")}
    task = ConfigurableTask(config={
        "task": "nan", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test",
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
        "doc_to_target": "right", "metric_list": [{"metric": "acc"}],
    })
    found = lm_eval.evaluate(lm=Diverged(second_alone), task_dict={"nan": task}, bootstrap_iters=100)["results"]["nan"]
    said = f"{found['acc,none']:.2f} ± {found['acc_stderr,none']:.2f}"
    print(f"{'the second choice' if second_alone else 'every choice'} is NaN: accuracy {said}")
    return round(found["acc,none"], 2)


print(*(f"{name} {version(name)}" for name in ("lm_eval", "datasets")), sep=", ")
same = (accuracy(False), accuracy(True)) == (0.7, 0.3)
print("as described" if same else "the behaviour has changed")
sys.exit(not same)
PY
"$place/venv/bin/python" -W ignore "$place/try.py" "$place"
