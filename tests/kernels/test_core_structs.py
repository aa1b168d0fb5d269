"""The structs that Python fills and C++ reads: same fields, same places, in every description."""

from __future__ import annotations

import ast
import ctypes
import inspect
from pathlib import Path

import emulated
import pytest
import torch

import tdpo_ext
from tdpo_ext import checks
from tdpo_ext.outputs import TDPOOutput
from tdpo_ext.token_statistics import fallback, kernels, loss_kernels, native

STRUCTS = ["RowLayout", "Logits", "Sequences", "Problem", "Outputs", "Forward", "Tile", "Finish"]
STRUCTS += ["LossOptions", "LossForward", "Upstream", "Backward"]
built = pytest.mark.skipif(
    native.core is None or isinstance(native.core, emulated.StandIn),
    reason="the extension is not built, or another library stands in for it",
)


def fields(struct: type) -> list[str]:
    return [name for name, kind in vars(struct).items() if inspect.isdatadescriptor(kind)]


def stub() -> dict[str, ast.stmt]:
    text = (Path(tdpo_ext.__file__).parent / "_core.pyi").read_text()
    return {
        x.name: x for x in ast.parse(text).body if isinstance(x, (ast.ClassDef, ast.FunctionDef))
    }


@built
@pytest.mark.parametrize("name", STRUCTS)
def test_the_stub_lists_the_fields_of_the_extension(name):
    made = stub()[name]
    assert isinstance(made, ast.ClassDef)
    methods = {x.name: x for x in made.body if isinstance(x, ast.FunctionDef)}
    arguments = [argument.arg for argument in methods.pop("__init__").args.kwonlyargs]
    assert arguments == list(methods) == fields(getattr(native.core, name))


@built
def test_the_stub_lists_all_structs_and_functions():
    listed = {name for name in stub() if name[0].islower() or name in STRUCTS}
    public = {x for x in dir(native.core) if not x.startswith("_") and not x.isupper()}
    assert public == listed if native.core.build_info()["cuda"] else public <= listed


def values(core: object, name: str) -> dict[str, object]:
    """A different number for each field of a struct, and structs of such in it."""
    count = iter(range(1, 100))
    made = {}
    for field in fields(getattr(core, name)):
        nested = {"policy": "Logits", "reference": "Logits", "problem": "Problem"}
        nested |= {"outputs": "Outputs", "gradient_rows": "RowLayout"}
        nested |= {"sequences": "Sequences", "options": "LossOptions", "upstream": "Upstream"}
        nested["statistics"] = "Outputs"
        if name == "Logits":
            nested["rows"] = "RowLayout"
        if field in nested:
            made[field] = getattr(core, nested[field])(**values(core, nested[field]))
        elif field in ("sizes", "strides"):
            made[field] = (next(count), next(count), next(count), next(count))
        else:
            made[field] = next(count) % 4 if field.endswith("dtype") else next(count)
    return made


def plain(value: object) -> object:
    """A struct as a dict; an array as a list."""
    if isinstance(value, (int, float, type(None))):
        return value or 0
    if isinstance(value, (tuple, ctypes.Array)):
        return list(value)
    return {field: plain(getattr(value, field)) for field in fields(type(value))}


@built
@pytest.mark.parametrize("name", STRUCTS)
def test_each_field_keeps_its_own_value(name):
    given = values(native.core, name)
    made = getattr(native.core, name)(**given)
    assert plain(made) == {field: plain(value) for field, value in given.items()}


@built
@pytest.mark.parametrize("name", STRUCTS)
@pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler on the path")
def test_the_emulation_has_the_structs_of_the_extension(name):
    core = emulated.EmulatedCore()
    assert [x for x, _ in getattr(core, name)._fields_] == fields(getattr(native.core, name))
    made = getattr(core, name)(**values(core, name))
    assert plain(made) == plain(getattr(native.core, name)(**values(native.core, name)))


@built
@pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler on the path")
def test_the_emulation_has_the_constants_of_the_extension():
    exported = emulated.described(emulated.EmulatedCore().description())
    constants = {name: value for name, value in exported.items() if name.isupper()}
    assert constants == {x: getattr(native.core, x) for x in dir(native.core) if x.isupper()}


def test_the_fallback_saves_as_many_numbers_as_the_core(compiled):
    assert kernels.core.NORMALIZERS == fallback.NORMALIZERS


def test_the_loss_has_as_many_numbers_of_a_pair_as_the_core(compiled):
    assert kernels.core.PAIR_QUANTITIES == loss_kernels.PAIR_QUANTITIES
    assert len(TDPOOutput._fields) - 1 == loss_kernels.PAIR_QUANTITIES


def test_records_have_as_many_numbers_as_the_core_merges(compiled):
    assert kernels.empty_records(3, torch.ones(1)).shape == (3, kernels.core.RECORD)


@built
def test_every_dtype_of_logits_has_a_code():
    assert set(native.core.DTYPES) == {str(x).removeprefix("torch.") for x in checks.LOGIT_DTYPES}


@built
def test_keywords_may_come_in_any_order_and_from_a_dict():
    made = native.core.RowLayout(**{"strides": [32], "sizes": [2], "di" + "ms"[:]: 1})
    assert (made.dims, made.sizes, made.strides) == (1, (2, 0, 0, 0), (32, 0, 0, 0))


@built
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": 1}, "Logits takes all of its fields, by name: data, rows"),
        ({"data": 1, "row": 2}, "Logits takes all of its fields, by name: data, rows"),
        ({"data": 1, "rows": 2, "dtype": 0}, "Logits takes all of its fields, by name"),
        ({"data": 1.5, "rows": None}, "Logits.data must be pointer, got 1.5"),
        ({"data": 1, "rows": (2, 3)}, r"Logits.rows must be RowLayout, got \(2, 3\)"),
    ],
)
def test_a_wrong_field_is_named(values, message):
    with pytest.raises(TypeError, match=message):
        native.core.Logits(**values)


@built
def test_numbers_that_a_field_cannot_hold_are_refused():
    core = native.core
    for sizes in ([1] * 5, "1", [2**63], [None]):
        with pytest.raises(TypeError, match=r"RowLayout\.sizes must be int64\[4\], got "):
            core.RowLayout(dims=1, sizes=sizes, strides=[1])
    with pytest.raises(TypeError, match=r"RowLayout\.dims must be int, got 2147483648"):
        core.RowLayout(dims=2**31, sizes=[1], strides=[1])
    given = values(core, "Problem")
    for code in (-1, 4, "float32"):
        with pytest.raises(TypeError, match=r"Problem\.dtype must be one of DTYPES, got"):
            core.Problem(**{**given, "dtype": code})


@built
def test_structs_cannot_be_changed_or_made_otherwise():
    made = native.core.RowLayout(dims=0, sizes=[], strides=[])
    with pytest.raises(AttributeError):
        made.dims = 1
    for make in (
        native.core.RowLayout,
        lambda: native.core.RowLayout(0, [], []),
        type(made).__new__,
    ):
        with pytest.raises((TypeError, AttributeError)):
            make()


@built
def test_another_struct_than_the_function_takes_is_refused():
    records = native.core.Tile(**values(native.core, "Tile"))
    with pytest.raises(TypeError, match=r"(?s)token_stats_forward.*work: Forward.*Tile"):
        native.core.token_stats_forward(native.core.instruction_sets()[0], 1, records)
