"""Jinja for templates that nobody vouches for: no access to Python, an end in time and memory.

Jinja's sandbox keeps a template from Python's internals, but not from looping for hours or from
making a string of gigabytes. Here each rendering has an allowance of characters and of CPU time.
Loops, macros, operators, filters and methods of strings draw on it, and where the result can be
much larger than what it is made of, before it is made. So do comparisons: a list that holds one
twice that holds one twice, and so on, takes forever to go through.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

_MAX_SOURCE_CHARS = 1 << 20
_MAX_CHARS = 1 << 25  # read, copied or written by one rendering
_MAX_SECONDS = 2.0  # of CPU time
_STEP_CHARS = 4  # what a turn of a loop or an operation counts as, beside the characters
_ITEM_CHARS = 8  # and an item of a list
_MAX_INT_BITS = 4096
_MAX_WIDTH = 1000  # that anything pads to or indents by

_WIDTH_FILTERS = (
    *("batch", "center", "format", "indent", "round", "slice", "tojson", "truncate", "wordwrap"),
)
_WIDTH_METHODS = ("center", "expandtabs", "ljust", "rjust", "zfill")
_LISTERS = ("batch", "list", "slice", "sort", "unique")  # of a string, its characters
# Filters that write all of what they are given, however deep.
_WRITERS = ("e", "escape", "forceescape", "format", "join", "pprint", "string", "tojson", "urlize")
# What compares the items of what it is given.
_COMPARING_FILTERS = ("dictsort", "groupby", "max", "min", "sort", "unique")
_COMPARING_METHODS = ("changed", "count", "index")
_COMPARING_TESTS = (
    *("==", "eq", "equalto", "!=", "ne", "<", "lt", "lessthan", "<=", "le"),
    *(">", "gt", "greaterthan", ">=", "ge", "in"),
)
_REFUSED_METHODS = ("encode", "to_bytes", "translate")
# A width of many figures, or one that is an argument.
_WIDE_FORMAT = re.compile(r"\{[^{}]*:[^{}]*(\d{4}|\{)|%[-+ #0.]*(\d{4}|\*)")


class TemplateTooExpensive(Exception):
    """The allowance is used up."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Compile and render within `bounded()`. Several threads may, each with its own allowance."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, **options: Any) -> None:
        super().__init__(finalize=self._write, **options)
        self._allowance = _Allowance()
        del self.globals["lipsum"]  # makes text without end, which no model asks for
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        for name in _COMPARING_TESTS:
            self.tests[name] = self._comparing(self.tests[name])

    @contextmanager
    def bounded(self) -> Iterator[None]:
        self._allowance.renew()
        yield

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        @functools.wraps(function)  # takes over Jinja's marks: what comes before the value
        def filtered(*args: Any, **kwargs: Any) -> Any:
            first = 1 if hasattr(function, "jinja_pass_arg") else 0
            value, rest = args[first], (*args[first + 1 :], *kwargs.values())
            if name in ("join", "sum", *_COMPARING_FILTERS) and isinstance(value, Iterator):
                value = list(value)  # which alone shows its length
            size = self._written_size if name in _WRITERS else _size
            self.spend(size(value) + sum(map(size, rest)))
            if name in _WIDTH_FILTERS:
                width = _check_width(f"the filter {name}", rest)
                self.spend(size(value) * width if name in ("indent", "tojson") else 0)
            if name in _LISTERS and isinstance(value, str):
                self.spend(_ITEM_CHARS * len(value))
            if name in _COMPARING_FILTERS:
                self.weighed(value)
            if name == "format":
                check_format(value)
            elif name == "sum" and any(isinstance(part, (list, tuple)) for part in rest):
                self.spend(len(value) * self._written_size(value))  # copied again for each item
            elif name == "join":
                self.spend(len(value) * sum(map(size, rest)))
            elif name == "replace":
                self.spend((len(str(value)) + 1) * max(len(str(part)) for part in (*rest, "")))
            result = function(*args[:first], value, *args[first + 1 :], **kwargs)
            self.spend(_size(result))
            return result

        self.filters[name] = filtered

    # ------------------------------------------------------------ what compiled templates call

    def spend(self, chars: int = 0) -> None:
        self._allowance.spend(chars)

    def copied(self, value: Any) -> Any:
        """A slice."""
        self.spend(_size(value))
        return value

    def weighed(self, value: Any) -> Any:
        """What is compared, or may be a key: a list counts with all that is in it."""
        self._written_size(value)
        return value

    def concatenated(self, *parts: Any) -> str:
        """The operator `~`."""
        return "".join([self._write(part) for part in parts])

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            _check_int(operator, left, right)
            self.spend()
        elif operator == "*":
            times = next((side for side in (left, right) if isinstance(side, int)), 1)
            self.spend(max(0, times) * (_size(left) + _size(right)))
        elif operator == "%" and isinstance(left, str):
            check_format(left)
            self.spend(_size(left) + left.count("%") * self._written_size(right))
        else:
            self.spend(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        owner = getattr(function, "__self__", None)
        if isinstance(owner, (str, int)):
            given = {name: arg for name, arg in kwargs.items() if name[:1] != "_"}
            self._check_method(owner, function.__name__, (*args, *given.values()))
        elif owner is not None and getattr(function, "__name__", "") in _COMPARING_METHODS:
            self.weighed((owner, *args))
        self.spend()
        result = super().call(context, function, *args, **kwargs)
        self.spend(_size(result) if isinstance(owner, str) else 0)
        return result

    def _check_method(self, owner: str | int, name: str, args: tuple[Any, ...]) -> None:
        if name in _REFUSED_METHODS:
            raise TemplateTooExpensive(f"{name}() is not for chat templates")
        if not isinstance(owner, str):
            return
        size = sum(map(self._written_size, args))
        self.spend(len(owner) + size)
        if name in _WIDTH_METHODS:
            width = _check_width(f"{name}()", args)
            self.spend(len(owner) * width if name == "expandtabs" else width)
        elif name in ("split", "rsplit", "splitlines"):
            separators = owner.count(args[0]) if args and args[0] else len(owner) // 2
            self.spend(_ITEM_CHARS * separators)
        elif name == "join":
            self.spend(len(owner) * sum(map(_size, args)))
        elif name == "replace":
            self.spend((len(owner) + 1) * max(len(str(part)) for part in (*args, "")))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """str.format and format_map, which Jinja puts functions of its own in the place of."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        form: str = value.__self__

        def formatted(*args: Any, **kwargs: Any) -> str:
            check_format(form)
            size = sum(map(self._written_size, (*args, *kwargs.values())))
            self.spend(len(form) + form.count("{") * size)
            return wrapped(*args, **kwargs)

        return formatted

    # ------------------------------------------------------------ inside

    def _comparing(self, test: Any) -> Callable[..., Any]:
        return lambda value, other: test(self.weighed(value), self.weighed(other))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > _MAX_SOURCE_CHARS:
            raise jinja2.TemplateSyntaxError(f"longer than {_MAX_SOURCE_CHARS} characters", 1)
        template: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        return template

    def _write(self, value: Any) -> str:
        """What `{{ value }}` becomes."""
        if not isinstance(value, str):
            self.spend(self._written_size(value))
            value = str(value)
        self.spend(len(value))
        return value

    def _written_size(self, value: Any) -> int:
        """About how many characters it takes to write `value` out."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, Mapping):
            parts = [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, KeysView, ValuesView, ItemsView)):
            parts = list(value)
        elif isinstance(value, Namespace):
            raise TemplateTooExpensive("it takes a namespace for a value")
        else:
            return _STEP_CHARS
        # Counting costs, too: one list may be in another again and again.
        self.spend(_ITEM_CHARS * len(parts))
        return _ITEM_CHARS * len(parts) + sum(map(self._written_size, parts))


