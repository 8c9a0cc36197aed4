"""Whole runs end in the parameters in which they ended before: see runs.py."""

import json

import pytest
import runs


@pytest.mark.parametrize("case", runs.CASES, ids=runs.name_of)
def test_a_run_ends_in_the_same_bits(case):
    assert runs.run(case) == json.loads(runs.FILE.read_text())[runs.name_of(case)]


def test_every_case_is_kept_and_no_other():
    assert sorted(json.loads(runs.FILE.read_text())) == sorted(map(runs.name_of, runs.CASES))
