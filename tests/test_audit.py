"""The audit fails for a finding alone, and says where the index gave no answer."""

import json

import audit
import pytest

GOOD = {"name": "numpy", "version": "2.4.6", "vulns": []}
BAD = {
  "name": "av",
  "version": "1.0",
  "vulns": [{"id": "CVE-2026-1", "fix_versions": ["1.1"], "aliases": [], "description": ""}],
}
SKIPPED = {"name": "jax", "skip_reason": "Dependency not found on PyPI"}


@pytest.mark.parametrize(
  ("packages", "code", "words"),
  [
    ([GOOD], 0, "none known of 1"),
    ([GOOD, SKIPPED], 0, "no answer for jax"),
    ([SKIPPED], 0, "gave no answer"),
    ([GOOD, BAD, SKIPPED], 1, "av 1.0: CVE-2026-1, mended in 1.1"),
  ],
)
def test_a_finding_fails_and_no_answer_is_said(packages, code, words):
  found, text = audit.judged(json.dumps({"dependencies": packages, "fixes": []}), "")
  assert found == code and words in text


def test_an_index_out_of_reach_is_said():
  code, text = audit.judged("", "Traceback\nConnectionError: no route to host\n")
  assert code == 0 and "no route to host" in text


def test_an_audit_that_fails_itself_fails():
  code, text = audit.judged("", "ERROR: package libtpu has duplicate requirements\n")
  assert code == 1 and "duplicate requirements" in text
