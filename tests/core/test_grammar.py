"""The grammar of specs: every written spec is read back unchanged."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import tokenprune as tp
from tokenprune import grammar, spec
from tokenprune.allocators import ALLOCATORS, Allocator
from tokenprune.compressor import Chain, Compressor, Stage
from tokenprune.errors import UserError
from tokenprune.grammar import Part

names = st.from_regex(r"[a-z][a-z0-9]*([-+][a-z0-9]+)*\+?", fullmatch=True)
keys = st.from_regex(r"[a-z_][a-z0-9_]*", fullmatch=True).filter(lambda name: name != "retention")
values = st.from_regex(r"[A-Za-z0-9./_-]+", fullmatch=True)
ratios = st.floats(1e-6, 1).map(repr)
single = st.builds(
    Part, names, st.dictionaries(keys, values, max_size=4), st.one_of(st.just(""), ratios)
)
chains = st.lists(
    st.builds(Part, names, st.dictionaries(keys, values, max_size=3), ratios),
    min_size=2,
    max_size=4,
)


@given(single)
def test_a_part_is_read_as_it_is_written(part: Part) -> None:
    assert grammar.read(str(part)) == (part,)
    assert list(grammar.read(str(part))[0].options) == list(part.options)
    assert grammar.has_retention(str(part)) == bool(part.retention)
    assert grammar.names(str(part)) == [part.name]


@given(chains)
def test_a_chain_is_read_as_it_is_written(parts: list[Part]) -> None:
    written = grammar.chained(parts)
    assert grammar.read(written) == tuple(parts)
    assert grammar.has_retention(written)
    assert grammar.names(written) == [part.name for part in parts]


@given(st.lists(st.one_of(single.map(str), chains.map(grammar.chained)), max_size=5))
def test_a_joined_list_of_specs_is_split_into_its_parts(specs: list[str]) -> None:
    assert list(grammar.split([",".join(specs)])) == specs
    assert list(grammar.split([", ".join(specs)])) == specs
    assert list(grammar.split(specs)) == specs


@given(st.one_of(single.map(str), chains.map(grammar.chained)))
def test_lines_hold_the_whole_spec(written: str) -> None:
    lines = grammar.lines(written)
    assert "".join(lines).replace(" ", "") == written.replace(" ", "")
    assert all(line.count(",") <= 1 and line.count("=") <= 1 for line in lines)


@given(
    st.dictionaries(keys, st.lists(values, min_size=1, max_size=3), min_size=1, max_size=3),
    st.sampled_from([",", ";"]),
)
def test_options_may_list_values(wanted: dict[str, list[str]], between: str) -> None:
    text = between.join(f"{name}={','.join(listed)}" for name, listed in wanted.items())
    assert dict(grammar.options(text, ";,")) == {n: ",".join(v) for n, v in wanted.items()}


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read = grammar.read(text)
    except UserError:
        return
    again = grammar.chained(read)
    assert grammar.read(again) == read


def _value(hint: Any) -> st.SearchStrategy[Any]:
    """Values that a field of a method may have."""
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        flat = [one for note in notes for one in getattr(note, "metadata", [note])]
        low = next((n.ge for n in flat if isinstance(n, Ge)), None)
        above = next((n.gt for n in flat if isinstance(n, Gt)), None)
        high = next((n.le for n in flat if isinstance(n, Le)), None)
        below = next((n.lt for n in flat if isinstance(n, Lt)), None)
        if inner is int:
            least = low if low is not None else above + 1 if above is not None else -50
            most = high if high is not None else below - 1 if below is not None else 10**6
            return st.integers(least, most)
        if inner is float:
            least = low if low is not None else above if above is not None else -1e6
            most = high if high is not None else below if below is not None else 1e6
            drawn = st.floats(least, most, allow_subnormal=False)
            return drawn.filter(lambda value: value not in (above, below))
        return _value(inner)
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    plain = {
        bool: st.booleans(),
        int: st.integers(-50, 10**6),
        float: st.floats(-1e6, 1e6, allow_subnormal=False),
        Allocator: st.sampled_from(sorted(ALLOCATORS)),
    }
    if hint in plain:
        return plain[hint]
    others = [one for one in get_args(hint) if one is not type(None)]
    if len(others) == 1 and type(None) in get_args(hint):
        return _value(others[0])
    return st.nothing()


@st.composite
def compressors(draw: st.DrawFn, pool: tuple[str, ...] | None = None) -> Compressor:
    """Any registered method with any options."""
    name = draw(st.sampled_from(pool or tp.list_methods()))
    cls = tp.registry.strategies.get(name)
    hints = get_type_hints(cls, include_extras=True)
    chosen = {}
    for item in dataclasses.fields(cls):
        strategy = _value(hints[item.name])
        if item.name != "retention" and not strategy.is_empty and draw(st.booleans()):
            chosen[item.name] = draw(strategy)
    retention = draw(st.one_of(st.sampled_from([1.0, 0.5, 1 / 3]), st.floats(1e-6, 1)))
    try:
        return tp.create(name, retention=retention, **chosen)
    except UserError:  # options that do not go together
        assume(False)
        raise


@settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], deadline=None)
@given(compressors())
def test_a_compressor_is_rebuilt_from_its_spec(compressor: Compressor) -> None:
    written = spec.format(compressor)
    assert spec.parse(written) == compressor
    assert spec.parse(compressor.label, retention=compressor.retention) == compressor
    assert grammar.has_retention(written)
    assert not grammar.has_retention(compressor.label)


@settings(suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_a_chain_is_rebuilt_from_its_label(data: st.DataObject) -> None:
    pools = {stage: tuple(tp.list_methods(stage=stage)) for stage in Stage}
    inner = st.lists(compressors(pools[Stage.LLM]), min_size=1, max_size=2)
    chain = Chain.of(data.draw(compressors(pools[Stage.PRE_LLM])), *data.draw(inner))
    assert spec.format(chain) == chain.label
    assert spec.parse(chain.label) == chain


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fastv:layer=3@", "no retention after '@'"),
        ("fastv:layer", "cannot read 'layer'"),
        ("fastv:layer=1,layer=2", "'layer' is given twice"),
        ("uniform:retention=0.5@0.5", "'retention' is given twice"),
        ("uniform + fastv@0.5", r"write for instance uniform@0\.5 \+ fastv@0\.5\."),
    ],
)
def test_invalid_specs_are_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        grammar.read(text)


def test_a_part_of_a_chain_may_name_its_retention() -> None:
    """``retention=0.5`` is as good as ``@0.5``."""
    written = "uniform:retention=0.5 + fastv@0.5"
    assert spec.parse(written) == spec.parse("uniform@0.5 + fastv@0.5")