class _Allowance(threading.local):
    chars = 0
    deadline = 0.0
    turn = 0

    def renew(self) -> None:
        self.chars = _MAX_CHARS
        self.deadline = time.thread_time() + _MAX_SECONDS

    def spend(self, chars: int) -> None:
        self.chars -= chars + _STEP_CHARS
        if self.chars < 0:
            raise TemplateTooExpensive(f"it takes over {_MAX_CHARS} characters or steps")
        self.turn += 1
        # The clock costs more than all of the above.
        if (self.turn % 64 == 0 or chars > 1 << 16) and time.thread_time() > self.deadline:
            raise TemplateTooExpensive(f"it takes over {_MAX_SECONDS:g} seconds")


class _Metering(NodeTransformer):
    """Makes what no other hook of Jinja sees draw on the allowance."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        return self._metered(node)

    def visit_Macro(self, node: nodes.Macro) -> nodes.Node:
        return self._metered(node)

    def visit_CallBlock(self, node: nodes.CallBlock) -> nodes.Node:
        return self._metered(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("concatenated", node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _call("copied", [node]) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _weighed(node.expr)
        for operand in node.ops:
            operand.expr = _weighed(operand.expr)
        return node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _weighed(node) if node.ctx == "load" else node

    def _metered(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call("spend", [nodes.Const(text)])))
        return node


def _call(method: str, args: list[nodes.Expr]) -> nodes.Call:
    """A call of a method of the environment: no template can take that name for a variable."""
    return nodes.Call(nodes.EnvironmentAttribute(method), args, [], None, None)


def _weighed(expr: nodes.Expr) -> nodes.Expr:
    return expr if isinstance(expr, nodes.Const) else _call("weighed", [expr])


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return _ITEM_CHARS * len(value) if isinstance(value, (list, tuple, dict, range)) else 0


def _check_int(operator: str, left: int, right: int) -> None:
    bits = left.bit_length()
    if operator == "*":
        bits += right.bit_length()
    elif operator == "**":
        bits *= max(0, right)
    if bits > _MAX_INT_BITS:
        raise TemplateTooExpensive("it computes with too large numbers")


def _check_width(what: str, args: tuple[Any, ...]) -> int:
    width = max((abs(arg) for arg in args if isinstance(arg, int)), default=0)
    if width > _MAX_WIDTH:
        raise TemplateTooExpensive(f"{what} is given a number over {_MAX_WIDTH}")
    return width


def check_format(form: Any) -> None:
    """Of `%`, format() and strftime()."""
    if _WIDE_FORMAT.search(str(form)):
        raise TemplateTooExpensive("it formats with a width that is too large, or computed")
