"""Plans: closed forms against figures worked out by hand, refusals, files, and the page.

Compiled programs: tests/test_planning_compiled.py.
"""

import dataclasses
import functools
import json
import math
import re

import numpy as np
import pytest

import plan as entry
from bench.gpu_proof import Proof, measured
from configs import preset
from planning import plan
from planning.api import case_of
from planning.compare import compare
from planning.guard import gpu_of_kind, memory_line
from planning.hardware import FP8_PRODUCTS, MEMORY, Shape, make_hardware, near
from planning.memory import carried_by
from planning.page import page_of
from planning.report import GIB
from planning.search import Found, Limits, compiled, describe, pareto, ranked
from planning.stretch import planned_table
from planning.time import passes_of
from planning.traffic import traffic_of
from planning.ways import DEEPSEEK
from programs.absent_gpus import GPUS as COMPILED_FOR
from runtime.gpus import GPUS
from sharding.config import LAYOUTS, MeshConfig
from sharding.pipeline.schedule import SCHEDULES, make_schedule
from sharding.pipeline.simulate import Costs, simulate
from sharding.pipeline.ticks import tick_table
from training.throughput import PEAK_BF16_TFLOPS

H100 = make_hardware("h100")
MEMORY_KEYS = {
    "weights", "gradients", "optimizer", "stash", "exchange", "workspace", "total", "limit",
}  # fmt: skip
KEYS = {
    "fits", "memory_gib", "collectives", "step_seconds", "parts_seconds", "bubble_fraction",
    "tokens_per_s_per_gpu", "mfu_causal", "mfu_noncausal", "gpu_hours", "cost", "engine",
}  # fmt: skip
SENT_KEYS = {"op", "axis", "times", "gib", "link", "seconds", "exposed_seconds"}


def lite(mesh: MeshConfig, gpus: int, micro: int, **train):
    return case_of("v2_lite", H100, gpus, mesh, micro, **train)


# ---- figures worked out by hand -----------------------------------------------------------------


def test_state_of_a_layout_worked_out_by_hand():
    """V2-Lite on 8 GPUs, experts over all of them (docs/planning.md has the same sums).

    15.706 B parameters, 14.395 B of them routed experts' (26 layers x 64 x 3 x 2048 x 1408). A GPU
    stores an eighth of everything in fp32, moments in bf16, and holds copies in bf16 of what it
    has not got, the others whole; gradients of these and of its experts are summed in fp32.
    """
    carried = carried_by(lite(MeshConfig(expert=8), 8, 8, batch_size=64))
    routed = 26 * 64 * 3 * 2048 * 1408
    others = 15_706_484_224 - routed
    stored = (routed + others) / 8
    assert carried["weights"] == pytest.approx(4 * stored + 2 * others, rel=2e-3)
    assert carried["optimizer"] == pytest.approx(4 * stored, rel=2e-3)
    assert carried["gradients"] == pytest.approx(4 * (routed / 8 + others), rel=2e-3)


def test_stash_of_a_layout_worked_out_by_hand():
    """What 26 MoE layers keep of 4096 tokens: input, key-value latent, attention's output with its
    log-sums, the experts' numbers and weights, and positions."""
    carried = carried_by(lite(MeshConfig(expert=8), 8, 8, batch_size=64))
    token = 2 * (2048 + 576 + 16 * 128) + 4 * (16 + 6 + 6 + 1)
    assert carried["stash"] == pytest.approx(26 * 4096 * token, rel=1e-3)


@pytest.mark.parametrize("remat", ["selective", "full"])
def test_the_stash_follows_the_recomputation(remat):
    kept = lite(MeshConfig(expert=8), 8, 8, batch_size=64, remat=remat).kept()
    assert kept[0].shape == (4096, 2048)
    assert (len(kept) > 2) == (remat == "selective")


def test_sequence_parallelism_cuts_what_layers_keep():
    def stash(**mesh) -> float:
        case = lite(MeshConfig(fsdp=2, tensor=4, **mesh), 8, 2, batch_size=8)
        return carried_by(case)["stash"]

    whole, cut = stash(), stash(sequence=True)
    token_of_stream = 2 * (2048 + 576)
    assert whole - cut == pytest.approx(26 * 4096 * token_of_stream * 3 / 4, rel=1e-3)


