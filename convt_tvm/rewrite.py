"""Finds and replaces parts of lowered kernels."""

from collections.abc import Callable
from typing import Any

from tvm import ir, tirx

__all__ = ["find_guard", "find_load", "rewrite"]

Expr = Any
Statement = Any


def rewrite(node: Statement, change: Callable[[Statement], Statement | None]) -> Statement:
    """The statement `node`, with each statement for which `change` gives another replaced, outermost first."""
    changed = change(node)
    if changed is not None:
        return changed
    match node:
        case tirx.For():
            body = rewrite(node.body, change)
            fields = node.kind, body, node.thread_binding, node.annotations, node.step
            return tirx.For(node.loop_var, node.min, node.extent, *fields)
        case tirx.SeqStmt():
            return tirx.SeqStmt([rewrite(part, change) for part in node.seq])
        case tirx.IfThenElse():
            other = None if node.else_case is None else rewrite(node.else_case, change)
            return tirx.IfThenElse(node.condition, rewrite(node.then_case, change), other)
        case tirx.AttrStmt():
            return tirx.AttrStmt(node.node, node.attr_key, node.value, rewrite(node.body, change))
        case _:
            return node


def _parts(node: Expr) -> list[Expr]:
    """The expressions that an expression is made of."""
    parts = (*getattr(node, "args", ()), *(getattr(node, field, None) for field in ("value", "a", "b")))
    return [part for part in parts if part is not None]


def find_load(node: Expr, buffer: str) -> Expr | None:
    """The first load from `buffer` in an expression; None if there is none."""
    if isinstance(node, ir.TensorLoad):
        return node if node.source.name == buffer else None
    return next((found for part in _parts(node) if (found := find_load(part, buffer)) is not None), None)


def find_guard(node: Expr) -> Expr | None:
    """The condition of the first conditional expression in an expression; None if there is none."""
    if isinstance(node, ir.Call) and node.op.same_as(ir.Op.get("prim.if_then_else")):
        return node.args[0]
    return next((found for part in _parts(node) if (found := find_guard(part)) is not None), None)
