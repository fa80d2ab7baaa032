"""Plans of a mesh as text."""

from dilax.sharded import Link, Plan
from dilax.sharded_blocks import BlockPlan


def plan_table(plan: Plan) -> str:
    """A plan as text: a row for each branch, and the sums.

    Example:
        >>> from dilax.sharded import plan_of
        >>> from dilax.spec import Branch
        >>> plan = plan_of((Branch(8, 1, 0, (0, 0)),), (1, 64, 2, 2, 8), "float32", devices=8)
        >>> print(plan_table(plan).splitlines()[1].split()[:3])
        ['8', '1', 'local']
    """
    head = ("segment", "rate", "method", "group", "messages", "received", "busiest", "ms", "late")
    rows: list[tuple[str, ...]] = [head]
    for branch in plan.branches:
        method = branch.method + (f" {branch.spread}" if branch.method == "hybrid" else "")
        cells = (branch.ranks.segment, branch.ranks.rate, method, branch.group, branch.messages)
        times = (f"{x * 1e3:.3g}" for x in (branch.compute, branch.exposed))
        rows.append((*map(str, cells), _bytes(branch.bytes), f"{branch.balance:.2f}", *times))
    return _text(rows, plan)


def block_plan_table(plan: BlockPlan) -> str:
    """A plan of block lists as text: a row for each run of blocks that travels, and the sums."""
    rows: list[tuple[str, ...]] = [("what", "from device", "to devices", "blocks", "messages")]
    for hop in plan.hops[1:]:
        ((low, high),) = filter(None, hop.rows)
        count = (high - low) // plan.block_size
        cells = "keys", f"-{hop.shift}", len(hop.pairs), count, plan.key_messages
        rows.append(tuple(map(str, cells)))
    for shift, pairs in zip(plan.moves.shifts, plan.moves.pairs, strict=True) if plan.moves else ():
        count = plan.moves.blocks.shape[1] if plan.moves else 0
        cells = "queries", f"-{shift}", len(pairs), count, plan.key_messages + 1
        rows.append(tuple(map(str, cells)))
    return _text(rows, plan)


def placement(plan: Plan | BlockPlan, examples: int = 1, heads: int = 1) -> str:
    """Where a plan places a call, in one line; examples, heads: devices along those."""
    if isinstance(plan, BlockPlan):
        shifts = {hop.shift for hop in plan.hops[1:]}
        methods = [f"ring of {len(shifts)} hops" if shifts else "local"]
        if plan.moves is not None:
            methods.append(f"global queries to {len(plan.moves.shifts)} devices")
    else:
        methods = list(dict.fromkeys(branch.method for branch in plan.branches))
    others = (("examples", examples), ("heads", heads))
    along = "".join(f"{count} along the {name}, " for name, count in others if count > 1)
    if plan.devices == 1:
        return f"{along}all tokens on every device"
    return f"{along}{plan.devices} devices along the tokens, {plan.layout}: {', '.join(methods)}"


def _text(rows: list[tuple[str, ...]], plan: Plan | BlockPlan) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    lines.append(
        f"each of {plan.devices} devices ({plan.layout}) receives {_bytes(plan.bytes)} in"
        f" {plan.messages} messages; the busiest has {plan.balance:.2f} times the mean work;"
        f" expected {plan.seconds * 1e3:.3g} ms forward {_speeds(plan.link)}"
    )
    return "\n".join(lines)


def _speeds(link: Link) -> str:
    """What the expected times assume of messages."""
    text = f"at {link.bandwidth / 1e9:.3g} GB/s"
    for size, bandwidth in link.levels:
        text += f" among {size} neighbours and {bandwidth / 1e9:.3g} GB/s beyond"
    return text


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
