"""The prompts of the coherence part: the beginnings of twenty functions, each after the same module header.

A rule of dashes above the head makes all of one length, so that they are read and continued as one batch.
"""

HEAD = '''"""Tools for text, numbers and files.

Everything here works on the objects of the standard library, keeps no state,
and raises ValueError for arguments that it cannot use.
"""

import collections
import functools
import itertools
import os
import re
import sys

__all__ = ["Error", "main"]

_default_encoding = "utf-8"
_missing = object()


'''

FUNCTIONS = [
    'def clamp(value, low, high):\n    """Return value, at least low and at most high."""\n',
    'def read_lines(path, encoding=_default_encoding):\n    """Return the lines of a file."""\n',
    "def _check_type(name, value, expected):\n    if not isinstance(value, expected):\n",
    'def first(iterable, default=None):\n    """Return the first item of the iterable."""\n    for item in iterable:\n',
    'def flatten(sequences):\n    """Flatten one level of nesting."""\n',
    "def is_prime(n):\n    if n < 2:\n        return False\n",
    'def parse_header(line):\n    """Parse a header line into a name and a value."""\n',
    "def find_executable(name, path=None):\n    if path is None:\n        path = os.environ.get(",
    'def merge(a, b):\n    """Merge two dictionaries; values of b win."""\n    result = dict(a)\n',
    "def count_words(text):\n    counts = collections.Counter()\n    for word in ",
    "def write_all(file, chunks):\n    total = 0\n    for chunk in chunks:\n",
    'def factorial(n):\n    """Return n!, for n of at least 0."""\n    if n < 0:\n        raise ValueError(',
    'def escape(text):\n    """Replace special characters by escapes."""\n',
    "def walk_tree(node):\n    yield node\n    for child in node.children:\n",
    'def compile_pattern(pattern, flags=0):\n    """Compile a regular expression, with caching."""\n    try:\n',
    "def format_size(size):\n    for unit in ('B', 'KB', 'MB', 'GB'):\n        if size < 1024:\n",
    "def __init__(self, name, parent=None):\n    self.name = name\n",
    'def binary_search(items, target):\n    """Return the index of target in sorted items, or -1."""\n    low = 0\n',
    "def _format_exception(error):\n    if error is None:\n        return ",
    "def main(args=None):\n    if args is None:\n        args = sys.argv[1:]\n",
]

LENGTH = len(HEAD) + max(map(len, FUNCTIONS)) + 8
PROMPTS = ["# ".ljust(LENGTH - 1 - len(HEAD + function), "-") + "\n" + HEAD + function for function in FUNCTIONS]
