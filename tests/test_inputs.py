"""Inputs of users: what does not fit is one sentence with its place, and nothing is read as something else."""

import gzip
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from memory_bench.budget import load_budget
from memory_bench.data import Library, Passage
from memory_bench.data.folder import FILES, FolderData
from memory_bench.errors import UserError
from memory_bench.gate.reference import read_reference
from memory_bench.parity.cases import Case
from memory_bench.published import reported
from memory_bench.published.claims import claims_file, read_claims
from memory_bench.running.options import Options, with_suite
from memory_bench.shipped import results_folder

SHIPPED = Path(__file__).parents[1] / "results/reference/smoke-cpu.jsonl"
BOOK = {"pg_id": 7, "title": "T", "author": "", "text": "a book"}
STUDY = {"QUESTION": "Q?", "CONTEXTS": ["one", "two"], "final_decision": "no", "LONG_ANSWER": "L"}
QA = {"id": "q1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 3}]}
NQ = {"question": "who", "answers": ["Paris"], "ctxs": [{"title": "T", "text": "It is Paris."}]}
BABI = "1 Mary went home.\n2 John went out.\n3 Where is Mary?\thome\t1\n"
MARKS = ("\u2028", "\u2029", "\x85", "\x1c", "\x0b", "\x0c", "\ufeff", "\u200b")


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def squad_file(context: str = "by Ada", **changes: Any) -> str:
    paragraph = {"context": context, "qas": [{**QA, **changes}]}
    return json.dumps({"version": "1.1", "data": [{"title": "T", "paragraphs": [paragraph]}]})


Reader = tuple[str, str, Callable[[FolderData], Any]]
BOOKS: Reader = ("books", "test", lambda d: d.books("test"))
WIKI: Reader = ("wikitext103", "test", lambda d: d.wikitext("test"))
STUDIES: Reader = ("pubmedqa", "studies", lambda d: d.pubmedqa("train"))
TRUTH: Reader = ("pubmedqa", "test ids", lambda d: d.pubmedqa("test"))
SQUAD: Reader = ("squad", "test", lambda d: d.passages("squad", "test"))
ROWS: Reader = ("squad", "train", lambda d: d.passages("squad", "train"))
NQ_FILE: Reader = ("nq", "test", lambda d: d.passages("nq", "test"))
STORIES: Reader = ("babi", "1", lambda d: d.babi(1))


def put(folder: Path, reader: Reader, content: str | bytes) -> Path:
    """A file of the data folder; studies and their answers are always together."""
    if reader is STUDIES:
        write(folder / FILES["pubmedqa"]["test ids"], b"{}")
    if reader is TRUTH:
        write(folder / FILES["pubmedqa"]["studies"], json.dumps({"1": STUDY, "2": STUDY}).encode())
    return write(folder / FILES[reader[0]][reader[1]], content if isinstance(content, bytes) else content.encode())


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(folder: Path, reader: Reader, content: str | bytes) -> Any:
    put(folder, reader, content)
    return reader[2](FolderData(folder))


def refusal(folder: Path, reader: Reader, content: str | bytes) -> str:
    """The sentence, which names the file."""
    with pytest.raises(UserError) as caught:
        read(folder, reader, content)
    said = str(caught.value)
    assert said.startswith(str(folder / FILES[reader[0]][reader[1]]))
    assert said.isprintable()
    assert said.endswith(".")
    return said.removeprefix(str(folder / FILES[reader[0]][reader[1]])).lstrip(",: ")


# what is valid is read as it stands


@pytest.mark.parametrize("mark", [m for m in MARKS if m > "\x1f"], ids=ascii)
def test_only_a_line_feed_ends_a_record(mark: str, tmp_path: Path) -> None:
    text = f"Here{mark}is Paris."
    assert [d.text for d in read(tmp_path, BOOKS, lines({**BOOK, "text": text}, {**BOOK, "pg_id": 8}))] == [
        text,
        "a book",
    ]
    assert [p.text for p in read(tmp_path, ROWS, lines({"context": text}, {"context": "b"}))] == [text, "b"]
    found = read(tmp_path, NQ_FILE, lines({**NQ, "ctxs": [{"title": "T", "text": text}]}, NQ))
    assert [p.text for p in found] == [text, "It is Paris."]
    (story,) = read(tmp_path, STORIES, BABI.replace("went home", f"went{mark}home"))
    assert story.facts == (f"Mary went{mark}home.", "John went out.")
    wiki = f" \n = A = \n \n one{mark}two \n"
    assert f"\n one{mark}two \n" in read(tmp_path, WIKI, wiki)[0].text


@pytest.mark.parametrize("mark", MARKS, ids=ascii)
def test_escaped_characters_are_read(mark: str, tmp_path: Path) -> None:
    text = f"Here{mark}is Paris."
    assert read(tmp_path, BOOKS, json.dumps({**BOOK, "text": text}))[0].text == text


def test_carriage_returns_blank_lines_and_a_byte_order_mark_are_no_content(tmp_path: Path) -> None:
    for reader, content in (
        (BOOKS, lines(BOOK, {**BOOK, "pg_id": 8})),
        (ROWS, lines({"context": "a"}, {"context": "b"})),
        (NQ_FILE, lines(NQ, NQ)),
        (STORIES, BABI * 2),
        (SQUAD, squad_file()),
        (STUDIES, json.dumps({"1": STUDY}, indent=1)),
        (WIKI, " = A = \n \n one \n"),
    ):
        plain = read(tmp_path, reader, content)
        assert plain
        dressed = "\ufeff" + content.replace("\n", "\r\n") + ("\r\n \t\r\n" if reader is not SQUAD else "")
        assert read(tmp_path, reader, dressed) == plain
        if reader in (BOOKS, ROWS, NQ_FILE, STORIES):
            assert read(tmp_path, reader, content.replace("\n", "\n\n")) == plain


def test_ids_are_numbers_or_texts_and_other_fields_may_be_anything(tmp_path: Path) -> None:
    big = 2**63 + 1
    rows = ({**BOOK, "pg_id": big, "more": None}, {**BOOK, "pg_id": "b", "more": [1, {"text": None}]})
    assert [d.id for d in read(tmp_path, BOOKS, lines(*rows))] == [str(big), "b"]
    (passage,) = read(tmp_path, SQUAD, squad_file(id=5, more=None))
    assert passage == Passage("5", "T", "by Ada", "Who?", ("Ada",))
    (book,) = read(tmp_path, BOOKS, lines({**BOOK, "text": "  spaced\n"}))
    assert (book.text, book.meta) == ("  spaced\n", {"title": "T", "author": ""})


# what is not


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": None}, "line 2: 'text' must be text, not null."),
        ({"text": 5}, "line 2: 'text' must be text, not 5."),
        ({"text": ["a"]}, "line 2: 'text' must be text, not a list."),
        ({"text": ""}, "line 2: 'text' is empty."),
        ({"text": " \n"}, "line 2: 'text' is empty."),
        ({"title": None}, "line 2: 'title' must be text, not null."),
        ({"pg_id": None}, "line 2: 'pg_id' must be a number or a text, not null."),
        ({"pg_id": True}, "line 2: 'pg_id' must be a number or a text, not true."),
        ({"pg_id": 1.5}, "line 2: 'pg_id' must be a number or a text, not 1.5."),
        ({"pg_id": ""}, "line 2: 'pg_id' is empty."),
        ({"pg_id": "7"}, 'line 2: has the id "7" of line 1 again.'),
    ],
)
def test_a_book_is_a_text(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, BOOKS, lines(BOOK, {**BOOK, "pg_id": 8, **changes})) == said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"pg_id": 8, "title": "", "author": ""}', "line 3: lacks 'text'."),
        ('{"text": "a", "text": "b"}', 'line 3: an object has the key "text" twice.'),
        ('{"text": "a", "more": NaN}', "line 3: NaN is no number in JSON."),
        ('{"text": "a", "more": [-Infinity]}', "line 3: -Infinity is no number in JSON."),
        ('{"pg_id": 8, "title": "", "author": "", "text": "a \\ud83d b"}',
         "line 3: 'text' holds half of a character (\\ud83d alone)."),
        ("[1]", "line 3: must be an object, not a list."),
        ("null", "line 3: must be an object, not null."),
        ('"text"', 'line 3: must be an object, not "text".'),
        ("{'text': 1}", "line 3: no JSON (Expecting property name enclosed in double quotes at character 2)."),
        ('{"text": "a', "line 3: no JSON (Unterminated string starting at at character 10)."),
        ("{} {}", "line 3: no JSON (Extra data at character 4)."),
        ("[" * 99999, "line 3: maximum recursion depth exceeded while decoding a JSON array from a unicode string."),
    ],
)  # fmt: skip
def test_a_line_is_an_object(line: str, said: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, BOOKS, f"{lines(BOOK)}\n{line}\n") == said


