"""The preflight of hosts with GPUs, on what nvidia-smi says of good and bad ones."""

import shutil

import pytest

from runtime import gpu_host
from runtime.gpu_host import CHECKS, Host, lines, main, preflight, this_host

EIGHT = "\n".join(f"{i}, NVIDIA H200, 9.0, 143771, 4, 580.95.05, Disabled" for i in range(8))
HEADER = "| NVIDIA-SMI 580.95.05   Driver Version: 580.95.05   CUDA Version: 13.0 |"
VERSIONS = {
    "jaxlib": "0.11.2",
    "jax-cuda13-plugin": "0.11.2",
    "nvidia-cuda-nvcc": "13.5.37",
}


def matrix(entry, count=8):
    """A matrix of `nvidia-smi topo`, with its colours, legend and columns that are no GPUs."""
    names = [f"GPU{i}" for i in range(count)]
    rows = ["\t\x1b[4m" + "\t".join([*names, "NIC0", "CPU Affinity"]) + "\x1b[0m"]
    for a in range(count):
        cells = ["X" if a == b else entry(a, b) for b in range(count)]
        rows.append("\t".join([names[a], *cells, "PIX", "0-47"]))
    return "\n".join([*rows, "NIC0\tPIX", "", "Legend:", "  X = Self"])


def host(
    gpus=EIGHT, header=HEADER, topo=lambda a, b: "NV18", peers=lambda a, b: "OK", apps="", **changes
):
    answers = {"--query-gpu": gpus, "--query-compute-apps": apps}

    def ask(*arguments):
        if not arguments:
            return header
        if arguments[0] == "topo":
            return matrix(topo if arguments[1] == "-m" else peers)
        return answers[arguments[0].partition("=")[0]]

    good = {
        "environment": {},
        "versions": VERSIONS,
        "assembler": "Cuda compilation tools, release 13.5, V13.5.37",
        "shared_gib": 64.0,
        "adapters": ("mlx5_0",),
    }
    return Host(ask, **(good | changes))


def problems(found):
    return [f for f in found if f.remedy]


def test_a_good_host_has_no_problem():
    found = preflight(host())
    assert problems(found) == []
    assert {f.check for f in found} == set(CHECKS)
    text = "\n".join(lines(found))
    assert "8 of 8 are seen: 8 x NVIDIA H200 (sm90)" in text
    assert "580.95.05, for CUDA 13.0" in text
    assert "28 pairs by NVLink" in text
    assert lines(found, problems_only=True) == []


