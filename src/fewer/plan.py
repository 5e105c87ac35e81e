"""The decision, as data: where every token goes, and with what weight.

Plan        each token goes to one slot, or is dropped: pruning and merging
Transform   each slot is any mixture of all tokens: a matrix, with the same verbs
"""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fewer.errors import FewerError


@dataclass(frozen=True)
class Plan:
    """The decision, as data: for every token the slot it goes to and the weight it goes in with.

    `slot` is -1 for a dropped token; `survivors` holds, slot by slot and in the original order, the token that gives
    its key, position and identity to the slot, and -1 where a leading index has fewer slots than the longest one.
    `moved` gives survivors new positions, where the method moves them; `mass` is how many tokens each slot counts as in
    attention (None: as many as its survivor did); `tier` chooses among the forms of storage that the method names,
    where it names several; `note` is a remark for the report. `apply` folds features, `pick` takes the survivors' own,
    `restore` goes back, `then` composes.

    >>> plan = Plan.keep(torch.tensor([[True, False, True, True]]))
    >>> plan.survivors.tolist(), plan.slot.tolist()
    ([[0, 2, 3]], [[0, -1, 1, 2]])
    >>> plan.pick(torch.tensor([[[1.0], [2.0], [3.0], [4.0]]])).flatten().tolist()
    [1.0, 3.0, 4.0]
    """

    slot: Int[Tensor, "*lead n"]
    weight: Float[Tensor, "*lead n"]
    survivors: Int[Tensor, "*lead k"]
    moved: Int[Tensor, "*lead k"] | None = None
    mass: Float[Tensor, "*lead k"] | None = None
    tier: Int[Tensor, "*lead k"] | None = None
    note: str = ""
    even: bool = field(default=False, compare=False, repr=False)
    """Whether every leading index is known to have as many slots: then none has to be looked for."""

    @classmethod
    def of(cls, survivors: Int[Tensor, "*lead k"], n: int) -> "Plan":
        """Keep these of `n` tokens, given in their order, as many at every leading index; drop the others."""
        places = torch.arange(survivors.shape[-1], device=survivors.device).expand_as(survivors)
        slot = survivors.new_full((*survivors.shape[:-1], n), -1).scatter_(-1, survivors, places)
        return cls(slot, (slot >= 0).float(), survivors, even=True)

    @classmethod
    def keep(cls, kept: Bool[Tensor, "*lead n"]) -> "Plan":
        """Keep the marked tokens, drop the others."""
        slot = torch.where(kept, kept.cumsum(-1) - 1, -1)
        counts = kept.sum(-1)
        longest = int(counts.max()) if counts.numel() else 0
        survivors = torch.full((*kept.shape[:-1], longest + 1), -1, dtype=torch.long, device=kept.device)
        index = torch.arange(kept.shape[-1], device=kept.device).expand_as(slot)
        survivors.scatter_(-1, torch.where(kept, slot, longest), index)  # dropped tokens land in a spare last column
        return cls(slot, kept.to(torch.float32), survivors[..., :longest])

    @property
    def counts(self) -> Int[Tensor, "*lead"]:
        """Slots at each leading index."""
        return (self.survivors >= 0).sum(-1)

    @property
    def folds(self) -> bool:
        """Whether some slot takes in more than its survivor."""
        return bool(((self.slot >= 0).sum(-1) > self.counts).any())

    def pick(self, x: Float[Tensor, "*lead n d"]) -> Float[Tensor, "*lead k d"]:
        """The survivors' own features; zeros in slots that do not exist."""
        return picked(x, self.survivors, self.even)

    def apply(self, x: Float[Tensor, "*lead n d"]) -> Float[Tensor, "*lead k d"]:
        """Fold all tokens into their slots, each with its weight; sums are taken in float32.

        Survivors are copied, and then only what is more, or less, than themselves is added: most of a plan moves
        nothing.
        """
        out, wide = picked(x, self.survivors, self.even), self.survivors.shape[-1]
        if not wide:
            return out
        home = self.survivors.gather(-1, self.slot.clamp(min=0)) == torch.arange(x.shape[-2], device=x.device)
        more = torch.where(self.slot < 0, 0, self.weight - home.float()).flatten()
        who = more.nonzero().flatten()
        if not len(who):
            return out
        first = torch.arange(0, self.counts.numel() * wide, wide, device=x.device).view(*self.counts.shape, 1)
        into = (first + self.slot).flatten()[who]
        added = x.reshape(-1, x.shape[-1]).index_select(0, who).float() * more[who].unsqueeze(-1)
        folded = out.float().reshape(-1, x.shape[-1]).index_add_(0, into, added)
        return folded.view(out.shape).to(x.dtype)

    def restore(self, y: Float[Tensor, "*lead k d"], how: str = "copy") -> Float[Tensor, "*lead n d"]:
        """Back to the original length; see `fewer.restorers` for the ways."""
        from fewer.restorers import restore  # it speaks of plans, so it cannot be imported above

        return restore(self, y, how)

    @property
    def assign(self) -> Int[Tensor, "*lead n"]:
        """The slot that each token is in, -1 for dropped ones."""
        return self.slot

    def then(self, later: "Reduction") -> "Reduction":
        """This plan, and `later` on what it leaves, as one."""
        return Transform.of(self).then(later) if isinstance(later, Transform) else self._then(later)

    def _then(self, later: "Plan") -> "Plan":
        if not later.slot.shape[-1]:  # this plan left nothing, so nothing it is
            return replace(self, note=later.note or self.note)
        gone = self.slot < 0
        at = self.slot.clamp(min=0)
        slot = torch.where(gone, -1, later.slot.gather(-1, at))
        weight = torch.where(slot < 0, 0.0, self.weight * later.weight.gather(-1, at))
        there, via = later.survivors >= 0, later.survivors.clamp(min=0)
        survivors = torch.where(there, self.survivors.gather(-1, via), -1)

        def passed_on(mine: Tensor | None, theirs: Tensor | None) -> Tensor | None:
            return theirs if mine is None or theirs is not None else torch.where(there, mine.gather(-1, via), -1)

        return Plan(
            slot,
            weight,
            survivors,
            passed_on(self.moved, later.moved),
            passed_on(self.mass, later.mass),
            passed_on(self.tier, later.tier),
            later.note or self.note,
        )

    def check(self, padding: Bool[Tensor, "*lead n"] | None = None) -> None:
        """Raise if the plan loses, invents or reorders tokens."""
        real = self.survivors >= 0
        home = self.slot.gather(-1, self.survivors.clamp(min=0))
        own = torch.arange(self.survivors.shape[-1], device=home.device).expand_as(home)
        if bool((real & (home != own)).any()):
            raise FewerError("the plan's survivors are not in their own slots: a token would be lost silently")
        steps, follows = self.survivors.diff(dim=-1), real[..., 1:]
        if bool((follows & ((steps <= 0) | ~real[..., :-1])).any()):
            raise FewerError("the plan's survivors are not in their original order")
        if bool((self.slot >= self.counts.unsqueeze(-1)).any()):
            raise FewerError("the plan sends a token to a slot that does not exist")
        if padding is not None and bool((padding & (self.slot >= 0)).any()):
            raise FewerError("the plan keeps padding")
        if self.even and not bool(real.all()):
            raise FewerError("the plan says that it has as many slots everywhere, and has not")