def test_other_encodings_are_named(tmp_path: Path) -> None:
    latin = lines(BOOK, {**BOOK, "text": "caf\xe9"}).encode("latin-1")
    assert refusal(tmp_path, BOOKS, latin) == "line 2: not UTF-8 (byte 0xe9)."
    for reader in (BOOKS, WIKI, STORIES, SQUAD, STUDIES, TRUTH, ROWS, NQ_FILE):
        assert refusal(tmp_path, reader, "{}\n\n".encode("utf-16")) == "line 1: not UTF-8 (byte 0xff)."


def test_files_that_are_empty_or_cut_off_are_named(tmp_path: Path) -> None:
    for reader in (BOOKS, WIKI, STORIES, ROWS, NQ_FILE):
        for content in ("", "\n \n", "\ufeff"):
            assert refusal(tmp_path, reader, content) == "holds nothing that could be used."
        path = put(tmp_path, reader, "x" * 9999)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(UserError, match=f"^Cannot read {re.escape(str(path))}: .*ended before"):
            reader[2](FolderData(tmp_path))
    for reader in (SQUAD, STUDIES, TRUTH):
        assert refusal(tmp_path, reader, "") == "line 1: no JSON (Expecting value at character 1)."
        assert refusal(tmp_path, reader, '{\n"a": 1,\n}').startswith("line 3: no JSON")
        assert refusal(tmp_path, reader, "[]") == "must be an object, not a list."


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"CONTEXTS": "Paris"}, "study 2: 'CONTEXTS' must be a list, not \"Paris\"."),
        ({"CONTEXTS": []}, "study 2: 'CONTEXTS' is empty."),
        ({"CONTEXTS": ["a", None]}, "study 2: 'CONTEXTS[1]' must be text, not null."),
        ({"CONTEXTS": {"a": "b"}}, "study 2: 'CONTEXTS' must be a list, not an object."),
        ({"QUESTION": None}, "study 2: 'QUESTION' must be text, not null."),
        ({"LONG_ANSWER": None}, "study 2: 'LONG_ANSWER' must be text, not null."),
        ({"final_decision": "perhaps"}, "study 2: 'final_decision' must be 'yes', 'no' or 'maybe', not \"perhaps\"."),
        ({"final_decision": "Yes"}, "study 2: 'final_decision' must be 'yes', 'no' or 'maybe', not \"Yes\"."),
        ({"final_decision": True}, "study 2: 'final_decision' must be 'yes', 'no' or 'maybe', not true."),
    ],
)
def test_a_study_has_contexts_and_a_decision(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, STUDIES, json.dumps({"1": STUDY, "2": {**STUDY, **changes}})) == said


