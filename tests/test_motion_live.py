"""Motion of live streams, sent by threads of this process over loopback sockets and pipes."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import media_zoo
import numpy as np
import pytest
from click.testing import CliRunner

from runtime.errors import MediaError, UsageError
from runtime.motion import live as live_module
from runtime.motion.approximate import ApproximateClip
from runtime.motion.commands import motion
from runtime.motion.connection import is_live, is_pipe, shown
from runtime.motion.handover import Handover
from runtime.motion.live import LiveSettings, LiveSource
from runtime.motion.mpeg4 import MotionSettings
from runtime.video import probe

PACKET = 188  # bytes of an MPEG-TS packet
CHUNK = 7 * PACKET
QUICK = LiveSettings(timeout_s=1.5, attempts=1, backoff_s=0.05, max_delay_s=60)
DRIFT = 2 * 25 / 6 / 160 / 0.00993703  # 2 pixels a source frame, in grid units at 6 frames per second


@pytest.fixture(scope="module")
def stream(tmp_path_factory) -> bytes:
    """10 s of H.264 with B frames in MPEG-TS, a key frame every second."""
    path = tmp_path_factory.mktemp("live") / "stream.ts"
    options = {"g": "25", "bf": "2", "preset": "ultrafast", "x264-params": "bframes=2"}
    return media_zoo.make(path, frames=250, size=(160, 96), rate=25, options=options).read_bytes()


def pieces(data: bytes, pause: float = 0) -> Iterator[bytes]:
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]
        if pause:
            time.sleep(pause)


@contextmanager
def tcp_server(*connections: Callable[[], Iterable[bytes]]) -> Iterator[str]:
    """Serves each of `connections` to one client after the other, then is gone."""
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(10)

    def work() -> None:
        with server:
            for chunks in connections:
                try:
                    client, _ = server.accept()
                    with client:
                        for chunk in chunks():
                            client.sendall(chunk)
                except OSError:  # the client has left
                    continue

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
    thread.join(10)
    assert not thread.is_alive()


def read_until_lost(items: Iterable) -> list:
    found = []
    with pytest.raises(MediaError, match=r"no video .*, 2 times in a row"):
        found.extend(items)  # `extend` keeps what came before the error
    return found


@pytest.mark.parametrize("source", ["codec", "mpeg4"])
def test_tcp_stream_becomes_clips(stream, source):
    with (
        tcp_server(lambda: pieces(stream)) as address,
        LiveSource(address, MotionSettings(), source, live=QUICK) as live,
    ):
        clips = read_until_lost(live)
    assert [(c.index, c.frame_index, c.time_s) for c in clips] == [(0, 0, 0.0), (1, 24, 4.0)]
    assert live.used == source and live.exact == (source == "mpeg4")
    for clip in clips:
        assert isinstance(clip, ApproximateClip) == (source == "codec")
        assert clip.grid.shape == (24, 2, 6, 10) and not clip.grid[0].any() and not clip.grid[12].any()
        assert np.median(clip.grid[1:12, 0, :, 2:]) == pytest.approx(DRIFT, rel=0.2)
        assert abs(np.median(clip.grid[1:12, 1])) < 0.1 * DRIFT
    picture = clips[0].keyframe.astype(int)
    assert min(np.abs(picture - media_zoo.scene(i, 160, 96)).mean() for i in range(4)) < 8


def test_frames_carry_time_and_pixels(stream):
    with tcp_server(lambda: pieces(stream)) as address, LiveSource(address, MotionSettings(), live=QUICK) as live:
        frames = read_until_lost(live.frames(images=True))
    assert [f.index for f in frames] == list(range(60))
    assert [f.kind for f in frames] == (["I"] + ["P"] * 11) * 5
    assert frames[7].time_s == pytest.approx(7 / 6) and frames[7].image.shape == (96, 160, 3)


def test_lost_packets_cost_only_what_depends_on_them(stream):
    rng = np.random.default_rng(1)
    packets = [stream[i : i + PACKET] for i in range(0, len(stream), PACKET)]
    kept = b"".join(p for n, p in enumerate(packets) if n < 40 or rng.random() > 0.01)
    assert len(kept) < len(stream)
    with tcp_server(lambda: pieces(kept)) as address, LiveSource(address, MotionSettings(), live=QUICK) as live:
        frames = read_until_lost(live.frames())
    assert live.statistics.corrupt > 0 and live.statistics.skipped > 0
    assert 50 <= len(frames) <= 61  # time goes on while nothing can be decoded
    moving = [float(np.median(f.grid[0])) for f in frames if f.grid is not None]
    assert all(-0.1 * DRIFT < m < 1.5 * DRIFT for m in moving), "no vectors from broken pictures"
    assert any(m == pytest.approx(DRIFT, rel=0.2) for m in moving)


def test_server_restart_is_survived(stream):
    half = stream[: len(stream) // 2 // PACKET * PACKET]
    with (
        tcp_server(lambda: pieces(half), lambda: [], lambda: pieces(half)) as address,
        LiveSource(address, MotionSettings(), live=LiveSettings(1.5, 2, 0.05, 60)) as live,
    ):
        clips = []
        with pytest.raises(MediaError, match="3 times in a row"):
            clips.extend(live)
    assert live.statistics.connections == 2
    assert [c.index for c in clips] == [0, 1]
    assert clips[1].frame_index >= 29, "numbered on"
    assert clips[1].time_s == pytest.approx(clips[1].frame_index / 6)
    assert not clips[1].grid[0].any()


def test_garbage_is_one_error():
    noise = np.random.default_rng(2).bytes(400_000)
    for data in (noise, b"", b"HTTP/1.1 404 Not Found\r\n\r\n"):
        with tcp_server(*[lambda data=data: pieces(data)] * 2) as address:
            with pytest.raises(MediaError, match=address) as caught:
                list(LiveSource(address, MotionSettings(), live=QUICK))
            assert "\n" not in str(caught.value)


def test_garbage_in_the_middle_is_skipped(stream):
    middle = len(stream) // 2 // PACKET * PACKET
    data = stream[:middle] + np.random.default_rng(3).bytes(30 * PACKET) + stream[middle:]
    with tcp_server(lambda: pieces(data)) as address, LiveSource(address, MotionSettings(), live=QUICK) as live:
        assert len(read_until_lost(live.frames())) > 45


def test_silence_is_an_error_in_time():
    def silent():
        time.sleep(4)
        return []

    settings = LiveSettings(timeout_s=0.3, attempts=1, backoff_s=0.05)
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(MediaError, match="2 times in a row"):
            next(iter(LiveSource(address, MotionSettings(), live=settings)))
    assert time.monotonic() - started < 4
    with pytest.raises(MediaError, match="connection refused"):
        next(iter(LiveSource(address, MotionSettings(), live=settings)))


def test_late_reader_gets_recent_motion(stream):
    """The queue holds at most `max_delay_s`, and drops the oldest."""
    settings = LiveSettings(timeout_s=1.5, attempts=1, backoff_s=0.05, max_delay_s=2)
    with tcp_server(lambda: pieces(stream)) as address, LiveSource(address, MotionSettings(), live=settings) as live:
        reader = live.frames()
        first = next(reader)
        until(lambda: live.statistics.frames == 60)
        rest = read_until_lost(reader)
    assert first.index == 0
    assert [f.index for f in rest] == list(range(48, 60)), "the last 2 s, no older"
    assert live.statistics.dropped == 47


def until(reached: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_delay_behind_a_paced_sender_is_short(stream):
    """Sent at five times real time: motion of a moment is there before much later video was sent."""
    sent = [0]

    def paced():
        for number, piece in enumerate(pieces(stream)):
            sent[0] = number * CHUNK
            yield piece
            time.sleep(2 * CHUNK / len(stream))

    lags = []
    with tcp_server(paced) as address, LiveSource(address, MotionSettings(), live=QUICK) as live:
        for frame in islice(live.frames(), 50):
            lags.append(sent[0] / len(stream) * 10 - frame.time_s)
    assert np.median(lags[30:]) < 2.5, "seconds of video; five times less on the clock"


def test_closing_stops_the_thread(stream):
    def endless():
        while True:
            yield from pieces(stream, 0.002)

    before = threading.active_count()
    with tcp_server(endless) as address:
        live = LiveSource(address, MotionSettings(), live=QUICK)
        reader = live.frames()
        next(reader)
        started = time.monotonic()
        live.close()
        list(reader)  # what was held, then the end
        assert time.monotonic() - started < 3
    until(lambda: threading.active_count() <= before)


@pytest.mark.parametrize("source", ["codec", "mpeg4"])
def test_named_pipe(stream, tmp_path, source):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    assert is_pipe(str(path)) and is_live(str(path))
    writer = threading.Thread(target=lambda: path.write_bytes(stream), daemon=True)
    writer.start()
    settings = LiveSettings(timeout_s=2, max_delay_s=1)
    live = LiveSource(str(path), MotionSettings(), source, live=settings)
    slowly = []
    for frame in live.frames():
        slowly.append(frame.index)
        time.sleep(0.002)
    assert slowly == list(range(60)), "a pipe's writer waits; nothing is dropped"
    writer.join(5)


def test_pipe_without_writer_or_video(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    with pytest.raises(MediaError, match="no data came in time"):
        list(LiveSource(str(path), MotionSettings(), live=LiveSettings(timeout_s=0.3)))
    writer = threading.Thread(target=lambda: path.write_bytes(b"no video at all\n" * 3000), daemon=True)
    writer.start()
    with pytest.raises(MediaError, match=str(path)):
        list(LiveSource(str(path), MotionSettings(), live=LiveSettings(timeout_s=2)))
    writer.join(5)


def test_udp(stream):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    stop = threading.Event()

    def send():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            while not stop.is_set():
                for piece in pieces(stream, 0.004):
                    sender.sendto(piece, ("127.0.0.1", port))
                    if stop.is_set():
                        return

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    try:
        with LiveSource(f"udp://127.0.0.1:{port}", MotionSettings(), live=QUICK) as live:
            clip = next(iter(live))
            assert np.median(clip.grid[1:12, 0, :, 2:]) == pytest.approx(DRIFT, rel=0.3)
    finally:
        stop.set()
        thread.join(5)


def rtsp_answers(client: socket.socket, payload: bytes) -> None:
    """A camera's side of RTSP with everything in one TCP connection: MPEG-TS in RTP, type 33, then good-bye."""
    requests = client.makefile("rb")
    port = client.getsockname()[1]
    while True:
        lines = []
        while (line := requests.readline().strip()) or not lines:
            lines.append(line.decode())
        method = lines[0].split()[0]
        number = next(line.split(":")[1] for line in lines if line.lower().startswith("cseq"))
        head = {
            "OPTIONS": "Public: DESCRIBE, SETUP, PLAY, TEARDOWN\r\n",
            "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Base: rtsp://127.0.0.1:{port}/\r\n",
            "SETUP": "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\nSession: 1\r\n",
            "PLAY": "Session: 1\r\n",
        }.get(method, "")
        body = ""
        if method == "DESCRIBE":
            body = "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=camera\r\nt=0 0\r\nm=video 0 RTP/AVP 33\r\na=control:0\r\n"
            head += f"Content-Length: {len(body)}\r\n"
        client.sendall(f"RTSP/1.0 200 OK\r\nCSeq:{number}\r\n{head}\r\n{body}".encode())
        if method == "PLAY":
            break
    for sequence, piece in enumerate(pieces(payload)):
        rtp = bytes([0x80, 33]) + sequence.to_bytes(2, "big") + (90 * sequence).to_bytes(4, "big") + b"SSRC" + piece
        client.sendall(b"$\0" + len(rtp).to_bytes(2, "big") + rtp)


