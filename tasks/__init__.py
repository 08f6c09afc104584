"""Tasks, installed as `memory_bench.tasks`.

- `answers.py`: hits, metrics and training of the tasks about retention
- `babi.py`: facts scattered in books
- `chapterbreak.py`: which beginning of a chapter follows
- `fact_updates.py`: facts that are replaced
- `folder.py`: any folder of text files
- `interleaved.py`: PG-19, two books in turn
- `key_value.py`: facts over distance
- `language_modeling.py`: PG-19 and WikiText-103
- `locomo.py`: questions about long conversations
- `lost_in_the_middle.py`: one of many pairs, by its place
- `noun_recall.py`: lists that are read again
- `passkey.py`: a number in irrelevant text
- `pubmedqa.py`: PubMedQA
- `retention.py`: SQuAD and NQ after unrelated passages
"""

if __name__ != "memory_bench.tasks":  # two names would make two copies of every class
    raise ImportError("Import memory_bench.tasks; tasks is only its folder.")
