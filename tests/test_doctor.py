"""`attnlab doctor`: what works here, and of the rest one line that says what it needs."""

import importlib.metadata

from attnlab import cli, doctor


def test_every_part_has_a_line(capsys):
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("yes  attnlab 0.1.0: Python 3.")
    assert any(line.startswith("yes  training and ablations: jax ") for line in lines)
    assert any(line.startswith("yes  devices: ") and line.endswith(": cpu") for line in lines)
    assert "no   TPU kernels: needs a TPU; elsewhere XLA's forms run" in lines
    assert any(line.startswith("no   GPU kernels: needs a GPU of compute capability 9.0") for line in lines)
    assert len(lines) == 5 + len(doctor._PARTS)


def test_what_is_missing_is_named_with_what_brings_it(monkeypatch):
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)

    def no_version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", no_version)
    found = {finding.what: finding.reason for finding in doctor.findings()}
    assert found["attnlab tokenize"] == "needs tokenizers: pip install 'attnlab[tokenizers]'"
    assert found["training and ablations"].startswith("needs jax, jaxlib, flax, ")
    assert all("pip install" in found[what] for what, *_ in doctor._PARTS)


def test_a_part_that_breaks_is_a_line_too(monkeypatch):
    def broken():
        raise RuntimeError("no driver\nat all")

    monkeypatch.setattr(doctor, "_KERNELS", [("GPU kernels", broken, "")])
    assert "no   GPU kernels: RuntimeError: no driver at all" in doctor.shown(doctor.findings())
