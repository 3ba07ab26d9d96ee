"""How a config file and --name=value on the command line override the settings of a script.

A script declares its settings as plain lines and ends them with one call:

    # Data
    block_size = 256              # longest context, tokens
    settings = configure(globals())

    python train.py config/shakespeare_char.py --n_layer=4        # rightmost wins
"""

import ast
import difflib
import errno
import math
import os
import re
import runpy
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP"):  # not on Windows
    SIGNALS.append(signal.SIGHUP)

class Setting(NamedTuple):
    """A line `name = value  # help` of a script, below a comment line, its section."""
    value: object  # bool, int, float or str: an override keeps this type
    help: str
    section: str

def declared_settings(path):
    """{name: Setting} of a script: every `name = literal` above its call of configure. A file
    that never calls it declares none."""
    above, end, _ = Path(path).read_text("utf-8", "replace").partition("configure(globals())")
    settings, section = {}, "Settings"
    for line in above.splitlines() if end else ():
        if line.startswith("# "):
            section = line[2:]
        if match := re.match(r"(\w+) = (.+?)(?:\s{2,}# (.*))?$", line):
            name, text, comment = match.groups("")
            try:
                value = ast.literal_eval(text)
            except (SyntaxError, ValueError):
                continue  # computed, so a helper's and not a setting
            settings[name] = Setting(value, comment, section)
    return settings

def configure(namespace):
    """Overrides the settings of the calling script from sys.argv and returns {name: value}.
    Only a script that is run reads sys.argv: imported, it keeps its defaults."""
    script = Path(namespace["__file__"])
    declared = declared_settings(script)
    values = {name: setting.value for name, setting in declared.items()}
    if namespace["__name__"] != "__main__":
        return values
    sys.excepthook = _report
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's lacks it
        sys.stdout.reconfigure(errors="replace")  # not every terminal can show every character
    anywhere = dict(declared)  # and of any script, which only a config file may name
    for path in script.parent.glob("*.py"):
        anywhere = declared_settings(path) | anywhere
    for argument in sys.argv[1:]:
        if argument.startswith("--") and "=" in argument:
            name, _, text = argument[2:].partition("=")
            _require_known(name, declared, "--", f"of {script.name}")
            values[name] = _typed(f"--{name}", text, declared[name].value, parse=True)
        elif not argument.startswith("-"):
            for name, value in _run_config(argument, script.parent).items():
                _require_known(name, anywhere, f"{argument}: ", "of any script")
                value = _typed(f"{argument}: {name}", value, anywhere[name].value)
                if name in declared:
                    values[name] = value
        elif argument not in ("--help", "-h"):
            stop(f"{argument} is not understood, settings are written --name=value", 2)
    if {"--help", "-h"} & set(sys.argv):
        print(_help(namespace["__doc__"], declared, values))
        sys.exit()
    for name, value in values.items():
        if str(value).startswith("~/") and name not in ("start", "stop_at"):  # these are text
            values[name] = os.path.expanduser(value)
    namespace.update(values)
    return values

def dataset_name(path):
    """The name of a folder under data/, also as a shell completes it: of data/small/, small."""
    parts = Path(path).parts
    return str(Path(*parts[parts[:1] == ("data",):])) if path else ""

# ---- what the scripts say to their user ----

def stop(sentence, status=1):
    """Ends the program with one sentence on stderr; status 2 says that a setting was wrong."""
    print(" ".join(sentence.split())[:900], file=sys.stderr)  # it may quote anything
    sys.exit(status)

def require(condition, sentence, status=2):
    """Ends the program with a sentence that names the remedy, unless the condition holds."""
    if not condition:
        stop(sentence, status)

def at_least(lowest, settings, *names):
    """Ends the program at the first of these settings below lowest."""
    for name in names:
        require(settings[name] >= lowest,
                f"--{name} must be at least {lowest}, not {settings[name]}")

def one_of(settings, name, *choices):
    """Ends the program where a setting is none of the choices."""
    require(settings[name] in choices, f"--{name} must be {', '.join(choices[:-1])} or "
            f"{choices[-1]}, not {settings[name]!r}")

