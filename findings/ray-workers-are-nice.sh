#!/bin/sh
# Ray runs every task and actor at niceness 15, and a process that a task starts inherits it.
#
# A benchmark that times its cells under Ray, on a machine that does anything else, competes for the processor with
# about 1/28 of the weight of a process of niceness 0; on the same machine without Ray it competes as an equal. Nothing
# says so: `ray.init`, `num_cpus` and the resources that a task holds promise whole cores. A process may lower its own
# priority and not raise it again, so a task cannot undo it. RAY_worker_niceness=0 in the environment in which the node
# is started does.
#
# Needs a network for pip. Exit code 0: as described; 1: another behaviour; 2: pip failed.
set -u
place=$(mktemp -d) && trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv" && "$place/venv/bin/pip" install -q ray==2.60.0 || exit 2
cat > "$place/try.py" <<'PY'
import os
import subprocess
import sys
import tempfile

import ray


def niceness():
    """Of this process, and of one that it starts."""
    own = os.getpriority(os.PRIO_PROCESS, 0)
    code = "import os; print(os.getpriority(os.PRIO_PROCESS, 0))"
    return own, int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def in_a_task(folder):
    """`niceness` of a task that holds a whole core of a Ray of its own."""
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False, _temp_dir=folder)
    found = ray.get(ray.remote(niceness).options(num_cpus=1).remote())
    ray.shutdown()
    return found


print("ray", ray.__version__)
here = niceness()
with tempfile.TemporaryDirectory(dir="/tmp") as folder:
    usual = in_a_task(folder)
os.environ["RAY_worker_niceness"] = "0"
with tempfile.TemporaryDirectory(dir="/tmp") as folder:
    asked = in_a_task(folder)
print(f"niceness here {here[0]}; in a task {usual[0]}, in its child {usual[1]}; with RAY_worker_niceness=0: {asked[0]}")
same = here[0] == 0 and usual == (15, 15) and asked == (0, 0)
print("as described" if same else "the behaviour has changed")
sys.exit(not same)
PY
"$place/venv/bin/python" -W ignore "$place/try.py"
