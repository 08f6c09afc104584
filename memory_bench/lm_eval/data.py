"""Our tasks as documents for lm-eval: what is read as context, what is asked as question.

The YAML files beside the tasks name `documents` as their ``custom_dataset``. Data come from the same folder, hub or
stand-in as in our own runs; every document says which, and at which revision. There is no tokenizer here, so texts that
are cut to a number of tokens are cut to four bytes for each.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from memory_bench import plugins
from memory_bench.data.library import Library
from memory_bench.episode import Ask, Episode, Read, Task
from memory_bench.running.environment import cache_folder, data_folder, hub_allowed

TOKEN_BYTES = 4
LOG = logging.getLogger(__name__)


def documents(
    source: str,
    settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    data: str = "",
    library: Library | None = None,
    **metadata: Any,
) -> dict[str, Any]:
    """The test documents of one of our tasks, as lm-eval's ``custom_dataset`` wants them: split to dataset.

    A document of language modelling has ``text``; a question has ``context``, ``question``, ``choices``, ``gold`` (the
    right one's index), ``answer`` and ``answers`` (all that count). Both have ``id``, ``label``, ``data`` and
    ``revision``.

    Args:
        source: name of the task.
        settings: its options, as the YAML file sets them.
        options: more of them, which win: ``--metadata '{"options": {"lengths": [512]}}'``.
        data: folder of real data; default: as the environment says.
        library: instead of `data`.
        metadata: whatever else lm-eval hands over; ignored.

    Raises:
        UserError: an unknown option, or data that cannot be had.
    """
    from datasets import Dataset

    del metadata
    cls = plugins.load("tasks", source)
    task: Task = cls(plugins.configure(source, cls.Config(), {**(settings or {}), **(options or {})}))
    folder = data_folder(Path(data) if data else None)
    library = library or Library(folder, cache_folder(), hub=hub_allowed(), notice=LOG.warning)
    where = task.data(library)
    if where.stand_in:
        LOG.warning("No real data for %s: using %s. Its numbers are not those of the real data.", source, where.label)
    rows = [row for episode in task.episodes(library, None) for row in _rows(episode)]
    marked = [{**row, "data": where.label, "revision": where.revision} for row in rows]
    return {"test": Dataset.from_list(marked)}


def _rows(episode: Episode) -> Iterator[dict[str, Any]]:
    """The documents of an episode: its scored text, or every question with all that is read before it."""
    read = ""
    for number, event in enumerate(episode.events):
        if isinstance(event, Ask):
            yield {"id": f"{episode.id}/{number}", "context": read, "question": event.prompt, **_asked(event)}
            continue
        text = _cut(event)
        read += text
        if event.scored:
            yield {"id": f"{episode.id}/{number}", "text": text, "label": event.tag}


def _asked(event: Ask) -> dict[str, Any]:
    gold = event.choices.index(event.answer) if event.choices else 0
    accepted = list(event.accepted or (event.answer.strip(),))
    choices = [choice.strip() for choice in event.choices]
    return {
        "choices": choices, "gold": gold, "answer": event.answer.strip(), "answers": accepted, "label": event.label,
    }  # fmt: skip


def _cut(read: Read) -> str:
    """What is read of a text, with the lead before it."""
    if not read.tokens:
        return read.text
    room = TOKEN_BYTES * read.tokens
    text = read.text.encode()[:room].decode(errors="ignore")
    left = room - len(text.encode())
    lead = read.lead.encode()[-left:].decode(errors="ignore") if left > 0 and read.lead else ""
    return lead + text
