"""lm-eval's documents as our episodes.

- ``loglikelihood_rolling``: the text is read and scored whole, behind a line break, so that each of its tokens counts.
- The others: the context goes through memory, then lm-eval's continuations are the choices of a question
  (``multiple_choice``), or the answer is written greedily (``loglikelihood``, as long as the right one, which tells
  whether it is lm-eval's greedy hit; ``generate_until``, as long as the task says).
- What the task's own judgement needs (the document, which request a choice answers) travels in a question's label, so
  metrics can be computed again from the samples alone.
"""

import datetime
import json
import re
from collections.abc import Iterator
from typing import Any

from memory_bench.episode import Ask, Episode, Read
from memory_bench.errors import UserError
from memory_bench.files.inputs import Place, shown

FEWSHOT_SEED = 1234  # lm-eval's own default
CONTEXT = "context"
MOST_TOKENS = 256  # lm-eval's own default of max_gen_toks
KINDS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
ROLLING = ("bits_per_byte", "byte_perplexity", "word_perplexity")


def episodes(task: Any, *, limit: int | None, question: str = "", max_tokens: int = 0) -> Iterator[Episode]:
    """The episodes of an lm-eval task's test documents.

    Args:
        task: a `ConfigurableTask`.
        limit: documents.
        question: text at which a context's question begins: from its last occurrence on it is the prompt.
        max_tokens: to generate, instead of the task's own number.

    Raises:
        UserError: a kind of task that cannot be asked here.
        DataError: a document holds what lm-eval would read as something else.
    """
    if task.OUTPUT_TYPE not in KINDS or getattr(task, "MULTIMODAL", False) or getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"lm-eval task {task.task_name} cannot be asked here: only text is, of the kinds {', '.join(KINDS)}."
        )
    task.set_fewshot_seed(FEWSHOT_SEED)
    shots = task.config.num_fewshot or 0
    for number, doc in task.doc_iterator(limit=limit):
        if problem := _misread(task, doc):
            raise Place(f"lm-eval task {task.task_name}", f"document {number}").fault(problem)
        context = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
        made = task.construct_requests(doc=doc, ctx=context, metadata=(task.task_name, number, 1))
        requests = made if isinstance(made, list) else [made]
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            yield _text(task, number, doc, requests[0].args[0])
        else:
            yield from _questions(task, number, doc, requests, question, max_tokens)


FIELD = re.compile(r"{{-?\s*(\w+)\s*-?}}")


def _misread(task: Any, doc: Any) -> str:
    """What lm-eval would read as something else: null as the word None, a text as its letters, a date with a time."""
    for template in (task.config.doc_to_text, task.config.doc_to_target):
        plain = isinstance(template, str) and "{%" not in template  # others may ask whether a field is null
        for name in [template, *FIELD.findall(template)] if plain and isinstance(doc, dict) else ():
            value = doc.get(name, "")
            if value is None or (isinstance(value, list) and None in value):
                return f"'{name}' is null, which would be read as the word None"
            if isinstance(value, datetime.datetime):  # `datasets` makes them of texts like 1969-07-20
                return f"'{name}' is no text but a time, which would be read as '{value}'"
    if task.OUTPUT_TYPE == "multiple_choice":
        choices = task.doc_to_choice(doc)
        if choices is None or isinstance(choices, str):
            return f"its choices must be a list, not {shown(choices)}"
        if any(choice is None for choice in choices):
            return "a choice is null, which would be read as the word None"
    return ""


def _text(task: Any, number: int, doc: Any, text: str) -> Episode:
    """A scored text; what its log-likelihood is divided by, metric for metric, is in the id."""
    items = task.process_results(doc, [-1.0])
    if not items or not all(name in ROLLING and isinstance(item, tuple) for name, item in items.items()):
        known = ", ".join(ROLLING)
        raise UserError(f"lm-eval task {task.task_name} judges texts by {', '.join(items)}; here only by {known}.")
    sizes = json.dumps({name: item[1] for name, item in items.items()})
    return Episode(f"{number} {sizes}", (Read("\n"), Read(text, scored=True, tag="text", anew=True)), str(number))


