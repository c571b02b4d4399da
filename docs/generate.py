"""Writes ``events.md`` and ``hooks.md`` from the code, so that they cannot say anything else.

``make docs`` runs it; a test fails where the files differ from what it would write.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import msgspec

import tcplat_core
from tcplat_core import Event, Field, Loss, Merge, Sampled, fields
from tcplat_core.event.record import Record
from tcplat_core.event.text import TCP_STATES
from tcplat_core.plugin import hookspecs
from tcplat_core.plugin.report import FIELDS, RunReport
from tcplat_core.registry.find import Plugins
from tcplat_core.testing import make_event

HERE = Path(__file__).parent
_MADE = "<!-- docs/generate.py makes this file from the code: make docs -->\n"


def events() -> str:
    """Return the page about the event's schema."""
    row = msgspec.json.encode(make_event()).decode()
    version = tcplat_core.SCHEMA_VERSION
    loss = attrs.asdict(Loss("tcp_client", "send", 3, 7_100, 7_900))
    lost = msgspec.json.encode({"v": version, "lost": loss}).decode()
    host = attrs.asdict(Merge(1, "service.jsonl", offset_ns=-3_000_000, bound_ns=15_000))
    merge = msgspec.json.encode({"v": version, "merge": host}).decode()
    share = msgspec.json.encode({"v": version, "sampled": attrs.asdict(Sampled(64))}).decode()
    report = RunReport(probes={}, duration_s=1.5)
    end = msgspec.json.encode({"v": version, "report": report.as_json()}).decode()
    return "\n".join(
        [
            _MADE,
            "# The event",
            "",
            f"Schema version {version}. One JSON object per line (or one msgpack map). All keys",
            "are always present, in this order; an unknown value is `null`:",
            "",
            "```json",
            row,
            "```",
            "",
            *_table(fields(Event)),
            "",
            *textwrap.wrap(f"States: {', '.join(map(str, TCP_STATES[1:]))}.", 100),
            "",
            *textwrap.wrap(
                "Captures of older versions can be read: fields that they lack are null. Version 2 "
                "added `thread`; in version 1 `comm` was the name of the thread `tid`. Your reader "
                "should ignore keys that it does not know.",
                100,
            ),
            "",
            "Texts are escaped: unprintable characters become `\\x1b` or similar, a backslash",
            "becomes two. `sock` and the `_ns` fields need 64 bits.",
            "",
            "## Fields of single probes",
            "",
            "They follow the common fields. `tcplat plugins show NAME` lists them for any probe.",
            "",
            *_own(),
            "## Lines that are not rows",
            "",
            "A loss of events. Rows are missing between `since_ns` and `until_ns`; both are 0 if",
            "unknown. The line comes before the first row that is younger than `since_ns`:",
            "",
            "```json",
            lost,
            "```",
            "",
            "A host of a capture made by `tcplat merge`: one line per host, before the rows",
            "(`Merge` in [hooks.md](hooks.md)):",
            "",
            "```json",
            merge,
            "```",
            "",
            "Of which connections rows follow, one in `one_in`: before the rows, if the run had",
            "`--sample`, and where `--max-overhead` changes it; rows from `since_ns` on are those",
            "of the new share (`Sampled` in [hooks.md](hooks.md)):",
            "",
            "```json",
            share,
            "```",
            "",
            "The report, at the end of a capture. It has the event counts of the run (here without",
            "probes). For each hook, produced = delivered + dropped + unread:",
            "",
            "```json",
            end,
            "```",
            "",
            *textwrap.wrap(
                "With `--sample` or `--max-overhead`, it also has `one_in`, the least and the "
                "greatest that held, and each hook has `unsampled`: rows that were not made, "
                "because their connection is not in the sample. They are not in `produced`.",
                100,
            ),
            "",
            "Keys of each probe, besides the sums `delivered` and `dropped`. `bare_acks`, `deaf`,",
            "`histograms`, `no_histograms` and `poll_error` are present only if they have a value:",
            "",
            *_report_keys(),
            "",
            "## The record",
            "",
            "The C struct that handlers fill. `has` shows which of `seq`, `bytes`, `flags` and of",
            "the probe's own fields with `has=True` are known (`TCPLAT_HAS_SEQ` ...). For other",
            "fields that may be `null`, 0 means `null`. Addresses are in network order, IPv4 as",
            "`::ffff:a.b.c.d`; ports are in host order. A probe's own fields come at the end.",
            "",
            "```c",
            Record(Event).c_struct().partition("_Static_assert")[0].rstrip(),
            "```",
            "",
        ]
    )


