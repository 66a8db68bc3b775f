"""Which part of the model an operation of a compiled program belongs to, by the named scopes it was traced in."""

import collections
import re
from collections.abc import Mapping

from jaxmoe.sharding.hlo import KINDS

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) (?:\(.*\) -> .* )?\{$")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = ")
_OP_NAME = re.compile(r'\bop_name="(?P<path>[^"]*)"')
_CALLED = re.compile(r"\b(?:condition|body|to_apply|calls|\w+_computations?)=(\{[^}]*\}|%?[\w.-]+)")
_NAME = re.compile(r"[\w.-]+")
_OPERAND = re.compile(r"%([\w.-]+)")
_COLLECTIVE = re.compile(rf" (?:{'|'.join(KINDS)})(?:-start|-done)?\(")
# What JAX's own control flow adds to a path; the path's last component is the primitive.
_CONTROL = re.compile(
    r"while|body|cond|branch_\d+_fun|scan|closed_call|core_call|eval_jaxpr|shard_map|pjit|checkpoint|remat\d?"
)
EXCHANGE = "exchange"

PARTS = ("attention", "experts", "feed-forward", "dispatch", "lm_head", "sampling", "other")
_PART_OF: Mapping[str, str] = {
    "attention": "attention", "moe": "experts", "experts": "experts", "feed_forward": "feed-forward",
    "route": "dispatch", "dispatch": "dispatch", "logits": "lm_head", "sampling": "sampling",
    "embed": "other",
}  # fmt: skip


def scope_of(op_name: str) -> str:
    """The named scopes in the `op_name` that HLO's metadata has of an operation, joined by "/"; "" if it has none.

    >>> scope_of("jit(forward)/while/body/closed_call/layer/attention/btd,dhk->bthk/dot_general")
    'layer/attention'
    """
    # Of operations that were merged into one, the first is as good as any.
    names = op_name.split(";")[0].split("/")[:-1]
    return "/".join(name for name in names if name.isidentifier() and not _CONTROL.fullmatch(name))


def scopes(hlo: str) -> dict[str, str]:
    """The scope of every instruction in `jax.stages.Compiled.as_text()`, by its name.

    Collectives have the scope EXCHANGE inside theirs. An instruction that the compiler made and gave no name, as it
    does to many matmuls and copies, has the innermost scope among those whose results it takes and those that take
    its own; if they have none, that of the loop or branch it runs in.
    """
    named: dict[str, str] = {}
    inside: dict[str, str] = {}
    neighbours: dict[str, list[str]] = collections.defaultdict(list)
    callers: dict[str, str] = {}
    exchanges: set[str] = set()
    computation = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header["name"]
        elif match := _INSTRUCTION.match(line):
            name = match["name"]
            inside[name] = computation
            if path := _OP_NAME.search(line):
                named[name] = scope_of(path["path"])
            if _COLLECTIVE.search(line):
                exchanges.add(name)
            for operand in _OPERAND.findall(line, match.end()):
                # What is not there yet is a computation: operands come first.
                if inside.get(operand) == computation:
                    neighbours[name].append(operand)
                    neighbours[operand].insert(0, name)
            for called in _CALLED.findall(line):
                callers |= dict.fromkeys(_NAME.findall(called), name)

    def depth(scope: str) -> int:
        return len(scope.split("/")) if scope else 0

    def scope(name: str) -> str:
        if name in named:
            return named[name]
        nearby = max((named.get(other, "") for other in neighbours[name]), key=depth, default="")
        caller = callers.get(inside[name])
        return nearby or (scope(caller) if caller else "")

    return {name: "/".join(filter(None, [scope(name), EXCHANGE if name in exchanges else ""])) for name in inside}


def part_of(scope: str) -> str:
    """The part, one of PARTS, that the innermost known scope is; "other" for norms, sums and what has no scope.

    Collectives are part of what they serve, but those of a mixture are its dispatch.

    >>> part_of("layer/moe"), part_of("layer/moe/exchange"), part_of("layer")
    ('experts', 'dispatch', 'other')
    """
    names = scope.split("/")
    if names[-1] == EXCHANGE and "moe" in names:
        return "dispatch"
    return next((_PART_OF[name] for name in reversed(names) if name in _PART_OF), "other")
