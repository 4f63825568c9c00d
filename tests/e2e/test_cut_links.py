"""One round of `scripts/cut-links`: the cable is cut in mid-transfer and mended; no token is wrong, nothing is left."""

from __future__ import annotations

import pytest

from tests.support import cable, hosts

pytestmark = [pytest.mark.e2e, pytest.mark.nixl, pytest.mark.slow, pytest.mark.timeout(240)]


def test_a_cable_that_is_cut_in_mid_transfer_and_mended() -> None:
    if reason := hosts.missing():
        pytest.skip(f"two hosts: {reason}")
    told = cable.run(1, ["cut"])
    assert told["requests"] == cable.PROMPTS and not told["wrong"] and not told["broken"], told
    assert told.get("cut: mixed", 0) + told.get("cut: local", 0), f"the cut hit nothing: {told}"
