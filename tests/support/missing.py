"""What becomes of tests that lack something."""

import os

import pytest


def skip_without(lack):
    """Skip a test for what it lacks, unless the text is empty; where nothing may lack, fail it."""
    if lack:
        (pytest.fail if os.environ.get("CUPY_SYNCBN_REQUIRE_ALL") else pytest.skip)(lack)
