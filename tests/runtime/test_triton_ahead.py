"""What was compiled ahead of time is launched, of every kind of kernel; what fails or is missing is compiled later."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from attnopt.aot.build import build as compiled
from attnopt.codegen.triton import Entry, TritonKernel
from attnopt.codegen.triton_plans import CHIPS, Chip
from attnopt.errors import CompileError
from attnopt.options import Options
from attnopt.runtime import triton_ahead, triton_gradient, triton_linear
from attnopt.runtime.dispatch import AttnoptWarning, Dispatcher
from attnopt.runtime.native import layout_of
from attnopt.runtime.triton_ahead import Ahead, rebound
from attnopt.runtime.triton_binaries import MANIFEST, Binary, write
from attnopt.runtime.triton_compile import Compiled
from attnopt.runtime.triton_launch import TritonBackend
from attnopt.runtime.triton_load import load
from attnopt.spec import AttentionSpec
from tests.runtime.ahead_calls import CALLS, CHIP, SLOPE, SPECS, Driver, Launch, backend, qkv, refuse


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver([])
    monkeypatch.setattr(Binary, "restore", lambda self: made.restore(self))
    for module in (triton_gradient, triton_linear):
        monkeypatch.setattr(module, "chip_of", lambda device: CHIP)
    return made


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    triton_gradient._KNOWN.clear()
    yield
    triton_gradient._KNOWN.clear()


def without_a_compiler(kernel: TritonKernel, entry: Entry, chip: Chip) -> Compiled:
    return Compiled(chip, entry.name, f"code of {entry.name}".encode(), {}, 1, 4, None, None, {})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Options]:
    """Writes what `attnopt aot` would, but for the machine code; returns the options that name it."""

    def make(*kinds: str, chip: Chip = CHIP, page: int = 0, **specs: AttentionSpec) -> Options:
        monkeypatch.setattr("attnopt.aot.build.compile_entry", without_a_compiler)
        write(tmp_path, compiled(specs.items(), [chip], "bfloat16", lambda text: None, kinds, page))
        return Options(aot_dir=str(tmp_path), first_use_check=False)

    return make


@pytest.mark.parametrize("kind", CALLS)
def test_every_kind_is_launched_as_it_was_written(kind: str, folder: Callable[..., Options], driver: Driver) -> None:
    kinds, specs, page, call, names = CALLS[kind]
    call(folder(*kinds, page=page, **specs))  # nothing here could compile or launch a kernel now
    assert {name.removeprefix("attention_") for name in driver.launched} == names
    other = folder(*kinds, chip=CHIPS["sm_80"], page=page, **specs)
    driver.launched.clear()
    triton_gradient._KNOWN.clear()
    with pytest.raises((CompileError, AssertionError), match=r"driver|NVIDIA|CUDA|cpu"):
        call(other)
    assert not driver.launched, "for another chip"


def test_gradients_have_the_forward_that_they_start_from(folder: Callable[..., Options], driver: Driver) -> None:
    options, spec = folder("forward", "backward", dense=SPECS["dense"]), replace(SPECS["dense"], returns=("lse",))
    for one in (spec, SPECS["dense"]):
        backend(one, [], options)(*qkv(), (), ())
    assert driver.launched == ["attention_forward"] * 2
    assert [row["kind"] for row in json.loads((Path(options.aot_dir or "") / MANIFEST).read_text())["kernels"]] == [
        *["forward"] * 2, *["backward"] * 3
    ]  # fmt: skip


def now(found: TritonBackend, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches of what is compiled just in time."""
    late: list[str] = []
    monkeypatch.setattr(load(found.kernel), "attention_forward", Launch(late, "late"))
    return late