def test_rtsp(stream):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(5)

        def work() -> None:
            client, _ = server.accept()
            with client:
                rtsp_answers(client, stream)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        address = f"rtsp://me:secret@127.0.0.1:{server.getsockname()[1]}/"
        with LiveSource(address, MotionSettings(), live=QUICK) as live:
            clip = next(iter(live))
        thread.join(5)
    assert np.median(clip.grid[1:12, 0, :, 2:]) == pytest.approx(DRIFT, rel=0.2)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_time_stamps_may_leap_and_memory_stays(stream):
    """The same ten seconds over and over: stamps go back each time."""
    with tcp_server(lambda: (piece for _ in range(12) for piece in pieces(stream))) as address:
        live = LiveSource(address, MotionSettings(), live=QUICK)
        reader = live.frames()
        start = [next(reader) for _ in range(100)]
        before = resident_bytes()
        rest = read_until_lost(reader)
        grown = resident_bytes() - before
    indices = [f.index for f in start + rest]
    assert indices == list(range(len(indices))) and len(indices) == pytest.approx(12 * 60, abs=24)
    assert grown < 24 << 20


def test_http_file_ends(stream, tmp_path):
    mp4 = media_zoo.make(tmp_path / "file.mp4", frames=60, size=(160, 96), rate=12, options={"movflags": "+faststart"})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(mp4.stat().st_size))
            self.end_headers()
            self.wfile.write(mp4.read_bytes())

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            address = f"http://127.0.0.1:{server.server_address[1]}/file.mp4"
            frames = list(LiveSource(address, MotionSettings(), live=QUICK).frames())
        finally:
            server.shutdown()
    assert [f.index for f in frames] == list(range(30))


