"""A pass key hidden in irrelevant text: the sentences of Mohtashami and Jaggi 2023 (arXiv:2305.16300), appendix."""

import hashlib

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there.\n"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
PROMPT = "\nWhat is the pass key? The pass key is"
REVISION = hashlib.sha256(repr((INTRODUCTION, NOISE, NEEDLE, PROMPT)).encode()).hexdigest()[:16]
