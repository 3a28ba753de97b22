"""Writers, throughput, display, plots and stop signals."""

import io
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runtime.signals import StopRequest
from training import display, metrics, plots, throughput


def record(step: int, **more) -> dict[str, float]:
    return {"train/loss": 4.0 - 0.1 * step, "train/tokens": 100 * (step + 1)} | more


def write(run_dir, steps, resume_step=0):
    with metrics.MetricsWriter(run_dir, resume_step) as writer:
        for step in steps:
            writer.write(step, record(step))


def test_records_are_json_lines_with_strings_for_non_finite(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(0, {"train/loss": jnp.float32(2.5), "moe/load_max_over_mean/layer_03": 1.5})
        writer.write(1, {"train/loss": float("nan"), "train/grad_norm": -np.inf})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    refuse = lambda text: pytest.fail(f"{text} is not JSON")  # noqa: E731
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first == {"step": 0, "train/loss": 2.5, "moe/load_max_over_mean/layer_03": 1.5}
    assert second == {"step": 1, "train/loss": "nan", "train/grad_norm": "-inf"}
    again = metrics.read_metrics(tmp_path)
    assert np.isnan(again[1]["train/loss"])
    assert again[1]["train/grad_norm"] == -np.inf


def test_tensorboard_reads_the_same_numbers_and_forgets_what_was_rerun(tmp_path):
    write(tmp_path, range(6))
    with metrics.MetricsWriter(tmp_path, resume_step=4) as writer:
        writer.write(4, {"train/loss": 1.25})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    scalars = [(e.step, round(e.value, 4)) for e in events.Scalars("train/loss")]
    assert scalars == [(0, 4.0), (1, 3.9), (2, 3.8), (3, 3.7), (4, 1.25)]


def test_resume_drops_later_records_and_a_cut_line(tmp_path):
    write(tmp_path, range(5))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "train/lo')  # killed while writing
    with pytest.warns(UserWarning, match=r"metrics.jsonl:6 is not a whole record"):
        assert len(metrics.read_metrics(tmp_path)) == 5
    write(tmp_path, range(3, 6), resume_step=3)
    records = metrics.read_metrics(tmp_path)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_failing_rewrite_leaves_the_old_file(tmp_path, monkeypatch):
    write(tmp_path, range(5))
    before = (tmp_path / "metrics.jsonl").read_text()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        metrics.MetricsWriter(tmp_path, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_errors_of_the_writer(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        with pytest.raises(
            ValueError, match=r"unknown metric 'train/los'; did you mean train/loss"
        ):
            writer.write(0, {"train/los": 1.0})
        with pytest.raises(ValueError, match="unknown metric 'moe/load_max_over_mean/layer_x'"):
            writer.write(0, {"moe/load_max_over_mean/layer_x": 1.0})
        writer.write(3, record(3))
        with pytest.raises(ValueError, match="step 3 is already written"):
            writer.write(3, record(3))


def test_only_process_zero_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(tmp_path / "run", range(2))
    stream = io.StringIO()
    with display.Display(10, stream) as shown:
        shown.show(0, record(0))
        shown.note("hello")
    assert not (tmp_path / "run").exists()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
        ("NVIDIA H20", 148), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250), ("NVIDIA H800", 989), ("cpu", None), ("NVIDIA RTX 4090", None),
    ],
)  # fmt: skip
def test_peak_by_device_kind(kind, peak):
    assert throughput.peak_bf16_tflops(kind) == peak


def test_throughput_counts_steps_and_leaves_pauses_out():
    time = [0.0]
    meter = throughput.Throughput(1e9, 2, "NVIDIA H200", clock=lambda: time[0])
    assert meter.lap() == {}
    for _ in range(4):
        time[0] += 0.5
        meter.add(3000)
    with meter.paused():
        time[0] += 100.0
    lap = meter.lap()
    assert lap == pytest.approx({
        "perf/step_s": 0.5, "perf/tokens_per_s": 6000, "perf/tokens_per_s_per_device": 3000,
        "perf/tflops_per_device": 3.0, "perf/mfu": 3.0 / 989,
    })  # fmt: skip
    metrics.check_names(lap)
    time[0] += 1.0
    meter.add(1000)
    assert meter.lap()["perf/tokens_per_s"] == pytest.approx(1000)  # a lap starts afresh
    unknown = throughput.Throughput(1e9, 2, "cpu", clock=lambda: time[0])
    time[0] += 1.0
    unknown.add(10)
    assert "perf/mfu" not in unknown.lap()


