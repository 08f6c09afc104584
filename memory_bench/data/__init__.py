"""Where data comes from: a folder, the Hugging Face hub, or a stand-in that any machine can get.

- `conversations.py`: long conversations, and LoCoMo's file
- `documents.py`: a text with its identity
- `entities.py`: passages about invented things
- `facts.py`: facts to keep over distance
- `folder.py`: plain files under `--data`
- `hub.py`: the Hugging Face hub at pinned revisions
- `library.py`: one door: the first origin that has it
- `lives.py`: invented persons and places about whom something changes
- `needles.py`: the sentences of passkey
- `nouns.py`: lists that are read twice
- `origins.py`: what every origin answers, and shared parsing
- `packages.py`: pinned files through pip, checked by SHA-256
- `pairs.py`: pairs of keys and values, one of which is asked for
- `passages.py`: questions about passages, stories: what they are, and their files
- `pubmedqa_split.py`: ids of the official test split
- `rows.py`: records of data files, checked
- `standins.py`: what any machine can get or make
- `studies.py`: invented studies
- `talks.py`: invented conversations
- `texts.py`: any folder of text files
- `updates.py`: facts that change
- `worlds.py`: a small simulated world
"""

from memory_bench.data.library import Library, Source
from memory_bench.data.origins import Study
from memory_bench.data.packages import fetch_package
from memory_bench.data.passages import Passage, Story

__all__ = ["Library", "Passage", "Source", "Story", "Study", "fetch_package"]
