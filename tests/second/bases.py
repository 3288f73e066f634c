"""Sections 8.1 and 8.5: what a participant may base an upload on, and its own steps."""

from pathlib import Path

from tests.second import results, values
from tests.second.encoding import require
from tests.second.ledger import Entry, find
from tests.second.values import Basis, Plain


def basis_of(
    gradients: Plain, model: Path | None, round_: int | None, entries: list[Entry], own: bool
) -> Basis:
    """Round, base, opened and content of an upload."""
    known = gradients.metadata
    if own:
        sums = find(entries, "open", kind="sum")
        require(sums, 5, "no sum was opened")
        require(model, 2, "--own-step without a model")
        last = max(sums, key=lambda entry: int(entry["round"]))
        stepped = values.read_plain(Path(str(model)))
        same = results.shapes(gradients.layout) == results.shapes(stepped.layout)
        require(same, 3, "other tensors than the model")
        found = Basis(last["round"], last["result"], last["opened"], stepped.content)
    elif model:
        weights, found = values.read_weights(model)
        same = results.shapes(gradients.layout) == results.shapes(weights.layout)
        require(same, 3, "other tensors than the model")
        if known:
            require(known["base"] == found.base, 3, "based on another model")
            require(known["content"] in (None, found.content), 3, "computed on another model")
    elif known and known["base"]:
        found = Basis(known["round"], known["base"], known["opened"], known["content"])
    else:
        found = Basis(0, None, None, None)
        require(round_ is not None, 2, "no round")
    least = found.round + 1
    number = least if round_ is None else round_
    require(least <= number < 2**32, 2, "a round that is not possible")
    return Basis(number, found.base, found.opened, found.content)


def check_basis(entries: list[Entry], basis: Basis, own: bool = False) -> None:
    """The rules of section 8.1; with `own`, the step line is as good as written."""
    if basis.base is None:
        return
    if basis.base == basis.opened:
        require(not find(entries, "open"), 5, "something was opened already")
        for pinned in find(entries, "upload"):
            if pinned["base"] is not None and pinned["base"] == pinned["opened"]:
                require(pinned["base"] == basis.base, 5, "not the initial weights of before")
        return
    opened = find(entries, "open", result=basis.base)
    require(opened, 5, "the base was not opened by this participant")
    require(opened[0]["opened"] == basis.opened, 4, "the base opened to something else")
    content = opened[0]["content"]
    if opened[0]["kind"] == "sum":
        if own:
            return
        steps = find(entries, "step", sum=basis.base)
        require(steps, 5, "no step along the sum")
        content = steps[0]["content"]
    require(basis.content is not None, 2, "the model is not known")
    require(basis.content == content, 4, "computed on another model")


def check_step(entries: list[Entry], sum_: str, content: str) -> None:
    for step in find(entries, "step", sum=sum_):
        require(step["content"] == content, 5, "another step along the sum")


def check_applied(entries: list[Entry], total: Plain, model: Plain) -> None:
    """Section 8.5, point 1, up to the step; nothing is said of what it gives."""
    opened = find(entries, "open", kind="sum", result=total.metadata["base"])
    require(opened, 5, "the sum was not opened by this participant")
    require(opened[0]["content"] == total.content, 4, "not the sum that was opened")
    parent = opened[0]["parent"]
    if parent is None:
        return
    pinned = [e for e in find(entries, "upload", base=parent) if e["opened"] == parent]
    if pinned:
        require(model.digest.hex() == parent, 4, "not the pinned weights")
        return
    steps = find(entries, "step", sum=parent)
    require(steps, 5, "the model before the sum is not known")
    require(steps[0]["content"] == model.content, 4, "not the model in the ledger")