def test_the_expert_exchange_sends_what_even_load_brings():
    """8 GPUs, no groups: a token needs a shard of 8 of 64 experts with 1 - C(56, 6)/C(64, 6)."""
    case = lite(MeshConfig(expert=8, exchange="ragged"), 8, 8, batch_size=64)
    share = 1 - math.comb(56, 6) / math.comb(64, 6)
    sent = next(one for one in traffic_of(case, passes_of(case)) if one.axis == "expert")
    passes = 26 * 8
    ways = 5  # to the experts and back; again, with gradients of outputs, and of inputs back
    assert sent.bytes == pytest.approx(passes * ways * 8 * 4096 * share * 2048 * 2, rel=1e-3)
    assert sent.seconds == pytest.approx(sent.bytes / (450e9 * 155 / 200))


def test_a_pipeline_is_no_faster_than_its_schedule_allows():
    case = lite(MeshConfig(pipe=2, expert=4, schedule="1f1b"), 8, 4, batch_size=32)
    passing = passes_of(case)
    layer = passing.layer
    stage = 13
    costs = Costs(
        F=stage * layer.F.total, B=stage * layer.B.total, W=stage * layer.W.compute, FB=1.0
    )
    ideal = simulate(make_schedule("1f1b", 2, 8), costs)
    assert passing.seconds > ideal.makespan
    assert passing.bubble >= 0.9 * max(ideal.bubble) / passing.seconds


def test_v3_in_deepseeks_ways_is_as_fast_as_published():
    """1,541.7 tokens/s/GPU and 38.94% of the peak (ISCA 2025, table 4), within 10%."""
    from planning.report import report_of

    hardware, mesh = make_hardware("h800"), LAYOUTS["deepseek"]
    case = case_of("v3_671b", hardware, 2048, mesh, 128, batch_ramp_from=0, batch_ramp_tokens=0.0)
    report = report_of(dataclasses.replace(case, ways=DEEPSEEK), "v3")
    assert report.tokens_per_s_per_gpu == pytest.approx(1541.7, rel=0.1)
    assert report.mfu[0] == pytest.approx(0.3894, rel=0.1)
    own = report_of(case, "v3")
    assert own.tokens_per_s_per_gpu < report.tokens_per_s_per_gpu


def test_a_dense_model_of_one_node_worked_out_by_hand():
    """Qwen2.5-7B, 7,615,616,512 parameters, over fsdp 8: a GPU stores an eighth in fp32, its
    moments in bf16, sums of gradients as they are stored, and what the gathers of two micro
    batches turn once more. A layer keeps its input, and attention's output with a log-sum for each
    of its 28 heads, and positions."""
    case = case_of("qwen25_7b", H100, 8, MeshConfig(fsdp=8), 8, batch_size=16, seq_len=4096)
    # Cut along their last dimension: the embedding, and of every layer what ends in the stream.
    turned = 152_064 * 3584 + 28 * (18_944 + 3584) * 3584
    assert carried_by(case) == {
        "weights": pytest.approx((7_615_616_512 + turned) * 4 / 8, rel=1e-3),
        "optimizer": pytest.approx(7_615_616_512 * 4 / 8, rel=1e-3),
        "gradients": pytest.approx(7_615_616_512 * 4 / 8, rel=1e-3),
        "stash": pytest.approx(28 * 4096 * (2 * (3584 + 28 * 128) + 4 * (28 + 1)), rel=1e-4),
    }
    passing = passes_of(case)
    assert passing.exchange == 0
    assert {one.axis for one in traffic_of(case, passing)} == {"fsdp"}


def test_a_dense_model_whose_attention_is_cudnns_is_planned_without_it():
    """What a layer keeps is traced, and JAX traces cuDNN's attention where cuDNN is alone."""
    report = plan("qwen25_1_5b", gpu="a100", gpus=8)
    assert report.layout["attention"] == "cudnn"
    # A layer's input and attention's output, 1536 numbers each of 8 x 8192 tokens, in bf16.
    kept = 28 * 8 * 8192 * 2 * 1536 * 2
    assert report.memory.stash == pytest.approx(kept, rel=1e-3)  # and positions


def test_gpus_that_take_the_library_are_planned_with_it():
    """Their hosts have it; attention's T x T in XLA's blocks would count for nothing that runs."""
    for gpu in ("l40s", "a100-80", "b200", "gb300"):
        report = plan("v2_lite", gpu=gpu, gpus=8, layout=MeshConfig(expert=8))
        assert report.layout["attention"] == "library"
    ours = plan("v2_lite", gpu="h200", gpus=8, layout=MeshConfig(expert=8))
    assert ours.memory.stash == report.memory.stash