def test_streams_without_vectors_need_the_fallback(tmp_path):
    options = {"x265-params": "log-level=none:keyint=25"}
    data = media_zoo.make(tmp_path / "hevc.ts", frames=100, rate=25, codec="libx265", options=options).read_bytes()
    with tcp_server(lambda: pieces(data)) as address, pytest.raises(MediaError, match=r"hevc.*--source mpeg4"):
        list(LiveSource(address, MotionSettings(), live=QUICK))
    with tcp_server(lambda: pieces(data)) as address:
        live = LiveSource(address, MotionSettings(), fallback="mpeg4", live=QUICK)
        assert len(read_until_lost(live.frames())) == 24
    assert live.used == "mpeg4" and live.exact


def test_a_camera_that_is_not_there_is_one_error():
    live = LiveSource("/dev/video77", MotionSettings(), live=LiveSettings(attempts=1, backoff_s=0.05))
    with pytest.raises(MediaError, match=r"/dev/video77: no video \(no such file"):
        list(live)


def test_command_reads_a_stream_for_a_while(stream, tmp_path):
    def endless():
        while True:
            yield from pieces(stream, 0.001)

    output, overlay = tmp_path / "motion.npz", tmp_path / "arrows.mp4"
    with tcp_server(endless) as address:
        arguments = [address, "-o", str(output), "--overlay", str(overlay), "--source", "codec", "--duration", "3"]
        result = CliRunner().invoke(motion, arguments)
    assert result.exit_code == 0, result.output
    assert "codec (approximate)" in result.stdout and "1 connections" in result.stdout
    with np.load(output, allow_pickle=False) as stored:
        assert stored["grids"].shape == (18, 2, 6, 10) and not stored["exact"]
        assert str(stored["source"]) == address
    assert probe(overlay).width == 160


