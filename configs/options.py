"""The words of a command line as a dataclass of options; an unknown one is named with near matches.

Tyro reads them. What it says of an option that it does not know leaves out the names that other
programs use, and fills a screen where a schedule has many fields.
"""

import dataclasses
import difflib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

import tyro


def parse_options[T](
    default: T,
    arguments: Sequence[str],
    prog: str,
    description: str | None = None,
    other_names: Mapping[str, str] | None = None,
) -> T:
    """`default` with the fields that `arguments` name; exits with status 2 for what is no option.

    other_names: last part of an option in other programs -> the option here.
    """
    options, unknown = tyro.cli(
        type(default),
        args=list(arguments),
        default=default,
        prog=prog,
        description=description,
        config=(tyro.conf.AvoidSubcommands,),
        return_unknown_args=True,
    )
    if unknown:
        names = [word for word in unknown if word.startswith("-") and not _is_number(word)]
        said = (
            _unknown_option(names[0], default, other_names or {})
            if names
            else (f"unexpected word {unknown[0]!r}; an option's value follows its --name.")
        )
        print(f"{prog}: {said} {prog} --help lists all options", file=sys.stderr)
        raise SystemExit(2)
    return options


def _unknown_option(word: str, default: Any, other_names: Mapping[str, str]) -> str:
    name = word.partition("=")[0].lstrip("-").replace("_", "-").lower()
    last = name.rpartition(".")[2]
    known = sorted(set(option_names(default)))
    ends = {option.rpartition(".")[2] for option in known}
    meant = [last] if last in ends else difflib.get_close_matches(last, ends, n=2, cutoff=0.75)
    alike = [option for option in known if option.rpartition(".")[2] in meant]
    near = [other_names[last]] if last in other_names else []
    near = near or difflib.get_close_matches(name, alike, n=2, cutoff=0.4)
    near = near or difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    hint = "; did you mean " + " or ".join(f"--{option}" for option in near) + "?"
    return f"unknown option {word.partition('=')[0]}" + (hint if near else ".")


def option_names(value: Any, prefix: str = "") -> Iterator[str]:
    """Names of the options that a dataclass has, without dashes; a field annotated with an empty
    name lends its own fields."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            plain = not getattr(field.type, "__metadata__", ())
            name = prefix + field.name.replace("_", "-") + "." if plain else prefix
            part, kinds = getattr(value, field.name), get_args(field.type)
            if part is not None or not any(map(dataclasses.is_dataclass, kinds)):
                yield from option_names(part, name)
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        for index, item in enumerate(value):
            yield from option_names(item, f"{prefix}{index}.")
    else:
        yield prefix.removesuffix(".")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
