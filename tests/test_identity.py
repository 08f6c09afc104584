"""Identity is the content: whatever is changed under the same name makes other cells, and old results stand aside."""

import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint, PathDistribution
from pathlib import Path
from typing import Any

import pytest
import yaml

from memory_bench import plugins, sources
from memory_bench.budget import load_budget
from memory_bench.cell import Cell, from_json, to_json
from memory_bench.data.library import Library
from memory_bench.errors import UserError
from memory_bench.files import artefacts, content
from memory_bench.files.content import Hashes
from memory_bench.lm_eval.finding import task_sources
from memory_bench.running.grid import Request, make_task, plan_grid, refuse_changed
from memory_bench.running.superseded import set_aside
from memory_bench.store import Store
from memory_bench.summaries import summarise
from memory_bench.zoo.named import Backbones
from memory_bench.zoo.named import content as backbone_content
from synthetic import make_cell, make_record

MODEL = """
from dataclasses import dataclass
from memory_bench.zoo.pretrain import Window
{imports}

@dataclass(frozen=True, slots=True)
class Config:
    segment: int = 8

class RMT(Window):
    "A model that nobody installed."
    Config = Config
    families = ("llama", "gpt2", "opt")
    def __init__(self, backbone, config, rng):
        super().__init__(backbone, config)

class Truncation(RMT):
    "Another."

class Passkey(RMT):
    "Called like a task."
"""
TASK = """
from memory_bench.tasks.language_modeling import PG19
{imports}

class Mine(PG19):
    "A task that nobody installed."
"""


def planned(world: Any, models: str = "truncation", tasks: str = "pg19", **more: Any) -> tuple[Cell, ...]:
    library = Library(more.pop("data", world.data), world.cache, hub=False)
    backbones = Backbones(library, world.cache, hub=False)
    request = Request(
        tuple(models.split(",")), tuple(tasks.split(",")), str(more.pop("backbone", world.backbone)),
        load_budget(str(world.budget)), (0,), controls=more.pop("controls", False), **more,
    )  # fmt: skip
    return plan_grid(request, library, backbones).cells


@pytest.fixture
def folder(world: Any, tmp_path: Path) -> Path:
    """A copy of the world's backbone with every kind of file that such a folder may have."""
    path = tmp_path / "backbone"
    shutil.copytree(world.backbone, path)
    for name in ("vocab.json", "special_tokens_map.json"):
        (path / name).write_text("{}")
    for name in ("merges.txt", "tokenizer.model", "chat_template.jinja", "pytorch_model.bin"):
        (path / name).write_text("text")
    return path


def test_every_file_of_a_backbone_counts(world: Any, folder: Path) -> None:
    """Also one byte in the middle of a large one, whatever its size and date say."""
    (folder / "pytorch_model.bin").write_bytes(bytes(9_000_000))
    before = planned(world, backbone=folder)[0]
    seen = {before.training.backbone.revision}
    for file in sorted(folder.iterdir()):
        facts, data = file.stat(), bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        revision = backbone_content(folder, Hashes(world.cache / "hashes"))
        assert revision not in seen, f"{file.name} does not count"
        seen.add(revision)
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    assert planned(world, backbone=folder) == (before,)
    copy = shutil.copytree(folder, folder.with_name("copy"))
    assert backbone_content(copy, Hashes()) == before.training.backbone.revision


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, hashes = tmp_path / "weights", Hashes(tmp_path / "hashes")
    file.write_bytes(b"one")
    first = hashes.of(file)
    assert not (tmp_path / "hashes").exists(), "it could change again within the same tick of the clock"
    later = time.time_ns() + 9_000_000_000
    monkeypatch.setattr(artefacts.time, "time_ns", lambda: later)
    assert hashes.of(file) == first
    (note,) = (tmp_path / "hashes").iterdir()
    with monkeypatch.context() as unread:
        unread.setattr(content, "sha256", lambda path: pytest.fail(f"{path} is read again"))
        assert hashes.of(file) == first
    written = note.read_text()
    for other in ("nonsense", "", "f" * 64, written[:64], f"{'f' * 64}{written[64:]}", f"{written}\n"):
        note.write_text(other)
        assert hashes.of(file) == first, "what was not written there is not used"
    (tmp_path / "other").write_bytes(b"two")
    hashes.of(tmp_path / "other")
    (foreign,) = set((tmp_path / "hashes").iterdir()) - {note}
    shutil.copy(foreign, note)
    assert hashes.of(file) == first, "another file's hash is not used"
    facts = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert hashes.of(file) == Hashes().of(file) != first


