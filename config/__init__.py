"""How a config file and --name=value on the command line override the settings of a script.

A script declares its settings as plain lines and ends them with one call:

    # Data
    block_size = 256              # longest context, tokens
    settings = configure(globals())

    python train.py config/shakespeare_char.py --n_layer=4        # rightmost wins
"""

import ast
import difflib
import io
import math
import os
import re
import runpy
import sys
import tokenize
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple


class Setting(NamedTuple):
    value: object  # bool, int, float or str: an override keeps this type
    help: str      # the comment on its line
    section: str   # the comment line above its group


def stop(sentence, status=1):
    """Ends the program with one sentence on stderr; status 2 says that a setting was wrong."""
    print(" ".join(sentence.split())[:900], file=sys.stderr)  # it may quote anything
    sys.exit(status)


@contextmanager
def stop_on_error(status=1):
    """A ValueError or OSError raised inside ends the program with its own sentence."""
    try:
        yield
    except (ValueError, OSError) as error:
        stop(str(error), status)


def declared_settings(path):
    """{name: Setting} of a script: every `name = literal` above its call of configure, as written.
    A file that never calls configure, or is no Python, declares none."""
    source = Path(path).read_bytes()
    try:
        nodes = ast.parse(source).body
    except (SyntaxError, ValueError):
        return {}
    end = next((i for i, node in enumerate(nodes) if _calls_configure(node)), 0)
    above = b"".join(source.splitlines(keepends=True)[:nodes[end].lineno - 1] if end else [])
    helps, headings = {}, {}
    for token in tokenize.tokenize(io.BytesIO(above).readline):
        if token.type == tokenize.COMMENT:
            alone = not token.line[:token.start[1]].strip()
            (headings if alone else helps)[token.start[0]] = token.string.lstrip("# ")
    settings = {}
    for node in nodes[:end]:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                continue  # computed, so a helper's and not a setting
            if isinstance(value, (bool, int, float, str)):
                section = max((line for line in headings if line < node.lineno), default=0)
                settings[node.targets[0].id] = Setting(
                    value, helps.get(node.end_lineno, ""), headings.get(section, "Settings"))
    return settings


def _calls_configure(node):
    call = getattr(node, "value", None)
    return isinstance(call, ast.Call) and getattr(call.func, "id", "") == "configure"


def configure(namespace):
    """Overrides the settings of the calling script from sys.argv and returns {name: value}.
    Only a script that is run reads sys.argv: imported, it keeps its defaults."""
    script = Path(namespace["__file__"])
    own = declared_settings(script)
    values = {name: setting.value for name, setting in own.items()}
    if namespace["__name__"] != "__main__":
        return values
    sys.excepthook = _report
    sys.stdout.reconfigure(errors="replace")  # not every terminal can show every character
    known = own  # to any script: a config file may name them all
    if any(not argument.startswith("-") for argument in sys.argv[1:]):
        for path in script.parent.glob("*.py"):
            known = declared_settings(path) | known
    for argument in sys.argv[1:]:
        if argument.startswith("--") and "=" in argument:
            name, _, text = argument[2:].partition("=")
            _require_known(name, own, "--", f"of {script.name}")
            values[name] = _typed(f"--{name}", text, own[name].value, parse=True)
        elif not argument.startswith("-"):
            for name, value in _run_config(argument, script.parent).items():
                _require_known(name, known, f"{argument}: ", "of any script")
                value = _typed(f"{argument}: {name}", value, known[name].value)
                if name in own:
                    values[name] = value
        elif argument not in ("--help", "-h"):
            stop(f"{argument} is not understood, settings are written --name=value", 2)
    if {"--help", "-h"} & set(sys.argv):
        print(_help(namespace["__doc__"], own, values))
        sys.exit()
    namespace.update(values)
    return values


def config_file(default):
    """The last config file on the command line, or default where there is none."""
    return ([default] + [one for one in sys.argv[1:] if not one.startswith("-")])[-1]


def _report(kind, error, trace):
    """Ctrl-C and a closed pipe, as by head, need no traceback, and too little memory a sentence;
    anything else uncaught is a bug."""
    if issubclass(kind, MemoryError) or re.search("out of memory|can't allocate", str(error)):
        print("out of memory, make the batch, the context or the model smaller", file=sys.stderr)
    elif kind not in (KeyboardInterrupt, BrokenPipeError):
        sys.__excepthook__(kind, error, trace)


def _run_config(path, folder):
    """The names a config file assigns; the modules it imports and its _names are its own."""
    if not os.path.isfile(path):  # Path.is_file may raise where no file can have that name
        configs = [str(p.relative_to(folder)) for p in folder.glob("config/[!_]*.py")]
        how = "settings are written --name=value" if "=" in path else _suggest(path, configs)
        stop(f"{path}: no such config file{how and ', ' + how}", 2)
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # a config is a program: whatever it raises is its own
        reason = " ".join(str(error).split())
        stop(f"{path} cannot be read as a config file: {type(error).__name__}: {reason}", 2)
    return {name: value for name, value in names.items()
            if not name.startswith("_") and not isinstance(value, ModuleType)}


def _require_known(name, known, prefix, whose):
    if name not in known:
        hint = _suggest(name, known) or "--help lists them"
        stop(f"{prefix}{name} is not a setting {whose}, {hint}", 2)


def _suggest(name, candidates):
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)
    return f"did you mean {close[0]}?" if close else ""


def _typed(label, value, default, parse=False):
    """The value in the type of the default; on the command line (parse) it arrives as text."""
    kind = type(default)
    try:
        if parse and kind is bool:
            value = {"true": True, "false": False}[value.lower()]
        elif parse or (kind is float and type(value) is int):
            value = kind(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        stop(f"{label} must be {'an int' if kind is int else 'a ' + kind.__name__} "
             f"like {default!r}, not {value!r}", 2)
    return value


def _help(doc, own, values):
    """The script's docstring, then each section's settings with the values now in force."""
    lines, section = [doc.strip()], None
    for name, setting in own.items():
        if setting.section != section:
            section = setting.section
            lines += ["", section]
        lines.append(f"  --{name}={values[name]!r}".ljust(40) + f" {setting.help}")
    return "\n".join(lines)
