"""Fuzz areas: specs, selections, and the options of all commands."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import annotated_types
import typer.main
from PIL import Image
from pydantic.fields import FieldInfo

from tokenprune.allocators import ALLOCATORS, Allocator
from tokenprune.cli import app
from tokenprune.compressor import Compressor, Stage
from tokenprune.encoder import EncoderCompressor
from tokenprune.errors import UserError
from tokenprune.experiments.ablation.run import parse_sweep
from tokenprune.experiments.checks.cases import Area, FuzzCase, Wrong, command, small_run
from tokenprune.experiments.common.grid import chosen
from tokenprune.layout import TokenLayout
from tokenprune.registry import strategies
from tokenprune.spec import method_specs, parse, split
from tokenprune.synthetic import sample_tokens

__all__ = ["Options", "Selections", "Specs"]

DIGITS = "9" * 4301  # more than Python converts to an integer
HUGE = str(10**20)
NO_NUMBERS = ("nan", "inf", "-inf", "Infinity", "1e400", "-1e400")
ODD_TEXT = ("", "x", "maybe", "\x1b[31mred", "\udcff", "a\nb", "é" * 300, "../..", "None", "-")


# --- specs ----------------------------------------------------------------------------------------


def limits(hint: Any) -> dict[str, Any]:
    """The limits in ``Annotated[..., Field(...)]``: ``ge``, ``gt``, ``le`` and ``lt``."""
    found: dict[str, Any] = {}
    for item in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
        for one in item.metadata if isinstance(item, FieldInfo) else [item]:
            for name in ("ge", "gt", "le", "lt"):
                if isinstance(one, getattr(annotated_types, name.capitalize())):
                    found[name] = getattr(one, name)
    return found


def plain(hint: Any) -> Any:
    """The type without its limits and without None."""
    if get_origin(hint) is Annotated:
        return plain(get_args(hint)[0])
    choices = [one for one in get_args(hint) if one is not type(None)]
    if type(None) in get_args(hint):
        return hint if len(choices) > 1 else plain(choices[0])
    return hint


def bounded(hint: Any) -> dict[str, Any]:
    """`limits` of a hint, or of the type that it makes optional."""
    return limits(hint) or next(filter(None, map(limits, get_args(hint))), {})


def good(hint: Any, rng: random.Random) -> str:
    """A value that the annotation allows, as written in a spec."""
    kind, ends = plain(hint), bounded(hint)
    if kind is bool:
        return rng.choice(["True", "False", "true", "false"])
    if get_origin(kind) is Literal:
        return str(rng.choice(get_args(kind)))
    if kind is Allocator:
        return rng.choice(sorted(ALLOCATORS))
    if kind is int:
        low = ends.get("ge", ends.get("gt", -41) + 1)
        return str(rng.randint(low, min(low + 40, ends.get("le", ends.get("lt", 10**6) - 1))))
    if kind is float:
        low = ends.get("ge", ends.get("gt", -10.0))
        high = ends.get("le", ends.get("lt", low + 20.0))
        value = low + (high - low) * rng.choice([0.5, 1e-9, 1 / 3, rng.random()])
        if value <= low and "gt" in ends:
            value = (low + high) / 2
        return rng.choice([repr(value), f"{value:.17g}"])
    raise TypeError(f"no rule for a good value of {hint}")


def bad(hint: Any, rng: random.Random) -> str:
    """A value that the annotation does not allow."""
    kind, ends = plain(hint), bounded(hint)
    wrong = [*ODD_TEXT, "1:2", "0x10", "--1", "1+1"]
    if kind in (int, float):
        wrong += [*NO_NUMBERS, DIGITS, f"-{DIGITS}"]
        low, high = ends.get("ge", ends.get("gt")), ends.get("le", ends.get("lt"))
        wrong += [f"{low - 1}", f"-{HUGE}"] if low is not None else []
        wrong += [f"{high + 1}", HUGE] if high is not None else []
        wrong += [f"{low}"] if "gt" in ends else []
        wrong += [f"{high}"] if "lt" in ends else []
        wrong += [HUGE, f"-{HUGE}", "1.5", f"{2**63}"] if kind is int else []
    return rng.choice(wrong)


class Specs(Area):
    """Valid specs are accepted and equal what their labels parse to; broken ones are refused."""

    name = "specs"
    share = 46

    def draw(self, rng: random.Random) -> FuzzCase:
        make: Callable[[random.Random], FuzzCase] = rng.choices(
            [self._valid, self._chain, self._invalid, self._malformed, self._mutated, self._sweep],
            weights=[35, 10, 25, 10, 15, 5],
        )[0]
        return make(rng)

    def _valid(self, rng: random.Random) -> FuzzCase:
        spec = _spec(rng.choice(strategies.names()), rng)
        retention = _retention(rng)
        return FuzzCase(f"{spec} at {retention!r}", "accepted", lambda: _rebuilt(spec, retention))

    def _chain(self, rng: random.Random) -> FuzzCase:
        parts = []
        for stage in Stage:
            names = [one for one in strategies.names() if strategies.get(one).stage is stage]
            if stage is Stage.LLM or rng.random() < 0.7:
                parts.append(f"{_spec(rng.choice(names), rng)}@{_retention(rng)!r}")
        spec = " + ".join([*parts, parts[-1]] if len(parts) == 1 else parts)
        return FuzzCase(spec, "accepted", lambda: _rebuilt(spec, None))

    def _invalid(self, rng: random.Random) -> FuzzCase:
        name = rng.choice(strategies.names())
        hints = _hints(strategies.get(name))
        field = rng.choice(sorted(hints))
        hint = hints[field]
        if get_origin(plain(hint)) is tuple:
            part = get_args(plain(hint))[0]
            values = [good(part, rng), bad(part, rng), *rng.choice([[], [good(part, rng)]])]
            deep = "/".join(["0.5"] * 100_000)
            value = rng.choice(["/".join(values), "/".join(values), deep, "(" * 100_000])
        else:
            value = bad(hint, rng)
        spec = f"{name}:{field}={value}"
        return FuzzCase(spec, "refused", lambda: parse(spec, retention=0.5))

    def _malformed(self, rng: random.Random) -> FuzzCase:
        name = rng.choice(strategies.names())
        many = rng.choice([30, 3000, 100_000])
        spec = rng.choice(
            [
                *(f"{name}:{word}=1" for word in ("name", "self", "cls", "stage", "card", "x")),
                *(f"{name}@{value}" for value in ("", "0", "-1", "2", *NO_NUMBERS, DIGITS, "½x")),
                f"{name}@0.5@0.25", f"{name}:retention=0.5@0.25", f"{name}:retention=",
                f"{name}:retention=0.5,retention=0.25", f"{name}:separators=all,separators=none",
                f"{name}:separators", f"{name}:=", f"{name}:=1", f"{name}::", f"{name}:{name}:",
                f"{name}nope", name.upper(), f"{name};", f"x:{name}", f"{name}:x:y=1",
                "", " ", ":", "@", "@0.5", "+", " + ", f"{name}@0.5 + ", f" + {name}@0.5",
                f"{name} + {name}", f"{name}@0.5 + + {name}@0.5",
                "..x:Y", ".x:Y", "x.:Y", "x..y:Y", ".:Y", "...:Y", "no_such_module_here:Y",
                "json:JSONDecoder", "json:nope", "os.path:join", "tokenprune.nope:Uniform",
                " + ".join(["uniform@0.5"] * many), " + ".join(["fastv@0.5"] * max(many, 3000)),
                f"{name}:" + "separators=all," * many + "x=1",
                "uniform" * many, f"{name}:" + "x" * many, f"{name}:x=" + "(" * many,
                "\0", f"{name}\0", f"\x1b[31m{name}", "\udcff", f"{name}:\udcff=1",
            ]
        )  # fmt: skip
        return FuzzCase(spec, "refused", lambda: _asked(spec))

    def _mutated(self, rng: random.Random) -> FuzzCase:
        spec = _spec(rng.choice(strategies.names()), rng)
        if rng.random() < 0.3:
            spec = f"{spec}@{_retention(rng)!r} + {_spec(rng.choice(strategies.names()), rng)}@0.5"
        for _ in range(rng.randint(1, 3)):
            place = rng.randrange(len(spec) + 1)
            sign = rng.choice([*":=,@+/. \t\n", "\0", "é", "９", "\udc80", chr(rng.randrange(128))])
            spec = spec[:place] + rng.choice(["", sign, 5 * sign]) + spec[place + 1 :]
        return FuzzCase(spec, "either", lambda: _asked(spec, empty=True))

    def _sweep(self, rng: random.Random) -> FuzzCase:
        wide = ",".join(map(str, range(20_000)))
        text = rng.choice(
            [
                "", ":", "fastv", "fastv:", "fastv:layer", "fastv:layer=", "fastv:layer=1",
                "fastv:layer=1,1", "fastv:layer=1,,2", "fastv:layer=1;2", "fastv@0.5:layer=1,2",
                "fastv:layer=1,2;layer=3", "a:b=1,2;c=1,2;d=1,2", "fastv + uniform",
                "fastv:" + "layer=1,2;" * 10_000, "fastv:layer=" + "1," * 100_000,
                f"fastv:layer={','.join(map(str, range(1, 20_000)))};start={wide}",
            ]
        )  # fmt: skip
        return FuzzCase(f"sweep {text}", "refused", lambda: parse_sweep(text))


def _hints(cls: type[Compressor]) -> dict[str, Any]:
    """Options of a method that a spec may give, and their annotations."""
    hints = get_type_hints(cls, include_extras=True)
    return {one.name: hints[one.name] for one in dataclasses.fields(cls) if one.name != "retention"}


def _spec(name: str, rng: random.Random) -> str:
    """A valid spec of the method, with some of its options given."""
    hints = _hints(strategies.get(name))
    given: dict[str, str] = {}
    for field in rng.sample(sorted(hints), rng.randint(0, len(hints))):
        if field in ("cut", "depths", "shares"):
            continue  # they depend on each other: see `_schedule`
        given[field] = good(hints[field], rng)
    given |= _schedule(name, hints, rng)
    options = ",".join(f"{field}={value}" for field, value in given.items())
    return f"{name}:{options}" if options else name


def _schedule(name: str, hints: dict[str, Any], rng: random.Random) -> dict[str, str]:
    """Options of a method with several cuts: depths rise, shares fall and are less than 1."""
    values = sorted({round(rng.uniform(0.01, 0.99), 4) for _ in range(rng.randint(1, 3))})
    for field, ordered in (("depths", values), ("shares", values[::-1])):
        if field in hints and rng.random() < 0.5:
            given = {field: "/".join(map(str, ordered))}
            return given | ({"cut": str(rng.randint(0, len(values)))} if "cut" in hints else {})
    return {}


def _retention(rng: random.Random) -> float:
    return rng.choice([1.0, 0.5, 1 / 3, 1e-6, 0.1, 1 - 1e-12, rng.uniform(0.001, 1)])


def _rebuilt(spec: str, retention: float | None) -> None:
    """Raise `Wrong` unless the label of the parsed ``spec`` parses to an equal compressor."""
    given = {} if retention is None else {"retention": retention}
    made = parse(spec, **given)
    again = parse(made.label, **given)
    if again != made:
        raise Wrong(f"the label {made.label!r} parses to {again}, not to {made}")
    if list(split([f"{made.label},uniform"])) != [made.label, "uniform"]:
        raise Wrong(f"the label {made.label!r} is split inside a list")
    if retention is not None and made.retention != retention:
        raise Wrong(f"its retention is {made.retention!r}")


def _asked(spec: str, *, empty: bool = False) -> None:
    """Read a spec as the commands do."""
    specs = method_specs([spec])
    if not specs and not empty:
        raise UserError("there is no method in it.")
    chosen(specs, [0.5])


# --- selections ---------------------------------------------------------------------------------


class Selections(Area):
    """Methods with any valid options select tokens of any image, or refuse."""

    name = "selections"
    share = 10

    def draw(self, rng: random.Random) -> FuzzCase:
        spec, retention = _spec(rng.choice(strategies.names()), rng), _retention(rng)
        layout, said = _layout(rng)
        text = rng.choice([0, 1, 5, 40])
        method = parse(spec, retention=retention)
        if isinstance(method, EncoderCompressor):  # it needs a vision encoder
            method = parse("uniform", retention=retention)
        cut = rng.choice([*method.cuts, None])
        part = method if cut is None else method.at(cut)

        def run() -> None:
            tokens = sample_tokens(part.needs, layout, seed=1, text=text)
            chosen = part(tokens)
            if chosen.features is not None and not chosen.features.isfinite().all():
                raise Wrong("merged features are not finite")

        what = f"{spec} at {retention!r}, cut {cut}, on {said} with {text} text tokens"
        return FuzzCase(what, "either", run)


def _layout(rng: random.Random) -> tuple[TokenLayout, str]:
    """The layout of a random image or video, and a description of it."""
    side = rng.choice([(1, 1), (1, 5), (3, 3), (4, 4), (7, 7)])
    kind = rng.choice(["crops", "crops", "view", "video"])
    if kind == "view":
        return TokenLayout.single(side, newline=rng.random() < 0.5), f"a view of {side}"
    if kind == "video":
        frames = rng.choice([1, 2, 3, 5, 8, 17])
        return TokenLayout.video(frames, side), f"{frames} frames of {side}"
    grid = rng.choice([(1, 1), (1, 2), (2, 2), (3, 1), (1, 5), (3, 3)])
    rows, cols = grid[0] * side[0], grid[1] * side[1]
    top, left = rng.randrange((rows + 1) // 2), rng.randrange((cols + 1) // 2)
    box = (top, rng.choice([rows, max(top + 1, rows - top)]), left, max(left + 1, cols - left))
    lines = rng.random() < 0.8
    said = f"{grid} crops of {side}, box {box}, {'' if lines else 'no '}separators"
    return TokenLayout.anyres(grid, side, box, newlines=lines), said


# --- options --------------------------------------------------------------------------------------

_NEGATIVE = {"layer"}  # counts from the end
_ZERO = {"seed", "text_tokens", "layer", ("report", "questions")}  # 0 has a meaning
_CHOICES = (
    *("dtype", "match", "modality", "conditions", "score", "only", "model", "config", "metric"),
    *("device_map", "attn", "quantize", "revision", "benchmark", "split", "template"),
)
_SIZES = ("image_size", "patches")


class Options(Area):
    """Options of all commands with invalid values, and a few valid ones."""

    name = "options"
    share = 20

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        run = str(small_run(folder / "run"))
        questions = ("--questions", "1")
        methods = ("-m", "uniform", "-r", "0.5")
        self.base: dict[str, tuple[str, ...]] = {
            "audit": ("uniform",),
            "compare": (*questions, *methods),
            "report": (run,),
            "pairs": (run,),
            "published": (),
            "validity": questions,
            "masks": methods,
            "demo": (),
            "positional-bias": ("--images", "1", *methods),
            "complementarity": questions,
            "crop-importance": questions,
            "ablation": ("fastv:layer=1,2", *questions),
            "efficiency": ("--config", "testbed-next"),
            "convert": ("uniform@0.5", "--config", "testbed-next"),
            "benchmark": ("--quick", "--only", "growth"),
            "export": (run, "--method", "uniform"),
        }
        self.run = run
        group: Any = typer.main.get_command(app)
        context = typer.Context(group)
        commands = {name: group.get_command(context, name) for name in group.list_commands(context)}
        self.numbers: list[tuple[str, str, type]] = []  # command, option, int or float
        self.choices: list[tuple[str, str]] = []
        self.sizes: list[tuple[str, str]] = []
        for name in self.base:
            hints = get_type_hints(commands[name].callback)
            for option in commands[name].params:
                kind, spelled = plain(hints.get(option.name)), option.opts[0]
                if kind in (int, float) or option.name == "retention":
                    self.numbers.append((name, spelled, kind))
                elif option.name in _CHOICES:
                    self.choices.append((name, spelled))
                elif option.name in _SIZES:
                    self.sizes.append((name, spelled))

    def draw(self, rng: random.Random) -> FuzzCase:
        make: Callable[[random.Random], tuple[tuple[str, ...], bool]] = rng.choices(
            [self._number, self._choice, self._size, self._path, self._valid],
            weights=[60, 15, 10, 10, 5],
        )[0]
        words, accepted = make(rng)
        shown = "tokenprune " + " ".join(map(repr, words))
        return FuzzCase(shown, "accepted" if accepted else "refused", lambda: command(*words))

    def _number(self, rng: random.Random) -> tuple[tuple[str, ...], bool]:
        name, option, kind = rng.choice(self.numbers)
        field = option.strip("-").replace("-", "_")
        wrong = [*NO_NUMBERS, HUGE, f"-{HUGE}", DIGITS, f"-{DIGITS}", "", "x", "1e", "0x1"]
        if kind is int:
            wrong += ["0.5", "1e3", str(2**63)]
        if field not in _NEGATIVE:
            wrong += ["-1"]
            if field not in _ZERO and (name, field) not in _ZERO:
                wrong += ["0"] if kind is int or option == "--retention" else []
        if option == "--retention":
            wrong = [one for one in wrong if one or "-r" not in self.base[name]]  # empty adds none
            wrong += ["0", "1.0000001", "50%", "1/2", "0.5,nan", "0.5,,2"]
        base = self.base[name]
        if name == "convert" and kind is float:  # the target takes the place of a retention
            base = ("uniform", *base[1:])
        value = rng.choice(wrong)
        return (name, *base, f"{option}={value}"), False

    def _choice(self, rng: random.Random) -> tuple[tuple[str, ...], bool]:
        name, option = rng.choice(self.choices)
        value = rng.choice([*ODD_TEXT[1:-1], "testbed-nxt", "float31", "imgae", "all ", "*", "%s"])
        return (name, *self.base[name], f"{option}={value}"), False

    def _size(self, rng: random.Random) -> tuple[tuple[str, ...], bool]:
        name, option = rng.choice(self.sizes)
        wrong = ["", "x", "0x0", "0x5", "-1x5", "5", "5x5x5", "1.5x2", "nanx5", "5x", "5hx5h"]
        wrong += [f"{HUGE}x{HUGE}", f"{DIGITS}x1", f"1x{DIGITS}", "1000000x1000000", f"1x{HUGE}"]
        return (name, *self.base[name], f"{option}={rng.choice(wrong)}"), False

    def _path(self, rng: random.Random) -> tuple[tuple[str, ...], bool]:
        (self.folder / "file").touch()
        (self.folder / "empty").mkdir(exist_ok=True)
        (self.folder / "full").mkdir(exist_ok=True)
        (self.folder / "full" / "notes.txt").touch()
        Image.new("RGB", (40, 30)).save(self.folder / "cat.png")
        below, nowhere = "file/below", "no/such/thing"
        compare = ("compare", *self.base["compare"])
        words = rng.choice(
            [
                *(("report", self.run, f"--out={path}") for path in ("/", ".", below, "empty")),
                *(("benchmark", "--quick", f"--out={path}") for path in ("/", ".", below, "empty")),
                *((name, *self.base[name], f"--out={path}")
                  for name in ("compare", "masks", "positional-bias", "efficiency", "ablation",
                               "complementarity", "crop-importance")
                  for path in ("file", below, "/dev/null")),
                *((name, path) for name in ("report", "pairs", "table")
                  for path in (nowhere, "file", "empty", "/", below, "/dev/null")),
                *((*compare, f"--data={path}") for path in (nowhere, "file", "empty", "/", below)),
                ("report", self.run, f"--data={nowhere}", "--out=."),
                ("benchmark", "--quick", f"--against={rng.choice([nowhere, 'file', 'empty'])}"),
                ("masks", rng.choice([nowhere, "file", "empty"]), "-m", "uniform"),
                ("masks", f"{nowhere}.png", "What?"), ("masks", "--video", "empty"),
                ("masks", "cat.png", "What", "is", "this?"),
                ("masks", "https://example.com/cat.png", "What?"),
                ("positional-bias", "https://example.com/cat.png"),
                *((name, *self.base[name], f"--out={path}", *force)
                  for name in ("masks", "efficiency") for path in (self.run, "full")
                  for force in ((), ("--force",))),
                *((name, *self.base[name], f"--model={path}")
                  for name in ("compare", "efficiency", "masks") for path in
                  ("file", "./nowhere", "/nowhere/at/all", below)),
                ("report", self.run, "--out=file"), ("benchmark", "--quick", "--out=file"),
                ("convert", "fastv", f"--flops={rng.choice([50, 2, 100])}"),
                ("convert", "fastv", f"--equivalent={rng.choice([50, 2, 100])}"),
                *((name, path, "--prompt=What?")
                  for name in ("positional-bias", "complementarity", "crop-importance", "masks")
                  for path in (nowhere, "file", "empty", "empty/*", "x/**/*.png", "a.jsonl")),
                *(("export", path, "--method=last") for path in (nowhere, "file", "empty", below)),
                ("export", self.run, "--method", rng.choice(["nope", " ", "uniform@0.5"])),
                ("serving-check", "testbed-next",
                 rng.choice(["fastv@0.5", "nope", "uniform", "os:path@0.5", "uniform@2"])),
                ("pairs", self.run, f"--kind={rng.choice(['../../x', 'nope', '/', ' '])}"),
                ("pairs", self.run, "-m", rng.choice(["nope", "fastv:", "uniform@0.5"])),
                ("validity", self.run, f"--published={rng.choice(['nope', 'llava-next-7b'])}"),
                ("published", f"--model={rng.choice(['nope', ' ', 'testbed-next'])}"),
                ("table",), ("report",), ("pairs",), ("audit",), ("convert",), ("nope",),
                ("list", rng.choice(["nope", " ", "../uniform", "unifrom"])),
                ("audit", rng.choice(["nope", "..x:Y", "uniform:name=x", "json:loads"])),
                ("convert", "uniform"), ("convert", "uniform@0.5", "--tokens=3"),
                ("convert", "uniform", "--tokens=3", "--flops=0.5"),
                ("ablation", rng.choice(["fastv", "fastv:layer=1", "x:y=1,2", "fastv:layer=1,x"])),
            ]
        )  # fmt: skip
        return words, False

    def _valid(self, rng: random.Random) -> tuple[tuple[str, ...], bool]:
        fits = [name for name in strategies.names() if _fits(name)]
        method = f"{rng.choice(fits)}@{rng.choice([0.1, 0.25, 0.5, 1])}"
        size = f"{rng.randint(1, 3000)}x{rng.randint(1, 3000)}"
        extra = rng.choice(
            [(), (f"--image-size={size}",), ("--patches=24x24",), ("--text-tokens=40",)]
        )
        return ("convert", method, "--config", "testbed-next", *extra), True


def _fits(name: str) -> bool:
    """Whether the method with default options runs on testbed-next."""
    from tokenprune.compatibility import check_compatible
    from tokenprune.models.loading import adapter_without_weights

    try:
        check_compatible(adapter_without_weights("testbed-next").facts, parse(name, retention=0.5))
    except UserError:
        return False
    return True
