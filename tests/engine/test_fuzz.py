"""Random models, optimizers and sequences of user actions, beside a loop in which everything is explicit, in float64.

After each action the weights agree with that loop to 1e-10, zeros are exactly +0, and the schedule is where an explicit
count has it. A sequence is its seed. The long form, which prints the shortest list of actions that fails:

    python tests/engine/test_fuzz.py --sequences 2000 --actions 60 --first-seed 0
"""

from __future__ import annotations

import argparse
import sys
import time

import pytest
import torch
from fuzz.world import draw, failure_of, minimized, run


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_random_sequences(first):
    for seed in range(first, first + 10):
        setup, actions = draw(seed, 40)
        run(setup, seed, actions)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--actions", type=int, default=60)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--failures", type=int, default=1, help="go on until so many have been found")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start, found = time.monotonic(), 0
    for done, seed in enumerate(range(options.first_seed, options.first_seed + options.sequences), start=1):
        setup, actions = draw(seed, options.actions)
        if failure_of(setup, seed, actions) is not None:
            actions, failure = minimized(setup, seed, actions)
            print(f"seed {seed}: {failure}\n{setup}", *map(repr, actions), sep="\n    ", flush=True)
            found += 1
            if found == options.failures:
                return 1
        if done % 100 == 0:
            print(f"{done} sequences in {time.monotonic() - start:.0f} s", flush=True)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