def test_a_dense_model_in_a_pipeline_is_cut_evenly():
    mesh = MeshConfig(pipe=4, fsdp=2)
    case = case_of("qwen25_7b", H100, 8, mesh, 2, batch_size=32)
    assert (case.placement.layer_of >= 0).sum() == 28
    assert passes_of(case).bubble > 0


# ---- hardware -----------------------------------------------------------------------------------


def test_one_source_of_facts_about_gpus():
    for name, gpu in COMPILED_FOR.items():
        if name in GPUS:
            assert abs(gpu.memory - GPUS[name].usable) < 0.08 * gpu.memory, name
            assert gpu.bandwidth == pytest.approx(GPUS[name].bandwidth, rel=0.05), name
    for gpu in GPUS.values():
        assert PEAK_BF16_TFLOPS[gpu.name] * 1e12 == gpu.bf16


def test_speeds_of_published_shapes_are_theirs():
    shape = Shape(7168, 16384)
    assert near(FP8_PRODUCTS, *shape) == FP8_PRODUCTS[shape]
    assert make_hardware("h800").product(4096, *shape, fp8=True) == pytest.approx(1520e12)
    assert H100.memory_speed == pytest.approx(3.35e12 * MEMORY.value)
    between = near(FP8_PRODUCTS, 4096, 6000)
    assert min(FP8_PRODUCTS.values()) < between < max(FP8_PRODUCTS.values())


def test_own_measurements_override(tmp_path):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({"memory": {"bandwidth": 1e12}, "dollars_per_gpu_hour": 3}))
    own = make_hardware("h100", measured=str(file))
    assert own.memory_speed == 1e12
    assert own.dollars_per_hour == 3


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"memry": {}}, "no table memry; there are products"),
        ({"memory": {"bandwith": 1e12}}, "memory has no key 'bandwith'; keys look like bandwidth"),
        ({"products": {"4096x7168 fp4": 1e12}}, "products has no key '4096x7168 fp4'"),
        ({"attention": {"forward": 0}}, "attention forward is 0, no positive number"),
        ({"attention": {"forward": "fast"}}, "attention forward is 'fast'"),
        ({"dollars_per_gpu_hour": -2}, "dollars_per_gpu_hour is -2"),
        ([], "it holds no tables by name"),
        ({"memory": 3e12}, "memory is no table"),
        ({"device": {"dry": True}}, "made without a GPU"),
        ({"device": {"kind": "NVIDIA H200"}}, "is of NVIDIA H200, and --gpu is h100"),
    ],
)
def test_a_file_of_measurements_that_says_nothing_is_refused(tmp_path, found, message):
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=re.escape(message)):
        make_hardware("h100", measured=str(file))


def test_the_proof_of_a_gpu_writes_measurements(tmp_path):
    """What `make gpu-proof` writes is what plans read: each speed where it was measured, and
    between shapes by the nearest."""
    proof = Proof(1.0, dry=False)
    times = {
        ("any", "product 4096x24576x1536", "both"): (2.0, 700e12),
        ("any", "copy", "both"): (0.001, 4.4e12),
        ("V3", "attention", "forward"): (0.01, 600e12),
        ("V3", "attention", "both"): (0.04, 500e12),
        ("V3", "experts", "both"): (0.1, 640e12),
        ("V3", "experts, FP8", "both"): (0.06, 1000e12),
    }
    proof.times = [
        dict(zip(("model", "path", "passes"), key, strict=True))
        | {"by": "mosaic", "seconds": seconds, "flop_per_s": speed}
        for key, (seconds, speed) in times.items()
    ]
    found = measured(proof)
    assert found["device"].pop("kind") == "cpu"
    file = tmp_path / "proof.json"
    file.write_text(json.dumps(found))
    own = make_hardware("h200", measured=str(file))
    assert own.product(4096, 24576, 1536, fp8=False) == 700e12
    assert own.product(4096, 4096, 7168, fp8=False) == 700e12, "the nearest that was measured"
    assert own.product(4096, 24576, 1536, fp8=True) == pytest.approx(1212e12), "not measured"
    assert own.memory_speed == 4.4e12
    assert own.grouped(4096, 4096, 7168, fp8=True) == 1000e12
    assert own.grouped(4096, 2048, 7168, fp8=False) == 640e12
    assert own.attention(4096, backward=False) == 600e12
    assert own.attention(4096, backward=True) == pytest.approx(2.5 * 600e12 * 0.01 / 0.03)