@pytest.mark.parametrize(
    ("changes", "check", "text", "remedy"),
    [
        ({"gpus": ""}, "GPUs", "nvidia-smi lists none", "load the driver"),
        ({"gpus": EIGHT.replace("580.95.05", "550.54.15"), "header": "CUDA Version: 12.4 "},
         "driver", "550.54.15, for CUDA 12.4; the wheels are CUDA 13", "driver 580 or newer"),
        ({"versions": {"jaxlib": "0.11.2"}}, "CUDA of JAX", "run on the CPU", "make gpu-env"),
        ({"versions": VERSIONS | {"jaxlib": "0.11.1"}},
         "CUDA of JAX", "plugin 0.11.2 with jaxlib 0.11.1", "make gpu-env"),
        ({"assembler": "release 13.0, V13.0.88"},
         "CUDA of JAX", "ptxas 13.0 on the PATH comes before the locked 13.5", "PATH="),
        ({"environment": {"CUDA_VISIBLE_DEVICES": "9"}}, "GPUs", "9 hides all", "unset it"),
        ({"environment": {"SLURM_NTASKS_PER_NODE": "8(x2)"}},
         "GPUs", "8 processes on this host, and each sees all 8", "--gpus-per-task=1"),
        ({"gpus": EIGHT.replace("Disabled", "Enabled")}, "GPUs", "MIG is on", "switched off"),
        ({"gpus": EIGHT.replace("7, NVIDIA H200, 9.0", "7, NVIDIA L40S, 8.9")},
         "GPUs", "of several kinds", "choose one kind"),
        ({"gpus": EIGHT.replace("143771, 4, ", "143771, 90000, ", 1), "apps": "4711, 89000"},
         "memory", "GPU 0: 90000 of 143771 MiB taken (processes 4711)", "end them"),
        ({"topo": lambda a, b: "SYS" if 7 in (a, b) else "NV18"},
         "links", "no NVLink: GPU0-GPU7 (SYS), GPU1-GPU7 (SYS)", "one NVLink group"),
        ({"peers": lambda a, b: "CNS"}, "links", "no peer access: GPU0-GPU1 (CNS)", "ACS"),
        ({"environment": {"NCCL_P2P_DISABLE": "1"}},
         "NCCL", "NCCL_P2P_DISABLE=1: GPUs of a host then send", "unset NCCL_P2P_DISABLE"),
        ({"environment": {"NCCL_NVLS_ENABLE": "0"}}, "NCCL", "NVLS_ENABLE=0: 0 leaves", "unset"),
        ({"shared_gib": 0.0625}, "NCCL", "/dev/shm has 0.06 GiB", "--shm-size"),
        ({"adapters": (), "environment": {"SLURM_JOB_NUM_NODES": "2"}},
         "NCCL", "2 hosts and no InfiniBand", "NCCL_SOCKET_IFNAME"),
    ],
)  # fmt: skip
def test_each_problem_is_named_with_its_remedy(changes, check, text, remedy):
    (problem,) = problems(preflight(host(**changes)))
    assert problem.check == check
    assert text in problem.text
    assert remedy in problem.remedy
    assert lines([problem]) == [f"gpu host  {check}: {problem.text} -> {problem.remedy}"]


def test_only_what_this_process_sees_is_judged():
    taken = EIGHT.replace("143771, 4, ", "143771, 90000, ", 1)
    slow_to_7 = host(taken, topo=lambda a, b: "SYS" if 7 in (a, b) else "NV18")
    for visible in ("1,2", "2,1,99,0"):
        seen = slow_to_7._replace(environment={"CUDA_VISIBLE_DEVICES": visible})
        assert problems(preflight(seen)) == []
        assert "2 of 8 are seen" in "\n".join(lines(preflight(seen)))
    assert "1 pairs by NVLink" in "\n".join(lines(preflight(seen)))
    by_name = host(environment={"CUDA_VISIBLE_DEVICES": "GPU-1a,GPU-2b,GPU-3c"})
    assert "3 of 8 are seen" in "\n".join(lines(preflight(by_name)))


def test_cards_without_nvlink_are_no_problem():
    """All pairs alike, as on hosts of L40S."""
    found = preflight(host(topo=lambda a, b: "NODE"))
    assert problems(found) == []
    assert "28 pairs by NODE" in "\n".join(lines(found))


def test_flags_are_told_with_their_reason():
    environment = {
        "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false --xla_some_flag=1",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": ".9",
    }
    text = "\n".join(lines(preflight(host(environment=environment))))
    assert "--xla_gpu_enable_triton_gemm=false: false leaves products to cuBLAS" in text
    assert "--xla_some_flag=1: from the environment" in text
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=.9: how much memory" in text


def test_a_machine_without_gpus_says_what_it_would_check(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    main()
    said = capsys.readouterr().out
    assert "no NVIDIA GPU" in said
    assert all(check in said for check in CHECKS)


def test_a_driver_that_does_not_answer_is_told(monkeypatch, capsys, tmp_path):
    """nvidia-smi is there and fails, as it does without a loaded driver."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'has failed because it could not communicate'\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu_host.has_gpus()
    assert this_host().ask("--query-gpu=index") == ""
    main()
    assert "nvidia-smi lists none -> load the driver" in capsys.readouterr().out