def test_studies_are_an_object_of_objects(tmp_path: Path) -> None:
    one = json.dumps(STUDY)
    assert refusal(tmp_path, STUDIES, f'{{"1": {one}, "1": {one}}}') == 'an object has the key "1" twice.'
    assert refusal(tmp_path, STUDIES, '{"1": "yes"}') == 'study 1: must be an object, not "yes".'


def test_the_answers_of_the_test_split_are_those_of_its_studies(tmp_path: Path) -> None:
    studies = tmp_path / FILES["pubmedqa"]["studies"]
    assert [s.id for s in read(tmp_path, TRUTH, '{"2": "no"}')] == ["2"]
    for content, said in (
        ('{"2": "yes"}', f'study 2: the answer is "yes" here and "no" in {studies}.'),
        ('{"3": "no"}', f"study 3: {studies} has no such study."),
        ('{"2": 1}', "study 2: 'answer' must be 'yes', 'no' or 'maybe', not 1."),
        ('{"2": "no", "2": "yes"}', 'an object has the key "2" twice.'),
    ):
        assert refusal(tmp_path, TRUTH, content) == said
        with pytest.raises(UserError, match=re.escape(said)):
            FolderData(tmp_path).pubmedqa("train")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answers": "Ada"}, "'data[0].paragraphs[0].qas[0].answers' must be a list, not \"Ada\"."),
        ({"answers": ["Ada"]}, "'data[0].paragraphs[0].qas[0].answers[0]' must be an object, not \"Ada\"."),
        ({"answers": [{"text": 3}]}, "'data[0].paragraphs[0].qas[0].answers[0].text' must be text, not 3."),
        ({"id": None}, "'data[0].paragraphs[0].qas[0].id' must be a number or a text, not null."),
        ({"is_impossible": 0}, "'data[0].paragraphs[0].qas[0].is_impossible' must be true or false, not 0."),
        ({"answers": [{"text": "Ada", "answer_start": 2}]},
         'question q1: the answer "Ada" does not stand at character 2 in the context.'),
        ({"answers": [{"text": "Ada", "answer_start": -3}]},
         'question q1: the answer "Ada" does not stand at character -3 in the context.'),
        ({"answers": [{"text": "Bob"}]}, 'question q1: the answer "Bob" does not stand in the context.'),
        ({"answers": []}, "question q1: it has no answer and is not impossible."),
        ({"is_impossible": True}, "question q1: it has answers and is marked impossible."),
    ],
)  # fmt: skip
def test_an_answer_of_squad_stands_in_its_context(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, SQUAD, squad_file(**changes)) == said


