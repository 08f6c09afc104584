"""Where data comes from: a folder, the Hugging Face hub, or a stand-in that any machine can get."""

from memory_bench.data.library import Library, Source
from memory_bench.data.origins import Study
from memory_bench.data.packages import fetch_package

__all__ = ["Library", "Source", "Study", "fetch_package"]
