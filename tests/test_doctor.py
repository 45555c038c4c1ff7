import json
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from flax_distil import cli, doctor


def status(findings, topic: str) -> doctor.Finding:
    return next(finding for finding in findings if finding.topic == topic)


def test_this_machine_is_well(capsys):
    assert cli.main(["doctor", "--no-network", "--json"]) == 0
    findings = [doctor.Finding(**row) for row in json.loads(capsys.readouterr().out)]
    assert {finding.topic for finding in findings} >= {"devices", "audio", "cache", *doctor.EXTRAS}
    assert status(findings, "audio").status == "ok"
    assert status(findings, "torch").status == "ok"  # the tests need it
    assert not [
        finding for finding in findings if finding.status == "missing" != finding.remedy == ""
    ]


def test_a_cache_that_cannot_be_written_is_broken(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLAX_DISTIL_CACHE", str(tmp_path / "file"))
    assert cli.main(["doctor", "--no-network"]) == 1
    printed = capsys.readouterr()
    assert "! cache" in printed.out
    assert "FLAX_DISTIL_CACHE" in printed.out
    assert printed.err == "flax-distil: broken: cache\n"


def test_packages_that_lack_or_are_too_old_are_named(monkeypatch):
    def version(name: str) -> str:
        if name == "ray":
            raise PackageNotFoundError
        return {"torch": "1.0"}.get(name, "99.0")

    monkeypatch.setattr(doctor, "version", version)
    assert list(doctor.lacking_packages("ray")) == ["ray"]
    (old,) = doctor.lacking_packages("torch")
    assert "not 1.0" in old
    assert list(doctor.lacking_packages("vad")) == []
    assert "pip install 'flax-distil[ray]'" in doctor.extra_packages("ray", "").remedy


def test_every_extra_of_users_is_explained():
    metadata = __import__("importlib.metadata").metadata.metadata("flax-distil")
    others = {"docs", "notebook", "test"}
    assert set(metadata.get_all("Provides-Extra")) - others == set(doctor.EXTRAS)


def test_an_unreachable_hub_is_not_an_error(monkeypatch):
    def head(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.get_session", lambda: SimpleNamespace(head=head))
    assert doctor.hub().status == "missing"


@pytest.mark.parametrize("present", [True, False])
def test_a_gpu_that_jax_does_not_use_is_noticed(monkeypatch, present):
    monkeypatch.setattr(doctor.Path, "exists", lambda _: present)
    assert ("flax-distil[cuda]" in doctor.devices().remedy) == present
