"""What a disk cannot take waits, whole and in order; what is too much is counted; nothing is raised."""

from __future__ import annotations

from pretrain.storage import patient_file
from pretrain.storage.patient_file import PatientFile
from tests.helpers.data_helpers import file_size_limit


def test_records_wait_for_the_disk_and_are_not_torn(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    file = PatientFile(path)
    with file_size_limit(10):  # the second record is written in part
        for text in (b"first\n", b"second\n", b"third\n"):
            file.append(text)
        assert path.read_bytes() == b"first\nseco"
    assert capsys.readouterr().err == (
        f"warning: {path}: cannot be written (File too large); expected a disk with space. Training goes on and what is to "
        "be written waits in memory: free space there.\n"
    )
    file.append(b"fourth\n")
    assert path.read_bytes() == b"first\nsecond\nthird\nfourth\n"
    assert capsys.readouterr().err == f"warning: {path}: is written again\n"
    file.close()


def test_what_waits_is_bounded_and_what_is_dropped_is_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(patient_file, "MAX_WAITING_BYTES", 20)
    path = tmp_path / "log.txt"
    file = PatientFile(path)
    with file_size_limit(0):
        for number in range(10):
            file.append(b"line %d\n" % number)
    file.append(b"10\n")
    assert path.read_bytes() == b"line 0\nline 1\n10\n"
    assert capsys.readouterr().err.endswith(f"{path}: is written again; 8 records were dropped\n")
    with file_size_limit(0):
        file.append(b"last\n")
        file.close()
    assert capsys.readouterr().err.endswith(f"{path}: its last 5 bytes could not be written, and are lost\n")


def test_a_file_that_cannot_be_made_waits_too(tmp_path, capsys):
    path = tmp_path / "tensorboard" / "events"
    (tmp_path / "tensorboard").write_text("in the way")
    file = PatientFile(path)
    file.append(b"first\n")
    assert "events: cannot be written (File exists); " in capsys.readouterr().err
    (tmp_path / "tensorboard").unlink()
    file.append(b"second\n")
    file.close()
    assert path.read_bytes() == b"first\nsecond\n"
