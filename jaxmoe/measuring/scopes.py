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
_COLLECTIVE = re.compile(rf" (?:{'|'.join(KINDS)})(?:-start|-done)?\(")
# What JAX's own control flow adds to a path; the path's last component is the primitive.
_CONTROL = re.compile(r"while|body|cond|branch_\d+_fun|scan|closed_call|core_call|shard_map|pjit|checkpoint|remat\d?")
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
    names = op_name.split("/")[:-1]
    return "/".join(name for name in names if name.isidentifier() and not _CONTROL.fullmatch(name))


def scopes(hlo: str) -> dict[str, str]:
    """The scope of every instruction in `jax.stages.Compiled.as_text()`, by its name.

    Collectives have the scope EXCHANGE inside theirs. What the compiler made and gave no name, a copy for instance,
    belongs to the loop or branch that it runs in.
    """
    found: dict[str, str | None] = {}
    exchanges: set[str] = set()
    inside: dict[str, str] = {}  # computation of each instruction
    callers: dict[str, str] = {}  # an instruction that runs each computation
    computation = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            computation = header["name"]
        elif match := _INSTRUCTION.match(line):
            name = match["name"]
            path = _OP_NAME.search(line)
            found[name] = None if path is None else scope_of(path["path"])
            inside[name] = computation
            if _COLLECTIVE.search(line):
                exchanges.add(name)
            for names in _CALLED.findall(line):
                callers |= dict.fromkeys(_NAME.findall(names), name)
    of_computation = _most_common_scopes(found, inside)
    called = {caller: computation for computation, caller in callers.items()}

    def resolve(name: str) -> str:
        while found[name] is None:
            own = of_computation.get(called.get(name, ""))
            caller = callers.get(inside[name])
            if own is not None:
                return own
            if caller is None:
                return ""
            name = caller
        return found[name] or ""

    return {name: f"{resolve(name)}/{EXCHANGE}" if name in exchanges else resolve(name) for name in found}


def _most_common_scopes(found: Mapping[str, str | None], inside: Mapping[str, str]) -> dict[str, str]:
    """By computation; only of those in which anything has a scope."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, scope in found.items():
        if scope:
            counts[inside[name]][scope] += 1
    return {computation: count.most_common(1)[0][0] for computation, count in counts.items()}


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
