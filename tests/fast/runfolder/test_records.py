"""runfolder/records.py: the jobs of a run, whatever an editor has left of the file."""

from __future__ import annotations

from pathlib import Path

from runfolder import records


def test_a_last_line_without_its_end_is_a_line_and_the_next_one_is_another(tmp_path: Path) -> None:
    records.add_submission(tmp_path, 7, {"cluster": "a"})
    path = tmp_path / "jobs.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    assert not records.has_damaged_end(tmp_path)
    assert [found.job_id for found in records.submissions(tmp_path)] == [7]
    records.add_submission(tmp_path, 8, {})
    assert [found.job_id for found in records.submissions(tmp_path)] == [7, 8]
    with path.open("a") as stream:
        stream.write('{"job_id": 9')
    assert records.has_damaged_end(tmp_path)