@dataclass(frozen=True)
class Transform:
    """Plan's dense sibling: slot i is the mixture `matrix[i]` of all tokens (Token Transforming, soft clusters).

    `survivors` names the token whose place each slot takes, -1 where a row has fewer slots than the longest one; `mass`
    is how many tokens each slot counts as. Pruning and merging are its special cases: `Transform.of(plan)`.

    >>> halves = Transform(torch.tensor([[[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]]]), torch.tensor([[0, 2]]))
    >>> halves.apply(torch.tensor([[[2.0], [4.0], [6.0]]])).flatten().tolist()
    [3.0, 5.0]
    """

    matrix: Float[Tensor, "b k n"]
    survivors: Int[Tensor, "b k"]
    mass: Float[Tensor, "b k"] | None = None
    note: str = ""

    @classmethod
    def of(cls, plan: Plan) -> "Transform":
        """The same decision, as a matrix."""
        slots = torch.arange(plan.survivors.shape[-1], device=plan.slot.device).unsqueeze(-1)
        matrix = torch.where(plan.slot.unsqueeze(-2) == slots, plan.weight.unsqueeze(-2), 0)
        return cls(matrix, plan.survivors, plan.mass, plan.note)

    @property
    def counts(self) -> Int[Tensor, " b"]:
        """Slots of each row."""
        return (self.survivors >= 0).sum(-1)

    @property
    def folds(self) -> bool:
        return True

    @property
    def assign(self) -> Int[Tensor, "b n"]:
        """The slot that takes the most of each token, -1 for those that no slot takes any of.

        A row of the matrix is a share of its slot; times the slot's mass it is a share of the token.
        """
        taken = self.matrix if self.mass is None else self.matrix * self.mass.unsqueeze(-1)
        most = taken.max(-2)
        return torch.where(most.values > 0, most.indices, -1)

    def apply(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b k d"]:
        """Every slot's mixture; sums are taken in float32."""
        return (self.matrix @ x.float()).to(x.dtype)

    def pick(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b k d"]:
        """The features of the tokens that give slots their places; zeros in slots that do not exist."""
        return picked(x, self.survivors)

    def restore(self, y: Float[Tensor, "b k d"], how: str = "copy") -> Float[Tensor, "b n d"]:
        """Back to the original length; see `fewer.restorers` for the ways."""
        from fewer.restorers import restore

        return restore(self, y, how)

    def then(self, later: "Reduction") -> "Transform":
        """This, and `later` on what it leaves, as one."""
        dense = later if isinstance(later, Transform) else Transform.of(later)
        there, via = dense.survivors >= 0, dense.survivors.clamp(min=0)
        mass = dense.mass
        if mass is None and self.mass is not None:
            mass = torch.where(there, self.mass.gather(-1, via), 0)
        survivors = torch.where(there, self.survivors.gather(-1, via), -1)
        return replace(dense, matrix=dense.matrix @ self.matrix, survivors=survivors, mass=mass)

    def check(self, padding: Bool[Tensor, "b n"] | None = None) -> None:
        """Raise if the slots are out of order, or padding gets into one."""
        real = self.survivors >= 0
        steps, follows = self.survivors.diff(dim=-1), real[..., 1:]
        if bool((follows & ((steps <= 0) | ~real[..., :-1])).any()):
            raise FewerError("the transform's slots are not in the order of their tokens")
        if bool((self.matrix.masked_fill(real.unsqueeze(-1), 0) != 0).any()):
            raise FewerError("the transform fills a slot that does not exist")
        if padding is not None and bool((self.matrix * padding.unsqueeze(-2) != 0).any()):
            raise FewerError("the transform mixes padding in")


Reduction = Plan | Transform


def picked(
    x: Float[Tensor, "*lead n d"], survivors: Int[Tensor, "*lead k"], even: bool = False
) -> Float[Tensor, "*lead k d"]:
    """Some tokens' features, copied row by row; zeros where there is none (-1), which `even` says is nowhere."""
    lead, n = survivors.shape[:-1], x.shape[-2]
    there = survivors if even else survivors.clamp(min=0)
    first = torch.arange(0, lead.numel() * n, n, device=x.device).view(*lead, 1)
    rows = x.reshape(-1, x.shape[-1]).index_select(0, (first + there).flatten())
    found = rows.view(*survivors.shape, x.shape[-1])
    return found if even or bool((survivors >= 0).all()) else torch.where((survivors < 0).unsqueeze(-1), 0, found)
