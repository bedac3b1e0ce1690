"""What the doctor says of machines that are made up, and of this one."""

import subprocess
import sys

import pytest

from tests.helpers.launch import ROOT
from utils import doctor
from utils.doctor import Facts, judge, pins

REQUIREMENTS = (ROOT / "requirements.txt").read_text()
GOOD = Facts(
    python=(3, 11, 7),
    system="Linux",
    release="6.8.0",
    packages={name: pins(REQUIREMENTS, (3, 11)).get(name, "9.9") for name in doctor.PACKAGES},
    shm_bytes=8 << 30,
    open_files=65536,
    gpus=[{"name": "NVIDIA H200", "gib": 139.0, "capability": "9.0", "bf16": True}] * 2,
)
ADA = {"name": "NVIDIA GeForce RTX 4090", "gib": 24.0, "capability": "8.9", "bf16": True}
TURING = {"name": "Tesla T4", "gib": 15.0, "capability": "7.5", "bf16": False}


def wrong(facts: Facts) -> dict[str, str]:
    return {line.what: f"{line.level}: {line.found}; {line.mend}" for line in judge(facts, REQUIREMENTS) if line.mend}


def test_a_good_machine_has_nothing_said_of_it():
    assert wrong(GOOD) == {}


@pytest.mark.parametrize(
    ("change", "what", "told"),
    [
        ({"python": (3, 9, 1)}, "Python", "broken: 3.9.1"),
        ({"packages": {**GOOD.packages, "torch": None}}, "torch", "broken: not installed"),
        ({"packages": {**GOOD.packages, "rich": "14.0.0"}}, "rich", "note: 14.0.0; tested with 15.0.0"),
        ({"packages": {**GOOD.packages, "deepspeed": "0.17.2"}}, "known", "broken: DeepSpeed below 0.19.3"),
        ({"packages": {**GOOD.packages, "torch": "2.5.1+cu124"}}, "known", "broken: torch below 2.6"),
        ({"torch_fault": "OSError: libcudart.so.12"}, "import torch", "broken: OSError: libcudart"),
        ({"shm_bytes": 64 << 20}, "/dev/shm", "note: 0.06 GiB; clips and NCCL travel through it"),
        ({"open_files": 256}, "open files", "note: 256; ulimit -n"),
        ({"gpus": []}, "GPU", "note: none"),
        ({"gpus": [TURING]}, "GPU", "no bfloat16"),
        ({"gpus": [ADA, ADA]}, "known", "NCCL_P2P_DISABLE=1"),
        ({"system": "Windows"}, "known", "broken: DeepSpeed's pipeline"),
        ({"release": "5.15.167.4-microsoft-standard-WSL2"}, "known", "note: WSL"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_odd_is_told_with_its_mend(change, what, told):
    assert told in wrong(GOOD._replace(**change))[what]


def test_one_gpu_or_the_variable_set_needs_no_advice():
    assert wrong(GOOD._replace(gpus=[ADA])) == {}
    assert wrong(GOOD._replace(gpus=[ADA, ADA], environment={"NCCL_P2P_DISABLE": "1"})) == {}


def test_pins_are_those_of_this_python():
    assert pins(REQUIREMENTS, (3, 11))["diffusers"] != pins(REQUIREMENTS, (3, 10))["diffusers"]
    assert all(pair.source and pair.mend for pair in doctor.PAIRS)


def test_it_runs_without_torch_and_shows_no_secret(tmp_path):
    """With the site's packages out of reach: the first start on a new machine."""
    secret = "hf_0123456789"
    environment = {"PATH": "/usr/bin", "HF_TOKEN": secret, "WANDB_API_KEY": secret, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); "
         "from utils.doctor import main; sys.exit(main([]))"],
        env=environment, capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "X torch" in done.stdout and "not installed" in done.stdout and "Traceback" not in done.stderr
    assert secret not in done.stdout + done.stderr and "OMP_NUM_THREADS" in done.stdout


def test_this_machine_is_looked_at():
    facts = doctor.look()
    text = doctor.table([*doctor.surroundings(facts), *judge(facts, REQUIREMENTS)])
    assert facts.packages["torch"] and "gloo" in text and "GiB free" in text
