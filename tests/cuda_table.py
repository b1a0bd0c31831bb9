"""A table of what pytest ran, test by test, from its JUnit XML: python tests/cuda_table.py FILE."""

from __future__ import annotations

import collections
import sys
import xml.etree.ElementTree as ElementTree


def main() -> None:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
        name = f"{case.get('classname', '').split('.')[-1]}.{case.get('name', '').split('[')[0]}"
        outcomes = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        counts[name][outcomes[0] if outcomes else "passed"] += 1
    print(f"{'':64}{'passed':>8}{'failed':>8}{'skipped':>9}")
    for name, row in counts.items():
        print(f"{name:64}{row['passed']:8}{row['failure'] + row['error']:8}{row['skipped']:9}")


if __name__ == "__main__":
    main()
