"""Where data comes from: a folder, the Hugging Face hub, or a stand-in that any machine can get."""

from memory_bench.data.library import Library, Source
from memory_bench.data.origins import Study
from memory_bench.data.packages import fetch_package
from memory_bench.data.passages import Passage, Story

__all__ = ["Library", "Passage", "Source", "Story", "Study", "fetch_package"]
