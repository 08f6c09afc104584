"""transformers without its progress bars and warnings, where they would stand between our own sentences."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quietly() -> Iterator[None]:
    """Inside, transformers says nothing: what is wrong comes as an exception, and is said in a sentence."""
    from transformers.utils import logging as told

    # The level of its root logger alone: some of its modules say more where their own level is raised.
    logger = logging.getLogger("transformers")
    level, shown = logger.level, told.is_progress_bar_enabled()
    logger.setLevel(logging.CRITICAL)
    told.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if shown:
            told.enable_progress_bar()
