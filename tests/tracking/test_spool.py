"""The spool file: whatever byte it was cut at, what reads is a prefix of what was written."""

import json
import os
import subprocess
import sys

import psutil
from hypothesis import given
from hypothesis import strategies as st

from cnn_tuning.tracking.spool import Writer, read, writer_alive, writer_identity

values = st.dictionaries(
    st.text(min_size=1, max_size=8), st.floats(allow_nan=False) | st.text(max_size=8), max_size=4
)


@given(st.lists(values, max_size=6), st.data())
def test_a_cut_file_reads_as_a_prefix(tmp_path_factory, written, data):
    writer = Writer(tmp_path_factory.mktemp("spool"), "key")
    for entry in written:
        writer.append("metrics", values=entry)
    writer.close()
    whole = writer.path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    writer.path.write_bytes(whole[:cut])
    events = list(read(writer.path, 0))
    assert [event["values"] for event, _ in events] == written[: len(events)]
    assert len(events) == whole[:cut].count(b"\n")
    writer.path.write_bytes(whole)
    end = events[-1][1] if events else 0
    assert [event["values"] for event, _ in read(writer.path, end)] == written[len(events) :]


def test_a_garbled_line_does_not_stop_the_rest(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"event":"a","at":1}\n{"event":"b","a{"event":"c"\n' + json.dumps({"event": "d", "at": 2}) + "\n"
    )
    assert [event["event"] for event, _ in read(path, 0)] == ["a", "unreadable", "d"]


def test_a_reused_process_number_is_another_writer():
    me = writer_identity()
    assert writer_alive(me, 0)
    assert not writer_alive({**me, "created": me["created"] - 60}, 0)
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    gone = {**me, "pid": child.pid, "created": psutil.Process(child.pid).create_time()}
    child.wait()
    assert not writer_alive(gone, 0)
    assert os.getpid() == me["pid"]