def test_kinds_of_devices_are_known_by_their_words():
    assert gpu_of_kind("NVIDIA H100 80GB HBM3") == "h100"
    assert gpu_of_kind("NVIDIA GB200") == "gb200"
    assert gpu_of_kind("cpu") == ""


# ---- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("tiny --gpus 8 --mesh.expert 3", "Legal and near: "),
        ("tiny --gpus 6 --mesh.pipe 2 --mesh.schedule dualpipe", "at least 2 x 2 ranks"),
        ("v2_lite --gpus 64 --mesh.pipe 64", "26 layers to cut"),
        ("tiny --gpus 0 --gpu h100 --mesh.expert 16 --mesh.data -2", "must be positive"),
        ("tiny --gpu h100 --measured nowhere.json", "--measured nowhere.json"),
        ("tiny --compare a.json", "--compare takes two files"),
        ("tiny --gpus 1000", "Legal and near: "),
        ("tiny --gpus -8", "--gpus -8: give 1 or more"),
        ("tiny --gpus 8 --network -5", "--network -5"),
        ("tiny --gpus 8 --per-node -1", "--per-node -1"),
        ("tiny --gpus 8 --json nowhere/a.json", "--json nowhere/a.json: there is no folder"),
        ("tiny --gpus 8 --html .", "--html .: no file can be written there"),
        ("tiny --search --gpus 8 --top 0", "--top 0"),
        ("tiny --search --gpus 8 --max-tensor 0", "--max-tensor 0"),
        ("janus_tiny --gpus 8", "plans are of language models"),
    ],
)
def test_what_cannot_work_is_refused(capsys, words, message):
    assert entry.main(words.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("plan.py: ")
    assert error.count("\n") == 1
    assert message in error


def test_unknown_presets_and_gpus_name_what_there_is(capsys):
    with pytest.raises(SystemExit) as ended:
        entry.main(["v3"])
    assert ended.value.code == 2
    assert "Known: tiny" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--gpu h101: there are a100, l40s, h100"):
        plan("tiny", gpu="h101")


def test_neighbours_of_a_refused_layout_are_legal():
    with pytest.raises(ValueError, match="Legal and near: ") as refused:
        plan("tiny", gpus=8, layout=MeshConfig(expert=3))
    offers = str(refused.value).split("Legal and near: ")[1].split("; ")
    sizes = dict(re.findall(r"(pipe|data|fsdp|expert|context|tensor)=(\d+)", offers[0]))
    assert sizes
    mesh = MeshConfig(**({"expert": 3} | {name: int(size) for name, size in sizes.items()}))
    assert plan("tiny", gpus=8, layout=mesh, with_advice=False).gpus == 8


# ---- reports, files, the page -------------------------------------------------------------------


def test_json_has_the_documented_keys_and_adds_up(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert entry.main(["tiny", "--gpus", "8", "--json", str(file), "--no-advice"]) == 0
    said = capsys.readouterr().out  # a small model: three digits, not 0.000 s and 1e-7 T tokens
    assert re.search(r"step +0\.000[1-9]\d\d s", said)
    assert re.search(r"819\.2 K tokens: 0\.\d+ GPU hours", said)
    found = json.loads(file.read_text())
    assert found.keys() >= KEYS
    memory = found["memory_gib"]
    assert memory.keys() == MEMORY_KEYS
    assert sum(v for k, v in memory.items() if k not in ("total", "limit")) == pytest.approx(
        memory["total"]
    )
    assert found["fits"] is True
    assert sum(found["parts_seconds"].values()) == pytest.approx(found["step_seconds"])
    assert all(one.keys() >= SENT_KEYS for one in found["collectives"])
    tokens = found["tokens_per_step"] / found["step_seconds"] / 8
    assert found["tokens_per_s_per_gpu"] == pytest.approx(tokens)
    assert found["engine"] == "closed form"


def test_the_page_has_the_numbers_of_the_json():
    report = plan("tiny", gpus=8, layout="cube", with_advice=False)
    found = report.to_json()
    page = page_of([found])
    data = re.search(r'<script type="application/json" id="plans">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    assert json.loads(data.group(1).replace("<\\/", "</")) == [json.loads(json.dumps(found))]
    for name, size in found["memory_gib"].items():
        if name not in ("total",) and size > 0:
            assert f"{name}: {size:.4g} GiB" in page
    for name, seconds in found["parts_seconds"].items():
        if seconds > 0:
            assert f"{name}: {seconds:.4g} seconds" in page
    assert "http://" not in re.sub(r'xmlns[:\w]*="[^"]*"|xlink="[^"]*"', "", page)
    assert "https://" not in page


def test_a_pipelines_page_shows_its_ticks():
    report = plan(
        "tiny", gpus=4, layout=MeshConfig(pipe=2, data=2), micro_batch_size=2, batch_size=8,
        with_advice=False,
    )  # fmt: skip
    page = page_of([report.to_json()])
    assert page.count("forward: ") >= 4
    assert report.bubble_fraction > 0


def test_two_plans_side_by_side(tmp_path):
    names = []
    for layout in ("fsdp", "cube"):
        names.append(str(tmp_path / f"{layout}.json"))
        plan("tiny", gpus=8, layout=layout, with_advice=False).write(names[-1])
    lines = compare(names)
    assert "fsdp" in lines[0]
    assert any(line.startswith("tokens_per_s_per_gpu") for line in lines)
    for text in ("{}", "[]", '"plan"', json.dumps({"best": [], "front": []})):
        (tmp_path / "fsdp.json").write_text(text)
        with pytest.raises(ValueError, match="is no plan: it has no "):
            compare(names)


def test_a_plan_that_does_not_fit_is_told_what_helps():
    report = plan("v2_lite", gpu="h100", gpus=1, layout="single", micro_batch_size=1, batch_size=64)
    assert not report.fits
    assert report.advice[0].startswith("does not fit by ")


# ---- search and train.py ------------------------------------------------------------------------


@functools.cache
def searched() -> Found:
    return ranked(preset("tiny"), H100, 4, Limits(2, 2, 1), "tiny", show=False)


def test_search_ranks_legal_layouts_and_keeps_the_front():
    found = searched()
    assert found.legal > 5
    speeds = [report.tokens_per_s_per_gpu for report in found.best]
    assert speeds == sorted(speeds, reverse=True)
    assert found.front == tuple(pareto(list(found.front)))
    assert {report.gpus for report in found.best} == {4}


def test_a_search_compiles_the_best_and_names_what_fails(monkeypatch, capsys):
    """Beside each other; what does not fit by its program goes behind what does."""
    found = searched()
    first, second, third, *others = found.best

    def with_compiled(report, case, cache, say):
        say("compiling")
        assert case.gpus == 4
        assert cache == "kept"
        if report is second:
            raise ValueError("the compiler has failed")
        needs = 1e6 if report is first else 1.0
        return dataclasses.replace(report, compiled={"memory_gib": {"total": needs}})

    monkeypatch.setattr("planning.compiled.with_compiled", with_compiled)
    best = compiled(found, 3, "kept").best
    assert [describe(report) for report in best] == [describe(r) for r in (third, first, *others)]
    assert [report.fits for report in best[:2]] == [True, False]
    said = capsys.readouterr().err
    assert f"3 of 3, {describe(third)}: compiling\n" in said
    assert f"2 of 3, {describe(second)}: the compiler has failed\n" in said


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_long_schedule_is_planned_as_it_is(name):
    """The block of ticks that repeats is found; ops, chunks and slots are those of the whole."""
    chunks = 3 if name == "interleaved" else 1
    for ranks, micro_batches in [(2, 14), (4, 24), (6, 60)]:
        whole = tick_table(make_schedule(name, ranks, micro_batches, chunks))
        found = planned_table(name, ranks, micro_batches, chunks)
        for column in ("code", "f_chunk", "b_chunk"):
            np.testing.assert_array_equal(getattr(found, column), getattr(whole, column))
        assert found[len(whole.columns()) :] == whole[len(whole.columns()) :], "slots and channels"
        repeated = (found.f_micro != whole.f_micro).any()
        assert repeated == (name != "gpipe"), "of few micro batches, but for gpipe"


def test_memory_line_of_a_run_and_its_refusal():
    line, refusal = memory_line(preset("tiny"), "h100", 8)
    assert line.startswith("memory       ")
    assert refusal == ""
    run = dataclasses.replace(preset("v3_671b"), mesh=MeshConfig(fsdp=8))
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, micro_batch_size=8))
    _, refusal = memory_line(run, "h100", 8)
    assert "a step takes at least" in refusal
    assert "--no-memory-check" in refusal


def test_limits_say_where_the_rest_goes():
    report = plan("tiny", gpus=8, with_advice=False)
    left, lines = H100.limit(1)
    assert report.memory.limit == left
    assert left < GPUS["h100"].usable < 80 * GIB
    assert len(lines) == 4