def test_offsets_count_characters_and_questions_are_there_once(tmp_path: Path) -> None:
    answer = {"answers": [{"text": "Ada", "answer_start": 5}]}
    assert read(tmp_path, SQUAD, squad_file("\U0001f600é by Ada"[:2] + "by Ada", **answer))[0].answers == ("Ada",)
    whole = json.loads(squad_file())
    whole["data"].append(whole["data"][0])
    said = refusal(tmp_path, SQUAD, json.dumps(whole))
    assert said == 'question q1: has the id "q1" of question q1 again.'


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answers": "Paris"}, "line 2: 'answers' must be a list, not \"Paris\"."),
        ({"answers": [1969]}, "line 2: 'answers[0]' must be text, not 1969."),
        ({"answers": []}, "line 2: 'answers' is empty."),
        ({"answers": [""]}, "line 2: 'answers[0]' is empty."),
        ({"question": None}, "line 2: 'question' must be text, not null."),
        ({"ctxs": {"title": "T", "text": "Paris"}}, "line 2: 'ctxs' must be a list, not an object."),
        ({"ctxs": []}, "line 2: 'ctxs' is empty."),
        ({"ctxs": [{"title": "T"}]}, "line 2: 'ctxs[0]' lacks 'text'."),
        ({"ctxs": [{"title": "T", "text": None}]}, "line 2: 'ctxs[0].text' must be text, not null."),
    ],
)
def test_answers_of_nq_are_a_list_of_texts(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, NQ_FILE, lines(NQ, {**NQ, **changes})) == said


def test_passages_of_flattened_squad_are_texts(tmp_path: Path) -> None:
    for value, said in ((None, "must be text, not null."), ("", "is empty."), (["a"], "must be text, not a list.")):
        assert refusal(tmp_path, ROWS, lines({"context": "a"}, {"context": value})) == f"line 2: 'context' {said}"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("1 Mary", "Mary", 'line 1: no line of bAbI ("Mary went home.").'),
        ("1 Mary went home.\n", "", "line 1: it has the number 2 and follows no other line of a story."),
        ("2 John went out.\n", "", "line 2: it has the number 3 and follows 1."),
        ("\t1", "\t9", "line 3: it names line 9, which is no fact of its story before it."),
        ("\t1", "\t3", "line 3: it names line 3, which is no fact of its story before it."),
        ("\t1", "\t", 'line 3: no line of bAbI ("3 Where is Mary?\\thome\\t").'),
        ("\thome\t1", "  home  1", "line 3: it is a question without an answer and its support behind tabs."),
        ("home\t1", "\t1", "line 3: its question or its answer is empty."),
        (".\n2", ".\r2", 'line 1: no line of bAbI ("1 Mary went home.\\r2 John went out.").'),
        ("1\n", "1\t4\n", 'line 3: no line of bAbI ("3 Where is Mary?\\thome\\t1\\t4").'),
    ],
)
def test_lines_of_babi_follow_one_another(old: str, new: str, said: str, tmp_path: Path) -> None:
    assert old in BABI
    assert refusal(tmp_path, STORIES, BABI.replace(old, new)) == said