@contextmanager
def stop_on_error(status=1):
    """A ValueError or OSError raised inside ends the program with its own sentence."""
    try:
        yield
    except BrokenPipeError:  # as by head: _report() says nothing
        raise
    except (ValueError, OSError) as error:
        stop(str(error) + _remedy(error), status)

@contextmanager
def catch_signals():
    """A list that the first Ctrl-C, SIGTERM or SIGHUP inside is appended to; a second one
    kills. One that is ignored stays so, as nohup wants; a thread cannot catch any."""
    received, before = [], {}

    def receive(number, frame):
        received.append(number)
        for each in before:
            if each == number == getattr(signal, "SIGHUP", None):  # a shell may send it twice
                sys.stdout = sys.stderr = open(os.devnull, "w")    # the terminal has gone
            else:
                signal.signal(each, signal.SIG_DFL)

    if threading.current_thread() is threading.main_thread():
        before = {number: handler for number in SIGNALS
                  if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, receive)
        yield received
    finally:
        for number in before:
            signal.signal(number, before[number])

def config_file(default):
    """The last config file on the command line, or default where there is none."""
    return ([default] + [one for one in sys.argv[1:] if not one.startswith("-")])[-1]

def _report(kind, error, trace):
    """Ctrl-C and a closed pipe, as by head, need no traceback; a full disk and too little
    memory a sentence; anything else uncaught is a bug."""
    no_memory = "out of memory|t allocate|calculation overflowed"  # in torch's RuntimeErrors
    if issubclass(kind, MemoryError) or re.search(no_memory, str(error)):
        print("out of memory, make the batch, the context or the model smaller", file=sys.stderr)
    elif issubclass(kind, OSError) and kind is not BrokenPipeError:
        print(f"{error}{_remedy(error)}", file=sys.stderr)
    elif kind not in (KeyboardInterrupt, BrokenPipeError):
        sys.__excepthook__(kind, error, trace)

def _remedy(error):
    """What to do about an OSError, by the errno that it or its cause has."""
    number = getattr(error, "errno", None) or getattr(error.__cause__, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ": make room; what was saved before is whole"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ": choose another place, or see to it that you may use this one"
    return ": choose another place" if number else ""

def _run_config(path, folder):
    """The names a config file assigns; the modules it imports and its _names are its own. The
    file may also lie beside the script."""
    if not os.path.isfile(path) and os.path.isfile(folder / path):
        path = str(folder / path)
    if not os.path.isfile(path):  # Path.is_file may raise where no file can have that name
        configs = [str(p.relative_to(folder)) for p in folder.glob("config/[!_]*.py")]
        hint = ", settings are written --name=value" if "=" in path else _suggest(path, configs)
        stop(f"{path}: no such config file{hint}", 2)
    try:
        names = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # a config is a program: it may raise anything
        stop(f"{path} cannot be read as a config file: {type(error).__name__}: {error}", 2)
    return {name: value for name, value in names.items()
            if not name.startswith("_") and not isinstance(value, ModuleType)}

def _require_known(name, known, prefix, whose):
    hint = _suggest(name, known) or ", --help lists them"
    require(name in known, f"{prefix}{name} is not a setting {whose}{hint}")

def _suggest(name, candidates):
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)
    return f", did you mean {close[0]}?" if close else ""

def _typed(label, value, default, parse=False):
    """The value in the type of the default; on the command line (parse) it arrives as text."""
    kind = type(default)
    try:
        if parse and kind is bool:
            value = {"true": True, "false": False}[value.lower()]
        elif parse or (kind is float and type(value) is int):
            value = kind(value)
        elif kind is str and type(value) is bool:  # compile = False in a config
            value = str(value)
        if type(value) is not kind or (kind is float and not math.isfinite(value)):
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        stop(f"{label} must be of type {kind.__name__}, like {default!r}, not {value!r}", 2)
    return value

def _help(doc, declared, values):
    """The script's docstring, then each section's settings with the values now in force."""
    lines, section = [doc.strip()], None
    for name, setting in declared.items():
        if setting.section != section:
            section = setting.section
            lines += ["", section]
        lines.append(f"  --{name}={values[name]!r}".ljust(40) + f" {setting.help}")
    return "\n".join(lines)