def test_data_count_by_their_content(world: Any, tmp_path: Path) -> None:
    data = shutil.copytree(world.data, tmp_path / "data")
    before = planned(world, tasks="pg19,pubmedqa", data=data)
    file = data / "pubmedqa/test_ground_truth.json"
    facts = file.stat()
    file.write_text(file.read_text().replace("yes", "Yes"))
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    after = planned(world, tasks="pg19,pubmedqa", data=data)
    assert [a.key == b.key for a, b in zip(before, after, strict=True)] == [True, False]


def write_plugin(folder: Path, text: str, helper: str) -> Path:
    """A file that imports one beside it, inside a function too, and that one another in a folder."""
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    file = folder / "mine.py"
    imports = "import sys, pathlib\nsys.path.insert(0, str(pathlib.Path(__file__).parent))\nimport beside_helper"
    file.write_text(text.format(imports=imports))
    (folder / "beside_helper.py").write_text("def later():\n    from parts import inner\n    return inner.VALUE\n")
    (folder / "parts/__init__.py").write_text("")
    (folder / "parts/inner.py").write_text(helper)
    return file


@pytest.mark.parametrize("kind", ["model", "task"])
def test_a_file_counts_with_what_it_imports_from_beside(
    kind: str, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = write_plugin(tmp_path, MODEL if kind == "model" else TASK, "VALUE = 1\n")
    (tmp_path / "unrelated.py").write_text("")
    name = {"models": f"{file}:RMT"} if kind == "model" else {"tasks": f"{file}:Mine"}
    (first,) = planned(world, **name)
    choice = first.training.model if kind == "model" else first.task
    assert len(choice.code) == 16
    assert from_json(to_json(first)) == first
    module = sys.modules[plugins.load(f"{kind}s", str(next(iter(name.values())))).__module__]
    assert module.beside_helper.later() == 1
    (tmp_path / "unrelated.py").write_text("VALUE = 3")
    assert planned(world, **name)[0].key == first.key
    (tmp_path / "parts/inner.py").write_text("VALUE = 2\n")  # of the same length, within the same second
    (other,) = planned(world, **name)
    assert other.key != first.key
    assert other.training.key != first.training.key, "a task makes training data"
    module = sys.modules[plugins.load(f"{kind}s", str(next(iter(name.values())))).__module__]
    assert module.beside_helper.later() == 2, "the new source is what runs"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """``package(distribution, version, **entries)``: an editable package `acme`, with entry points of ours."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme/__init__.py").write_text("")
    (tmp_path / "acme/model.py").write_text(MODEL.format(imports="from acme import deeper"))
    (tmp_path / "acme/tasks.py").write_text(TASK.format(imports="from . import deeper"))
    (tmp_path / "acme/deeper.py").write_text("VALUE = 1\n")
    (tmp_path / "acme/unused.py").write_text("")
    real, entries = plugins.entry_points, []
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [*real(group=group), *(e for e in entries if e.group == group)]
    )

    def make(distribution: str, version: str, kind: str = "models", **named: str) -> Path:
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        for name, value in named.items():
            plain: Any = EntryPoint(name, value, f"memory_bench.{kind}")
            entries[:] = [e for e in entries if (e.name, e.dist.name, e.group) != (name, distribution, plain.group)]
            entries.append(plain._for(PathDistribution(info)))
        importlib.invalidate_caches()
        return tmp_path / "acme"

    yield make
    for name in [n for n in sys.modules if n.partition(".")[0] == "acme"]:
        del sys.modules[name]


def test_an_installed_plug_in_counts_with_sources_package_and_version(world: Any, package: Callable[..., Path]) -> None:
    home = package("acme-memory", "1.2", mine="acme.model:RMT")
    package("acme-memory", "1.2", "tasks", books="acme.tasks:Mine")
    (first,) = planned(world, "mine", "books")
    assert (first.training.model.package, first.task.package) == ("acme-memory 1.2", "acme-memory 1.2")
    assert (first.training.model.revision, len(first.training.model.code)) == ("", 16)
    (home / "unused.py").write_text("VALUE = 3")
    assert planned(world, "mine", "books") == (first,)
    (home / "deeper.py").write_text("VALUE = 2\n")
    (second,) = planned(world, "mine", "books")
    assert second.training.model.code != first.training.model.code
    assert second.task.code != first.task.code
    assert sys.modules["acme.deeper"].VALUE == 2
    package("acme-memory", "1.3", mine="acme.model:RMT")
    (third,) = planned(world, "mine")
    assert third.training.model.package == "acme-memory 1.3"
    assert third.training.model.code == second.training.model.code
    assert third.training.key != replace(third.training, model=second.training.model).key


def test_our_own_plug_ins_have_a_version_and_no_code(world: Any) -> None:
    """Their keys are those of before there was such a thing."""
    cell = planned(world, "hmt")[0]
    assert {c.identity for c in (cell.training.model, cell.task, cell.training.corpus)} == {("", "")}
    plain = to_json(cell)
    for choice in (plain["task"], *(plain["training"][n] for n in ("model", "backbone", "corpus", "recipe"))):
        del choice["package"], choice["code"]
    assert from_json(plain).key == cell.key
    assert make_cell("rmt").key == "336bb33a7993385e"


@pytest.mark.parametrize("part", ["main.yaml", "base.yaml", "utils.py", "deep/more.py", "docs.jsonl", "shots.jsonl"])
def test_a_task_file_counts_with_all_it_is_made_of(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memory_bench.lm_eval.task import LmEvalConfig, LmEvalTask

    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "deep").mkdir()
    for name, rows in (("docs.jsonl", 3), ("shots.jsonl", 2)):
        (tmp_path / name).write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(rows)))
    files = {split: str(tmp_path / f"{name}.jsonl") for split, name in (("test", "docs"), ("train", "shots"))}
    base = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test", "fewshot_split": "train", "num_fewshot": 1, "output_type": "loglikelihood",
        "doc_to_target": " so", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "main.yaml").write_text("include: base.yaml\ntask: mine\ndoc_to_text: !function utils.text\n")
    (tmp_path / "utils.py").write_text("def text(doc):\n    from deep.more import END\n    return doc['text'] + END\n")
    (tmp_path / "deep/more.py").write_text("END = '.'\n")
    assert {"main.yaml", "base.yaml", "utils.py", "deep/more.py"} == set(task_sources(tmp_path / "main.yaml").files)

    def revision() -> str:
        task = LmEvalTask.named(str(tmp_path / "main.yaml"))(LmEvalConfig())
        return task.data(Library(None, tmp_path, hub=False)).revision

    before = revision()
    assert revision() == before
    old, new = {
        "docs.jsonl": ("docs", "book"), "shots.jsonl": ("shots", "shown"), "utils.py": ("+ END", "+ END * 2"),
        "deep/more.py": ("'.'", "'!'"), "base.yaml": (" so", " no"), "main.yaml": ("mine", "ours"),
    }[part]  # fmt: skip
    (tmp_path / part).write_text((tmp_path / part).read_text().replace(old, new))
    assert revision() != before
    for name in [n for n in sys.modules if n.partition(".")[0] == "deep"]:
        del sys.modules[name]


def test_what_changes_after_planning_fails_the_cell(world: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL.format(imports=""))
    (tmp_path / "task.py").write_text(TASK.format(imports=""))
    data = shutil.copytree(world.data, tmp_path / "data")
    (cell,) = planned(world, f"{tmp_path}/mine.py:RMT", f"{tmp_path}/task.py:Mine", backbone=folder, data=data)

    def check() -> None:
        fresh = Library(data, world.cache, hub=False)
        refuse_changed(cell, make_task(cell.task), Backbones(fresh, world.cache, hub=False).card(str(folder)), fresh)

    check()
    for file, what in (
        (tmp_path / "mine.py", "model"), (tmp_path / "task.py", "task"), (folder / "merges.txt", "backbone"),
        (data / "pg19/books_test.jsonl.gz", "data of"),
    ):  # fmt: skip
        before = file.read_bytes()
        file.write_bytes(before + b"\n")
        with pytest.raises(UserError, match=f"The files of the {what} .*have changed since the run was planned"):
            check()
        file.write_bytes(before)
    check()


def test_old_results_stand_aside_and_come_back(tmp_path: Path) -> None:
    store = Store.open_or_create(tmp_path)
    old, other = make_cell("rmt"), make_cell("hmt")
    new = replace(old, training=replace(old.training, backbone=replace(old.training.backbone, revision="new")))
    for cell in (old, other):
        store.write_record(make_record(cell, None), None)
    assert set_aside(store, [old, other]) == 0
    assert set_aside(store, [new]) == 2, "rows of one table stand on one backbone, asked for again or not"
    assert not store.records()
    assert (tmp_path / "superseded" / old.key / "record.json").is_file()
    store.write_record(make_record(new, None), None)
    assert set_aside(store, [old, other]) == 1
    assert {r.key for r in store.records()} == {old.key, other.key}


@pytest.mark.parametrize("part", ["backbone", "corpus", "model"])
@pytest.mark.parametrize("content", ["revision", "code", "version"])
def test_rows_of_another_content_stand_aside(part: str, content: str, tmp_path: Path) -> None:
    """Also those that the command did not ask for: another seed of the model, another model on the backbone."""
    store = Store.open_or_create(tmp_path)
    old = make_cell("rmt", seed=1) if part == "model" else make_cell("hmt")
    apart = make_cell("hmt", task="pubmedqa", budget="gpu-minutes")
    apart = replace(apart, training=replace(apart.training, backbone=replace(apart.training.backbone, name="other")))
    for cell in (old, apart):
        store.write_record(make_record(cell, None), None)
    asked = make_cell("rmt")
    choice = replace(getattr(asked.training, part), **{content: 9 if content == "version" else "new"})
    assert set_aside(store, [asked]) == 0
    assert set_aside(store, [replace(asked, training=replace(asked.training, **{part: choice}))]) == 1
    assert [r.key for r in store.records()] == [apart.key]


def test_the_same_folder_answers_with_new_weights(world: Any, folder: Path, invoke: Any, tmp_path: Path) -> None:
    """The kind in which it was seen: the same command, the same ``--out``, other weights."""
    from safetensors.torch import load_file, save_file

    for name in ("pytorch_model.bin", "vocab.json", "merges.txt", "tokenizer.model"):
        (folder / name).unlink()
    arguments = world.arguments("--models", "truncation", "--tasks", "pg19", "--backbone", str(folder))
    arguments = ["run", *arguments, "--no-controls", "--seeds", "1", "--out", str(tmp_path / "out")]
    found, said = [], []
    first = load_file(folder / "model.safetensors")
    second = {k: v * 3 if k.endswith("1.mlp.up_proj.weight") else v for k, v in first.items()}
    for weights in (first, second, first):
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        code, _, err = invoke(*arguments)
        assert code == 0
        (record,) = [json.loads(p.read_text()) for p in (tmp_path / "out/cells").glob("*/record.json")]
        found.append(next(m["value"] for m in record["metrics"] if m["metric"] == "nll"))
        said.append("1 results are set aside" in err)
    assert found[0] == found[2] != found[1]
    assert said == [False, True, True]


def test_a_program_that_puts_names_together_is_read_as_far_as_it_can_be(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import importlib\nimportlib.import_module('b')\nimport numpy, json, torch.nn\n")
    (tmp_path / "b.py").write_text("from . import c\nimport a")
    (tmp_path / "c.py").write_text("def (")
    assert sorted(sources.of_file(tmp_path / "a.py").files) == ["a.py", "b.py", "c.py"]


def test_a_file_counts_with_libraries_that_are_not_installed(package: Callable[..., Path], tmp_path: Path) -> None:
    """As an editable installation is, or a folder on PYTHONPATH."""
    home = package("acme-memory", "1.2")
    (tmp_path / "elsewhere").mkdir()
    file = tmp_path / "elsewhere/mine.py"
    file.write_text("import numpy, pytest, yaml, torch.nn\nfrom acme import deeper\n")
    found = sources.of_file(file)
    before = found.revision
    assert sorted(found.files) == ["acme", "acme.deeper", "mine.py"]
    (home / "deeper.py").write_text("VALUE = 2\n")
    assert sources.of_file(file).revision != before


def labels(cells: tuple[Cell, ...]) -> list[str]:
    return [cell.label for cell in cells]


def test_labels_are_unique(world: Any, tmp_path: Path) -> None:
    for name in ("a", "b", "x/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(MODEL.format(imports="").replace("Truncation", "Fresh"))
    a, b, c = (f"{tmp_path}/{name}.py" for name in ("a", "b", "x/a"))
    assert labels(planned(world, f"{a}:RMT,{b}:RMT,rmt")) == ["rmt@a", "rmt@b", "rmt"]
    assert labels(planned(world, f"{a}:Fresh")) == ["fresh"]
    assert labels(planned(world, f"{a}:Fresh,{b}:Fresh[segment=4]")) == ["fresh@a", "fresh@b[segment=4]"]
    assert labels(planned(world, f"{a}:Fresh,{a}:Fresh")) == ["fresh"]
    assert labels(planned(world, f"{a}:Passkey")) == ["passkey@a"]
    with pytest.raises(UserError, match="would both be called fresh@a: give a file or class another name"):
        planned(world, f"{a}:Fresh,{c}:Fresh")
    cells = planned(world, f"{a}:RMT,{b}:RMT", settings={"rmt@b": {"segment": 4}})
    assert [cell.training.model.config["segment"] for cell in cells] == [16, 4]
    with pytest.raises(UserError, match="'rmt' is no model or task of this run"):
        planned(world, f"{a}:RMT,{b}:RMT", settings={"rmt": {"segment": 4}})


def test_a_control_is_the_shipped_one(world: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL.format(imports=""))
    cells = planned(world, f"{tmp_path}/mine.py:Truncation", controls=True, settings={"truncation": {"segment": 4}})
    found = {cell.label: (cell.training.model.name, cell.training.model.config["segment"], cell.role) for cell in cells}
    assert found["truncation@mine"] == (f"{tmp_path}/mine.py:Truncation", 16, "asked")
    assert found["truncation"] == ("truncation", 4, "control")


def test_a_second_package_takes_no_name(world: Any, package: Callable[..., Path], tmp_path: Path) -> None:
    package("acme-memory", "1.2", truncation="acme.model:Truncation", fresh="acme.model:RMT")
    package("other", "1", fresh="acme.model:Truncation", passkey="acme.model:RMT")
    known = plugins.installed("models")
    assert known["truncation"].value == "memory_bench.baselines.truncation:Truncation"
    assert {"truncation@acme-memory", "fresh@acme-memory", "fresh@other"} <= set(known)
    assert "fresh" not in known
    assert summarise(known["fresh@other"], "fresh@other").name == "fresh@other"
    with pytest.raises(UserError, match="Unknown model 'fresh'"):
        planned(world, "fresh")
    cells = planned(world, "truncation@acme-memory,fresh@other", settings={"truncation@acme-memory": {"segment": 4}},
                    controls=True)  # fmt: skip
    found = {cell.label: (cell.training.model.package, cell.training.model.config["segment"]) for cell in cells}
    assert found["truncation@acme-memory"] == ("acme-memory 1.2", 4)
    assert found["truncation"] == ("", 16)
    assert found["fresh@other"][0] == "other 1"
    (tmp_path / "other.py").write_text(MODEL.format(imports="").replace("Truncation", "Fresh"))
    with pytest.raises(UserError, match="would both be called fresh@other"):
        planned(world, f"{tmp_path}/other.py:Fresh,fresh@other")
    with pytest.raises(UserError, match="'passkey' is a model and also a task or the backbone"):
        planned(world, "passkey", "passkey", settings={"passkey": {"segment": 4}})


def test_what_is_no_model_or_task_is_refused(world: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    others = "from pathlib import Path\nimport torch as t\nfrom memory_bench.protocol import MemoryModel as Base"
    file.write_text(MODEL.format(imports=others))
    for name, said in (
        ("Base", "it has no Config, open, step, flops"),
        ("Path", "it has no Config, fit"),
        ("t", "it is no class"),
    ):
        with pytest.raises(UserError, match=rf"mine\.py:{name} is no model: {said}"):
            planned(world, f"{file}:{name}")
    with pytest.raises(UserError, match=r"mine\.py:RMT is no task: it has no headline"):
        planned(world, "truncation", f"{file}:RMT")


def test_one_label_never_stands_for_two_rows(world: Any) -> None:
    with pytest.raises(UserError, match=r"hmt\[recall=false\] would stand for two rows"):
        planned(world, "hmt[recall=false],hmt[recall='false']")