def _questions(
    task: Any, number: int, doc: Any, requests: list[Any], question: str, max_tokens: int
) -> Iterator[Episode]:
    """One episode for every context of a document; mostly there is one."""
    by_context: dict[str, list[tuple[int, Any]]] = {}
    for request in requests:
        by_context.setdefault(request.args[0], []).append((request.idx, request.args[1]))
    right = _right(task, doc)
    generates = task.OUTPUT_TYPE == "generate_until"
    for n, (context, asked) in enumerate(by_context.items()):
        read, prompt = _split(context if generates else context.rstrip(), question)
        evidence = CONTEXT if read else ""
        label = {"doc": number, "fields": doc}
        if generates:
            ask = _generated(task, prompt, evidence, asked[0], label, max_tokens)
        else:
            # As lm-eval cuts them: blanks that end a context belong to what follows.
            blanks = context[len(context.rstrip()) :]
            continuations = [(idx, blanks + text) for idx, text in asked]
            ask = _scored(task.OUTPUT_TYPE, prompt, evidence, continuations, label, right)
        reads = (Read(read, tag=CONTEXT),) if read else ()
        yield Episode(str(number) if not n else f"{number}.{n}", (*reads, ask), str(number), begun=True)


def _split(context: str, question: str) -> tuple[str, str]:
    """What is read, and what is asked; never nothing of both."""
    at = context.rfind(question) if question else -1
    read, prompt = (context, "") if at < 0 else (context[:at], context[at:])
    return read, prompt or ("" if read else "\n")


def _scored(
    kind: str, prompt: str, evidence: str, asked: list[tuple[int, str]], label: dict[str, Any], right: int
) -> Ask:
    texts: dict[str, list[int]] = {}
    for idx, continuation in asked:
        texts.setdefault(continuation, []).append(idx)
    choices = list(texts)
    gold = next((n for n, places in enumerate(texts.values()) if right in places), 0)
    told = _json({**label, "asked": list(texts.values()), "right": gold})
    if kind == "loglikelihood":
        return Ask(prompt, (), choices[0], evidence, told, max_tokens=1)
    return Ask(prompt, tuple(choices), choices[gold], evidence, told)


def _generated(
    task: Any, prompt: str, evidence: str, asked: tuple[int, dict[str, Any]], label: dict[str, Any], max_tokens: int
) -> Ask:
    idx, how = asked
    if how.get("do_sample") and float(how.get("temperature", 1.0)) > 0:
        raise UserError(f"lm-eval task {task.task_name} samples its answers; here they are written greedily.")
    until = how.get("until") or []
    own = next((how[n] for n in ("max_gen_toks", "max_new_tokens", "max_tokens") if how.get(n)), MOST_TOKENS)
    target = task.doc_to_target(label["fields"])
    answers = [str(t) for t in (target if isinstance(target, list) and target else [target])]
    answer = answers[0] if answers[0][:1].isspace() else f" {answers[0]}"
    told = _json({**label, "asked": [[idx]], "right": 0, "until": [until] if isinstance(until, str) else list(until)})
    return Ask(prompt, (), answer if answer.strip() else " -", evidence, told, max_tokens or int(own), tuple(answers))


def _right(task: Any, doc: Any) -> int:
    """Index of the right request of a document with choices; the first of several, 0 where there is none."""
    if task.OUTPUT_TYPE != "multiple_choice":
        return 0
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    gold = gold[0] if isinstance(gold, list) and gold else gold
    if isinstance(gold, str):
        choices = task.doc_to_choice(doc)
        return choices.index(gold) if gold in choices else 0
    return int(gold) if isinstance(gold, int) else 0


def _json(label: dict[str, Any]) -> str:
    return json.dumps(label, ensure_ascii=False, default=str)