def test_wikitext_begins_with_a_title(tmp_path: Path) -> None:
    said = "line 2: text before the first title (' = Title = ')."
    for content in (" \n the end of an article \n \n = A = \n \n one \n", " \n no titles \n"):
        assert refusal(tmp_path, WIKI, content) == said


def test_a_run_says_it_before_anything_is_made(tmp_path: Path) -> None:
    put(tmp_path, STUDIES, json.dumps({"1": {**STUDY, "CONTEXTS": "one"}}))
    with pytest.raises(UserError, match="study 1: 'CONTEXTS' must be a list"):
        Library(tmp_path, tmp_path / "cache", hub=False).prepare("pubmedqa")


# other files of users


def test_lines_of_a_reference_end_with_line_feeds(tmp_path: Path) -> None:
    first, *rest = SHIPPED.read_text(encoding="utf-8").split("\n")
    odd = json.dumps({**json.loads(first), "model": "a\u2028b\x85c"}, ensure_ascii=False)
    path = tmp_path / "r.jsonl"
    path.write_bytes(("\ufeff" + "\r\n".join([odd, "", *rest])).encode())
    shipped = read_reference(SHIPPED)
    assert [line.model for line in read_reference(path)] == ["a\u2028b\x85c", *(line.model for line in shipped[1:])]
    path.write_text(f"{first}\n\n{first}\n")
    with pytest.raises(
        UserError, match=r"Cannot use line 3 of the reference .*r\.jsonl: accuracy of hmt .*is there twice"
    ):
        read_reference(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('evidence = ["hmt.abstract"]', 'evidence = "hmt.abstract"', "claim 2: 'evidence' must be a list, not"),
        ("seeds = 5", 'seeds = "5"', "setup: 'seeds' must be a whole number, not \"5\""),
        ("seeds = 5", "seeds = true", "setup: 'seeds' must be a whole number, not true"),
        ("low = 0.005", "low = 2026-01-01", "claim 2: Object of type date is not JSON serializable"),
        ("low = 0.005", "low = nan", "claim 2: Out of range float values are not JSON compliant"),
        ('id = "C2"', 'id = "C1"', 'claim C1: has the id "C1" of claim C1 again'),
        ('id = "C2"', "id = 2", "claim 2: 'id' must be text, not 2"),
        ("[setup]", "[set-up]", "there is no table 'setup'"),
        ('kind = "lower", ', "", "claim 1: lacks 'kind'"),
    ],
)
def test_a_claim_has_the_types_of_its_fields(old: str, new: str, said: str, tmp_path: Path) -> None:
    text = claims_file().read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "claims.toml"
    path.write_text(text.replace(old, new, 1) if new != "[set-up]" else text.replace("[setup", "[set-up"))
    with pytest.raises(UserError, match=re.escape(f"{path}") + ".*" + re.escape(said)):
        read_claims(path)


