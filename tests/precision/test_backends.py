"""Which backend computes, and what is said where none can. GPUs are pretended: only what torch says of them matters."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lightning_dualpipe.errors import ConfigurationError, MissingPackageError
from lightning_dualpipe.precision import backends
from lightning_dualpipe.precision.backends import choose_backend
from lightning_dualpipe.precision.emulate import EmulateBackend
from lightning_dualpipe.precision.recipe import BF16, MXFP8, Block, Current, Delayed
from lightning_dualpipe.precision.te_backend import why_not_te

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GPUS = {"A100": (8, 0), "RTX 3090": (8, 6), "RTX 4090": (8, 9), "H200": (9, 0), "B200": (10, 0), "RTX 5090": (12, 0)}


class Machine:
    """A GPU, and what the two backends say about themselves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu = "H200"
        self.against: dict[str, str | None] = {"te": None, "torch": None}
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: GPUS[self.gpu])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: self.gpu)
        monkeypatch.setattr(backends, "find_spec", lambda name: None if self.missing else object())
        for name, kind in (("te", "TEBackend"), ("torch", "TorchBackend")):
            stand_in = SimpleNamespace(
                **{
                    f"why_not_{name}": lambda recipe, name=name: self.against[name],
                    kind: lambda recipe, name=name: name,
                }
            )
            monkeypatch.setitem(sys.modules, f"lightning_dualpipe.precision.{name}_backend", stand_in)

    @property
    def missing(self) -> bool:
        return "not installed" in (self.against["te"] or "")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_transformer_engine_is_the_first_choice(machine):
    choice = choose_backend("auto", Block(), CUDA)
    assert (choice.name, choice.build()) == ("te", "te")
    assert str(choice) == "backend='te': it can be used here"


def test_torch_is_the_second(machine):
    machine.against["te"] = "Transformer Engine is not installed"
    choice = choose_backend("auto", Block(), CUDA)
    assert (choice.name, choice.build()) == ("torch", "torch")


@pytest.mark.parametrize("recipe", [Block(), Current(), MXFP8()], ids=str)
def test_the_definition_computes_where_there_are_no_kernels(recipe, machine):
    choice = choose_backend("auto", recipe, CPU)
    assert choice.name == "emulate" and isinstance(choice.build(), EmulateBackend)
    assert str(choice) == "backend='emulate': no kernels multiply FP8 on cpu"
    in_float64 = choose_backend("auto", recipe, CUDA, torch.float64)
    assert str(in_float64) == "backend='emulate': no kernels multiply FP8 in float64"


@pytest.mark.parametrize("name", ["te", "torch", "emulate"])
def test_what_is_asked_for_is_taken(name, machine):
    choice = choose_backend(name, Block(), CUDA)
    assert str(choice) == f"backend={name!r}: as asked for"


def test_a_recipe_without_fp8_needs_nobody(machine):
    for wanted in backends.BACKENDS:
        assert choose_backend(wanted, BF16(), CPU).name is None


_BLOCK = "recipe 'block' needs Hopper (H100, H200) or Blackwell (B200), and this is"
LACKING = {
    ("A100", Block()): f"{_BLOCK} A100 (SM80); use recipe='bf16'",
    ("RTX 3090", Current()): "recipe 'current' needs Ada (L4, L40S), Hopper (H100, H200) or newer, and this is "
    "RTX 3090 (SM86); use recipe='bf16'",
    ("RTX 4090", Block()): f"{_BLOCK} RTX 4090 (SM89); use recipe='current' or recipe='bf16'",
    ("H200", MXFP8()): "recipe 'mxfp8' needs Blackwell (B200), and this is H200 (SM90); use recipe='block' or "
    "recipe='bf16'",
    ("RTX 5090", MXFP8()): "recipe 'mxfp8' needs Blackwell (B200), and this is RTX 5090 (SM120); use recipe='current' "
    "or recipe='bf16'",
    ("RTX 5090", Block()): f"{_BLOCK} RTX 5090 (SM120); use recipe='current' or recipe='bf16'",
}


