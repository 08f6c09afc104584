"""A cell's scored events as a Parquet file that carries the cell's key, and what tells that it is another cell's.

pyarrow and pandas are imported where they are needed: a list of records opens without them.
"""

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memory_bench.files.artefacts import Damaged
from memory_bench.record import Record

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
MARK = b"memory_bench"
"""The entry of the file's own metadata that holds schema and key."""


def to_parquet(samples: "pd.DataFrame", key: str) -> bytes:
    """The content of a file with a cell's samples and its key."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(samples, preserve_index=False)
    mark = json.dumps({"schema": SCHEMA, "cell": key}).encode()
    # Through memory: the parquet writer's own errors do not tell a full disk from a bug.
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), MARK: mark}), buffer)
    return buffer.getvalue()


def read_parquet(path: Path, key: str) -> "pd.DataFrame":
    """The samples of a cell.

    Raises:
        Damaged: the file cannot be read, or is another cell's.
    """
    import pandas as pd
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as opened:  # threads cost more than they save here
            table = opened.read(use_threads=False)
        samples: pd.DataFrame = table.to_pandas(use_threads=False)
    except Exception as error:  # pyarrow raises many types for broken files
        raise Damaged(f"it cannot be read ({type(error).__name__})") from error
    _check_key(table.schema, key)
    if "choice_nll" in samples:
        lists = [None if v is None else [math.nan if x is None else float(x) for x in v] for v in samples["choice_nll"]]
        samples["choice_nll"] = pd.Series(lists, index=samples.index, dtype=object)
    return samples


def check_unsummed(path: Path, record: Record) -> None:
    """What can be told of samples whose record has no checksum of them: key, seed and number of scored tokens.

    Raises:
        Damaged: they are not those of the record, or cannot be read.
    """
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except Exception as error:
        raise Damaged(f"it cannot be read ({type(error).__name__})") from error
    _check_key(schema, record.key)
    try:
        rows: Any = pq.read_table(path, columns=["seed", "control", "tokens"]).to_pandas()
        seeds, scored = set(rows["seed"]), int(rows.loc[rows["control"] == "", "tokens"].sum())
    except Exception as error:
        raise Damaged(f"it cannot be read ({type(error).__name__})") from error
    if seeds - {record.cell.training.seed} or (record.metrics and scored != record.usage.scored_tokens):
        raise Damaged("it holds the samples of another cell")


def _check_key(schema: Any, key: str) -> None:
    """Refuse the Arrow schema of a file that is marked as another cell's."""
    try:
        mark = (schema.metadata or {}).get(MARK)
        told = json.loads(mark) if mark is not None else {"cell": key}  # an older version marked nothing
    except Exception as error:
        raise Damaged(f"it cannot be read ({type(error).__name__})") from error
    if not isinstance(told, dict) or told.get("cell") != key:
        raise Damaged("it holds the samples of another cell")
