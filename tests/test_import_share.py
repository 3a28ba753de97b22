"""One host's share of a released model, at reduced depth: what it reads, in how much memory."""

import re
import subprocess
import sys

import pytest

from tests.test_generate import HERE


@pytest.mark.slow
def test_a_host_reads_its_share_within_three_times_its_largest_shard():
    """V3 at full width and 4 + 1 layers: 33 GB claimed by sparse files, of which one host of 64
    reads its own bytes. The bound is the one that docs/reliability.md states."""
    command = [sys.executable, "-m", "bench.import_share", "--quick"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    claimed = float(re.search(r"layers: ([\d.]+) GB claimed", done.stdout)[1])
    read = float(re.search(r"read from files \| ([\d.]+) GB", done.stdout)[1])
    times = float(re.search(r"MiB more, ([\d.]+) x the largest shard", done.stdout)[1])
    assert read < claimed / 3
    assert times < 3
