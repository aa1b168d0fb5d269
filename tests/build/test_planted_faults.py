"""The table of planted faults keeps up with the code: each still stands where it says."""

from __future__ import annotations

import planted_faults


def test_every_fault_can_be_planted():
    for fault in planted_faults.faults():
        source = (planted_faults.ROOT / "python" / "tdpo_ext" / fault.file).read_text()
        assert fault.applied_to(source) != source
