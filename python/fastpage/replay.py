"""Runs the log of a scheduler's calls again: `python -m fastpage.replay LOG`.

The log is what `record_scheduler` (engine argument) or `_C.Scheduler.record` wrote. It holds the
prompts, the outputs and the key of the block hashes, so treat it as you treat them. The answer is
one line; the exit status is 0 if every step came out as recorded, 1 if one did not, and 2 if the
file is no log of this version. A process that died is no difference: its last call is made, too.
"""

from __future__ import annotations

import argparse
import sys

from fastpage import _C


def summary(result: _C.ReplayResult) -> str:
    did = f"{result.num_calls:,} calls, {result.num_steps:,} steps"
    if result.divergence:
        return f"{did}, then a difference: {result.divergence}"
    end = "" if result.complete else "; the log ends in the midst of a call"
    return f"{did}: as recorded{end}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m fastpage.replay",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("log")
    parser.add_argument(
        "--no-checks",
        action="store_true",
        help="do not walk all blocks after every call to check the invariants: faster",
    )
    args = parser.parse_args(arguments)
    try:
        result = _C.replay(args.log, check_integrity=not args.no_checks)
    except _C.Error as error:
        print(f"error: {args.log}: {error}", file=sys.stderr)
        return 2
    print(summary(result))
    return 1 if result.divergence else 0


if __name__ == "__main__":
    sys.exit(main())