def test_arguments_that_it_was_not_compiled_for_are(
    folder: Callable[..., Options], driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = backend(SPECS["alibi"], SLOPE, folder("forward", alibi=SPECS["alibi"]))
    late, (q, k, v) = now(found, monkeypatch), qkv()
    wide, moved = torch.zeros(2, 2, 80, 40, dtype=q.dtype)[..., :32], torch.zeros(5)[1:]
    for given in ((q, wide, v, SLOPE), (q, k.mT.contiguous().mT, v, SLOPE), (q, k, v, [moved])):
        found(*given, ())
    assert (late, driver.launched) == (["late"] * 3, [])
    found(q, k, v, SLOPE, ())
    assert (late, driver.launched) == (["late"] * 3, ["attention_forward"])


def test_types_constants_and_divisors_are_those_of_the_signature(folder: Callable[..., Options]) -> None:
    options = folder("forward", dense=SPECS["dense"])
    found = Ahead(CHIP, options, refuse)
    kernel = backend(SPECS["dense"], [], options).kernel
    ready = found.module(kernel).attention_forward
    usual = [16 if constant is None else constant for _, constant, _ in ready.takes]
    given = [torch.zeros(1, dtype=t) if t else n for (t, _, _), n in zip(ready.takes, usual, strict=True)]
    assert ready.fits(given)
    assert not ready.fits(given[:-1])
    for place, (dtype, constant, divisible) in enumerate(ready.takes):
        wrong = [torch.zeros(1, dtype=torch.int8), 3] if dtype else [1 << 31, *[5] * (divisible or constant == 1)]
        for value in wrong:
            assert not ready.fits([*given[:place], value, *given[place + 1 :]]), kernel.entries[0].arguments[place]


def test_what_fails_is_compiled_just_in_time_once_and_the_site_says_why(
    folder: Callable[..., Options], driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver.broken = ("attention_forward",)
    monkeypatch.setattr("attnopt.runtime.triton_launch.chip_of", lambda device: CHIP)
    dispatcher = Dispatcher(folder("forward", dense=SPECS["dense"]))
    site = dispatcher.site(SPECS["dense"].text)
    found = dispatcher._choose(site, layout_of((), qkv()[0], ()), None, torch.device("cuda"))
    late = now(found, monkeypatch)
    with pytest.warns(AttnoptWarning, match=r"attention_forward \(forward, sm_90\).*no kernel image") as said:
        for _ in range(3):
            found(*qkv(), (), ())
    assert (len(said), len(late), driver.launched) == (1, 3, [])
    assert "no kernel image is available" in site.reason


def _gone(options: Options) -> Options:
    return replace(options, aot_dir=f"{options.aot_dir}/nothing")


def _altered(options: Options) -> Options:
    path = Path(options.aot_dir or "", MANIFEST)
    path.write_text(path.read_text().replace('"num_warps": 4', '"num_warps": 16'))
    return options


def _truncated(options: Options) -> Options:
    (code,) = Path(options.aot_dir or "").glob("*.cubin")
    code.write_bytes(b"")
    return options


def _unknown(options: Options) -> Options:
    path = Path(options.aot_dir or "", MANIFEST)
    manifest = json.loads(path.read_text())
    manifest["kernels"][0]["spec"] = "{}"
    path.write_text(json.dumps(manifest))
    return options


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(_gone, "cannot be read"), (_altered, "altered"), (_truncated, "truncated"), (_unknown, "")],
    ids=["gone", "altered", "truncated", "another spec"],
)
def test_a_folder_that_cannot_be_used_costs_one_warning_and_no_kernel(
    spoil: Callable[[Options], Options], reason: str, folder: Callable[..., Options], driver: Driver,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = spoil(folder("forward", dense=SPECS["dense"]))
    dispatcher, given = Dispatcher(options), (layout_of((), qkv()[0], ()), None, torch.device("cuda"))
    monkeypatch.setattr("attnopt.runtime.triton_launch.chip_of", lambda device: CHIP)
    with pytest.warns(AttnoptWarning, match=rf"{reason}.*compiled just in time instead") as said:
        made = [dispatcher._choose(dispatcher.site(SPECS[x].text), *given) for x in ("dense", "causal")]
        Ahead(CHIP, options, dispatcher.warn)
    assert len(said) == 1
    assert all(isinstance(one, TritonBackend) for one in made)
    late, module = now(made[0], monkeypatch), load(made[0].kernel)
    monkeypatch.setattr(module.attention, "__defaults__", (module.attention_forward, None))
    made[0](*qkv(), (), ())
    assert (late, driver.launched) == (["late"], [])


def test_a_folder_is_read_once_until_it_changes(
    folder: Callable[..., Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, times = folder("forward", dense=SPECS["dense"]), []
    read = triton_ahead.read
    monkeypatch.setattr(triton_ahead, "read", lambda path: times.append(path) or read(path))
    kernel = backend(SPECS["dense"], [], options).kernel
    assert all(Ahead(CHIP, options).holds(kernel) for _ in range(3))
    folder("forward", causal=SPECS["causal"])
    assert not Ahead(CHIP, options).holds(kernel)
    assert len(times) == 2


def test_nothing_is_taken_without_a_folder_or_under_the_interpreter(
    folder: Callable[..., Options], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = folder("forward", dense=SPECS["dense"])
    kernel = backend(SPECS["dense"], [], options).kernel
    assert Ahead(CHIP, Options()).module(kernel) is load(kernel)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not Ahead(CHIP, options).holds(kernel)


def test_only_the_copy_is_bound_anew(folder: Callable[..., Options]) -> None:
    kernel = backend(SPECS["dense"], [], folder("forward", dense=SPECS["dense"])).kernel
    module, ready = load(kernel), {"attention_forward": object()}
    before = module.attention_forward
    made = rebound(module, ready)
    assert made.attention_forward is made.attention.__defaults__[0] is ready["attention_forward"]
    assert made.attention.__globals__ is vars(made)
    assert module.attention_forward is module.attention.__defaults__[0] is before