def test_command_keeps_what_came_before_the_loss(stream, tmp_path, monkeypatch):
    monkeypatch.setattr(live_module, "MAX_BACKOFF", 0.05)
    output = tmp_path / "motion.npz"
    with tcp_server(lambda: pieces(stream)) as address:
        result = CliRunner().invoke(motion, [address, "-o", str(output), "--source", "mpeg4", "--json"])
    assert result.exit_code == 0, result.output
    *_, note, last = map(json.loads, result.stdout.splitlines())
    assert note["event"] == "note" and "connection refused" in note["text"]
    assert (last["motion_source"], last["exact"], last["frames"]) == ("mpeg4", True, 60)
    with np.load(output) as stored:
        assert len(stored["grids"]) == 60 and stored["exact"]


def test_ctrl_c_ends_a_recording(stream, tmp_path):
    def endless():
        while True:
            yield from pieces(stream, 0.005)

    output = tmp_path / "motion.npz"
    with tcp_server(endless) as address:
        command = [sys.executable, "-m", "videolavit", "motion", address, "-o", str(output), "--json"]
        root = Path(__file__).parent.parent
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as process:
            for line in process.stdout:
                if '"done":12' in line:
                    process.send_signal(signal.SIGINT)
                    break
            rest = process.stdout.read()
        assert process.returncode == 0 and '"event":"result"' in rest
    with np.load(output) as stored:
        assert len(stored["grids"]) >= 12


def test_addresses():
    assert all(map(is_live, ["rtsp://camera/1", "udp://127.0.0.1:5", "pipe:0", "/dev/video0", "HTTPS://a/b.ts"]))
    assert not any(map(is_live, ["clip.mp4", "folder/clip.mp4", "ftp://host/a.mp4", ""]))
    assert shown("rtsp://user:p@ss@camera:554/1?a=b@c") == "rtsp://camera:554/1?a=b@c"
    assert shown("rtsp://camera/1") == "rtsp://camera/1" and shown("a@b.mp4") == "a@b.mp4"
    for wrong in ({"timeout_s": 0}, {"attempts": 0}, {"max_delay_s": -1}, {"backoff_s": 0}):
        with pytest.raises(UsageError):
            LiveSettings(**wrong)


def test_secrets_in_the_address_are_not_shown():
    with pytest.raises(MediaError) as caught:
        list(LiveSource("tcp://me:secret@127.0.0.1:9", MotionSettings(), live=QUICK))
    assert "secret" not in str(caught.value) and "127.0.0.1:9" in str(caught.value)


def test_handover_is_bounded_in_items_and_bytes():
    queue: Handover[int] = Handover(3, 100, drop=True)
    assert all(queue.put(n, 10) for n in range(5))
    assert queue.put(5, 85)  # pushes out what does not fit beside it
    queue.end(MediaError("over"))
    assert not queue.put(6, 1)
    found = []
    with pytest.raises(MediaError, match="over"):
        found.extend(queue)
    assert found == [4, 5] and queue.dropped == 4