def test_peak_memory_prefers_the_devices(monkeypatch):
    here = throughput.peak_memory_gib()
    assert 0.05 < here < 1000  # a process with JAX in it, in GiB
    devices = [SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (1, 3)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert throughput.peak_memory_gib() == 3 / 2**30


def test_plain_display_is_short_and_keeps_what_matters():
    time, stream = [0.0], io.StringIO()
    with display.Display(1000, stream, clock=lambda: time[0]) as shown:
        for step in range(1000):
            more = {"eval/bits_per_byte": 2.5} if step == 503 else {}
            shown.show(step, record(step, **more))
            time[0] += 0.1
        shown.note("saved")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10 + 3  # every 10 s; the evaluation, the last step, the note
    assert lines[0].startswith("step 1/1000  loss 4.000")
    assert "eval 2.500 bits/byte" in next(line for line in lines if line.startswith("step 504/"))
    assert lines[-2].startswith("step 1000/1000")
    assert lines[-1] == "saved"


def test_terminal_display_rewrites_one_line(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    stream = io.StringIO()
    with display.Display(3, stream) as shown:
        for step in range(3):
            shown.show(step, record(step, **{"perf/step_s": 2.0, "perf/tokens_per_s": 12345.0}))
    text = stream.getvalue()
    assert "\x1b[2K" in text  # erases the line it rewrites
    assert "step 3/3" in text
    assert text.count("\n") == 1


def test_a_narrow_terminal_shows_every_field(monkeypatch):
    """Stage rl in 80 columns: all fields, on three rows."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    line = {
        "policy/reward": 0.514, "eval/accuracy": 0.333, "eval/accuracy_greedy": 0.3,
        "policy/length": 15.2, "policy/entropy": 0.812, "policy/sampler_gap": 1.2e-6,
        "perf/rollout_share": 0.62, "perf/update_share": 0.3, "train/learning_rate": 2e-4,
        "train/grad_norm": 0.512, "moe/load_max_over_mean": 1.3, "train/skipped_steps": 2,
    }  # fmt: skip
    stream = io.StringIO()
    with display.Display(150, stream) as shown:
        shown.show(8, {"perf/step_s": 100.0})
        shown.show(9, line | {"perf/step_s": 2.0})
    for field in ("ETA 4m40s", "held-out 33.3%", "gap 1.2e-06", "grad 0.51", "skipped 2"):
        assert field in stream.getvalue()
    rows = display.wrapped(display.status_line(10, 150, line), 80).splitlines()
    assert len(rows) == 3
    assert max(map(len, rows)) <= 80
    assert "  ".join(rows) == display.status_line(10, 150, line)


def test_the_time_left_does_not_count_the_first_step():
    stream = io.StringIO()
    with display.Display(11, stream, plain_every_s=0) as shown:
        shown.show(0, record(0, **{"perf/step_s": 60.0}))
        shown.show(1, record(1, **{"perf/step_s": 2.0}))
    first, second = stream.getvalue().splitlines()
    assert "ETA" not in first
    assert "ETA 18s" in second


def test_status_line_reads_like_prose():
    full = {
        "train/loss": 3.21449, "eval/bits_per_byte": 2.1, "train/learning_rate": 2.2e-4,
        "train/grad_norm": 0.512, "perf/tokens_per_s": 1_234_567, "perf/mfu": 0.4123,
        "perf/tokens_per_s_per_device": 154321, "moe/load_max_over_mean": 1.239,
        "perf/step_s": 0.5, "train/skipped_steps": 0,
    }  # fmt: skip
    assert display.status_line(100, 1000, full) == (
        "step 100/1000  ETA 7m30s  loss 3.214  eval 2.100 bits/byte  lr 2.20e-04  grad 0.51  "
        "1.23M tok/s  154k tok/s/device  MFU 41.2%  load 1.24x"
    )
    assert "skipped 2" in display.status_line(1, 2, {"train/skipped_steps": 2})


@pytest.mark.parametrize(
    ("x", "text"),
    [(0, "0"), (950, "950"), (999.6, "1.00k"), (12345, "12.3k"), (1e6, "1.00M"), (14.8e12, "14.8T"),
     (9.996e3, "10.0k"), (99_960, "100k"), (5e16, "50000T")],
)  # fmt: skip
def test_human_numbers(x, text):
    assert display.human(x) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.4, "8s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (1_051_200, "12d04h")],
)
def test_durations(seconds, text):
    assert display.duration(seconds) == text


def test_plots_are_drawn_from_the_file(tmp_path):
    rng = np.random.default_rng(0)
    with metrics.MetricsWriter(tmp_path) as writer:
        for step in range(40):
            loads = {f"moe/load_max_over_mean/layer_{n:02d}": 1 + rng.random() for n in range(1, 5)}
            more = {"eval/bits_per_byte": 3.0} if step % 10 == 9 else {}
            writer.write(step, record(step, **loads, **more, **{"train/mtp_loss": 5.0}))
        writer.write(40, record(40, **{"train/loss": float("nan")}))
    drawn = plots.plot_run(tmp_path)
    assert [path.name for path in drawn] == ["loss.png", "expert_load.png"]
    for path in drawn:
        image = imread(path)
        assert image.shape[1] >= 800
        assert image[..., :3].std() > 0.05  # not a blank page
    load = plots.expert_load_figure(metrics.read_metrics(tmp_path))
    assert load is not None
    assert load.axes[0].get_xlabel() == "tokens"


@pytest.mark.parametrize("layers", [1, 4, 58])
def test_no_label_of_the_load_is_cut(layers):
    name = "moe/load_max_over_mean/layer_{:02d}".format
    lines = [
        record(step, **{name(n): 1.5 for n in range(layers)}) | {"step": step} for step in range(3)
    ]
    figure = plots.expert_load_figure(lines)
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    bar = figure.axes[1].yaxis.label.get_window_extent()
    title = figure.axes[0].title.get_window_extent()
    for box in (bar, title):
        assert 0 <= box.x0 <= box.x1 <= figure.bbox.width
        assert 0 <= box.y0 <= box.y1 <= figure.bbox.height


def test_plots_of_a_dense_run_and_of_nothing(tmp_path):
    write(tmp_path, range(1))
    assert [path.name for path in plots.plot_run(tmp_path)] == ["loss.png"]
    assert plots.loss_figure([{"step": 0}]) is None
    with pytest.raises(FileNotFoundError):
        plots.plot_run(tmp_path / "nowhere")


def test_a_stop_signal_sets_the_flag_and_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.requested
        assert stop.signal_name == ""
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        assert stop.signal_name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)  # a person does not want to wait
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_first_interrupt_finishes_the_loop_and_second_ends_it():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # a repeated SIGTERM changes nothing
        assert stop.signal_name == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_signal_is_answered_while_the_main_thread_is_busy():
    """In a call that does not return to Python, as a compilation: said at once, and the second
    SIGINT quits."""
    code = (
        "import hashlib\nfrom runtime.signals import StopRequest\n"
        "with StopRequest():\n"
        "    print('ready', flush=True)\n"
        "    hashlib.pbkdf2_hmac('sha512', b'x', b'y', 10**9)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    first = process.stderr.readline()
    assert first == "SIGINT: finishing this step; again to quit now\n"
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=20)
    assert (process.returncode, rest) == (130, "SIGINT: quitting; the step in progress is lost\n")


def test_a_process_asked_to_stop_leaves_in_peace():
    code = (
        "from runtime.signals import StopRequest\nimport time\n"
        "with StopRequest() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while not stop.requested: time.sleep(0.01)\n"
        "print('saved', stop.signal_name)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (0, "saved SIGTERM\n")