def test_published_numbers_name_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = results_folder() / "reported"
    folder = tmp_path / "reported"
    folder.mkdir()
    monkeypatch.setattr(reported, "results_folder", lambda: tmp_path)
    (folder / "registry.toml").write_text((shipped / "registry.toml").read_text(encoding="utf-8"), encoding="utf-8")
    head, first, second, *_ = (shipped / "rmt.csv").read_text(encoding="utf-8").split("\n")
    for content, said in (
        ([head, first, second.replace("29.63", "nan")], "line 3: no published number (ValueError: value = nan is not"),
        ([head, first, second.replace("29.63", "29,63")], "line 3: it has not the 27 columns of the first line"),
        ([head, first, second.replace(",,verified", ",perhaps,verified")], "line 3: no published number (KeyError"),
        ([head, first, second.replace("verified", "sure")], "line 3: no published number (ValueError: sure, printed)"),
        ([head, first, first], "line 3: the id 'rmt.table-5"),
        ([head, first, second[:-1]], "line 3: it has not the 27 columns of the first line"),
        (
            [head.replace("value", "number"), first],
            "line 2: no published number (ValueError: the columns differ by number, value)",
        ),
    ):
        (folder / "rmt.csv").write_text("\n".join(content) + "\n", encoding="utf-8")
        with pytest.raises(UserError, match=re.escape(f"rmt.csv, {said}")):
            reported.load.__wrapped__()
    (folder / "rmt.csv").write_bytes(("\ufeff" + "\r\n".join([head, first, second, ""])).encode())
    assert [r.value for r in reported.load.__wrapped__()] == [29.95, 29.63]


def options(suite: Path) -> Options:
    empty: Any = dict.fromkeys(Options.__dataclass_fields__, "")
    return Options(**{**empty, "suite": str(suite), "settings": ()})


def test_a_suite_says_what_the_command_line_would(tmp_path: Path) -> None:
    suite = tmp_path / "s.toml"
    suite.write_text('models = ["hmt", "rmt"]\nseeds = [7]\nlimit = 3\n[set]\n"lm-eval:x.question" = "\U0001f600é"\n')
    found = with_suite(options(suite))
    assert (found.models, found.seeds, found.limit) == ("hmt,rmt", "7,", "3")
    assert found.settings == ('lm-eval:x.question="\U0001f600é"',)
    assert asdict(found)["budget"] == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("models = 5", "models must be a text, not 5"),
        ("models = [1]", "models must be a text, not 1"),
        ("seeds = true", "seeds must be a whole number or a text, not True"),
        ("seeds = 2.5", "seeds must be a whole number or a text, not 2.5"),
        ("limit = [1, 2]", "limit must be a whole number or a text, not [1, 2]"),
        ('set = "hmt.segment=1"', "set must be a table of options"),
        ('[set]\n"hmt.segment" = 2026-01-01', "hmt.segment = 2026-01-01 is no value of an option"),
        ('[set]\n"hmt.segment" = inf', "hmt.segment = inf is no value of an option"),
        ("[tasks]\na = 1", "tasks must be a text, not {'a': 1}"),
    ],
)
def test_a_suite_has_texts_and_counts(content: str, said: str, tmp_path: Path) -> None:
    suite = tmp_path / "s.toml"
    suite.write_text(content)
    with pytest.raises(UserError, match=re.escape(f"Suite {suite}: {said}")):
        with_suite(options(suite))


def test_a_budget_counts_in_whole_numbers(tmp_path: Path) -> None:
    path = tmp_path / "b.toml"
    for content, said in (
        ("seeds = 2.5", "seeds must be a whole number, not 2.5"),
        ("train_tokens = 10.5", "train_tokens must be a whole number, not 10.5"),
        ("name = 3", "name must be a text, not 3"),
        ("seeds = true", "seeds must be a number, not True"),
    ):
        path.write_text(content)
        with pytest.raises(UserError, match=re.escape(f"Budget file {path}: {said}")):
            load_budget(str(path))
    path.write_text("seeds = 2.0\ntrain_tokens = 1e6\ntrain_seconds = 0.5")
    found = load_budget(str(path))
    assert list(range(found.seeds)) == [0, 1]
    assert (found.train_tokens, found.train_seconds, found.name) == (1e6, 0.5, "b")


def test_a_reference_case_says_each_thing_once(tmp_path: Path) -> None:
    for content, said in (('{"a": 1, "a": 2}', "twice"), ("[]", "must be an object"), ('{"a": NaN}', "NaN is")):
        (tmp_path / "case.json").write_text(content)
        with pytest.raises(UserError, match=f"is no reference case: cannot read case.json .*{said}"):
            _ = Case(tmp_path).info