def _table(rows: tuple[Field, ...] | list[Field]) -> Iterator[str]:
    yield "| key | type | meaning |"
    yield "|---|---|---|"
    for field in rows:
        yield f"| `{field.name}` | {field.type} | {_cell(field.doc)} |"


def _report_keys() -> Iterator[str]:
    """Yield the keys of a probe in the report, with the texts below its fields."""
    keys = {field: key for key, field in FIELDS.items()}
    yield "| key | meaning |"
    yield "|---|---|"
    for field, doc in _docs_of_fields("plugin/report", "ProbeReport"):
        yield f"| `{keys.get(field, field)}` | {_cell(' '.join(doc.split()))} |"


def _docs_of_fields(home: str, name: str) -> Iterator[tuple[str, str]]:
    tree = ast.parse((Path(tcplat_core.__file__).parent / f"{home}.py").read_text())
    classes = {one.name: one for one in tree.body if isinstance(one, ast.ClassDef)}
    for field, doc in itertools.pairwise(classes[name].body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            yield ast.unparse(field.target), str(ast.literal_eval(doc.value))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _own() -> Iterator[str]:
    plugins = Plugins.load()
    for found in plugins.found:
        if found.kind != "probe" or found.distribution != "tcplat":
            continue
        own = [field for field in fields(plugins.probe(found.name).event) if field.own]
        if own:
            yield f"### {found.name}"
            yield ""
            yield from _table(own)
            yield ""


SECTIONS = {
    "Marks and versions": ("hookimpl", "HOOKSPEC_VERSION", "SCHEMA_VERSION"),
    "A probe": ("ProbeSpec", "HookPoint", "Way", "Hook", "Interfaces", "Moment"),
    "Ways to listen": (
        *(
            "tracepoint",
            "tracepoints",
            "stream_points",
            "fentry",
            "fenter",
            "fexit",
            "kprobe",
            "kentry",
            "kreturn",
        ),
        "xdp",
    ),
    "The row": (
        "Event",
        "PacketEvent",
        "Wire",
        "micros",
        "address",
        "clock_offset_ns",
        "Field",
        "fields",
    ),
    "Options": (
        *("Option", "Options", "Kind", "integer", "choice", "ports", "boolean", "duration", "size"),
        "path",
    ),
    "Maps that Python reads": ("ReadableMap", "Maps", "MapView"),
    "What the kernel counts": (
        *("Histogram", "Aggregation", "Aggregates", "Distribution", "Group", "AggregateSink"),
    ),
    "A sink": (
        "SinkSpec",
        "Sink",
        "RunInfo",
        "Output",
        "Place",
        "connect",
        *("json_lines", "slim_rows", "SlimRows", "SLIM_NUMBERS", "ends_ns"),
        "printable",
        "columns",
        "say",
        "Loss",
        "Sampled",
        "RunReport",
    ),
    "A command": (
        *("Reader", "whole_file", "Merge", "HOST_BITS", "add_reports", "Shares", "share_text"),
        *("connection_hash", "is_in_share"),
    ),
    "Errors": (*("TcplatError", "UsageError", "CannotRunError", "PluginError", "ReaderGoneError"),),
}
"""Every public name, in the order in which one needs them."""


_WITH_METHODS = (
    "Sink",
    "Output",
    "Place",
    "Moment",
    "Distribution",
    "Maps",
    "Reader",
)
"""Classes whose methods a plugin has, or calls."""


def hooks() -> str:
    """Return the page about the hooks, and all that a plugin may import."""
    parts = [
        _MADE,
        "# The hooks, and what a plugin may import",
        "",
        f"Version {tcplat_core.HOOKSPEC_VERSION}.",
        "",
        *_prose(inspect.getdoc(hookspecs) or ""),
    ]
    for name in [name for name in vars(hookspecs) if name.startswith("tcplat_")]:
        parts += ["", f"## {name}", "", *_prose(inspect.getdoc(getattr(hookspecs, name)) or "")]
    parts += ["", "Import everything below from `tcplat_core`; nothing else is public."]
    values = _docs_of_values()
    for section, names in SECTIONS.items():
        parts += ["", f"## {section}"]
        for name in names:
            parts += ["", f"### {_head(name)}", "", *_described(name, values)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join([*parts, ""]))


def _docs_of_values() -> dict[str, str]:
    """Return the texts below public values: Python keeps no docstring for these."""
    found = {}
    for home in ("plugin/hookspecs", "event/fields", "plugin/specs", "plugin/options"):
        tree = ast.parse((Path(tcplat_core.__file__).parent / f"{home}.py").read_text())
        for value, doc in zip(tree.body, tree.body[1:], strict=False):
            if not isinstance(value, ast.Assign) or not isinstance(doc, ast.Expr):
                continue
            if isinstance(value.targets[0], ast.Name) and isinstance(doc.value, ast.Constant):
                found[value.targets[0].id] = str(doc.value.value)
    return found


def _head(name: str) -> str:
    value = getattr(tcplat_core, name)
    return f"{name}{_signature(value)}" if inspect.isfunction(value) else name


def _signature(function: Callable[..., object]) -> str:
    """As one would write it: annotations are texts here, and `self` is not given."""
    shown = re.sub(r"<class '[\w.]*?(\w+)'>", r"\1", str(inspect.signature(function)))
    return re.sub(r"^\((?:self|cls)(?:, )?", "(", shown.replace("'", ""))


def _described(name: str, values: dict[str, str]) -> Iterator[str]:
    value = getattr(tcplat_core, name)
    yield from _prose(inspect.cleandoc(values.get(name) or value.__doc__))
    if not inspect.isclass(value):
        return
    if attrs.has(value) and not re.search("(Args|Attributes):", value.__doc__ or ""):
        yield ""
        members = [one for one in attrs.fields(value) if not one.name.startswith("_")]
        yield from (f"- `{one.name}`: {one.type}" for one in members)
    if exit_code := getattr(value, "exit_code", None):
        yield f"Exit status {exit_code}."
    if name not in _WITH_METHODS:
        return
    for method, function in vars(value).items():
        plain = function.__func__ if isinstance(function, classmethod) else function
        if isinstance(plain, property):
            yield from ("", f"- `{method}`: {_inline(plain.__doc__ or '')}")
        elif inspect.isfunction(plain) and not method.startswith("_"):
            yield from ("", f"- `{method}{_signature(plain)}`:")
            yield textwrap.indent("\n".join(_prose(inspect.getdoc(plain) or "")), "  ")


def _prose(doc: str) -> Iterator[str]:
    """Return a docstring as Markdown: literals, examples, lists of arguments and exceptions."""
    for block in re.split(r"\n\n(?=\S)", doc):
        head, colons, code = block.partition("::\n\n")
        if colons:
            yield from (_inline(f"{head}:"), "", "```python")
            yield from (textwrap.dedent(code).rstrip(), "```", "")
        elif found := re.match(r"(Args|Attributes|Raises|Returns):\n", block):
            if found[1] not in ("Args", "Attributes"):
                yield from (f"{found[1]}:", "")
            for item in re.split(r"\n(?=\S)", textwrap.dedent(block[found.end() :])):
                name, _, words = re.sub(r"\s+", " ", item).partition(": ")
                yield f"- `{name}`: {_inline(words)}" if words else f"- {_inline(name)}"
            yield ""
        else:
            yield from (_inline(block), "")


def _inline(text: str) -> str:
    text = re.sub(r":\w+:`(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`")


def main() -> None:
    """Write both."""
    for name, make in MAKES.items():
        (HERE / name).write_text(make(), encoding="utf-8")


MAKES = {"events.md": events, "hooks.md": hooks}

if __name__ == "__main__":
    main()