@pytest.mark.parametrize(("gpu", "recipe"), LACKING, ids=lambda each: str(each))
def test_a_gpu_without_kernels_computes_without_fp8_or_refuses_what_it_is_asked_for(gpu, recipe, machine):
    machine.gpu = gpu
    message = LACKING[gpu, recipe]
    choice = choose_backend("auto", recipe, CUDA)
    assert (choice.name, choice.reasons) == (None, (message,))
    for wanted in ("te", "torch"):
        with pytest.raises(ConfigurationError) as refused:
            choose_backend(wanted, recipe, CUDA)
        assert str(refused.value) == f"backend={wanted!r} cannot run: {message}"
    assert choose_backend("emulate", recipe, CUDA).name == "emulate"


@pytest.mark.parametrize(("gpu", "recipe"), [("RTX 4090", Current()), ("RTX 4090", Delayed()), ("B200", MXFP8())])
def test_a_gpu_with_kernels_is_used(gpu, recipe, machine):
    machine.gpu = gpu
    assert choose_backend("auto", recipe, CUDA).name == "te"


def test_a_package_that_would_not_help_is_not_asked_for(machine):
    machine.gpu, machine.against["te"] = "A100", "Transformer Engine is not installed; pip install it"
    with pytest.raises(ConfigurationError, match="needs Hopper"):
        choose_backend("te", Block(), CUDA)


def test_a_missing_package_is_named(machine):
    machine.against["te"] = "Transformer Engine is not installed; pip install it"
    with pytest.raises(MissingPackageError, match="backend='te' cannot run: Transformer Engine is not installed; pip"):
        choose_backend("te", Block(), CUDA)


def test_a_gpu_that_could_is_not_left_idle_in_silence(machine):
    machine.against = {"te": "Transformer Engine is not installed; pip install it", "torch": "it knows 'block' alone"}
    with pytest.raises(ConfigurationError) as refused:
        choose_backend("auto", Current(), CUDA)
    assert str(refused.value).splitlines() == [
        "recipe 'current' cannot run, though this GPU could; backend='emulate' can, slower than without FP8:",
        "  - te: Transformer Engine is not installed; pip install it",
        "  - torch: it knows 'block' alone",
    ]


def test_a_build_of_torch_that_is_too_old_is_named(machine):
    machine.against["te"] = "recipe 'block' needs a torch built for CUDA 12.9 or newer, and this one is for 12.6"
    with pytest.raises(ConfigurationError, match=r"backend='te' cannot run: .*CUDA 12\.9 or newer, .* for 12\.6"):
        choose_backend("te", Block(), CUDA)


@pytest.mark.parametrize("name", ["te", "torch"])
def test_kernels_are_refused_where_there_is_no_gpu_and_in_float64(name, machine):
    with pytest.raises(
        ConfigurationError, match=r"needs CUDA devices, and this run computes on cpu; use backend='emul"
    ):
        choose_backend(name, Block(), CPU)
    with pytest.raises(ConfigurationError, match=r"has no kernels for float64; use weights='bf16-true', or backend="):
        choose_backend(name, Block(), CUDA, torch.float64)


@pytest.mark.parametrize("wanted", ["auto", "emulate"])
def test_a_recipe_that_remembers_is_not_emulated(wanted, machine):
    with pytest.raises(ConfigurationError, match=r"cannot run.*: scales of 'delayed' come from .*; use recipe='curr"):
        choose_backend(wanted, Delayed(), CPU)


def test_nor_is_its_emulation_recommended(machine):
    machine.against = dict.fromkeys(machine.against, "it cannot")
    for wanted, device in (("auto", CUDA), ("te", CPU)):
        with pytest.raises(ConfigurationError, match="recipe='current' with backend='emulate'"):
            choose_backend(wanted, Delayed(), device)
    assert "recipe='current' with backend='emulate'" in str(why_not_te(Delayed()))
