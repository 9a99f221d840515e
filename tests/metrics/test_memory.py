import subprocess
import sys

import pytest
import torch

from lightning_dualpipe.metrics import peak_memory
from tests.marks import needs_cuda

CPU = torch.device("cpu")


def test_it_rises_with_what_is_held_and_does_not_fall():
    before = peak_memory(CPU)
    held = torch.ones(before // 4 + 2**26)  # more than all that this process has ever held
    after = peak_memory(CPU)
    assert after > before + 2**27
    del held
    assert peak_memory(CPU) > after - 2**24  # the kernel adds up what its cores have counted now and then


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_it_is_not_that_of_the_process_that_started_this_one():
    """``getrusage`` gives a child the peak of who started it, across exec."""
    held = torch.ones(2**27)  # 512 MiB
    script = "import re; print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024)"
    child = int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert child < 2**27 < held.nbytes <= peak_memory(CPU)


@needs_cuda
def test_on_a_gpu_it_is_what_torch_had_allocated():
    device = torch.device("cuda", 0)
    held = torch.empty(2**26, device=device)
    assert peak_memory(device) >= held.nbytes
