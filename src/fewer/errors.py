"""Every error and warning that fewer raises for something its user can mend."""


class FewerError(ValueError):
    """Base of every error fewer raises for something its user can mend."""


class BudgetError(FewerError):
    """`keep` cannot be read, or cannot be met."""


class MissingSignal(FewerError):
    """The method needs something that this model or place cannot give."""


class UnsupportedModel(FewerError):
    """The model, or a part of it, is none that fewer can work on."""


class UnknownName(FewerError):
    """No method, task or option has that name."""


class FewerWarning(UserWarning):
    """Something was not shortened as asked, and the result is still right."""
