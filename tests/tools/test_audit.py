"""The audit of the extras counts nothing as audited that was not."""

from __future__ import annotations

from tools import audit


def entry(name: str, *faults: str) -> dict[str, object]:
    vulnerabilities = [{"id": fault, "fix_versions": ["9.9"]} for fault in faults]
    return {"name": name, "version": "1", "vulns": vulnerabilities}


def test_extras_are_resolved_with_those_that_they_refer_to() -> None:
    extras = {"lm": ["numpy"], "test": ["pytest", "transformer-xl[lm]"]}
    project = {"dependencies": ["torch>=2.11"], "optional-dependencies": extras}
    assert audit.requirements(project, ["test"]) == ["torch>=2.11", "pytest", "numpy"]


def test_packages_without_vulnerabilities_pass() -> None:
    report = {"dependencies": [entry("some-package"), entry("torch")]}
    assert audit.verdict(report, ["Some_Package==1", "torch==1"], "") == []


def test_a_vulnerability_is_named_with_its_fix() -> None:
    report = {"dependencies": [entry("torch", "CVE-1")]}
    assert audit.verdict(report, ["torch==1"], "") == ["torch==1: CVE-1, fixed in 9.9"]


def test_a_package_that_was_not_audited_is_a_failure() -> None:
    report = {"dependencies": [{"name": "torch", "skip_reason": "unknown"}]}
    (line,) = audit.verdict(report, ["torch==1", "numpy==2"], "")
    assert line.startswith("2 of 2 packages were not audited: ")
    assert line.endswith("torch==1, numpy==2")


def test_a_service_that_cannot_be_reached_is_a_failure() -> None:
    (line,) = audit.verdict(None, ["torch==1"], "name not known")
    assert line == (
        "nothing was audited: the vulnerability service cannot be reached (name not known)"
    )
